"""The cached prefix gives what the whole network gives, or says why it is left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)

from ranksure.errors import CaptureError
from ranksure.network.logits import predict
from ranksure.network.prefix import cached_prefix
from ranksure.network.targets import select_targets

WIDE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**WIDE, "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0, "num_labels": 3}
IMAGE = {**WIDE, "image_size": 8, "patch_size": 4, "num_labels": 3}
WHISPER = {"d_model": 16, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_layers": 1}
MAKERS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**TEXT)),
    "gpt2": lambda: GPT2ForSequenceClassification(
        GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40, n_positions=32, pad_token_id=0, num_labels=3)
    ),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**TEXT)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**IMAGE)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**IMAGE)),
    "whisper": lambda: WhisperForAudioClassification(
        WhisperConfig(**WHISPER, decoder_attention_heads=2, num_mel_bins=8, max_source_positions=10, num_labels=3)
    ),
    "albert": lambda: AlbertForSequenceClassification(AlbertConfig(**TEXT, embedding_size=8)),
}


def batches_for(kind: str) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    if kind in ("vit", "dinov2"):
        return [{"pixel_values": torch.randn(n, 3, 8, 8, dtype=torch.float64)} for n in (3, 2)]
    if kind == "whisper":
        return [{"input_features": torch.randn(n, 8, 20, dtype=torch.float64)} for n in (3, 2)]
    out = []
    for lengths in ((7, 4, 5), (3, 6)):
        ids, mask = torch.zeros(len(lengths), max(lengths)).long(), torch.zeros(len(lengths), max(lengths)).long()
        for row, length in enumerate(lengths):
            ids[row, :length], mask[row, :length] = torch.randint(1, 40, (length,)), 1
        out.append({"input_ids": ids, "attention_mask": mask})
    return out


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "albert"])
def test_the_tail_gives_the_logits_of_the_whole_network(kind):
    torch.manual_seed(0)
    model = MAKERS[kind]().double().eval()
    batches, targets = batches_for(kind), select_targets(model, "all-linear", "last")
    whole = predict(model, batches)
    with cached_prefix(model, batches, targets) as prefix:
        assert len(prefix.skipped) == 2 and not prefix.why_not and prefix.nbytes > 0
        for _ in range(2):
            assert float((predict(model, prefix.batches) - whole).abs().max()) <= 1e-6 * float(whole.abs().max())
        assert predict(model, [prefix.batches[1]]).shape[0] == 2
        with prefix.paused() as plain:
            assert plain is batches and torch.equal(predict(model, plain), whole)
    assert torch.equal(predict(model, batches), whole)


def test_frozen_layers_run_once():
    torch.manual_seed(0)
    model = MAKERS["bert"]().eval()
    batches, targets = batches_for("bert"), select_targets(model, ["query"], "last")
    runs = []
    inner = model.bert.encoder.layer[0].attention.self.query
    inner.register_forward_hook(lambda *_: runs.append(1))
    with cached_prefix(model, batches, targets) as prefix:
        predict(model, prefix.batches)
        predict(model, prefix.batches)
    assert len(runs) == len(batches)


@pytest.mark.parametrize(
    ("kind", "layers", "memory", "reason"),
    [
        ("albert", "all", 1e9, "no frozen layer"),
        ("bert", "all", 1e9, "no frozen layer"),
        ("bert", "last", 10, "does not fit the memory"),
    ],
)
def test_where_everything_runs(kind, layers, memory, reason):
    model = MAKERS[kind]().eval()
    batches, targets = batches_for(kind), select_targets(model, ["query"], None if layers == "all" else layers)
    with cached_prefix(model, batches, targets, memory) as prefix:
        assert prefix.batches is batches and not prefix.skipped and reason in prefix.why_not


class Residual(nn.Module):
    """What is outside the layers sees their inputs: more than hidden states pass."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.twice = twice

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.layers[0](x) if self.twice else x


@pytest.mark.parametrize(("twice", "reason"), [(False, "logits change"), (True, "exactly once")])
def test_a_network_whose_layers_cannot_be_left_out(twice, reason):
    net = Residual(twice)
    batches = [{"x": torch.randn(3, 4)}]
    whole = predict(net, batches)
    with cached_prefix(net, batches, {"layers.2": net.layers[2]}) as prefix:
        assert prefix.batches is batches and reason in prefix.why_not
    assert torch.equal(predict(net, batches), whole)


class InPlace(nn.Module):
    """Its last layer overwrites its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_hidden_states_that_are_changed_in_place_are_not_used_again():
    net = InPlace()
    batches = [{"x": torch.randn(3, 4)}]
    with cached_prefix(net, batches, {"layers.1.1": net.layers[1][1]}) as prefix:
        assert prefix.skipped  # the first time, what is kept is still whole
        with pytest.raises(CaptureError, match="in place"):
            predict(net, prefix.batches)
