"""The mean loss of batches that someone made: of the rows, or no verdict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

import ranksure
from ranksure.network.gradient import GradientPass, gradient_pass
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


def padded_runs(positions: bool) -> tuple[Any, dict[str, list[dict[str, torch.Tensor]]]]:
    """GPT-2, and rows that are padded on the left: to the longest of each batch, and in other ways."""
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
    layouts = {
        "moving": [batch(part, max(map(len, part)), low) for part, low in parts],
        "fixed": [batch(p, 9, low) for p, low in parts],
        "one": [batch(rows, 9, 0)],
        "multiple": [batch(rows, 16, 0)],  # of eight
        "alike": [batch([rows[0], rows[3]], 9, 0), batch([rows[3], rows[4]], 9, 1)],
    }
    return model, layouts


def of_padded(positions: bool, layout: str) -> GradientPass:
    model, layouts = padded_runs(positions)
    return gradient_pass(model, layouts[layout], {"c_attn": model.transformer.h[0].attn.c_attn})


@pytest.mark.parametrize("layout", ["moving", "one", "multiple", "alike"])
def test_padding_that_is_the_batch_s_own_is_refused_where_it_counts(layout: str) -> None:
    with pytest.raises(RowsInteract, match="how far its batch is padded"):
        of_padded(False, layout)
    found = of_padded(True, layout)
    model, layouts = padded_runs(True)
    model.eval().requires_grad_(False)
    losses = []
    for batch in layouts[layout]:
        for ids, label in zip(batch["input_ids"], batch["labels"], strict=True):
            logits = model(input_ids=ids[ids > 0][None]).logits
            losses.append(nn.functional.cross_entropy(logits, label[None]))
    assert found.terms.mean == pytest.approx(float(torch.stack(losses).mean()), rel=1e-10)


def test_padding_to_one_width_is_part_of_every_row() -> None:
    assert of_padded(False, "fixed").n_samples == 5
    model, layouts = padded_runs(False)
    layer = {"c_attn": model.transformer.h[0].attn.c_attn}
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for batch in layouts["fixed"] for i in range(2)]
    assert gradient_pass(model, [*rows, *layouts["one"]], layer).n_samples == 9  # batches of one row tell too


class Recording(nn.Module):
    """Frames ``(rows, bands, time)`` of a fixed length and a mask ``(rows, time)`` that need not count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.double()

    def forward(self, input_features, attention_mask):
        assert input_features.shape[-1] == attention_mask.shape[1] == 6
        halves = (input_features * attention_mask[:, None]).unflatten(-1, (2, 3))
        return self.layer(halves.mean(-1).flatten(1))


def test_a_mask_over_frames_that_a_network_needs_all_of() -> None:
    model, features = Recording(), randn(3, 2, 6, generator=generator_of(0))
    mask = (torch.arange(6) < torch.tensor([6, 3, 4])[:, None]).long()
    batch = {"input_features": features, "attention_mask": mask, "labels": torch.arange(3)}
    assert gradient_pass(model, [batch], {"layer": model.layer}).n_samples == 3
