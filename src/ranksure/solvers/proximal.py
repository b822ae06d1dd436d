"""Accelerated proximal gradient on dense updates: "full fine-tuning" in the paper.

FISTA (Beck and Teboulle 2009) on ``F(delta) = sum_i w_i loss(z_i) + sum_j lambda_j ||delta_j||_*`` with
the adaptive restart of O'Donoghue and Candes (2015, the gradient scheme). The proximal step of the
nuclear norm soft-thresholds the singular values of every block. Rate ``O(1/k^2)`` at step ``1/L``.

This is the classical way to the same optimum that :func:`ranksure.solvers.burer_monteiro.solve` finds:
a baseline, and an independent check. It needs one product with the operator, one with its adjoint and
one singular value decomposition of every block per iteration, over any tangent operator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import scipy.linalg
import torch
from torch import Tensor

from ranksure.certificate import Certificate, PointState, certify_point
from ranksure.errors import SettingError
from ranksure.factors import Delta, Factors, multiplied
from ranksure.operators.base import TangentOperator, cast_factors, zero_factors
from ranksure.problem import Problem
from ranksure.solvers.solution import Solution, Status

_GRAM_LIMIT = 4096  # rows of the Gram matrix up to which its largest eigenvalue is computed
_POWER_MARGIN = 1.1  # a power iteration approaches the norm from below
_STORED_BYTES = 1 << 30  # of gradients, up to which they may be stored
_FEW = 0.25  # share of eigenvectors up to which they are cheaper one by one


def proximal_gradient(
    problem: Problem,
    *,
    tolerance: float = 1e-6,
    start: Factors | None = None,
    best_dual: float = -math.inf,
    step: float | None = None,
    backtracking: bool | None = None,
    accelerate: bool = True,
    check_every: int = 10,
    max_iterations: int = 10_000,
    max_seconds: float = math.inf,
    progress: Callable[[int, Certificate], None] | None = None,
) -> Solution:
    """Minimise over dense updates by accelerated proximal gradient.

    Args:
        problem: the problem; iterations run in its operator's dtype, certificates in float64.
        tolerance: relative gap ``(F - D) / (F(0) - D)`` to reach.
        start: factors of the starting update, or None for zero.
        best_dual: a dual value known to be feasible for this problem.
        step: step size; ``1 / L`` by default (:func:`smoothness_bound`).
        backtracking: halve the step where the quadratic upper bound fails. By default it is on only
            where ``L`` comes from a power iteration, which does not bound it from above.
        accelerate: False for the plain proximal gradient method (ISTA).
        check_every: iterations between certificates, which are the stopping rule.
        max_iterations: most iterations.
        max_seconds: most seconds, looked at after every iteration.
        progress: called with the iteration and its certificate.

    Returns:
        The point of the lowest objective among those certified, as balanced factors of the thresholded singular
        value decomposition; ``evaluations`` counts iterations and ``history`` holds (seconds, relative gap).

    Raises:
        SettingError: a step, interval or limit that is not positive.
    """
    if check_every < 1 or max_iterations < 1 or not max_seconds > 0 or (step is not None and not 0 < step < math.inf):
        raise SettingError("step, check_every, max_iterations and max_seconds must be positive")
    began = time.perf_counter()
    here = _Iterates(problem, start or {}, step, backtracking, accelerate)
    seen = _Seen(problem.exact, here.factors(), best_dual, tolerance, began)
    remedy = f"the limit of {max_iterations} iterations was reached; raise max_iterations or the tolerance"
    iteration = 0
    while not seen.converged and iteration < max_iterations:
        iteration += 1
        if not here.advance():
            remedy = "the iterates diverged: the step is too large; lower it, or leave it out for 1 / L"
            break
        out_of_time = time.perf_counter() - began > max_seconds
        if iteration % check_every == 0 or iteration == max_iterations or out_of_time:
            certificate = seen.look(here.factors())
            if progress is not None:
                progress(iteration, certificate)
        if out_of_time and not seen.converged:
            remedy = f"the limit of {max_seconds:g} seconds was reached; raise max_seconds or the tolerance"
            break
    return seen.solution(iteration, remedy)


class _Iterates:
    """The accelerated iteration: a point, and the one ahead of it where the next gradient is taken."""

    def __init__(
        self, problem: Problem, start: Factors, step: float | None, backtracking: bool | None, accelerate: bool
    ) -> None:
        bound_is_sure = step is not None
        self._scales: dict[str, float] = {}
        if step is None:  # one that is given is meant in the blocks' own units
            self._scales, problem = problem.scales, problem.equilibrated
            smoothness, bound_is_sure = smoothness_bound(problem)
            step = 1 / (smoothness or 1.0)  # 0: no update changes a logit, and zero is optimal whatever the step
        self.step, self.accelerate = step, accelerate
        self.backtracking = not bound_is_sure if backtracking is None else backtracking
        self.problem = replace(problem, operator=problem.operator.for_dense_updates(_STORED_BYTES))
        start = multiplied(cast_factors(start, self.problem.operator), self._scales)
        self._start = {**zero_factors(self.problem.operator), **start}
        delta = {name: u @ v.T for name, (u, v) in self._start.items()}
        self.point = self.ahead = _Point(delta, self.problem.operator.apply(delta))
        self.momentum = 1.0
        self.parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def factors(self) -> Factors:
        """The point as balanced factors; the start's own before the first iteration."""
        inside = {name: (p * s.sqrt(), q * s.sqrt()) for name, (p, s, q) in self.parts.items()} or self._start
        return multiplied(inside, {name: 1 / scale for name, scale in self._scales.items()})

    def advance(self) -> bool:
        """One iteration; False where the iterates diverged."""
        problem, ahead, previous = self.problem, self.ahead, self.point
        residual = problem.residual(problem.dual_variable(problem.logits(ahead.contrasts)))
        gradient = problem.operator.adjoint(residual)
        for name, term in problem.linear.items():
            gradient[name] = gradient[name] + term.to(gradient[name])
        while True:
            point = self._proximal_step(gradient)
            if not self.backtracking or _is_majorised(problem, point, ahead, gradient, self.step):
                break
            self.step /= 2
        if not float(point.contrasts.abs().max()) < 1e120:  # squares of logits would overflow
            return False
        self.point = self.ahead = point
        if self.accelerate:
            moves = ((ahead.delta[name] - x, x - previous.delta[name]) for name, x in point.delta.items())
            uphill = sum(float((ahead_of * moved).sum()) for ahead_of, moved in moves)
            following = (1 + math.sqrt(1 + 4 * self.momentum**2)) / 2
            weight = 0.0 if uphill > 0 else (self.momentum - 1) / following
            self.momentum = 1.0 if uphill > 0 else following
            self.ahead = point.extrapolated(previous, weight)
        return True

    def _proximal_step(self, gradient: Delta) -> _Point:
        problem, step, kept = self.problem, self.step, {name: len(s) for name, (_, s, _) in self.parts.items()}
        self.parts = {
            name: threshold_singular_values(x - step * gradient[name], step * problem.penalty[name], kept.get(name))
            for name, x in self.ahead.delta.items()
        }
        delta = {name: (p * s) @ q.T for name, (p, s, q) in self.parts.items()}
        return _Point(delta, problem.operator.apply(delta))


