"""Training curves of the linearised problem: full fine-tuning and LoRA by rank, held against the certified optimum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ranksure.reproduce.experiment import Check, Curve, Experiment, Finding, Run
from ranksure.reproduce.figures import curve_panels
from ranksure.reproduce.prepared import Prepared
from ranksure.reproduce.settings import Setting
from ranksure.reproduce.trainings import NEAR, Trained, linear_full, linear_lora, relative_excess
from ranksure.solvers.solution import Solution

SHARE = 0.1  # lambda as a share of lambda_max
WEAK = 0.03  # a second one, for the first setting: the weaker the penalty, the slower every method
CERTIFIED = 1e-6
NOT_STUCK = 1e-2  # relative excess; a run at a spurious minimum stays above what no more steps take away
_FASTER = 0.8  # a lower rank that needs less than this share of the steps counts as faster: starts differ
_FLOOR = 1e-6  # of the figure


@dataclass(frozen=True)
class Panel:
    """One setting, seed and lambda.

    Attributes:
        title: of the panel.
        prepared: the setting.
        lam: lambda.
        optimum: the certified optimum.
        runs: full fine-tuning, LoRA by rank, and where it was run gradient descent.
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
        """LoRA by rank, trained by Adam."""
        return {run.rank: run for run in self.runs if run.rank is not None and run.method == "adam"}

    @property
    def sufficient(self) -> Trained:
        """LoRA at the paper's rank."""
        return self.lora[self.prepared.paper_rank]

    @property
    def descent(self) -> Trained | None:
        """LoRA at the paper's rank by plain gradient descent, where it was run."""
        return next((run for run in self.runs if run.method == "gd"), None)


def measure(run: Run) -> Finding:
    """Run the experiment."""
    ready, missing = run.available(pairs(run))
    wanted: list[tuple[Prepared, float, str]] = []
    for index, prepared in enumerate(ready):
        prepared.release()
        shares = (SHARE, WEAK) if index == 0 and not run.small else (SHARE,)
        wanted += [(prepared, share * prepared.lambda_max, f"{share:.0%} of λ_max") for share in shares]
    panels = [panel(run, prepared, lam, name) for prepared, lam, name in wanted]
    return finding(panels, missing)


def pairs(run: Run) -> list[tuple[Setting, int]]:
    """Six or more text settings (tasks by seeds), images and speech."""
    text, others = run.first_and_others()
    seeds = run.size(1, 2, 3)
    chosen = [(setting, run.seed + k) for k in range(seeds) for setting in text]
    chosen.sort(key=lambda pair: text.index(pair[0]))
    return chosen[:1] if run.small else chosen + [(setting, run.seed) for setting in others]


def panel(run: Run, prepared: Prepared, lam: float, name: str) -> Panel:
    """All trainings of one setting at one lambda."""
    optimum = prepared.optimum(lam)
    few = run.size([1], [1, 2, 4], [1, 2, 4, 8])
    runs = [linear_full(run, prepared, lam)]
    runs += [linear_lora(run, prepared, lam, rank) for rank in prepared.ranks(few)]
    if prepared.n_outputs == 2 and prepared.seed == run.seed:  # thousands of steps: only where a step is cheap
        runs.append(linear_lora(run, prepared, lam, prepared.paper_rank, "gd"))
    title = f"{prepared.label}\nN={prepared.n}, K={prepared.n_outputs}, λ={name}"
    return Panel(title, prepared, lam, optimum, runs)


def finding(panels: Sequence[Panel], missing: Sequence[str]) -> Finding:
    """What the trainings say."""
    curves = [
        Curve(_label(run, panel), [x for x, _ in run.curve], [y for _, y in run.curve], panel.title)
        for panel in panels
        for run in panel.runs
    ]
    optima = {panel.title: panel.optimum for panel in panels}
    columns = ["setting", "K", "N", "lambda", "training", "rank", "objective", "optimum", "relative excess"]
    columns += ["steps", "steps to 1e-4", "seconds", "optimum's ranks", "its relative gap"]
    rows = [
        [
            panel.prepared.label,
            panel.prepared.n_outputs,
            panel.prepared.n,
            panel.lam,
            f"{'LoRA' if run.rank else 'full fine-tuning'}, {run.method}",
            run.rank,
            run.objective,
            panel.optimum.certificate.objective,
            run.excess,
            run.steps,
            run.reached,
            run.seconds,
            "+".join(str(rank) for rank in panel.optimum.ranks.values()),
            panel.optimum.certificate.relative_gap,
        ]
        for panel in panels
        for run in panel.runs
    ]
    figure = curve_panels(
        curves,
        x="step",
        y="relative excess",
        transform=lambda curve: [relative_excess(y, optima[curve.group]) for y in curve.y],
        y_scale="log",
        level=NEAR,
        level_label="1e-4 above the optimum",
        floor=_FLOOR,
    )
    return Finding(
        checks=checks(panels),
        columns=columns,
        rows=rows,
        figure=figure,
        curves=curves,
        reference={title: optimum.certificate.objective for title, optimum in optima.items()},
        axes={"x": "step", "y": "objective: loss plus penalty"},
        missing=missing,
    )


