"""What is planned and certified is a figure of the rows: of every batch size, on both sides of padding, row by row."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import ranksure
from ranksure.certificate import lambda_max
from ranksure.data.texts import Rows, load_rows
from ranksure.errors import CaptureError
from ranksure.losses import get_loss
from ranksure.network.targets import select_targets
from ranksure.runs.options import DataSettings
from ranksure.runs.saved.data import read_data
from ranksure.tasks.linearise import capture_rows
from ranksure.tasks.text import load_text_task
from tests.helpers import rounding
from tests.runs.tiny_runs import save_gpt2_lm, save_pairs
from tests.tiny_text import BAD, GOOD, ODD

WORDS = ["[PAD]", "[UNK]", "<s>", "</s>", *GOOD, *BAD, *ODD[:4]]
SIZES = {"num_labels": 2, "initializer_range": 0.3, "pad_token_id": 0}
LAYERS = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    **SIZES,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}


def bert(**more: Any) -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**LAYERS, **more))


def gpt2(**more: Any) -> PreTrainedModel:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=len(WORDS), **sizes, **SIZES, **more))


def llama(**more: Any) -> PreTrainedModel:
    return LlamaForSequenceClassification(LlamaConfig(**LAYERS, **more))


def xlnet(**more: Any) -> PreTrainedModel:
    sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
    return XLNetForSequenceClassification(XLNetConfig(vocab_size=len(WORDS), **sizes, **SIZES, **more))


def xlnet_first() -> PreTrainedModel:
    return xlnet(summary_type="first")


def deberta(**more: Any) -> PreTrainedModel:
    """Its relative positions are put through projections of their own."""
    return DebertaV2ForSequenceClassification(DebertaV2Config(**LAYERS, **RELATIVE, type_vocab_size=0, **more))


def deberta_shared() -> PreTrainedModel:
    """Its relative positions are put through the projections of the content."""
    return deberta(share_att_key=True)


TARGETS = {
    bert: ["query", "value"],
    gpt2: ["c_attn"],
    llama: ["q_proj", "v_proj"],
    xlnet: ["layer_1"],
    xlnet_first: ["layer_1", "layer_2"],
    deberta: ["query_proj", "pos_key_proj", "value_proj"],
    deberta_shared: ["query_proj", "key_proj"],
}


def tokenizer_of(side: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **special, model_max_length=32, padding_side=side,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def rows_of(n: int = 10) -> Rows:
    random = torch.Generator().manual_seed(0)
    lengths = [1, 2, 9, 2, 5, 1, 7, 9, 3, 4]
    texts = [
        " ".join(WORDS[4 + i] for i in torch.randint(16, (lengths[row],), generator=random).tolist())
        for row in range(n)
    ]
    return load_rows(pd.DataFrame({"text": texts, "label": [i % 2 for i in range(n)]}))


def made(build: Any, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return build(**more).double().eval()


def losses_alone(model: nn.Module, tokenizer: Any, rows: Rows) -> Tensor:
    """Of every row by itself, without padding."""
    return torch.stack(
        [
            cross_entropy(model(**tokenizer(text, return_tensors="pt")).logits, torch.tensor([label]))
            for text, label in zip(rows.texts, rows.labels, strict=True)
        ]
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("build", TARGETS, ids=lambda build: build.__name__)
def test_a_plan_is_of_the_rows(build: Any, side: str) -> None:
    model, tokenizer, rows = made(build), tokenizer_of(side), rows_of()
    loss = get_loss("cross-entropy")
    targets = select_targets(model, TARGETS[build])
    weights = [module.weight.requires_grad_() for module in targets.values()]
    alone = losses_alone(model, tokenizer, rows).mean()
    allowed = 10 * rounding(model) if build is llama else 0.0  # its norm is computed in float32
    norms = [torch.linalg.matrix_norm(g, 2) for g in torch.autograd.grad(alone, weights)]
    for size in (1, 3, len(rows)):
        task = load_text_task(model, rows, tokenizer=tokenizer, batch_size=size)
        problem = capture_rows(task, task.targets(TARGETS[build]), rows, loss, torch.float64).problem()
        base = loss.value(problem.base_logits, problem.labels).mean()
        assert float(base) == pytest.approx(float(alone), rel=1e-10)
        assert lambda_max(problem) == pytest.approx(float(max(norms)), rel=1e-9 + allowed)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("build", TARGETS, ids=lambda build: build.__name__)
def test_a_certificate_is_of_the_rows(build: Any, side: str) -> None:
    model, tokenizer, rows = made(build), tokenizer_of(side), rows_of()
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=TARGETS[build], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        run = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        alone = float(losses_alone(run, tokenizer, rows).mean())
    found = []
    for size in (1, 3, len(rows)):
        data = read_data((run, tokenizer), rows, DataSettings(batch_size=size))
        found.append(ranksure.certify(run, data.batches, weight_decay=0.01))
        assert found[-1].loss == pytest.approx(alone, rel=1e-10)
    assert len({each.verdict for each in found}) == 1 and found[0].verdict != "not-checked"
    assert [each.training_gain_bound for each in found] == pytest.approx([found[0].training_gain_bound] * 3, rel=1e-8)


def test_how_padding_is_told() -> None:
    rows = rows_of()
    said = {}
    for build in (bert, gpt2, llama, xlnet):
        for side in ("right", "left"):
            task = load_text_task(made(build), rows, tokenizer=tokenizer_of(side))
            padding = task.settle_padding(rows)
            said[build.__name__, side] = (padding.own_length, "position_ids" in "".join(padding.notes))
            assert padding.notes == tuple(task.notes[len(task.notes) - len(padding.notes) :])
    # BERT reads the first place and XLNet the last one, whatever stands there.
    assert said["bert", "left"] == said["xlnet", "right"] == (True, False)
    # Llama turns its queries and keys in float32, which absolute positions show in float64.
    assert said["gpt2", "left"] == said["llama", "left"] == (False, True)
    for key in (("bert", "right"), ("xlnet", "left"), ("gpt2", "right"), ("llama", "right")):
        assert said[key] == (False, False), key


def test_padding_that_gives_nan_is_named() -> None:
    """Eager attention in float64: a place that can look at padding only adds the lowest number to itself."""
    model, tokenizer, rows = made(llama, attn_implementation="eager"), tokenizer_of("left"), rows_of()
    with pytest.raises(CaptureError, match=r'padded.*attn_implementation="sdpa"'):
        load_text_task(model, rows, tokenizer=tokenizer).settle_padding(rows)
    run = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(CaptureError, match=r'padded.*attn_implementation="sdpa"'):
        read_data((run, tokenizer), rows)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_language_model_whose_tokenizer_pads_on_the_left(tmp_path: Any, size: int) -> None:
    from transformers import AutoTokenizer

    folder = save_gpt2_lm(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    run = get_peft_model(
        GPT2LMHeadModel.from_pretrained(folder).double(),
        LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False),
        autocast_adapter_dtype=False,
    ).eval()
    data = read_data((run, tokenizer), save_pairs(tmp_path / "pairs.jsonl"), DataSettings(batch_size=size))
    total, count = 0.0, 0
    for row in data.features:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = run(ids[None]).logits[0, :-1]
        total += float(cross_entropy(logits, labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    assert ranksure.certify(run, data.batches, weight_decay=0.01).loss == pytest.approx(total / count, rel=1e-10)
