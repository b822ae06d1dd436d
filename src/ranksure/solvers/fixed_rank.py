"""The best point of given ranks: many starts in one batch, saddles left by their curvature."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ranksure.certificate import PointState, certify
from ranksure.curvature import Inertia, escape_direction, inertia
from ranksure.factors import Factors, balanced, truncated
from ranksure.operators.base import zero_factors
from ranksure.problem import Problem
from ranksure.solvers.descent import descend, gradient_scale, restricted
from ranksure.solvers.lbfgs import FactorLayout, Minimum, minimize
from ranksure.solvers.solution import Solution


@dataclass(frozen=True)
class FixedRank:
    """Best point found at fixed ranks.

    Attributes:
        solution: the best start's end point and its certificate (against every rank).
        starts: number of starts made.
        objectives: objective reached by every start (unfinished where one start was already good enough).
        stationary: whether the gradient reached its tolerance.
        curvature: inertia of the Hessian at the point; undetermined where the gap made it needless.
    """

    solution: Solution
    starts: int
    objectives: list[float]
    stationary: bool
    curvature: Inertia


def solve_fixed_rank(
    problem: Problem,
    ranks: dict[str, int],
    *,
    reference: Factors | None = None,
    random_starts: int = 0,
    seed: int = 0,
    tolerance: float = 1e-8,
    best_dual: float = -math.inf,
    max_evaluations: int = 3000,
    enough: float = 1e-7,
    check_curvature: bool = True,
) -> FixedRank:
    """Minimise over factors of the given ranks from several starts, all in one batch.

    Args:
        problem: the problem.
        ranks: rank by block, clipped to the block's size; zero leaves a block out.
        reference: factors whose truncation is one start (the optimum, as a rule).
        random_starts: further starts, Gaussian at three scales.
        seed: seed of the random starts.
        tolerance: relative gradient norm that counts as stationary.
        best_dual: a dual value known to be feasible for this problem.
        max_evaluations: most evaluations of the batch.
        enough: relative gap at which no further search is made.
        check_curvature: prove the absence of negative curvature, and leave saddles by it.

    Returns:
        The best end point, with what was checked about it.
    """
    began = time.perf_counter()
    working, bases = problem.reduced
    shapes = dict(working.operator.shapes)
    full_ranks = {name: min(ranks.get(name, 0), *problem.operator.shapes[name], *shapes[name]) for name in shapes}
    layout = FactorLayout(shapes, full_ranks)
    if layout.size == 0:
        zero = zero_factors(working.operator)
        state = certify(working, zero, best_dual)
        lifted = bases.lift(zero) if bases is not None else zero
        solution = Solution(lifted, state.certificate, "converged", "", 0, time.perf_counter() - began)
        return FixedRank(solution, 1, [state.certificate.objective], True, Inertia(0, 0.0))
    generator = torch.Generator().manual_seed(seed)
    starts: list[Tensor] = []
    if reference is not None:
        full = restricted(working, bases, reference)
        starts.append(layout.flatten(_padded(truncated(full, full_ranks), shapes, full_ranks)))
    if not starts:
        random_starts = max(1, random_starts)
    for index in range(random_starts):
        starts.append(_random_start(working, layout, full_ranks, generator, (0.1, 1.0, 0.3)[index % 3]))
    function = layout.function(working)
    goal = tolerance * gradient_scale(working)
    gain = working.objective_at_zero - best_dual
    enough_value = best_dual + enough * gain if math.isfinite(best_dual) else None
    result = descend(
        problem,
        layout,
        torch.cat(starts),
        tolerance=tolerance,
        max_evaluations=max_evaluations,
        stop_below=enough_value,
    )
    evaluations = result.evaluations
    objectives = [float(value) for value in result.value]
    best = int(torch.argmin(result.value))
    x, norm = result.x[best : best + 1], float(result.gradient_norm[best])
    curvature = Inertia(None, 0.0, "not asked for")
    for _ in range(4 if check_curvature else 0):
        factors = {**zero_factors(working.operator), **layout.unflatten(x)}
        state = certify(working, factors, best_dual)
        if state.certificate.relative_gap <= max(enough, 1e-12) or norm > goal:
            break
        curvature = inertia(working, factors, state)
        if curvature.negative in (0, None):
            break
        lower = _leave_saddle(working, layout, function, x, factors, state, goal, max_evaluations)
        evaluations += lower.evaluations
        best = int(torch.argmin(lower.value))
        if not float(lower.value[best]) < float(function(x)[0]):
            break
        x, norm = lower.x[best : best + 1], float(lower.gradient_norm[best])
        curvature = Inertia(None, curvature.tau, "not determined after a saddle was left")
    factors = balanced({**zero_factors(working.operator), **layout.unflatten(x)})
    state = certify(working, factors, best_dual)
    lifted = bases.lift(factors) if bases is not None else factors
    stationary = norm <= goal
    done = stationary or state.certificate.relative_gap <= enough
    solution = Solution(
        lifted,
        state.certificate,
        "converged" if done else "not-converged",
        "" if done else "the limit of evaluations was reached before a stationary point; raise max_evaluations",
        evaluations,
        time.perf_counter() - began,
    )
    return FixedRank(solution, len(starts), objectives, stationary, curvature)


def _leave_saddle(
    problem: Problem,
    layout: FactorLayout,
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    factors: Factors,
    state: PointState,
    goal: float,
    max_evaluations: int,
) -> Minimum:
    """Step both ways along the direction of negative curvature and descend from there."""
    kept = {name: factors[name] for name in layout.parts}
    flat = layout.flatten(escape_direction(problem, kept, state).direction)
    size = max(float(x.norm()), 1e-6)
    trials = torch.cat([x + sign * share * size * flat for share in (0.01, 0.1) for sign in (1, -1)])
    return minimize(function, trials, tolerance=goal, max_evaluations=max_evaluations)


def _padded(factors: Factors, shapes: dict[str, tuple[int, int]], ranks: dict[str, int]) -> Factors:
    """Fill missing columns with small deterministic ones, so that every column can move."""
    out: Factors = {}
    generator = torch.Generator().manual_seed(0)
    for name, rank in ranks.items():
        u, v = factors[name]
        missing = rank - u.shape[1]
        if missing > 0:
            scale = 1e-3 * max(float(u.norm()), 1e-3) / math.sqrt(u.shape[0] * rank)
            m, n = shapes[name]
            extra = (torch.randn(m, missing, generator=generator), torch.randn(n, missing, generator=generator))
            u, v = torch.cat([u, scale * extra[0].to(u)], 1), torch.cat([v, scale * extra[1].to(v)], 1)
        out[name] = (u, v)
    return out


def _random_start(
    problem: Problem, layout: FactorLayout, ranks: dict[str, int], generator: torch.Generator, scale: float
) -> Tensor:
    """Gaussian factors whose penalty is ``scale`` times the loss at zero."""
    x = torch.randn(1, layout.size, generator=generator, dtype=torch.float64).to(problem.operator.device)
    x = x.to(problem.operator.dtype)
    penalty = float(problem.penalty_of(layout.unflatten(x)))
    return x * math.sqrt(scale * max(problem.objective_at_zero, 1e-300) / penalty)
