"""A point of the factored objective with its derivatives, and how to leave it along a direction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ranksure.certificate import PointState, certify_point
from ranksure.curvature import hessian_vector
from ranksure.factors import Factors
from ranksure.operators.base import cast_factors, check_factors, zero_factors
from ranksure.problem import Problem
from ranksure.solvers.descent import gradient_scale
from ranksure.solvers.solution import Solution

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Escape:
    """A second-order descent from a saddle.

    Attributes:
        direction: factors of unit norm, of the point's shapes.
        curvature: their Rayleigh quotient with the Hessian of ``Phi``; negative.
        step: the signed step at which the decrease was measured: go to ``x + step * direction``.
        decrease: ``Phi(x) - Phi(x + step * direction)``, positive beyond rounding.
        mean_decrease: ``Phi(x)`` less the mean of ``Phi`` at both signs of the step: the part that no gradient
            explains, positive beyond rounding.
    """

    direction: Factors
    curvature: float
    step: float
    decrease: float
    mean_decrease: float

    def apply(self, factors: Factors) -> Factors:
        """The point after the step."""
        return moved(factors, self.direction, self.step)


class Point:
    """The point with its derivatives, on the problem as stored and on the span of its tokens."""

    def __init__(self, problem: Problem, factors: Factors, optimum: Solution | None) -> None:
        self.problem = problem.exact
        check_factors(factors, problem.operator)
        like = self.problem.operator
        self.factors = {**zero_factors(like), **cast_factors(factors, like)}
        self.moving = {name: pair for name, pair in self.factors.items() if pair[0].shape[1] > 0}
        known = certify_point(self.problem, optimum.factors).certificate.dual if optimum is not None else -math.inf
        self.state = certify_point(self.problem, self.factors, known)
        self.value, self.gradient = self.state.certificate.objective, {}
        if self.moving:
            value, self.gradient = self.problem.value_and_gradient(self.moving)
            self.value = float(value)
        # What the factors have outside the span has curvature lambda, so the span decides the inertia.
        self.working, self.bases = problem.reduced
        self.eps = float(torch.finfo(self.problem.operator.dtype).eps)
        self.inner = self.bases.restrict(self.moving)

    @cached_property
    def inner_state(self) -> PointState:
        return self.state if self.bases.is_trivial else certify_point(self.working, self.inner)

    @cached_property
    def gradient_error(self) -> float:
        """Bound on the rounding of the gradient's norm."""
        own = self.problem.operator.adjoint_error(self.problem.residual(self.problem.dual_variable(self.state.logits)))
        sizes = {n: float(g.norm()) + self.problem.penalty[n] for n, g in self.state.gradients.items()}
        return math.hypot(*((own[n] + 64 * _EPS * sizes[n]) * norm_of({n: pair}) for n, pair in self.moving.items()))

    def across(self, direction: Factors) -> tuple[Factors, float] | None:
        """The direction less its rotations, at unit norm, and its curvature where that is negative beyond doubt.

        Doubt is rounding, and the curvature that the residual gradient can feign: ``||gradient|| / ||x||`` at the
        natural size of ``x``, ten times over. (Along a rotation the gradient does: the orbit bends, the line does not.)
        """
        direction = self.bases.lift(direction)
        direction = {name: less_rotations(self.moving[name], pair) for name, pair in direction.items()}
        norm = norm_of(direction)
        if norm < 1e-3:
            return None
        direction = {name: (du / norm, dv / norm) for name, (du, dv) in direction.items()}
        image = hessian_vector(self.problem, self.moving, self.state, direction)
        curvature = sum(float((a * b).sum()) for n in image for a, b in zip(direction[n], image[n], strict=True))
        penalty = self.problem.penalty
        size = max(penalty[n] + float(g.norm()) for n, g in self.state.gradients.items())
        feigned = norm_of(self.gradient) / gradient_scale(self.problem) * min(penalty.values())
        return (direction, curvature) if curvature < -(64 * self.eps * size + 10 * feigned) else None

    def escape(self, direction: Factors, curvature: float) -> Escape | None:
        """The best of a few steps both ways whose mean lies below the point beyond rounding; None if there is none."""
        rounding = 4 * self.state.certificate.rounding + 64 * self.eps * abs(self.value)
        natural = gradient_scale(self.problem) / min(self.problem.penalty.values())  # the largest norm that can help
        best: Escape | None = None
        for exponent in range(9):
            step = natural * 10 ** (-exponent / 2)
            trials = (moved(self.moving, direction, sign * step) for sign in (1, -1))
            ahead, back = (float(self.problem.value_and_gradient(trial)[0]) for trial in trials)
            mean, decrease = self.value - 0.5 * (ahead + back), self.value - min(ahead, back)
            if mean > rounding and (best is None or decrease > best.decrease):
                best = Escape(direction, curvature, step if ahead <= back else -step, decrease, mean)
        return best


def less_rotations(factor: tuple[Tensor, Tensor], direction: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A direction of one block less its projection on ``{Q S, S skew}``.

    The least-squares ``S`` solves ``Q^T Q S + S Q^T Q = Q^T D - D^T Q``.
    """
    q, d = torch.cat(factor), torch.cat(direction)
    values, basis = torch.linalg.eigh(q.T @ q)
    inner = basis.T @ (q.T @ d) @ basis
    sums = values[:, None] + values
    skew = torch.where(sums > 1e-14 * values[-1], (inner - inner.T) / sums.clamp(min=1e-300), 0)
    rest = d - q @ (basis @ skew @ basis.T)
    return rest[: len(factor[0])], rest[len(factor[0]) :]


def moved(factors: Factors, direction: Factors, step: float) -> Factors:
    """``x + step * direction``; blocks that the direction lacks stay."""
    out = dict(factors)
    for name, (du, dv) in direction.items():
        u, v = factors[name]
        out[name] = (u + step * du.to(u), v + step * dv.to(v))
    return out


def norm_of(factors: Factors) -> float:
    """Euclidean norm of all factors together."""
    return math.sqrt(sum(float(part.double().square().sum()) for pair in factors.values() for part in pair))
