"""Training curves of the linearised problem: full fine-tuning and LoRA by rank, held against the certified optimum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ranksure.lab.claim import Check, Claim, Finding
from ranksure.lab.settings.named import Setting
from ranksure.lab.settings.panel import Column, Panel
from ranksure.lab.settings.panel import finding as of_panels
from ranksure.lab.settings.prepared import Prepared, certified
from ranksure.lab.settings.run import SettingRun
from ranksure.lab.settings.trained import NEAR, Trained, linear_full, linear_lora, relative_excess

SHARE = 0.1  # lambda as a share of lambda_max
WEAK = 0.03  # a second one, for the first setting: the weaker the penalty, the slower every method
NOT_STUCK = 1e-2  # relative excess; a run at a spurious minimum stays above what no more steps take away
_FASTER = 0.8  # a lower rank that needs less than this share of the steps counts as faster: starts differ
_FLOOR = 1e-6  # of the figure


def measure(run: SettingRun) -> Finding:
    """Run the experiment."""
    weak = [] if run.small else [WEAK]

    def one(prepared: Prepared) -> list[Panel]:
        prepared.release()
        shares = [SHARE, *weak]
        weak.clear()  # the first setting alone
        return [panel(run, prepared, share * prepared.lambda_max, f"{share:.0%} of λ_max") for share in shares]

    return finding(*run.each(pairs(run), one))


def pairs(run: SettingRun) -> list[tuple[Setting, int]]:
    """Six or more text settings (tasks by seeds), images and speech."""
    text, others = run.first_and_others()
    chosen = [(setting, run.seed + k) for setting in text for k in range(run.size(1, 2, 3))]
    return chosen[:1] if run.small else chosen + [(setting, run.seed) for setting in others]


def panel(run: SettingRun, prepared: Prepared, lam: float, name: str) -> Panel:
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
    optima = {panel.title: panel.optimum for panel in panels}
    columns: dict[str, Column] = {
        "optimum": lambda panel, run: panel.optimum.certificate.objective,
        "relative excess": lambda panel, run: run.excess,
        "steps": lambda panel, run: run.steps,
        "steps to 1e-4": lambda panel, run: run.reached,
        "seconds": lambda panel, run: run.seconds,
        "optimum's ranks": lambda panel, run: "+".join(str(rank) for rank in panel.optimum.ranks.values()),
        "its relative gap": lambda panel, run: panel.optimum.certificate.relative_gap,
    }
    return of_panels(
        panels,
        missing,
        checks(panels),
        columns,
        "objective: loss plus penalty",
        y="relative excess",
        transform=lambda curve: [max(relative_excess(y, optima[curve.group]), _FLOOR) for y in curve.y],
        level=NEAR,
        level_label="1e-4 above the optimum",
    )


# ---- what the numbers say


def checks(panels: Sequence[Panel]) -> list[Check]:
    """The parts of the claim."""
    gaps = [panel.optimum.certificate.relative_gap for panel in panels]
    found = [
        certified("The optimum of every setting", gaps),
        near("Full fine-tuning (proximal gradient)", {p.title: p.full for p in panels}),
        near("LoRA at a rank with r(r+1)/2 > KN (Adam)", {p.title: p.sufficient for p in panels}),
    ]
    descents = {p.title: p.descent for p in panels if p.descent is not None}
    if descents:
        found.append(descended(descents))
    return [*found, slower(panels)]


def near(what: str, runs: Mapping[str, Trained]) -> Check:
    """Every one of these runs ends within 1e-4 of the certified optimum."""
    worst = max(runs, key=lambda title: runs[title].excess)
    count = sum(run.excess <= NEAR for run in runs.values())
    return Check(
        f"{what} ends at the certified optimum, within {NEAR:g} relative.",
        f"{what} ends within {NEAR:g} of the certified optimum in {count} of {len(runs)} settings; the worst excess is "
        f"{runs[worst].excess:.1e} ({' '.join(worst.split())}).",
        count == len(runs),
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
    lower = [(panel, rank, run) for panel in panels for rank, run in panel.lower.items()]
    for panel, _, run in lower:
        enough = panel.sufficient.reached
        if run.excess > NEAR:
            stuck += 1
        elif enough is None or run.reached is None or run.reached < enough:
            early += 1
            much += enough is None or run.reached is None or run.reached < _FASTER * enough
        else:
            late += 1
    worst = [(run.excess, rank, " ".join(panel.title.split())) for panel, rank, run in lower]
    excess, rank, title = max(worst, default=(0.0, 0, "nothing"))
    return Check(
        "LoRA of a lower rank is slower than at the theorem's rank, or stuck.",
        f"Of {len(lower)} runs at a rank below the theorem's, {stuck} do not come within {NEAR:g} of the optimum (the "
        f"worst ends at an excess of {excess:.2g}: rank {rank}, {title}), {late} do in at least as many steps as at "
        f"the theorem's rank, and {early} in fewer, {much} of them in less than {_FASTER:.0%} of the steps.",
        bool(lower) and much == 0,
    )


CLAIM = Claim(
    title="Training curves of the linearised problem",
    claim="Full fine-tuning and LoRA of a rank with r(r+1)/2 > KN converge to the same global minimum; LoRA of a lower "
    "rank converges slower, or not to it.",
    source="Section 6, training curves; Theorems 3.1 and 4.1",
    minutes=(9, 200),
    measure=measure,
)
