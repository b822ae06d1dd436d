"""Plans on the tiny model, made once and judged by every test."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranksure
from ranksure.planner.result import PlanResult
from tests.tiny_text import save_bert, save_csv


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="session")
def bert(folder: Path) -> str:
    return save_bert(folder / "bert")


@pytest.fixture(scope="session")
def csv(folder: Path) -> str:
    return save_csv(folder / "two.csv", 150)


@pytest.fixture(scope="session")
def csv3(folder: Path) -> str:
    return save_csv(folder / "three.csv", 200, ("bad", "good", "odd"))


@pytest.fixture(scope="session")
def answer(bert: str, csv3: str) -> PlanResult:
    """Three classes, eight modules of several ranks, a weak penalty: rank 1 is not enough."""
    return ranksure.plan(
        bert,
        csv3,
        target_modules=["query", "value", "output.dense"],
        samples=40,
        weight_decay="3%",
        ranks=[1, 3],
        captured=0.999,
        random_starts=1,
        linearised=True,
    )


@pytest.fixture(scope="session")
def auto(bert: str, csv: str) -> PlanResult:
    """Two classes, the penalty chosen by held-out loss."""
    return ranksure.plan(
        bert,
        csv,
        target_modules=["query", "value"],
        layers_to_transform="last",
        samples=24,
        ranks=[1, 2],
        linearised=True,
    )
