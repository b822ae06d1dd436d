from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ranksure.data.conversations import IGNORED
from ranksure.errors import SettingError
from ranksure.tasks.collate import Collator, PackedCollator, check_packing, packed
from tests.helpers import rounding


def feature(length: int, seed: int = 0) -> dict[str, list[int]]:
    ids = torch.randint(3, 30, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "attention_mask": [1] * length, "labels": [IGNORED, *ids[1:]]}


def small(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.3,
        attn_implementation=kind,
    )
    return LlamaForCausalLM(config).eval()


def joined_up(rows: list[dict[str, list[int]]], key: str) -> list[int]:
    return [value for row in rows for value in row[key]]


def test_padding_is_on_the_right_and_carries_no_loss():
    rows = [feature(3), feature(5, 1)]
    batch = Collator(pad_token_id=2)(rows)
    assert batch["input_ids"].tolist() == [[*rows[0]["input_ids"], 2, 2], rows[1]["input_ids"]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [[*rows[0]["labels"], IGNORED, IGNORED], rows[1]["labels"]]
    scalars = [{"input_ids": [1, 2], "labels": 0.5}, {"input_ids": [1], "labels": 1.5}]
    assert Collator(0, torch.float32)(scalars)["labels"].tolist() == [0.5, 1.5]


def test_padding_as_the_tokenizer_has_it():
    rows = [{"input_ids": [5, 6], "attention_mask": [1, 1], "token_type_ids": [0, 1]}, feature(4)]
    rows[1] = {"input_ids": [7, 8, 9, 10], "attention_mask": [1] * 4, "token_type_ids": [0] * 4}
    tokenizer = SimpleNamespace(pad_token_id=2, padding_side="left", pad_token_type_id=3)
    batch = replace(Collator.of(tokenizer), positions=True)(rows)
    assert {key: value[0].tolist() for key, value in batch.items()} == {
        "input_ids": [2, 2, 5, 6],
        "attention_mask": [0, 0, 1, 1],
        "token_type_ids": [3, 3, 0, 1],
        "position_ids": [0, 0, 0, 1],
    }
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 3]


def test_packing_keeps_every_row_whole_and_its_terms():
    rows = [feature(n, n) for n in (5, 4, 9, 2, 3)]
    joined = packed(rows, 10)
    assert [len(row["input_ids"]) for row in joined] == [9, 9, 5]
    assert joined_up(joined, "input_ids") == joined_up(rows, "input_ids")
    assert joined[0]["position_ids"] == [*range(5), *range(4)]
    assert joined_up(joined, "labels") == joined_up(rows, "labels")
    leading = packed([{"input_ids": [7, 8], "labels": [7, 8]}] * 2, 4)
    assert leading[0]["labels"] == [IGNORED, 8, IGNORED, 8]


@pytest.mark.parametrize("kind", ["sdpa", "eager", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_rows_give_the_logits_of_rows_alone(kind, dtype):
    model = small(kind).to(dtype)
    rows = [feature(n, n) for n in (5, 4, 9, 2, 3)]
    collator = PackedCollator(2, dtype)
    check_packing(model, rows, collator)
    batch = collator(packed(rows, 12))
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits[0] for row in rows])
    together = torch.cat([logits[0, :9], logits[1, :11], logits[2, :3]])
    assert torch.isfinite(logits).all()
    # Two layers round a value some ten times each, after sums of up to 24 products, whose errors grow like the root.
    assert (together - alone).abs().max() <= 2 * 10 * 5 * rounding(model) * alone.abs().max()


class Leaks(nn.Module):
    """Ignores the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small("sdpa")

    def forward(self, input_ids, position_ids=None, attention_mask=None):
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = torch.ones_like(input_ids)
        return self.inner(input_ids, attention_mask=attention_mask, position_ids=position_ids)


class Refuses(Leaks):
    def forward(self, input_ids, attention_mask=None):
        raise ValueError("no such mask")


def test_a_model_that_mixes_packed_rows_is_refused():
    rows = [feature(n, n) for n in (5, 4, 9)]
    with pytest.raises(SettingError, match="does not keep packed rows apart"):
        check_packing(Leaks(), rows, PackedCollator(2))
    with pytest.raises(SettingError, match="does not take packed rows"):
        check_packing(Refuses(), rows, PackedCollator(2))
