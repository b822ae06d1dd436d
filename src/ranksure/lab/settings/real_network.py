"""The real network as an objective: full-batch loss of LoRA factors or dense updates, its frozen layers run once.

What lies below the targets is the same in every step (:mod:`ranksure.network.prefix`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from ranksure.data.samples import Samples
from ranksure.factors import Delta, Factors
from ranksure.lab.settings.training import Course, Rule, Training
from ranksure.losses import CrossEntropy
from ranksure.network.logits import Batch, frozen, logits_of
from ranksure.network.prefix import cached_prefix
from ranksure.network.side_path import applied
from ranksure.solvers.proximal import threshold_singular_values
from ranksure.tasks.task import Task


class RealNetwork:
    """A task's network on fixed rows, with its targets by name; frozen, its head fitted.

    As a context, it runs what lies below the targets once.
    """

    def __init__(self, task: Task[Any], targets: Mapping[str, nn.Module], rows: Samples) -> None:
        self.task, self.targets = task, dict(targets)
        batches, back = task.batches_by_length(rows)
        self.labels, self.back, self.n = task.labels(rows), back, len(rows)
        order = torch.argsort(back)
        sizes = [next(iter(batch.values())).shape[0] for batch in batches]
        self.batches = list(zip(batches, self.labels[order].split(sizes), strict=True))
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        batches = [batch for batch, _ in self.batches]
        self._opened.enter_context(cached_prefix(self.task.model, batches, self.targets))
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def logits(self, factors: Factors) -> Tensor:
        """Logits ``(N, K)`` at ``W0 + u v^T``, float64, in the order of the rows."""
        with frozen(self.task.model), torch.no_grad(), applied(self.targets, _single(factors)):
            parts = [self._forward(batch) for batch, _ in self.batches]
        return torch.cat(parts).double()[self.back]

    def loss_and_gradient(self, factors: Factors, moved: str = "uv") -> tuple[float, Factors]:
        """Mean cross-entropy at ``W0 + u v^T`` and its gradient with respect to the factors named in ``moved``."""
        x: Factors = {}
        for name, (u, v) in _single(factors).items():
            x[name] = (u.requires_grad_("u" in moved), v.requires_grad_("v" in moved))
        total = 0.0
        with frozen(self.task.model), torch.enable_grad(), applied(self.targets, x):
            for batch, labels in self.batches:
                loss = nn.functional.cross_entropy(self._forward(batch), labels, reduction="sum") / self.n
                loss.backward()
                total += float(loss.detach())

        def slope(tensor: Tensor, like: Tensor) -> Tensor:
            return torch.zeros_like(like) if tensor.grad is None else tensor.grad.to(like)

        gradient = {name: (slope(u, factors[name][0]), slope(v, factors[name][1])) for name, (u, v) in x.items()}
        return total, gradient

    def lora_objective(self, lam: float) -> Callable[[Factors], tuple[float, Factors]]:
        """Loss plus ``(lambda/2)(||u||^2 + ||v||^2)``."""

        def objective(factors: Factors) -> tuple[float, Factors]:
            value, gradient = self.loss_and_gradient(factors)
            for name, (u, v) in factors.items():
                value += 0.5 * lam * float(u.square().sum() + v.square().sum())
                gu, gv = gradient[name]
                gradient[name] = (gu.add(u, alpha=lam), gv.add(v, alpha=lam))
            return value, gradient

        return objective

    def _forward(self, batch: Batch) -> Tensor:
        return logits_of(self.task.model, batch).float()


def full_fine_tuning(
    network: RealNetwork,
    shapes: Mapping[str, tuple[int, int]],
    lam: float,
    rule: Rule,
    *,
    step: float,
    progress: Callable[[int, int], None] | None = None,
) -> Training:
    """Proximal gradient on dense updates of the real network: every step soft-thresholds the singular values.

    Accelerated, with the momentum dropped whenever the objective rises; ``step`` is halved where the quadratic bound
    fails. The objective is ``loss + lambda sum_j ||delta_j||_*``.

    Returns:
        The run; its factors are those of the thresholded singular value decomposition.
    """
    dense = _Dense(network, shapes, lam, step)
    course = Course(rule)
    x = ahead = {name: torch.zeros(shape) for name, shape in shapes.items()}
    value, momentum = dense.loss(x), 1.0
    course.at(0, value, lambda: {name: (torch.zeros(m, 0), torch.zeros(n, 0)) for name, (m, n) in shapes.items()})
    for count in range(1, rule.steps + 1):
        previous, before = x, value
        x, value, factors = dense.step(ahead)
        course.at(count, value, lambda factors=factors: factors)
        rose = value > before
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        weight = 0.0 if rose else (momentum - 1) / following
        momentum = 1.0 if rose else following
        ahead = {name: torch.lerp(previous[name], d, 1 + weight) for name, d in x.items()}
        if progress is not None:
            progress(count, rule.steps)
        if course.flat:
            return course.ended("flat")
    return course.ended("steps")


class _Dense:
    """Dense updates of a network under a nuclear norm, and the step size, halved where the quadratic bound fails."""

    def __init__(self, network: RealNetwork, shapes: Mapping[str, tuple[int, int]], lam: float, step: float) -> None:
        self.network, self.lam, self.size = network, lam, step
        self.eyes = {name: torch.eye(n) for name, (_, n) in shapes.items()}

    def loss(self, delta: Delta) -> float:
        logits = self.network.logits(self._factors(delta))
        return float(CrossEntropy().value(logits, self.network.labels).mean())

    def step(self, ahead: Delta) -> tuple[Delta, float, Factors]:
        """From ``ahead``: gradient step and soft threshold. The update, its objective, and its factors."""
        loss, pairs = self.network.loss_and_gradient(self._factors(ahead), moved="u")
        gradient = {name: pair[0] for name, pair in pairs.items()}
        while True:
            step = self.size
            parts = {
                name: threshold_singular_values(d - step * gradient[name], step * self.lam) for name, d in ahead.items()
            }
            x = {name: (p * s) @ q.T for name, (p, s, q) in parts.items()}
            moved = {name: x[name] - d for name, d in ahead.items()}
            now = self.loss(x)
            linear = sum(float((gradient[name] * d).sum()) for name, d in moved.items())
            square = sum(float(d.square().sum()) for d in moved.values())
            if now <= loss + linear + square / (2 * step) + 1e-6 * abs(loss) or step < 1e-12:
                break
            self.size /= 2
        value = now + self.lam * sum(float(s.sum()) for _, s, _ in parts.values())
        return x, value, {name: (p * s.sqrt(), q * s.sqrt()) for name, (p, s, q) in parts.items()}

    def _factors(self, delta: Delta) -> Factors:
        return {name: (d, self.eyes[name]) for name, d in delta.items()}


def _single(factors: Factors) -> Factors:
    return {name: (u.detach().float().clone(), v.detach().float().clone()) for name, (u, v) in factors.items()}
