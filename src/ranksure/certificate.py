# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Optimality certificates: a duality gap that bounds the distance to the best of every rank.

From any point, ``R = w * gradient of the loss`` scaled by ``c`` is feasible for the Fenchel dual when
``c ||A_j^*(R)||_op <= lambda_j`` for every block and ``c R / w`` is in the conjugate's domain, so
``D(c R)`` is a lower bound on the optimum over all updates, hence over all ranks. Everything is
evaluated in float64 on the stored operator; spectral norms are upper bounds (full singular values,
inflated by their backward error and by the rounding error of the adjoint).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ranksure.factors import Delta, Factors, nuclear_norms
from ranksure.operators.base import cast_factors
from ranksure.problem import Problem

_HIDDEN = 0.01
"""Share of F(0) up to which a gain that rounding hides counts as none."""


@dataclass(frozen=True)
class Certificate:
    """What is proved about a point.

    Attributes:
        objective: ``F`` at the point (nuclear norm of the update as the penalty).
        dual: best feasible dual value known; ``F* >= dual``.
        gap: ``objective - dual`` plus an allowance for rounding; at least ``objective - F*``.
        objective_at_zero: ``F(0)``.
        relative_gap: ``gap / (F(0) - dual)``: the gap as a share of what any update can gain; infinite where rounding
            hides what can be gained.
        spectral_ratios: ``rho_j``, upper bound on ``||A_j^*(R)||_op / lambda_j``, by block.
        dual_step: the scale ``c`` of the point's own dual variable.
        rounding: the part of ``gap`` that allows for rounding.
    """

    objective: float
    dual: float
    gap: float
    objective_at_zero: float
    relative_gap: float
    spectral_ratios: dict[str, float]
    dual_step: float
    rounding: float

    @property
    def spectral_ratio(self) -> float:
        """Largest ``rho_j`` over blocks."""
        return max(self.spectral_ratios.values())

    def captured(self, best_objective: float | None = None) -> tuple[float, float]:
        """Interval that holds ``(F(0) - F) / (F(0) - F*)``, given the lowest objective known (by default, this one)."""
        gained = self.objective_at_zero - self.objective
        best = min(self.objective, best_objective if best_objective is not None else self.objective)
        return captured_interval(gained, self.objective_at_zero - self.dual, self.objective_at_zero - best)

    def to_json(self) -> dict[str, object]:
        """Plain numbers."""
        return {**asdict(self), "spectral_ratio": self.spectral_ratio}


def captured_interval(gained: float, most: float, found: float) -> tuple[float, float]:
    """The shares ``gained / most`` and ``gained / found`` in order, clipped to one; one where nothing can be gained."""
    if most <= 0:
        return (1.0, 1.0)
    ends = (gained / most, min(1.0, gained / found) if found > 0 else 0.0)
    return (min(ends), max(ends))  # a point worse than no update at all has negative shares


@dataclass(frozen=True)
class PointState:
    """A point with what its certificate was computed from.

    Attributes:
        certificate: the certificate.
        logits: linearised logits, ``(N, K)``.
        gradients: ``g_j = A_j^*(R)``, each ``(m, n)``: the gradient of the data loss (and of the linear term, if
            the problem has one) by block.
    """

    certificate: Certificate
    logits: Tensor
    gradients: Delta


def spectral_upper_bounds(gradients: Delta, errors: dict[str, float]) -> dict[str, float]:
    """Upper bounds on spectral norms: full singular values, their backward error, the adjoint's error.

    Infinite where a gradient has overflowed.
    """
    out: dict[str, float] = {}
    for name, g in gradients.items():
        inflation = 1 + 16 * max(g.shape) * torch.finfo(torch.float64).eps
        known = bool(torch.isfinite(g).all()) and math.isfinite(errors[name])
        out[name] = float(torch.linalg.svdvals(g.double())[0]) * inflation + errors[name] if known else math.inf
    return out


def certify_point(problem: Problem, factors: Factors, best_dual: float = -math.inf) -> PointState:
    """Certify the point of the updates ``u v^T`` (blocks left out are zero), in float64 but for a matrix-free operator.

    ``best_dual`` is a dual value already known to be feasible for this problem.
    """
    problem = problem.exact
    factors = cast_factors(factors, problem.operator)
    if factors:
        contrast_values = problem.operator.apply_factors(factors)
    else:
        contrast_values = torch.zeros_like(problem.base_logits @ problem.contrasts)
    logits = problem.logits(contrast_values)
    penalty = sum(problem.penalty[name] * norm for name, norm in nuclear_norms(factors).items())
    objective = float(problem.data_loss(logits)) + penalty
    if problem.linear and factors:
        objective += float(problem.linear_of(factors))

    dual = problem.dual_variable(logits)
    residual = problem.residual(dual)
    gradients = problem.operator.adjoint(residual)
    bounds = spectral_upper_bounds(gradients, problem.operator.adjoint_error(residual))
    limit, bounds = _feasible_range(problem, gradients, bounds)
    gradients = {name: g + problem.linear[name] if name in problem.linear else g for name, g in gradients.items()}
    ratios = {name: bound / problem.penalty[name] for name, bound in bounds.items()}

    limit = min(limit, problem.loss.max_dual_step(dual / problem.weights[:, None], problem.labels))
    step, own = _best_dual_step(problem, dual, min(limit * (1 - 1e-15), 1e12))
    best = max(own, best_dual)
    at_zero = problem.objective_at_zero
    eps = torch.finfo(problem.operator.dtype).eps
    rounding = (problem.operator.n_samples + 64) * eps * (abs(objective) + abs(best) + abs(at_zero))
    rounding += 64 * eps * _cancellation(problem, logits, dual, step, 64 * eps)
    rounding += (problem.operator.n_samples + 64) * torch.finfo(torch.float64).tiny  # below it, digits are lost
    gap = max(objective - best, 0.0) + rounding
    still = penalty == 0.0 and max(ratios.values()) <= 1  # no update, and no direction that leads down
    relative = 0.0 if still else _relative(gap, at_zero, best, rounding)
    certificate = Certificate(objective, best, gap, at_zero, relative, ratios, step, rounding)
    return PointState(certificate, logits, gradients)