class _Seen:
    """The points that were certified: the last, the best, and what their duals prove together."""

    def __init__(self, problem: Problem, factors: Factors, best_dual: float, tolerance: float, began: float) -> None:
        self.problem, self.tolerance, self.began = problem, tolerance, began
        self.dual = best_dual
        self.history: list[tuple[float, float]] = []
        self.best: tuple[Factors, PointState] | None = None
        self.look(factors)

    def look(self, factors: Factors) -> Certificate:
        """Certify a point."""
        state = certify_point(self.problem, factors, self.dual)
        certificate = state.certificate
        self.dual, self.last = certificate.dual, (factors, state)  # the dual is the best so far
        self.history.append((time.perf_counter() - self.began, certificate.relative_gap))
        if self.best is None or certificate.objective <= self.best[1].certificate.objective:
            self.best = self.last
        return certificate

    @property
    def converged(self) -> bool:
        """Whether the last point is within the tolerance."""
        return self.last[1].certificate.relative_gap <= self.tolerance

    def solution(self, iterations: int, remedy: str) -> Solution:
        """The last point where it converged, else the best."""
        factors, state = self.last if self.converged or self.best is None else self.best
        if state.certificate.dual < self.dual:  # a later point may have proved more about the best one
            state = certify_point(self.problem, factors, self.dual)
        status: Status = "converged" if self.converged else "not-converged"
        remedy, seconds = "" if self.converged else remedy, time.perf_counter() - self.began
        return Solution(factors, state.certificate, status, remedy, iterations, seconds, self.history)


