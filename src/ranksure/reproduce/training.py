"""One loop for LoRA training, whether the network is linearised or real: Adam or gradient descent on all rows.

The objective is the factored one, loss plus ``(lambda/2)(||u||^2 + ||v||^2)``: the weight decay is a true L2 penalty
also under Adam, whose decoupled variant minimises something else. The optimisers and the schedule are torch's own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ranksure.errors import SettingError
from ranksure.factors import Factors
from ranksure.solvers.first_order import log_spaced

Objective = Callable[[Factors], tuple[float, Factors]]
"""Value on factors, and its gradient."""

_POINTS = 60  # points of a curve
_MOMENTUM = 0.9  # of gradient descent, Nesterov's


@dataclass(frozen=True)
class Rule:
    """How a run is made, and when it ends.

    Attributes:
        method: ``adam``, or ``gd``: gradient descent with Nesterov's momentum.
        learning_rate: the first one; it is halved whenever the objective has made no new minimum in ``patience``
            steps (``gd`` then starts again from its best point).
        steps: most steps.
        patience: see ``learning_rate``.
        window: a run ends when the objective has fallen by less than ``tolerance`` of its whole gain in so many steps.
        tolerance: see ``window``.
    """

    method: str = "adam"
    learning_rate: float = 5e-3
    steps: int = 2000
    patience: int = 10
    window: int = 200
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.method not in ("adam", "gd"):
            raise SettingError(f"unknown method {self.method!r}: use adam or gd")
        if not (0 < self.learning_rate < math.inf and self.steps >= 1 and self.patience >= 0 and self.window >= 1):
            raise SettingError(
                "the learning rate, the steps and the window must be positive, the patience not negative"
            )


@dataclass(frozen=True)
class Training:
    """A finished run.

    Attributes:
        factors: those of the lowest objective.
        value: that objective.
        curve: (step, objective) at about sixty steps, spaced geometrically; the start is step 0.
        steps: steps made.
        seconds: wall-clock seconds.
        ended: ``target``, ``flat`` (see :class:`Rule`) or ``steps``.
        reached: the first step at or below ``level``; None if there was none.
    """

    factors: Factors
    value: float
    curve: list[tuple[int, float]]
    steps: int
    seconds: float
    ended: str
    reached: int | None = None


def train(
    objective: Objective,
    start: Factors,
    rule: Rule,
    *,
    target: float = -math.inf,
    level: float = -math.inf,
    progress: Callable[[int, int], None] | None = None,
) -> Training:
    """Train factors from ``start``.

    Args:
        objective: what is minimised.
        start: factors by block; those of rank 0 stay so.
        rule: method, learning rate, and when the run ends.
        target: a value at which the run may end.
        level: a value whose first step is wanted.
        progress: called with (steps done, most steps).

    Raises:
        SettingError: the objective is not finite at some step: the learning rate is too large.
    """
    began = time.perf_counter()
    names = list(start)
    x = [tensor.detach().clone().requires_grad_() for name in names for tensor in start[name]]
    if rule.method == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(x, lr=rule.learning_rate)
    else:
        optimizer = torch.optim.SGD(x, lr=rule.learning_rate, momentum=_MOMENTUM, nesterov=True)
    # No new minimum, however small, is what tells a step that is too long from a slow stretch near a saddle.
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=rule.patience, threshold=0)
    at = {0, *log_spaced(rule.steps, _POINTS)}
    curve: list[tuple[int, float]] = []
    lowest: list[float] = []  # the best value up to each step
    kept: list[Tensor] = []
    ended, step, value, reached = "steps", 0, math.inf, None
    for step in range(rule.steps + 1):
        value, gradient = objective(_factors(names, x))
        if not math.isfinite(value):
            raise SettingError(
                f"training diverged at step {step}: the learning rate {rule.learning_rate:g} is too large"
            )
        if not lowest or value < lowest[-1]:
            kept = [tensor.detach().clone() for tensor in x]
        lowest.append(min(value, lowest[-1]) if lowest else value)
        if step in at:
            curve.append((step, value))
        if reached is None and value <= level:
            reached = step
        if value <= target:
            ended = "target"
            break
        if step >= rule.window and _is_flat(lowest, rule):
            ended = "flat"
            break
        if step == rule.steps:
            break
        for tensor, slope in zip(x, (g for name in names for g in gradient[name]), strict=True):
            tensor.grad = slope
        optimizer.step()
        rate = optimizer.param_groups[0]["lr"]
        schedule.step(value)
        if rule.method == "gd" and optimizer.param_groups[0]["lr"] < rate:
            # Momentum at a rate that is too large goes far astray: back to the best point, from rest.
            with torch.no_grad():
                for tensor, best in zip(x, kept, strict=True):
                    tensor.copy_(best)
            optimizer.state.clear()
        if progress is not None:
            progress(step + 1, rule.steps)
    if curve[-1][0] != step:
        curve.append((step, value))
    return Training(_factors(names, kept), lowest[-1], curve, step, time.perf_counter() - began, ended, reached)


def _is_flat(lowest: list[float], rule: Rule) -> bool:
    """Whether the last window brought next to nothing. Before any gain there is nothing to compare with: go on."""
    gained = lowest[0] - lowest[-1]
    return gained > 1e-2 * abs(lowest[0]) and lowest[-1 - rule.window] - lowest[-1] < rule.tolerance * gained


def _factors(names: list[str], x: list[Tensor]) -> Factors:
    return {name: (x[2 * i].detach(), x[2 * i + 1].detach()) for i, name in enumerate(names)}