def _relative(gap: float, at_zero: float, dual: float, rounding: float) -> float:
    """``gap / (F(0) - dual)``; 0 where nothing can be gained, infinite where rounding or an overflow hides that."""
    gain = at_zero - dual
    if not math.isfinite(gap + gain):
        return math.inf
    if gain > rounding:
        return gap / gain
    return 0.0 if gap <= 2 * rounding and rounding <= _HIDDEN * at_zero else math.inf


def _feasible_range(problem: Problem, gradients: Delta, bounds: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The largest ``c`` known to be feasible, where ``||c g_j + linear_j||_op <= lambda_j``, and the norms at 1.

    With a linear term the norm is convex in ``c``: below its chord from 0 to 1, and below ``c ||g_j|| + ||linear_j||``.
    """
    limit, at_one = math.inf, dict(bounds)
    for name, g in gradients.items():
        lam, term = problem.penalty[name], problem.linear.get(name)
        if term is None:
            limit = min(limit, lam / max(bounds[name], 1e-300))
            continue
        own = float(torch.linalg.svdvals(g)[0])
        slack = {name: max(bounds[name] - own, 0.0) + torch.finfo(torch.float64).eps * float(g.norm() + term.norm())}
        at_one[name] = spectral_upper_bounds({name: g + term}, slack)[name]
        at_zero = spectral_upper_bounds({name: term}, {name: 0.0})[name]
        apart = (lam - at_zero) / max(bounds[name], 1e-300)
        chord = 1.0 if at_one[name] <= lam else (lam - at_zero) / (at_one[name] - at_zero)
        limit = min(limit, max(apart, chord, 0.0))
    return limit, at_one


def _cancellation(problem: Problem, logits: Tensor, dual: Tensor, step: float, eps: float) -> float:
    """Size of the terms that cancel in the losses and in the dual value when logits share a large offset.

    A loss that is steep only far from its labels (squared error) feels the logits' rounding by its slope and curvature.
    """
    sizes = logits.abs().sum(1) + problem.base_logits.abs().sum(1)
    steep = 1.0 if math.isfinite(problem.loss.lipschitz(problem.n_logits)) else eps * sizes
    return float((sizes * (problem.weights * steep + max(1.0, step) * dual.abs().sum(1))).sum())


def lambda_max(problem: Problem) -> float:
    """Smallest uniform lambda at which the zero update is optimal: ``max_j ||A_j^*(R at 0) + linear_j||_op``."""
    problem, _ = problem.reduced  # the bases are orthonormal, so the norms are the same
    gradients = problem.operator.adjoint(problem.residual(problem.dual_variable(problem.base_logits)))
    terms = {name: problem.linear.get(name, 0) for name in gradients}
    return max(float(torch.linalg.svdvals(g.double() + terms[name])[0]) for name, g in gradients.items())


def _best_dual_step(problem: Problem, dual: Tensor, limit: float) -> tuple[float, float]:
    """Maximise the concave ``D(c R)`` over ``0 <= c <= limit``; any ``c`` in range is a valid bound.

    A grid is refined around its best point; one call of the conjugate serves a whole grid.
    """
    gradient = dual / problem.weights[:, None]
    linear = (dual * problem.base_logits).sum()
    points = max(6, min(24, (1 << 22) // max(1, dual.numel())))

    def best_of(steps: Tensor) -> tuple[float, float, int]:
        conjugate = problem.loss.conjugate(steps[:, None, None] * gradient, problem.labels)
        values = steps * linear - (conjugate * problem.weights).sum(-1)
        values = torch.where(torch.isfinite(values), values, -math.inf)
        index = int(values.argmax())
        return float(steps[index]), float(values[index]), index

    def grid(low: float, high: float) -> Tensor:
        return torch.linspace(low, high, points, dtype=dual.dtype, device=dual.device).clamp_(low, high)

    # The maximum is near c = 1 unless the point is far from stationary.
    low, high = 0.0, min(limit, 4.0)
    if limit > 4:
        doubling = 4 * 2 ** torch.arange(math.ceil(math.log2(limit / 4)) + 1, dtype=dual.dtype, device=dual.device)
        doubling = doubling.clamp_(max=limit)
        _, _, index = best_of(doubling)
        high = float(doubling[min(index + 1, len(doubling) - 1)])
    fixed = torch.tensor([0.0, limit] + ([1.0] if limit >= 1 else []), dtype=dual.dtype, device=dual.device)
    step, best, _ = best_of(fixed)
    for _ in range(math.ceil(math.log(1e7) / math.log((points - 1) / 2))):
        steps = grid(low, high)
        found, value, index = best_of(steps)
        if value > best:
            step, best = found, value
        low, high = float(steps[max(index - 1, 0)]), float(steps[min(index + 1, points - 1)])
    return step, best
