"""Training curves of the real, nonlinear network: full fine-tuning and LoRA by rank, beside the linearised optimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ranksure.reproduce.experiment import Check, Curve, Experiment, Finding, Run
from ranksure.reproduce.figures import curve_panels
from ranksure.reproduce.prepared import Prepared
from ranksure.reproduce.trainings import Trained, real_full, real_lora
from ranksure.solvers.solution import Solution

SHARE = 0.1  # lambda as a share of lambda_max of the linearised problem
SAME = 0.02  # objectives that differ by less than this share of the gain are taken as equal: runs are not at their end


@dataclass(frozen=True)
class Panel:
    """One setting and seed.

    Attributes:
        title: of the panel.
        prepared: the setting.
        lam: lambda.
        optimum: of the linearised problem.
        runs: full fine-tuning and LoRA by rank, of the real network.
    """

    title: str
    prepared: Prepared
    lam: float
    optimum: Solution
    runs: Sequence[Trained]

    @property
    def full(self) -> Trained:
        """Full fine-tuning."""
        return next(run for run in self.runs if run.rank is None)

    @property
    def lora(self) -> dict[int, Trained]:
        """LoRA by rank."""
        return {run.rank: run for run in self.runs if run.rank is not None}

    @property
    def sufficient(self) -> Trained:
        """LoRA at the rank of the theorem."""
        return self.lora[self.prepared.paper_rank]

    @property
    def best(self) -> float:
        """Lowest objective of all runs."""
        return min(run.objective for run in self.runs)

    def behind(self, run: Trained) -> float:
        """How far a run ends above the best, as a share of the best one's gain."""
        return (run.objective - self.best) / (self.optimum.certificate.objective_at_zero - self.best)

    def half_way(self, run: Trained) -> float:
        """First step at which a run has 90% of the best one's gain; infinite if never."""
        zero = self.optimum.certificate.objective_at_zero
        level = zero - 0.9 * (zero - self.best)
        return next((step for step, value in run.curve if value <= level), float("inf"))


def measure(run: Run) -> Finding:
    """Run the experiment."""
    text, others = run.first_and_others()
    wanted = [(setting, run.seed) for setting in text[: run.size(1, 1, len(text))]]
    if not run.small:
        of_each_kind = {setting.kind: setting for setting in reversed(others)}.values()  # the first of each
        wanted += [(setting, run.seed) for setting in (others if run.full else reversed(of_each_kind))]
    ready, missing = run.available(wanted)
    panels = []
    for prepared in ready:
        panels.append(panel(run, prepared))
        prepared.release()
    return finding(panels, missing)


def panel(run: Run, prepared: Prepared) -> Panel:
    """All trainings of one setting."""
    lam = SHARE * prepared.lambda_max
    few = run.size([1], [1, 2], [1, 2, 4, 8])
    runs = [real_full(run, prepared, lam), *(real_lora(run, prepared, lam, rank) for rank in prepared.ranks(few))]
    title = f"{prepared.label}\nN={prepared.n}, K={prepared.n_outputs}, λ={SHARE:.0%} of λ_max"
    return Panel(title, prepared, lam, prepared.optimum(lam), runs)


def finding(panels: Sequence[Panel], missing: Sequence[str]) -> Finding:
    """What the trainings say."""
    curves = [
        Curve(_label(run, panel), [x for x, _ in run.curve], [y for _, y in run.curve], panel.title)
        for panel in panels
        for run in panel.runs
    ]
    reference = {panel.title: panel.optimum.certificate.objective for panel in panels}
    columns = ["setting", "K", "N", "lambda", "training", "rank", "objective", "behind the best", "linearised optimum"]
    columns += ["steps", "steps to 90% of the best gain", "seconds"]
    rows = [
        [
            panel.prepared.label,
            panel.prepared.n_outputs,
            panel.prepared.n,
            panel.lam,
            f"{'LoRA' if run.rank else 'full fine-tuning'}, {run.method}",
            run.rank,
            run.objective,
            panel.behind(run),
            panel.optimum.certificate.objective,
            run.steps,
            panel.half_way(run) if panel.half_way(run) < float("inf") else None,
            run.seconds,
        ]
        for panel in panels
        for run in panel.runs
    ]
    figure = curve_panels(
        curves,
        x="step",
        y="objective of the real network",
        y_scale="log",
        level=reference,
        level_label="certified optimum of the linearised problem",
    )
    return Finding(
        checks=checks(panels),
        columns=columns,
        rows=rows,
        figure=figure,
        curves=curves,
        reference=reference,
        axes={"x": "step", "y": "objective of the real network: loss plus penalty"},
        missing=missing,
    )


def _label(run: Trained, panel: Panel) -> str:
    return "theorem's rank, r(r+1)/2 > KN" if run.rank == panel.prepared.paper_rank else run.label


def checks(panels: Sequence[Panel]) -> list[Check]:
    """The parts of the claim."""
    together = [abs(panel.behind(panel.sufficient) - panel.behind(panel.full)) for panel in panels]
    worse = []
    for one in panels:
        lower = [run for rank, run in one.lora.items() if rank < one.prepared.paper_rank]
        worse += [(run, one, one.half_way(run) >= one.half_way(one.sufficient)) for run in lower]
    not_better = [one.behind(run) >= one.behind(one.sufficient) - SAME for run, one, _ in worse]
    slower = sum(late for _, _, late in worse)
    ends = ", ".join(
        f"{(one.best / one.optimum.certificate.objective - 1):+.1%} ({one.prepared.label})" for one in panels
    )
    below = all(one.best <= one.optimum.certificate.objective * 1.1 for one in panels)
    return [
        Check(
            "In the real network, too, LoRA at the theorem's rank and full fine-tuning end at the same objective.",
            f"Their last objectives differ by at most {max(together, default=float('nan')):.1%} of the best gain, in "
            f"{len(panels)} settings; up to {SAME:.0%} counts as the same.",
            bool(together) and max(together) <= SAME,
        ),
        Check(
            "A lower rank is not better, and slower.",
            f"{sum(not_better)} of {len(worse)} runs at a lower rank end no better than the theorem's rank (by more "
            f"than {SAME:.0%} of the gain); {slower} take at least as many steps to 90% of the best gain.",
            bool(worse) and all(not_better) and slower == len(worse),
        ),
        Check(
            "The real network reaches the objective of the linearised optimum (up to 10%), or a lower one.",
            f"The best objective of the real network, relative to the certified optimum of its linearisation: {ends}. "
            "Below 0 the network found more than its linearisation has.",
            bool(panels) and below,
        ),
    ]


EXPERIMENT = Experiment(
    title="Training curves of the real network",
    claim="The picture of the linearised problem holds in the real, nonlinear network: LoRA of a sufficient rank ends "
    "where full fine-tuning does, and a lower rank takes longer.",
    where="beyond Section 6, which trains the linearised network",
    minutes=(6, 60),
    measure=measure,
)
