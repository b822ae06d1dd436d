"""The cached prefix gives what the whole network gives, or says why it is left out."""

from __future__ import annotations

import shutil
import tempfile

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
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
from ranksure.network.gradient import gradient_pass
from ranksure.network.logits import frozen, logits_of, predict
from ranksure.network.prefix import cached_prefix
from ranksure.network.side_path import applied
from ranksure.network.targets import block_shape, select_targets
from tests.helpers import rounding

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


def inputs_of(kind: str, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    return [
        {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()} for batch in batches_for(kind)
    ]


def model_for(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MAKERS[kind]().to(dtype).eval()


def slopes(model, batches, targets) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits at a random update of every target, and gradients of their squares in its factors."""
    g = torch.Generator().manual_seed(2)
    factors = {}
    for name, module in targets.items():
        m, n = block_shape(module)
        factors[name] = tuple((0.3 * torch.randn(size, 2, generator=g)).requires_grad_() for size in (m, n))
    with frozen(model), applied(targets, factors):
        logits = torch.cat([logits_of(model, dict(batch)) for batch in batches])
        logits.double().square().sum().backward()
    return logits.detach(), [x.grad for pair in factors.values() for x in pair]


def agree(model, found, whole) -> None:
    """To rounding in the network's dtype: the same operations on the same inputs."""
    for a, b in zip([found[0], *found[1]], [whole[0], *whole[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=8 * rounding(model) * float(b.abs().max()))


WITH_PREFIX = [kind for kind in MAKERS if kind != "albert"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", WITH_PREFIX)
def test_the_tail_gives_the_logits_and_gradients_of_the_whole_network(kind, dtype):
    model = model_for(kind, dtype)
    batches, targets = inputs_of(kind, dtype), select_targets(model, "all-linear", "last")
    whole, plain = slopes(model, batches, targets), predict(model, batches)
    with cached_prefix(model, batches, targets) as prefix:
        assert len(prefix.skipped) == 2 and not prefix.why_not and prefix.nbytes > 0 and not prefix.in_file
        for _ in range(2):
            agree(model, slopes(model, prefix.batches, targets), whole)
        with prefix.paused() as all_rows:
            assert torch.equal(predict(model, all_rows), plain)
    assert torch.equal(predict(model, batches), plain)
    assert not any("forward" in vars(module) for module in model.modules())


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
    model = model_for("bert")
    batches, targets = batches_for("bert"), select_targets(model, ["query"], "last")
    runs = []
    inner = model.bert.encoder.layer[0].attention.self.query
    inner.register_forward_hook(lambda *_: runs.append(1))
    with cached_prefix(model, batches, targets):
        runs.clear()
        predict(model, batches)
        assert not runs


@pytest.mark.parametrize(("kind", "layers"), [("albert", None), ("bert", None), ("gpt2", None), ("vit", None)])
def test_where_no_layer_lies_below_the_targets(kind, layers):
    model = model_for(kind)
    batches, targets = inputs_of(kind, torch.float32), select_targets(model, "all-linear", layers)
    with cached_prefix(model, batches, targets) as prefix:
        assert prefix.batches is batches and not prefix.skipped and "no frozen layer" in prefix.why_not


@pytest.mark.parametrize(
    ("kind", "names", "skipped", "idle"),
    [
        ("bert", ["classifier"], ["bert"], "bert"),
        ("albert", ["classifier"], ["albert"], "albert"),
        ("dinov2", ["classifier"], ["dinov2"], "dinov2"),
        ("bert", ["bert.pooler.dense", "classifier"], None, "bert.encoder"),
        ("bert", ["bert.encoder.layer.1.output.dense", "classifier"], None, "bert.encoder.layer.1.attention"),
        ("llama", ["model.layers.2.mlp.down_proj"], None, "model.layers.2.self_attn"),
        ("gpt2", ["transformer.h.1.mlp.c_proj", "transformer.h.2.attn.c_proj"], None, "transformer.h.1.attn"),
        ("whisper", ["encoder.layers.1.fc2", "projector"], ["encoder.layers.0"], "encoder.layers.1.self_attn"),
    ],
)
def test_nothing_below_the_lowest_target_runs(kind, names, skipped, idle):
    """The head or the pooler alone, a target deep inside a layer, targets in and outside the stack."""
    model = model_for(kind)
    batches, targets = inputs_of(kind, torch.float32), {name: model.get_submodule(name) for name in names}
    whole, runs = slopes(model, batches, targets), []
    inner = next(
        m for m in reversed(list(model.get_submodule(idle).modules())) if next(m.parameters(False), None) is not None
    )
    inner.register_forward_hook(lambda *_: runs.append(1))
    with cached_prefix(model, batches, targets) as prefix:
        runs.clear()
        agree(model, slopes(model, batches, targets), whole)
        assert not runs and prefix.skipped == (skipped or prefix.skipped) != []


@pytest.mark.parametrize("names", [["encoder.layers.1.fc2", "decoder.layers.1.fc1"], ["decoder.layers.1.fc1"]])
def test_encoder_and_decoder(names):
    torch.manual_seed(0)
    sides = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40, "num_labels": 3}
    special = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1, "decoder_start_token_id": 2}
    config = BartConfig(**sides, **sizes, **special, max_position_embeddings=32, init_std=0.3)
    model = BartForSequenceClassification(config).eval()
    batches = batches_for("bert")
    for batch in batches:
        ends = batch["attention_mask"].sum(1) - 1
        batch["input_ids"][batch["input_ids"] == 2] = 3
        batch["input_ids"][torch.arange(len(ends)), ends] = 2
    targets = {f"model.{name}": model.get_submodule(f"model.{name}") for name in names}
    whole, runs = slopes(model, batches, targets), []
    model.model.encoder.layers[0].fc1.register_forward_hook(lambda *_: runs.append(1))
    with cached_prefix(model, batches, targets) as prefix:
        runs.clear()
        agree(model, slopes(model, batches, targets), whole)
        assert prefix.skipped and not runs


class Net(nn.Module):
    """Layers with whatever a rule makes of their outputs."""

    def __init__(self, rule, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.rule = rule

    def forward(self, x):
        return self.rule(self.layers, x)


def residual(layers, x):
    for layer in layers:
        x = x + layer(x)
    return x


def skip_where_long(layers, x):
    """What the first layer gives is needed again, in batches of more than two rows."""
    first = layers[0](x)
    y = layers[2](torch.tanh(layers[1](torch.tanh(first))))
    return y + first if len(x) > 2 else y


def twice(layers, x):
    return layers[0](layers[2](layers[1](layers[0](x))))


def checkpointed(layers, x):
    def run(x):
        return layers[2](torch.tanh(layers[1](torch.tanh(layers[0](x)))))

    return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)


def hidden_by_zero(layers, x):
    """The target reads what a skipped layer gives, times a weight that is zero until it is adapted."""
    first = layers[0](x)
    return layers[1](first) + layers[2](first)


def rows_of(*sizes: int) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(size, 4, generator=g)} for size in sizes]


@pytest.mark.parametrize("rule", [residual, skip_where_long, twice, hidden_by_zero])
@pytest.mark.parametrize("sizes", [(2, 3, 1), (3, 2)])
def test_networks_of_other_makes(rule, sizes):
    torch.manual_seed(0)
    net, batches = Net(rule), rows_of(*sizes)
    with torch.no_grad():
        net.layers[2].weight.mul_(rule is not hidden_by_zero)
    targets = {"layers.2": net.layers[2]}
    whole, runs = slopes(net, batches, targets), []
    with cached_prefix(net, batches, targets) as prefix:
        net.layers[1].register_forward_hook(lambda _, args, out: runs.append(bool(out.isnan().any())))
        for _ in range(2):
            agree(net, slopes(net, batches, targets), whole)
    assert prefix.skipped and not prefix.why_not and runs


def random_after(layers, x):
    return layers[2](layers[1](layers[0](x))) + torch.rand(())


def in_place(layers, x):
    return layers[2](layers[1](layers[0](x)).relu_())


def opposite_order(layers, x):
    return layers[2](layers[1](layers[0](x))) if len(x) > 2 else layers[1](layers[0](layers[2](x)))


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (random_after, "logits change"),
        (checkpointed, "checkpointing"),
        (in_place, "in place"),
        (opposite_order, "exactly once"),
    ],
)
def test_networks_whose_layers_cannot_be_left_out(rule, reason):
    net, batches = Net(rule), rows_of(3, 2)
    with cached_prefix(net, batches, {"layers.2": net.layers[2]}) as prefix:
        assert prefix.batches is batches and not prefix.skipped and reason in prefix.why_not
    assert not any("forward" in vars(module) for module in net.modules())


