"""Training curves of the real, nonlinear network: full fine-tuning and LoRA by rank, beside the linearised optimum."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ranksure.lab.claim import Check, Claim, Finding
from ranksure.lab.settings.panel import Column, Panel, reference
from ranksure.lab.settings.panel import finding as of_panels
from ranksure.lab.settings.prepared import Prepared
from ranksure.lab.settings.run import SettingRun
from ranksure.lab.settings.trained import Trained, real_full, real_lora

SHARE = 0.1  # lambda as a share of lambda_max of the linearised problem
SAME = 0.02  # objectives that differ by less than this share of the gain are taken as equal: runs are not at their end


def measure(run: SettingRun) -> Finding:
    """Run the experiment."""
    text, others = run.first_and_others()
    wanted = [(setting, run.seed) for setting in text[: run.size(1, 1, len(text))]]
    if not run.small:
        of_each_kind = {setting.kind: setting for setting in reversed(others)}.values()  # the first of each
        wanted += [(setting, run.seed) for setting in (others if run.full else reversed(of_each_kind))]
    return finding(*run.each(wanted, lambda prepared: [panel(run, prepared)]))


def panel(run: SettingRun, prepared: Prepared) -> Panel:
    """All trainings of one setting."""
    lam = SHARE * prepared.lambda_max
    few = run.size([1], [1, 2], [1, 2, 4, 8])
    runs = [real_full(run, prepared, lam), *(real_lora(run, prepared, lam, rank) for rank in prepared.ranks(few))]
    title = f"{prepared.label}\nN={prepared.n}, K={prepared.n_outputs}, λ={SHARE:.0%} of λ_max"
    return Panel(title, prepared, lam, prepared.optimum(lam), runs)


def best(panel: Panel) -> float:
    """Lowest objective of all runs."""
    return min(run.value for run in panel.runs)


def behind(panel: Panel, run: Trained) -> float:
    """How far a run ends above the best, as a share of the best one's gain."""
    return (run.value - best(panel)) / (panel.optimum.certificate.objective_at_zero - best(panel))


def half_way(panel: Panel, run: Trained) -> float:
    """First step at which a run has 90% of the best one's gain; infinite if never."""
    zero = panel.optimum.certificate.objective_at_zero
    level = zero - 0.9 * (zero - best(panel))
    return next((step for step, value in run.curve if value <= level), math.inf)


def finding(panels: Sequence[Panel], missing: Sequence[str]) -> Finding:
    """What the trainings say."""
    columns: dict[str, Column] = {
        "behind the best": behind,
        "linearised optimum": lambda panel, run: panel.optimum.certificate.objective,
        "steps": lambda panel, run: run.steps,
        "steps to 90% of the best gain": lambda panel, run: _finite(half_way(panel, run)),
        "seconds": lambda panel, run: run.seconds,
    }
    return of_panels(
        panels,
        missing,
        checks(panels),
        columns,
        "objective of the real network: loss plus penalty",
        y="objective of the real network",
        level=reference(panels),
        level_label="certified optimum of the linearised problem",
    )


def _finite(value: float) -> float | None:
    return value if value < math.inf else None


def checks(panels: Sequence[Panel]) -> list[Check]:
    """The parts of the claim."""
    together = [abs(behind(panel, panel.sufficient) - behind(panel, panel.full)) for panel in panels]
    lower = [(panel, run) for panel in panels for run in panel.lower.values()]
    not_better = sum(behind(panel, run) >= behind(panel, panel.sufficient) - SAME for panel, run in lower)
    slower = sum(half_way(panel, run) >= half_way(panel, panel.sufficient) for panel, run in lower)
    optima = [panel.optimum.certificate.objective for panel in panels]
    ends = ", ".join(
        f"{(best(panel) / optimum - 1):+.1%} ({panel.prepared.label})"
        for panel, optimum in zip(panels, optima, strict=True)
    )
    below = all(best(panel) <= optimum * 1.1 for panel, optimum in zip(panels, optima, strict=True))
    return [
        Check(
            "In the real network, too, LoRA at the theorem's rank and full fine-tuning end at the same objective.",
            f"Their last objectives differ by at most {max(together):.1%} of the best gain, in "
            f"{len(panels)} settings; up to {SAME:.0%} counts as the same.",
            max(together) <= SAME,
        ),
        Check(
            "A lower rank is not better, and slower.",
            f"{not_better} of {len(lower)} runs at a lower rank end no better than the theorem's rank (by more "
            f"than {SAME:.0%} of the gain); {slower} take at least as many steps to 90% of the best gain.",
            bool(lower) and not_better == slower == len(lower),
        ),
        Check(
            "The real network reaches the objective of the linearised optimum (up to 10%), or a lower one.",
            f"The best objective of the real network, relative to the certified optimum of its linearisation: {ends}. "
            "Below 0 the network found more than its linearisation has.",
            below,
        ),
    ]


CLAIM = Claim(
    title="Training curves of the real network",
    claim="The picture of the linearised problem holds in the real, nonlinear network: LoRA of a sufficient rank ends "
    "where full fine-tuning does, and a lower rank takes longer.",
    source="beyond Section 6, which trains the linearised network",
    minutes=(6, 60),
    measure=measure,
)
