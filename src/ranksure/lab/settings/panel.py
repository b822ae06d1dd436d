"""All trainings of one setting at one lambda, held against its certified optimum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ranksure.lab.claim import Check, Curve, Finding, Table
from ranksure.lab.figures import curve_panels
from ranksure.lab.settings.prepared import Prepared
from ranksure.lab.settings.trained import Trained
from ranksure.solvers.solution import Solution


@dataclass(frozen=True)
class Panel:
    """One setting, seed and lambda: full fine-tuning, LoRA by rank, and where it was run gradient descent."""

    title: str
    prepared: Prepared
    lam: float
    optimum: Solution  # of the linearised problem, certified
    runs: Sequence[Trained]

    @property
    def full(self) -> Trained:
        return next(run for run in self.runs if run.rank is None)

    @property
    def lora(self) -> dict[int, Trained]:
        """LoRA by rank, trained by Adam."""
        return {run.rank: run for run in self.runs if run.rank is not None and run.method == "adam"}

    @property
    def sufficient(self) -> Trained:
        """LoRA at the theorem's rank."""
        return self.lora[self.prepared.paper_rank]

    @property
    def lower(self) -> dict[int, Trained]:
        """LoRA at ranks below the theorem's."""
        return {rank: run for rank, run in self.lora.items() if rank < self.prepared.paper_rank}

    @property
    def descent(self) -> Trained | None:
        """LoRA at the theorem's rank by plain gradient descent, where it was run."""
        return next((run for run in self.runs if run.method == "gd"), None)

    def curve(self, run: Trained) -> Curve:
        """A run's curve. Ranks differ between panels where K N does: the theorem's goes by that name."""
        label = run.label
        if run.rank == self.prepared.paper_rank:
            label = f"theorem's rank, {'gradient descent' if run.method == 'gd' else 'r(r+1)/2 > KN'}"
        return Curve(label, [x for x, _ in run.curve], [y for _, y in run.curve], self.title)


Column = Callable[[Panel, Trained], Any]

_EVERY: dict[str, Column] = {
    "setting": lambda panel, run: panel.prepared.label,
    "K": lambda panel, run: panel.prepared.n_outputs,
    "N": lambda panel, run: panel.prepared.n,
    "lambda": lambda panel, run: panel.lam,
    "training": lambda panel, run: f"{'LoRA' if run.rank else 'full fine-tuning'}, {run.method}",
    "rank": lambda panel, run: run.rank,
    "objective": lambda panel, run: run.value,
}


def reference(panels: Sequence[Panel]) -> dict[str, float]:
    """The certified optimum of every panel."""
    return {panel.title: panel.optimum.certificate.objective for panel in panels}


def finding(
    panels: Sequence[Panel],
    missing: Sequence[str],
    checks: Sequence[Check],
    columns: Mapping[str, Column],
    axis: str,
    **drawing: Any,
) -> Finding:
    """Curves by panel, and a table with a row for every run: what it is, then ``columns``. ``axis`` names the curves'
    values.
    """
    runs = [(panel, run) for panel in panels for run in panel.runs]
    curves = [panel.curve(run) for panel, run in runs]
    every = {**_EVERY, **columns}
    return Finding(
        checks=checks,
        figure=curve_panels(curves, x="step", y_scale="log", **drawing),
        table=Table(list(every), [[value(panel, run) for value in every.values()] for panel, run in runs]),
        curves=curves,
        reference=reference(panels),
        axes={"x": "step", "y": axis},
        missing=missing,
    )
