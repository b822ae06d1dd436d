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

from ranksure.certificate import Certificate, PointState, certify
from ranksure.errors import SettingError
from ranksure.factors import Delta, Factors
from ranksure.operators.base import TangentOperator, cast_factors, zero_factors
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator
from ranksure.operators.matrix_free import MatrixFreeOperator
from ranksure.problem import Problem
from ranksure.solvers.solution import Solution, Status

_GRAM_LIMIT = 4096  # rows of the Gram matrix up to which its largest eigenvalue is computed
_POWER_MARGIN = 1.1  # a power iteration approaches the norm from below
_STORED_BYTES = 1 << 30  # of gradients, up to which they may be stored
_READING = 16  # multiplications of a matrix product in the time that one stored number is read
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
    bound_is_sure = step is not None
    if step is None:
        smoothness, bound_is_sure = smoothness_bound(problem)
        if smoothness == 0:  # no update changes a logit: zero is optimal whatever the step
            smoothness = 1.0
        step = 1 / smoothness
    backtracking = not bound_is_sure if backtracking is None else backtracking
    certified = problem.to(torch.float64) if hasattr(problem.operator, "to") else problem
    problem = _stored(problem)

    factors = {**zero_factors(problem.operator), **cast_factors(start or {}, problem.operator)}
    point = _Point.of(problem, {name: u @ v.T for name, (u, v) in factors.items()})
    previous, ahead, momentum = point, point, 1.0
    state = certify(certified, factors, best_dual)
    best_dual = state.certificate.dual
    best: tuple[Factors, PointState] = (factors, state)
    history = [(time.perf_counter() - began, state.certificate.relative_gap)]
    status: Status = "converged" if state.certificate.relative_gap <= tolerance else "not-converged"
    remedy = f"the limit of {max_iterations} iterations was reached; raise max_iterations or the tolerance"
    iteration, kept = 0, dict[str, int]()
    while status != "converged" and iteration < max_iterations:
        iteration += 1
        residual = problem.residual(problem.dual_variable(problem.logits(ahead.contrasts)))
        gradient = problem.operator.adjoint(residual)
        for name, term in problem.linear.items():
            gradient[name] = gradient[name] + term.to(gradient[name])
        while True:
            parts = {
                name: threshold_singular_values(x - step * gradient[name], step * problem.penalty[name], kept.get(name))
                for name, x in ahead.delta.items()
            }
            kept = {name: len(s) for name, (_, s, _) in parts.items()}
            delta = {name: (p * s) @ q.T for name, (p, s, q) in parts.items()}
            point = _Point(delta, problem.operator.apply(delta))
            if not backtracking or _is_majorised(problem, point, ahead, gradient, step):
                break
            step /= 2
        if not float(point.contrasts.abs().max()) < 1e120:  # squares of logits would overflow
            remedy = "the iterates diverged: the step is too large; lower it, or leave it out for 1 / L"
            break
        if accelerate:
            uphill = sum(
                float(((ahead.delta[name] - x) * (x - previous.delta[name])).sum()) for name, x in delta.items()
            )
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            weight = 0.0 if uphill > 0 else (momentum - 1) / following
            momentum = 1.0 if uphill > 0 else following
            ahead = point.extrapolated(previous, weight)
        else:
            ahead = point
        previous = point

        out_of_time = time.perf_counter() - began > max_seconds
        if iteration % check_every == 0 or iteration == max_iterations or out_of_time:
            factors = {name: (p * s.sqrt(), q * s.sqrt()) for name, (p, s, q) in parts.items()}
            state = certify(certified, factors, best_dual)
            best_dual = state.certificate.dual  # the best so far
            history.append((time.perf_counter() - began, state.certificate.relative_gap))
            if progress is not None:
                progress(iteration, state.certificate)
            if state.certificate.objective <= best[1].certificate.objective:
                best = (factors, state)
            if state.certificate.relative_gap <= tolerance:
                status = "converged"
        if out_of_time and status != "converged":
            remedy = f"the limit of {max_seconds:g} seconds was reached; raise max_seconds or the tolerance"
            break
    if status == "converged":
        best, remedy = (factors, state), ""
    elif best[1].certificate.dual < best_dual:  # a later point may have proved more about the best one
        best = (best[0], certify(certified, best[0], best_dual))
    certificate = best[1].certificate
    return Solution(best[0], certificate, status, remedy, iteration, time.perf_counter() - began, history)


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
    if size <= _GRAM_LIMIT and not isinstance(operator, MatrixFreeOperator):
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


def _stored(problem: Problem) -> Problem:
    """The same problem with its gradients stored, where that makes products with dense updates cheaper.

    A product passes over every token, or over every stored gradient; a stored number is read once for each product,
    while those of a token stay in the cache.
    """
    operator = problem.operator
    if not isinstance(operator, FactoredOperator) or operator.dense_nbytes > _STORED_BYTES:
        return problem
    sizes = operator.shapes
    by_token = sum(
        group.n_tokens * sizes[name][0] * sizes[name][1]
        for group in operator.groups
        for name in group.outputs
        if not group.is_index
    )
    stored = operator.n_samples * operator.n_outputs * sum(m * n for m, n in sizes.values())
    if _READING * stored > by_token:
        return problem
    return replace(problem, operator=DenseOperator(operator.jacobians()))


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

    @classmethod
    def of(cls, problem: Problem, delta: Delta) -> _Point:
        return cls(delta, problem.operator.apply(delta))

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