def test_hidden_states_that_are_changed_in_place_later_are_not_used_again():
    net, batches = Net(lambda layers, x: layers[1](layers[0](x)), 2), rows_of(3)
    with cached_prefix(net, batches, {"layers.1": net.layers[1]}) as prefix:
        assert prefix.skipped
        net.layers[1].register_forward_pre_hook(lambda _, args: (args[0].relu_(),))
        predict(net, batches)  # the first time, what is kept is still whole
        with pytest.raises(CaptureError, match="in place"):
            predict(net, batches)


@pytest.mark.parametrize("memory", [1e9, 10])
def test_only_the_rows_that_were_recorded_are_skipped(memory):
    """Other rows, fewer of them, and rows changed meanwhile go through the whole network; any order does."""
    model = model_for("bert")
    batches, targets = batches_for("bert"), select_targets(model, ["query"], "last")
    others = [
        {name: x[:2] for name, x in batches[0].items()},
        {**batches[1], "input_ids": batches[1]["input_ids"].flip(0)},
        {**batches[0], "attention_mask": torch.ones_like(batches[0]["attention_mask"])},
        *[{name: x.clone() for name, x in batch.items()} for batch in reversed(batches)],
    ]
    whole, turned = predict(model, others), [{**batch} for batch in batches]
    with cached_prefix(model, batches, targets, memory) as prefix:
        runs = []
        model.bert.encoder.layer[0].register_forward_hook(lambda _, args, out: runs.append(args[0].isnan().any()))
        torch.testing.assert_close(predict(model, others), whole)
        batches[0]["input_ids"][0, 1] += 1
        found = predict(model, batches)
        assert prefix.in_file == (memory == 10)
    torch.testing.assert_close(found, predict(model, turned))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_gradient_pass_and_its_checks_of_single_rows(kind):
    """Rows that are run again alone go through the whole network."""
    model = model_for(kind)
    targets = select_targets(model, "all-linear", "last")
    batches = [{**batch, "labels": torch.arange(len(batch["input_ids"])) % 3} for batch in batches_for(kind)]
    whole = gradient_pass(model, batches, targets, kind="cross-entropy")
    with cached_prefix(model, batches, targets) as prefix:
        found = gradient_pass(model, prefix.batches, targets, kind="cross-entropy")
    assert prefix.skipped and torch.equal(found.terms.losses, whole.terms.losses)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient)


