"""The mean loss of batches that someone made: of the rows, or no verdict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

import ranksure
from ranksure.network.gradient import gradient_pass
from ranksure.network.row_losses import RowsInteract
from tests.helpers import generator_of, randn


class Net(nn.Module):
    """Logits ``(rows, 3)``; ``mix`` says what the rows do to one another."""

    def __init__(self, mix: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head, self.mix = nn.Linear(4, 4), nn.Linear(4, 3), mix
        self.double()

    def forward(self, x):
        return self.head(self.mix(self.layer(x)))


def few_first(h):
    """A capacity: rows after the first are dropped."""
    return h * (torch.arange(len(h)) < 1)[:, None]


@pytest.mark.parametrize("mix", [lambda h: h - h.mean(0), lambda h: h.softmax(0), few_first, lambda h: h.roll(1, 0)])
@pytest.mark.parametrize("sizes", [(8,), (6, 2), (1, 7)])
def test_rows_that_interact(mix, sizes) -> None:
    model = Net(mix)
    x, labels = randn(8, 4, generator=generator_of(0)).split(sizes), (torch.arange(8) % 3).split(sizes)
    batches = [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]
    with pytest.raises(RowsInteract, match="samples interact"):
        gradient_pass(model, batches, {"layer": model.layer})
    alone = [
        {key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in range(len(batch["x"]))
    ]
    assert gradient_pass(model, alone, {"layer": model.layer}).n_samples == 8


def test_a_run_whose_rows_interact_is_not_checked() -> None:
    run = get_peft_model(
        Net(lambda h: h - h.mean(0)), LoraConfig(r=2, target_modules=["layer"]), autocast_adapter_dtype=False
    )
    batches = [{"x": randn(6, 4, generator=generator_of(0)), "labels": torch.arange(6) % 3}]
    nn.init.normal_(run.base_model.model.layer.lora_B["default"].weight)
    found = ranksure.certify(run, batches, weight_decay=0.01)
    assert found.verdict == "not-checked" and "samples interact" in found.reasons[0]


def padded_runs(positions: bool) -> tuple[nn.Module, list[list[dict[str, torch.Tensor]]]]:
    """GPT-2, and rows that are padded on the left: to the longest of each batch, and all alike."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "num_labels": 3, "pad_token_id": 0}
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=20, initializer_range=0.4, **sizes)).double()
    rows = [torch.randint(1, 20, (n,), generator=generator_of(n)) for n in (2, 5, 3, 9, 4)]

    def batch(part: list[torch.Tensor], width: int, low: int) -> dict[str, torch.Tensor]:
        ids = torch.stack([nn.functional.pad(row, (width - len(row), 0)) for row in part])
        out = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.arange(low, low + len(part)) % 3}
        if positions:
            out["position_ids"] = (out["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return out

    parts = [(rows[:3], 0), (rows[3:], 3)]
    return model, [
        [batch(part, max(map(len, part)), low) for part, low in parts],
        [batch(p, 9, low) for p, low in parts],
    ]


def test_padding_that_moves_with_the_batch_is_refused() -> None:
    model, (moving, fixed) = padded_runs(positions=False)
    layer = {"c_attn": model.transformer.h[0].attn.c_attn}
    with pytest.raises(RowsInteract, match="how far its batch is padded"):
        gradient_pass(model, moving, layer)
    assert gradient_pass(model, fixed, layer).n_samples == 5  # one width for all: part of every row
    model, (moving, fixed) = padded_runs(positions=True)
    layer = {"c_attn": model.transformer.h[0].attn.c_attn}
    means = [gradient_pass(model, batches, layer).terms.mean for batches in (moving, fixed)]
    assert means[0] == pytest.approx(means[1], rel=1e-10)
