"""Paired timings, rows of the table, and how they are shown."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what is compared.
        unit: ``x`` for a ratio of two times, ``of`` for a share, ``N^`` for a growth exponent, ``s`` for seconds.
        values: one measurement per run.
        sense: whether the target is a lower or an upper bound; None where nothing is asked.
        target: the bound.
        censored: the values are lower bounds (a baseline was stopped there).
        note: what a reader must know (sizes, absolute times, the gap of a stopped baseline).
    """

    name: str
    unit: Literal["x", "of", "N^", "s"]
    values: list[float]
    sense: Literal[">=", "<="] | None
    target: float
    censored: bool = False
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where nothing is asked, or a stopped baseline leaves it open."""
        if self.sense is None:
            return None
        if self.sense == ">=":
            enough = self.median >= self.target
            return None if self.censored and not enough else enough
        return self.median <= self.target

    def shown(self, value: float) -> str:
        text = f"{value:.3g}" if value < 100 else f"{value:.0f}"
        return f"N^{value:.2f}" if self.unit == "N^" else text + {"x": "x", "s": " s", "of": ""}[self.unit]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "median": self.median, "met": self.met}


@dataclass(frozen=True)
class Size:
    """How much to measure: everything, or a quick look at every row."""

    runs: int
    samples: int
    growth: tuple[int, ...]
    cap: float  # a baseline is stopped at this many times our time
    cvxpy_cap: float
    cvxpy_samples: int
    jacrev_samples: int
    reduction: tuple[tuple[int, int, int, float, int], ...]  # blocks, rank, equations N K, target in seconds, runs


FULL = Size(
    runs=5,
    samples=64,
    growth=(64, 256, 1024),
    cap=50,
    cvxpy_cap=300,
    cvxpy_samples=224,
    jacrev_samples=64,
    reduction=((2, 64, 2048, 60, 5), (12, 64, 4096, 600, 3)),
)
QUICK = Size(
    runs=2,
    samples=16,
    growth=(16, 32, 64),
    cap=3,
    cvxpy_cap=3,
    cvxpy_samples=16,
    jacrev_samples=4,
    reduction=((2, 12, 64, 60, 2), (3, 12, 128, 600, 1)),
)


def seconds_of(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def paired(
    one: Callable[[], object], other: Callable[[], object], runs: int, repeat: int = 1
) -> tuple[list[float], list[float]]:
    """Seconds of both, one after the other in every run, after one warm-up; ``repeat`` calls make a run."""
    one(), other()
    first: list[float] = []
    second: list[float] = []
    for _ in range(runs):
        a = b = 0.0
        for _ in range(repeat):
            a += seconds_of(one)
            b += seconds_of(other)
        first.append(a / repeat)
        second.append(b / repeat)
    return first, second


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Least-squares slope of ``log(value)`` over ``log(size)``."""
    x = [math.log(size) for size in sizes]
    y = [math.log(max(value, 1e-300)) for value in values]
    mx, my = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def show(rows: Sequence[Row], console: Console, title: str) -> None:
    table = Table(title=title, title_justify="left", show_lines=False, expand=False)
    for name in ("", "measured", "min - max", "target", "", "note"):
        number = name in ("measured", "min - max", "target")
        table.add_column(name, overflow="fold", justify="right" if number else "left")
    for row in rows:
        mark = "> " if row.censored else ""
        verdict = {True: "[green]ok[/]", False: "[red]not met[/]", None: "open" if row.sense else ""}[row.met]
        spread = f"{row.shown(min(row.values))} - {row.shown(max(row.values))}"
        bound = Row("", row.unit, [row.target], None, 0).shown(row.target) if row.sense else ""
        asked = f"{row.sense} {bound}" if row.sense else ""
        table.add_row(row.name, mark + row.shown(row.median), spread, asked, verdict, row.note)
    console.print(table)
