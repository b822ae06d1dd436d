"""A plan of the network itself, made once: three classes, two modules, a rank that is not enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ranksure
from ranksure.planner.result import PlanResult
from tests.tiny_text import save_bert, save_csv

ASKED: dict[str, Any] = {
    "target_modules": ["value", "output.dense"],
    "layers_to_transform": "last",
    "samples": 24,
    "heldout": 40,
    "weight_decay": "40%",
    "ranks": [1, 3],
    "captured": 0.95,
    "random_starts": 0,
}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root: Path = tmp_path_factory.mktemp("network")
    return save_bert(root / "bert"), save_csv(root / "three.csv", 90, ("bad", "good", "odd"))


@pytest.fixture(scope="session")
def answer(inputs: tuple[str, str]) -> PlanResult:
    return ranksure.plan(*inputs, **ASKED)
