"""Lambda for the network itself: a path from below ``lambda_max`` down, chosen by the network's own held-out loss."""

from __future__ import annotations

from ranksure.planner.network.pieces import Reached
from ranksure.planner.network.rows import HeldOutRows
from ranksure.planner.network.stage import Stage
from ranksure.records.plan import NetworkStep

SHARES = (0.95, 0.85, 0.7, 0.55, 0.4, 0.28, 0.18, 0.1, 0.05, 0.02)
"""Of lambda_max. Near it the steps are short: there the network leaves the branch that its linearisation follows."""

_TOLERANCE = 0.1
_MOST_GRADIENTS = 150  # of one step; a point that is not solved says nothing of its lambda
_PATIENCE = 2  # steps without a lower held-out loss, after which the path ends
EXPECTED = 200
"""Gradients of a path, as a rule."""


def follow_path(stage: Stage, lambda_max: float, select: HeldOutRows) -> tuple[list[NetworkStep], float, Reached]:
    """Solve at falling lambdas, each from the one before, until the held-out loss has risen twice.

    Returns:
        The steps (the first is no update, which is what ``lambda_max`` gives), the lambda of the lowest held-out loss,
        and the point reached there.
    """
    zero = Reached(stage.objective.zero(), stage.objective.at_zero, stage.objective.at_zero, status="converged")
    points, steps = [zero], [_step(lambda_max, zero, zero, select)]
    for share in SHARES:
        if stage.spent("following lambda"):
            break
        at = stage.at(lambda_max * share)
        (lam,) = set(at.objective.penalty.values())
        at.objective.memory_bytes = 0  # no capture for a sharper certificate of a step
        point = at.solved(f"path/{lam!r}", points[-1].factors, _TOLERANCE, _MOST_GRADIENTS, "following lambda")
        points.append(point)
        steps.append(_step(lam, point, zero, select))
        losses = [step.selection_loss or 0.0 for step in steps]
        if len(losses) - 1 - losses.index(min(losses)) >= _PATIENCE:
            break
    best = min(range(len(steps)), key=lambda i: steps[i].selection_loss or 0.0)
    return steps, steps[best].weight_decay, points[best]


def _step(lam: float, point: Reached, zero: Reached, select: HeldOutRows) -> NetworkStep:
    loss, accuracy = select.mean(point.factors)
    gained = zero.objective - point.objective
    return NetworkStep(
        weight_decay=lam,
        ranks=point.ranks,
        objective=point.objective,
        relative_gap=point.gap / gained if gained > 0 else None,
        selection_loss=loss,
        selection_accuracy=accuracy,
        gradients=point.gradients,
    )
