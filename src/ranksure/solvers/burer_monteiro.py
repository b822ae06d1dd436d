"""The certified global solver: low-rank factors, a certificate, new directions, repeat.

1. At the current factors, compute the certificate. Stop when the relative gap is small.
2. Where a block's spectral ratio exceeds one, its top singular pairs are descent directions that the
   factors cannot reach. Add them by a generalised conditional gradient step: minimise the convex
   ``loss(a z + b z_P) + a pen + b pen_P`` over ``a, b >= 0``, which cannot go up and by itself
   converges as ``O(1/t)`` for every lambda > 0 (Harchaoui, Juditsky, Nemirovski 2015).
3. Minimise over the factors by L-BFGS, rebalance them by a singular value decomposition (which never
   raises the objective), drop zero columns, and go on.

The reference for this family is BM-Global (Lee, Liang, Tang, Toh, JMLR 2024).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ranksure.certificate import Certificate, PointState, certify_point
from ranksure.factors import FactorLayout, Factors, balanced, ranks_of
from ranksure.operators.base import zero_factors
from ranksure.problem import Problem
from ranksure.solvers.descent import descend, restricted
from ranksure.solvers.growth import combined, descent_pairs, pruned
from ranksure.solvers.solution import Solution, Status


def solve(
    problem: Problem,
    *,
    tolerance: float = 1e-6,
    start: Factors | None = None,
    best_dual: float = -math.inf,
    max_rounds: int = 60,
    max_evaluations: int = 20_000,
    progress: Callable[[int, Certificate], None] | None = None,
) -> Solution:
    """Solve the linearised problem to a certified relative gap; the certificate holds whether it is reached or not.

    Args:
        problem: the problem.
        tolerance: relative gap ``(F - D) / (F(0) - D)`` to reach.
        start: factors to start from (a neighbouring solution), or None for zero.
        best_dual: a dual value known to be feasible for this problem.
        max_rounds: most rounds of certificate and new directions.
        max_evaluations: most objective evaluations.
        progress: called with the round and its certificate.

    """
    began = time.perf_counter()
    working, bases = problem.working
    factors = restricted(working, bases, start)
    evaluations, inner, stalled = 0, 1e-2, 0
    history: list[tuple[float, float]] = []
    remedy = f"the limit of {max_rounds} rounds was reached; raise max_rounds or the tolerance"
    status: Status = "not-converged"
    state = certify_point(working, factors, best_dual)
    best: tuple[Factors, PointState] = (factors, state)
    for index in range(max_rounds):
        certificate = state.certificate
        best_dual = max(best_dual, certificate.dual)
        history.append((time.perf_counter() - began, certificate.relative_gap))
        if progress is not None:
            progress(index, certificate)
        if certificate.relative_gap <= tolerance:
            status, remedy = "converged", ""
            break
        if evaluations >= max_evaluations:
            remedy = f"the limit of {max_evaluations} evaluations was reached; raise it or the tolerance"
            break
        # Inner accuracy follows the gap: a gradient of relative size e costs about e of the gap.
        inner = min(inner, max(1e-10, 0.1 * certificate.relative_gap))
        factors, used = _improved(problem, factors, state, inner, max_evaluations - evaluations)
        evaluations += used
        state = certify_point(working, factors, best_dual)
        best = min(best, (factors, state), key=lambda point: point[1].certificate.gap)
        stalled = stalled + 1 if state.certificate.gap > 0.9 * certificate.gap else 0
        inner = max(1e-12, 0.1 * inner) if stalled else inner
        if stalled >= 8:
            remedy = "the gap stopped shrinking at rounding; raise the tolerance, or check the data for extreme values"
            break
    if status != "converged":
        factors, state = best
    factors, state = _finished(problem, factors, state, tolerance, max(best_dual, state.certificate.dual))
    if state.certificate.relative_gap > tolerance and status == "converged":
        status, remedy = "not-converged", "the gap on the full operator is above the tolerance; lower the tolerance"
    return Solution(factors, state.certificate, status, remedy, evaluations, time.perf_counter() - began, history)


def _finished(
    problem: Problem, factors: Factors, state: PointState, tolerance: float, best_dual: float
) -> tuple[Factors, PointState]:
    """The point without needless directions, on the full blocks and certified there."""
    working, bases = problem.working
    target = max(tolerance, state.certificate.relative_gap)
    factors, state = pruned(
        factors,
        (factors, state),
        lambda fewer: (fewer, certify_point(working, fewer, best_dual)),
        lambda found: found[1].certificate.relative_gap <= target,
        [10.0**-k for k in range(2, 9)],
    )
    lifted = bases.lift(factors)
    if not bases.is_trivial:  # certified on the stored operator, not on its reduction
        state = certify_point(problem, lifted, max(best_dual, state.certificate.dual))
    return lifted, state


def _improved(
    problem: Problem, factors: Factors, state: PointState, tolerance: float, budget: int
) -> tuple[Factors, int]:
    """New directions, then descent over the factors; balanced, with the evaluations used."""
    working, _ = problem.working
    factors = _add_directions(working, factors, state)
    layout = FactorLayout(working.operator.shapes, ranks_of(factors))
    if layout.size == 0:
        return balanced(factors), 0
    result = descend(
        problem, layout, layout.flatten(factors), tolerance=tolerance, max_evaluations=max(1, min(budget, 3000))
    )
    return balanced({**zero_factors(working.operator), **layout.unflatten(result.x)}), result.evaluations


def _add_directions(problem: Problem, factors: Factors, state: PointState) -> Factors:
    """Generalised conditional gradient step along the top singular pairs of every violating block."""
    pairs: Factors = {}
    for name, g in state.gradients.items():
        violates = state.certificate.spectral_ratios[name] > 1  # an upper bound
        pairs[name] = descent_pairs(g, problem.penalty[name], 1e-12) if violates else (g[:, :0], g.T[:, :0])
    if not any(ranks_of(pairs).values()):
        return factors
    if any(ranks_of(factors).values()):
        z = problem.operator.apply_factors(factors).double()
    else:
        z = torch.zeros_like(state.logits @ problem.contrasts)
    dz = problem.operator.apply_factors(pairs).double()
    prices = [float(problem.penalty_of(x) + problem.linear_of(x)) for x in (factors, pairs)]
    a, b = _convex_step(problem, z, prices[0], dz, prices[1])
    return combined(factors, a, pairs, b)


def _convex_step(problem: Problem, z: Tensor, pen: float, dz: Tensor, dpen: float) -> tuple[float, float]:
    """Minimise ``loss(a z + b dz) + a pen + b dpen`` over ``a, b >= 0``, but for a trace of ``b``.

    Projected Newton in two variables (Bertsekas 1982): a variable at zero whose slope is positive rests.
    """
    paths = torch.stack([z, dz]).to(problem.contrasts) @ problem.contrasts.T
    prices = torch.tensor([pen, dpen], dtype=paths.dtype, device=paths.device)

    def logits_at(x: Tensor) -> Tensor:
        return problem.base_logits + x[0] * paths[0] + x[1] * paths[1]

    def value_at(x: Tensor) -> float:
        return float(problem.data_loss(logits_at(x)) + (x * prices).sum())

    def gradient_at(x: Tensor) -> Tensor:
        return (paths * problem.dual_variable(logits_at(x))).sum((1, 2)) + prices

    x = torch.tensor([1.0, 0.0]).to(paths)
    curvature = problem.loss.smoothness(problem.n_logits) * float((problem.weights[:, None] * dz.square()).sum())
    first = max(-float(gradient_at(x)[1]), 0.0) / max(curvature, 1e-300)
    x[1] = first  # descends: the step of the quadratic bound
    value = value_at(x)
    for _ in range(50):
        gradient = gradient_at(x)
        curved = problem.loss.hessian_vector(logits_at(x), problem.labels, paths) * problem.weights[:, None]
        hessian = torch.einsum("ank,bnk->ab", paths, curved)
        move = _newton_step(x, gradient, hessian)
        step, previous = 1.0, value
        while step > 1e-10:
            trial = (x - step * move).clamp(min=0)
            value = value_at(trial)
            if value <= previous - 1e-4 * float((gradient * (x - trial)).sum()) and math.isfinite(value):
                break
            step /= 2
        else:
            value = previous
            break
        x = trial
        if previous - value <= 1e-15 * abs(previous):
            break
    a, b = float(x[0]), float(x[1])
    # A zero column is a saddle of the factors: keep a trace of the new direction for the descent.
    return a, max(b, 1e-6 * first)


def _newton_step(x: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """Newton's step on the variables that are free to move, zero on the rest."""
    free = (x > 0) | (gradient < 0)
    diagonal = torch.diagonal(hessian).clamp(min=1e-300)
    scaled = hessian / diagonal.sqrt()[:, None] / diagonal.sqrt() + 1e-10 * torch.eye(2).to(hessian)
    scaled[~free] = scaled[:, ~free] = 0
    scaled[~free, ~free] = 1
    slope = torch.where(free, gradient, 0) / diagonal.sqrt()
    return torch.linalg.solve(scaled, slope) / diagonal.sqrt()
