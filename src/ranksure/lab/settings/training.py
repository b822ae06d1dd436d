"""One loop for LoRA training, whether the network is linearised or real: Adam or gradient descent on all rows.

The objective is the factored one, loss plus ``(lambda/2)(||u||^2 + ||v||^2)``: the weight decay is a true L2 penalty
also under Adam, whose decoupled variant minimises something else. The optimisers and the schedule are torch's own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
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
    """A finished run."""

    factors: Factors  # those of the lowest objective
    value: float  # that objective
    curve: Sequence[tuple[float, float]]  # (step, objective), spaced geometrically; the start is step 0
    steps: int
    seconds: float
    ended: str  # target, flat (see Rule) or steps
    reached: int | None = None  # the first step at or below a level; None if there was none


class Course:
    """What a run has seen so far: its curve, its lowest objective, and whether it still gets anywhere.

    ``least`` is the gain, as a share of the first objective, before which nothing is called flat.
    """

    def __init__(self, rule: Rule, least: float = 0.0) -> None:
        self.rule, self.least, self.began = rule, least, time.perf_counter()
        self.marks = {0, *log_spaced(rule.steps, _POINTS)}
        self.curve: list[tuple[int, float]] = []
        self.lowest: list[float] = []  # the best value up to each step
        self.last = (0, math.inf)
        self.best: Factors = {}

    def at(self, step: int, value: float, factors: Callable[[], Factors]) -> None:
        """Note a step; its factors are asked for where its objective is the lowest so far."""
        self.last = step, value
        if not self.lowest or value < self.lowest[-1]:
            self.best = factors()
        self.lowest.append(min(value, self.lowest[-1]) if self.lowest else value)
        if step in self.marks:
            self.curve.append(self.last)

    @property
    def flat(self) -> bool:
        """Whether the last window brought next to nothing. Before any gain there is nothing to compare with."""
        step, rule, lowest = self.last[0], self.rule, self.lowest
        gained = lowest[0] - lowest[-1]
        if step < rule.window or gained <= self.least * abs(lowest[0]):
            return False
        return lowest[-1 - rule.window] - lowest[-1] < rule.tolerance * gained

    def ended(self, why: str, reached: int | None = None) -> Training:
        step = self.last[0]
        curve = self.curve if self.curve[-1][0] == step else [*self.curve, self.last]
        return Training(self.best, self.lowest[-1], curve, step, time.perf_counter() - self.began, why, reached)


def train(
    objective: Objective,
    start: Factors,
    rule: Rule,
    *,
    target: float = -math.inf,
    level: float = -math.inf,
    progress: Callable[[int, int], None] | None = None,
) -> Training:
    """Train factors from ``start``; those of rank 0 stay so.

    The run may end at the value ``target``; ``level`` is a value whose first step is wanted.

    Raises:
        SettingError: the objective is not finite at some step: the learning rate is too large.
    """
    steps, course, reached = _Steps(start, rule), Course(rule, least=1e-2), None
    for step in range(rule.steps + 1):
        value, gradient = objective(steps.factors())
        if not math.isfinite(value):
            raise SettingError(
                f"training diverged at step {step}: the learning rate {rule.learning_rate:g} is too large"
            )
        course.at(step, value, steps.copy)
        if reached is None and value <= level:
            reached = step
        if value <= target:
            return course.ended("target", reached)
        if course.flat:
            return course.ended("flat", reached)
        if step < rule.steps:
            steps.step(value, gradient, course.best)
            if progress is not None:
                progress(step + 1, rule.steps)
    return course.ended("steps", reached)


class _Steps:
    """The factors that are trained, torch's optimiser of them, and its learning rate."""

    def __init__(self, start: Factors, rule: Rule) -> None:
        self.names = list(start)
        self.x = [tensor.detach().clone().requires_grad_() for pair in start.values() for tensor in pair]
        self.restarts = rule.method == "gd"
        if rule.method == "adam":
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.x, lr=rule.learning_rate)
        else:
            self.optimizer = torch.optim.SGD(self.x, lr=rule.learning_rate, momentum=_MOMENTUM, nesterov=True)
        # No new minimum, however small, is what tells a step that is too long from a slow stretch near a saddle.
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=0.5, patience=rule.patience, threshold=0
        )

    def factors(self) -> Factors:
        """The factors, not copied."""
        return {name: (self.x[2 * i].detach(), self.x[2 * i + 1].detach()) for i, name in enumerate(self.names)}

    def copy(self) -> Factors:
        return {name: (u.clone(), v.clone()) for name, (u, v) in self.factors().items()}

    def step(self, value: float, gradient: Factors, best: Factors) -> None:
        """One step; gradient descent goes back to the best factors, from rest, where its rate is halved."""
        for tensor, slope in zip(self.x, _tensors(gradient, self.names), strict=True):
            tensor.grad = slope
        self.optimizer.step()
        rate = self.optimizer.param_groups[0]["lr"]
        self.schedule.step(value)
        if self.restarts and self.optimizer.param_groups[0]["lr"] < rate:  # momentum goes far astray at such a rate
            with torch.no_grad():
                for tensor, kept in zip(self.x, _tensors(best, self.names), strict=True):
                    tensor.copy_(kept)
            self.optimizer.state.clear()


def _tensors(factors: Factors, names: list[str]) -> list[Tensor]:
    return [tensor for name in names for tensor in factors[name]]
