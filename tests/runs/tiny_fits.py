"""Fits of a tiny BERT, shared by the tests of fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import ranksure
from ranksure.runs.fitting.fit import fit
from ranksure.runs.fitting.result import FitResult
from tests.tiny_text import save_bert, save_csv

ADAPTER = "adapter_model.safetensors"
QUICK: dict[str, Any] = {"batch_size": 24, "learning_rate": 0.03, "logging_steps": 5}


def make_tiny(folder: Path) -> Path:
    """A model, two data sets, and plans: two classes (nearly linear), three classes (far from it), mean pooling."""
    model = save_bert(folder / "bert")
    two = save_csv(folder / "two.csv", 80)
    three = save_csv(folder / "three.csv", 90, ("bad", "good", "odd"))
    common = {"samples": 24, "heldout": 32, "layers_to_transform": "last", "ranks": [1, 2], "linearised": True}
    both = {**common, "target_modules": ["query", "value"], "weight_decay": "30%"}
    ranksure.plan(model, two, **both).save(folder / "plan2")
    ranksure.plan(model, two, **both, pooling="mean").save(folder / "mean")
    ranksure.plan(model, three, **common, target_modules=["value"], weight_decay="20%").save(folder / "plan3")
    return folder


def fitted(tiny: Path, out: Path, **settings: Any) -> FitResult:
    """A fit of the two-class plan."""
    return fit(data=str(tiny / "two.csv"), out=out, plan=tiny / "plan2", **{**QUICK, **settings})


def same(first: Path, second: Path) -> None:
    """Two adapters with the same bits, verdict and history."""
    a, b = load_file(first / ADAPTER), load_file(second / ADAPTER)
    assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)
    left, right = (json.loads((folder / "fit.json").read_text()) for folder in (first, second))
    for key in ("history", "final", "verdict", "steps", "ranks", "stages"):
        assert left[key] == right[key], key