def _label(run: Trained, panel: Panel) -> str:
    """Ranks differ between panels where K N does: the paper's rank goes by that name, too."""
    if run.rank == panel.prepared.paper_rank:
        return "theorem's rank, gradient descent" if run.method == "gd" else "theorem's rank, r(r+1)/2 > KN"
    return run.label


# ---- what the numbers say


def checks(panels: Sequence[Panel]) -> list[Check]:
    """The parts of the claim."""
    found = [certified(panels), near("Full fine-tuning (proximal gradient)", {p.title: p.full for p in panels})]
    found.append(near("LoRA at a rank with r(r+1)/2 > KN (Adam)", {p.title: p.sufficient for p in panels}))
    descents = {p.title: p.descent for p in panels if p.descent is not None}
    if descents:
        found.append(descended(descents))
    return [*found, slower(panels)]


def certified(panels: Sequence[Panel]) -> Check:
    """Every optimum has a certificate of relative gap at most 1e-6."""
    gaps = [panel.optimum.certificate.relative_gap for panel in panels]
    worst = max(gaps, default=float("inf"))
    return Check(
        f"The optimum of every setting is certified to a relative gap of at most {CERTIFIED:g}.",
        f"{sum(gap <= CERTIFIED for gap in gaps)} of {len(gaps)} optima are certified; the largest relative gap is "
        f"{worst:.1e}.",
        bool(gaps) and worst <= CERTIFIED,
    )


def near(what: str, runs: Mapping[str, Trained]) -> Check:
    """Every one of these runs ends within 1e-4 of the certified optimum."""
    excesses = {title: run.excess for title, run in runs.items()}
    worst = max(excesses, key=excesses.__getitem__, default="")
    count = sum(excess <= NEAR for excess in excesses.values())
    return Check(
        f"{what} ends at the certified optimum, within {NEAR:g} relative.",
        f"{what} ends within {NEAR:g} of the certified optimum in {count} of {len(runs)} settings; the worst excess is "
        f"{excesses[worst]:.1e} ({' '.join(worst.split())})."
        if runs
        else f"{what} was not run.",
        bool(runs) and count == len(runs),
    )


def descended(runs: Mapping[str, Trained]) -> Check:
    """Gradient descent is nowhere stuck: it is slow, so what counts is that it comes within a percent."""
    worst = max(runs, key=lambda title: runs[title].excess)
    close = sum(run.excess <= NOT_STUCK for run in runs.values())
    there = sum(run.excess <= NEAR for run in runs.values())
    steps = max(run.steps for run in runs.values())
    return Check(
        f"Gradient descent at the same rank is not stuck either: it comes within {NOT_STUCK:g} relative.",
        f"Gradient descent (with momentum) at the theorem's rank comes within {NOT_STUCK:g} of the certified optimum "
        f"in {close} of {len(runs)} settings, and within {NEAR:g} in {there}, in at most {steps} steps; the worst "
        f"excess is {runs[worst].excess:.1e} ({' '.join(worst.split())}).",
        close == len(runs),
    )


def slower(panels: Sequence[Panel]) -> Check:
    """A rank that is too low is stuck or takes more steps than the sufficient one."""
    stuck = late = early = much = 0
    for panel in panels:
        enough = panel.sufficient.reached
        for rank, run in panel.lora.items():
            if rank >= panel.prepared.paper_rank:
                continue
            if run.excess > NEAR:
                stuck += 1
            elif enough is None or run.reached is None or run.reached < enough:
                early += 1
                much += enough is None or run.reached is None or run.reached < _FASTER * enough
            else:
                late += 1
    total = stuck + late + early
    lower = [
        (run.excess, rank, " ".join(panel.title.split()))
        for panel in panels
        for rank, run in panel.lora.items()
        if rank < panel.prepared.paper_rank
    ]
    excess, rank, title = max(lower, default=(0.0, 0, "nothing"))
    return Check(
        "LoRA of a lower rank is slower than at the theorem's rank, or stuck.",
        f"Of {total} runs at a rank below the theorem's, {stuck} do not come within {NEAR:g} of the optimum (the worst "
        f"ends at an excess of {excess:.2g}: rank {rank}, {title}), {late} do in at least as many steps as at the "
        f"theorem's rank, and {early} in fewer, {much} of them in less than {_FASTER:.0%} of the steps.",
        total > 0 and much == 0,
    )


EXPERIMENT = Experiment(
    title="Training curves of the linearised problem",
    claim="Full fine-tuning and LoRA of a rank with r(r+1)/2 > KN converge to the same global minimum; LoRA of a lower "
    "rank converges slower, or not to it.",
    where="Section 6, training curves; Theorems 3.1 and 4.1",
    minutes=(9, 200),
    measure=measure,
)
