"""What a plan writes, read back by others: layers below the head that no checkpoint holds come with the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import ranksure
from ranksure.runs.fitting.plan_folder import install_planned_head
from tests.helpers import rounding
from tests.tiny_text import frame, save_bert_classifier, save_csv, save_roberta

TEXTS = [text for text in frame(8)["text"]]


def base_with(kind: str, folder: Path) -> str:
    if kind == "roberta":  # its head's first layer is new, too
        return save_roberta(folder)
    name = save_bert_classifier(folder, ["bad", "good"] if kind == "pooler" else ["x", "y", "z"])
    path = folder / "model.safetensors"
    kept = {key: value for key, value in load_file(path).items() if "pooler" not in key}
    save_file(kept, path, metadata={"format": "pt"})
    return name


def logits_by_peft(base: str, adapter: Path, seed: int) -> Tensor:
    """Of the adapter on the base, as PEFT and transformers alone load them in some process."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, ignore_mismatched_sizes=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        return (
            PeftModel.from_pretrained(model, adapter)
            .eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt"))
            .logits
        )


def logits_by_hand(network: nn.Module, factors: dict[str, tuple[Tensor, Tensor]], base: str) -> Tensor:
    """Of the planned network with ``u v^T`` added to its matrices."""
    before = {name: network.get_submodule(name).weight.detach().clone() for name in factors}
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        for name, (u, v) in factors.items():
            network.get_submodule(name).weight += (u @ v.T).to(before[name].dtype)
        out = network.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
        for name, weight in before.items():
            network.get_submodule(name).weight.copy_(weight)
    return out


@pytest.mark.parametrize(
    ("kind", "drawn", "saved"),
    [
        ("pooler", "bert.pooler.dense", {"bert.pooler.dense"}),
        ("pooler and head", "bert.pooler.dense", {"bert.pooler.dense", "classifier"}),
        ("roberta", "classifier.dense", {"classifier"}),
    ],
)
def test_what_was_drawn_below_the_head_is_told_saved_and_the_same_for_everyone(tmp_path, kind, drawn, saved):
    base, data = base_with(kind, tmp_path / "base"), save_csv(tmp_path / "d.csv", 60)
    asked = {"target_modules": ["query", "value"], "layers_to_transform": "last", "seed": 3}
    plan = ranksure.plan(base, data, samples=24, ranks=[1], weight_decay="10%", linearised=True, **asked)
    (told,) = [note for note in plan.record.notes if drawn in note]
    assert "random" in told and "saved with the adapter" in told
    plan.save(tmp_path / "plan")

    network = plan._prepared.task.model
    first, second = (logits_by_peft(base, tmp_path / "plan" / "adapter", seed) for seed in (1, 2))
    assert torch.equal(first, second)
    expected = logits_by_hand(network, plan.factors, base)
    torch.testing.assert_close(first, expected, rtol=200 * rounding(network), atol=200 * rounding(network))
    wrapped = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, ignore_mismatched_sizes=True),
        tmp_path / "plan" / "adapter",
    )
    assert set(install_planned_head(wrapped, tmp_path / "plan")) == {
        key.rpartition(".")[0] for key in network.state_dict() if any(key.startswith(f"{name}.") for name in saved)
    }

    fit = ranksure.fit(plan=tmp_path / "plan", data=data, out=tmp_path / "fit", max_steps=2, seed=5)
    assert any(drawn in note for note in fit.record.notes)
    adapter = tmp_path / "fit" / "adapter"
    assert torch.equal(*(logits_by_peft(base, adapter, seed) for seed in (1, 2)))
    weights = [folder / "adapter_model.safetensors" for folder in (tmp_path / "plan" / "adapter", adapter)]
    planned, trained = map(load_file, weights)
    kept = [key for key in planned if "lora_" not in key]
    assert kept and all(torch.equal(planned[key], trained[key]) for key in kept)