def new_parameter(layer):
    layer.weight = nn.Parameter(layer.weight + 1)


def new_data(layer):
    layer.weight.data = layer.weight.data + 1


def added(layer):
    with torch.no_grad():
        layer.weight.add_(1)


@pytest.mark.parametrize("change", [new_parameter, new_data, added])
def test_weights_below_that_change_are_an_error(change):
    net, batches = Net(residual), rows_of(3, 2)
    with cached_prefix(net, batches, {"layers.2": net.layers[2]}):
        change(net.layers[2])  # the target's own may
        predict(net, batches)
        change(net.layers[1])
        with pytest.raises(CaptureError, match=r"layers\.1\.weight changed"):
            predict(net, batches)
    predict(net, batches)


@pytest.mark.parametrize("kind", ["llama", "whisper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_beyond_the_memory_a_file_without_a_name(kind, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = model_for(kind, dtype)
    batches, targets = inputs_of(kind, dtype), select_targets(model, "all-linear", "last")
    whole = slopes(model, batches, targets)
    with pytest.raises(KeyboardInterrupt), cached_prefix(model, batches, targets, 10) as prefix:
        assert prefix.in_file and prefix.skipped and prefix.nbytes > 10
        agree(model, slopes(model, batches, targets), whole)
        assert not list(tmp_path.iterdir())  # so that no way to end leaves it behind
        kept = prefix._cache.kept
        raise KeyboardInterrupt
    assert not kept.in_file and not kept.lists
    assert not any("forward" in vars(module) for module in model.modules())


def no_room(folder):
    return shutil._ntuple_diskusage(10**9, 10**9, 1000)


def test_a_disk_without_room(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", no_room)
    net, batches = Net(residual), rows_of(3, 2)
    with cached_prefix(net, batches, {"layers.2": net.layers[2]}, 10) as prefix:
        assert prefix.batches is batches and "disk" in prefix.why_not and "TMPDIR" in prefix.why_not
    with cached_prefix(net, batches, {"layers.2": net.layers[2]}, 1000) as prefix:
        assert prefix.skipped and not prefix.in_file