def smoothness_bound(problem: Problem) -> tuple[float, bool]:
    """Smoothness ``L`` of the data loss in the update, ``beta ||diag(w)^{1/2} A||^2``, over all blocks at once.

    ``beta`` is the loss's smoothness in the logits; contrasts are orthonormal, so it holds for them too.

    Returns:
        ``L``, and whether it is an upper bound: it is from the largest eigenvalue of the Gram matrix; a power
        iteration (large or matrix-free operators) only estimates it, with a margin of 10%.
    """
    operator = problem.operator
    beta = problem.loss.smoothness(problem.n_logits)
    size = operator.n_samples * operator.n_outputs
    if size <= _GRAM_LIMIT and operator.is_stored:
        root = problem.weights.double().sqrt().repeat_interleave(operator.n_outputs)
        gram = operator.gram() * root[:, None] * root
        largest = float(torch.linalg.eigvalsh(gram)[-1])
        rounding = 1 + 16 * (size + 2) * torch.finfo(torch.float64).eps
        return beta * max(largest, 0.0) * rounding, True
    return beta * _POWER_MARGIN * _weighted_norm_squared(operator, problem.weights), False


def _weighted_norm_squared(operator: TangentOperator, weights: Tensor, iterations: int = 30) -> float:
    """Largest eigenvalue of ``diag(w)^{1/2} A A^* diag(w)^{1/2}`` by power iteration, from below."""
    root = weights.sqrt()[:, None]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(operator.n_samples, operator.n_outputs, generator=generator, dtype=torch.float64)
    x = x.to(operator.device, operator.dtype)
    norm = 0.0
    for _ in range(iterations):
        x = root * operator.apply(operator.adjoint(root * (x / x.norm())))
        before, norm = norm, float(x.norm())
        if norm == 0 or abs(norm - before) <= 1e-3 * norm:
            break
    return norm


def threshold_singular_values(
    x: Tensor, threshold: float, expected: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft-threshold the singular values of a matrix: the proximal step of ``threshold * nuclear norm``.

    Args:
        x: matrix ``(m, n)``.
        threshold: what every singular value loses; those below it become zero.
        expected: about how many will be kept, which decides how they are computed, not what they are.

    Returns:
        ``p`` (m, k), ``s`` (k,), ``q`` (n, k) of the result ``p diag(s) q^T``, with ``k`` the number kept.
    """
    m, n = x.shape
    # The result is a smooth function of the Gram matrix where the threshold is not tiny: its error is about
    # eps (s_1 / threshold)^2 / 2, in float64. Its eigenvalues cost a third of the singular values or less.
    if threshold > 1e-4 * float(x.norm()):
        wide = n > m
        y = (x.T if wide else x).double()
        values, vectors = _eigenpairs_above(y.T @ y, threshold**2, expected)
        s = values.clamp(min=0).sqrt()
        keep = s > threshold
        s, v = s[keep].flip(0), vectors[:, keep].flip(1)
        u = (y @ v) / s
        shrunk = (s - threshold).to(x.dtype)
        u, v = u.to(x.dtype), v.to(x.dtype)
        return (v, shrunk, u) if wide else (u, shrunk, v)
    p, s, qt = torch.linalg.svd(x, full_matrices=False)
    count = int((s > threshold).sum())
    return p[:, :count], s[:count] - threshold, qt[:count].T


def _eigenpairs_above(gram: Tensor, level: float, expected: int | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues above a level, ascending, and their vectors; perhaps others besides."""
    if expected is None or expected > _FEW * len(gram) or gram.device.type != "cpu":
        values, vectors = torch.linalg.eigh(gram)
        return values, vectors
    few, columns = scipy.linalg.eigh(
        gram.numpy(), subset_by_value=(level, math.inf), driver="evr", check_finite=False, overwrite_a=True
    )
    return torch.from_numpy(few), torch.from_numpy(columns)


class _Point:
    """A dense update and its contrasts."""

    def __init__(self, delta: Delta, contrasts: Tensor) -> None:
        self.delta, self.contrasts = delta, contrasts

    def extrapolated(self, previous: _Point, weight: float) -> _Point:
        """``x + weight (x - previous)``; contrasts follow by linearity."""
        if weight == 0:
            return self
        delta = {name: torch.lerp(previous.delta[name], x, 1 + weight) for name, x in self.delta.items()}
        return _Point(delta, torch.lerp(previous.contrasts, self.contrasts, 1 + weight))


def _is_majorised(problem: Problem, point: _Point, ahead: _Point, gradient: Delta, step: float) -> bool:
    """Whether the data loss is at most its quadratic model at step ``step`` (up to rounding)."""
    now, base = (float(problem.data_loss(problem.logits(p.contrasts))) for p in (point, ahead))
    moved = {name: x - ahead.delta[name] for name, x in point.delta.items()}
    slopes = {name: g - problem.linear[name].to(g) if name in problem.linear else g for name, g in gradient.items()}
    linear = sum(float((slopes[name] * d).sum()) for name, d in moved.items())
    squared = sum(float(d.square().sum()) for d in moved.values())
    rounding = 64 * torch.finfo(problem.operator.dtype).eps * (abs(base) + abs(linear))
    return now <= base + linear + squared / (2 * step) + rounding
