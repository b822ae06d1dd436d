"""The best point of given ranks: many starts in one batch, saddles left by their curvature."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ranksure.certificate import certify_point
from ranksure.curvature import Inertia, escape_direction, inertia
from ranksure.factors import FactorLayout, Factors, balanced, truncated
from ranksure.operators.base import zero_factors
from ranksure.problem import Problem
from ranksure.solvers.descent import descend, gradient_scale, restricted
from ranksure.solvers.lbfgs import Minimum, minimize, objective_on
from ranksure.solvers.solution import Solution, Status


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
    """
    began = time.perf_counter()
    working, bases = problem.working
    shapes = working.operator.shapes
    full_ranks = {name: min(ranks.get(name, 0), *problem.operator.shapes[name], *shapes[name]) for name in shapes}
    layout = FactorLayout(shapes, full_ranks)

    def ended(
        x: Factors, evaluations: int, starts: int, values: list[float], stationary: bool, curvature: Inertia
    ) -> FixedRank:
        factors = balanced({**zero_factors(working.operator), **x})
        found = certify_point(working, factors, best_dual).certificate
        done = stationary or found.relative_gap <= enough
        status: Status = "converged" if done else "not-converged"
        remedy = "the limit of evaluations was reached before a stationary point; raise max_evaluations"
        seconds = time.perf_counter() - began
        solution = Solution(bases.lift(factors), found, status, "" if done else remedy, evaluations, seconds)
        return FixedRank(solution, starts, values or [found.objective], stationary, curvature)

    if layout.size == 0:
        return ended({}, 0, 1, [], True, Inertia(0, 0.0))
    starts = _starts(problem, layout, full_ranks, reference, random_starts, seed)
    gain = working.objective_at_zero - best_dual
    stop = best_dual + enough * gain if math.isfinite(best_dual) else None
    result = descend(problem, layout, starts, tolerance=tolerance, max_evaluations=max_evaluations, stop_below=stop)
    point, curvature = _best_of(result), Inertia(None, 0.0, "not asked for")
    if check_curvature:
        point, curvature = _without_saddles(working, layout, point, tolerance, best_dual, enough, max_evaluations)
    stationary = float(point.gradient_norm) <= tolerance * gradient_scale(working)
    values = [float(value) for value in result.value]
    return ended(layout.unflatten(point.x), point.evaluations, len(starts), values, stationary, curvature)


def _best_of(found: Minimum, evaluations: int = 0) -> Minimum:
    """The row of the lowest value, with so many evaluations added."""
    row = slice(best := int(torch.argmin(found.value)), best + 1)
    parts = (found.x[row], found.value[row], found.gradient_norm[row], found.converged[row])
    return Minimum(*parts, found.evaluations + evaluations)


def _starts(
    problem: Problem,
    layout: FactorLayout,
    ranks: dict[str, int],
    reference: Factors | None,
    random_starts: int,
    seed: int,
) -> Tensor:
    """The truncated reference and random points at three scales, one at least: ``(S, D)``."""
    working, bases = problem.working
    generator = torch.Generator().manual_seed(seed)
    starts: list[Tensor] = []
    if reference is not None:
        full = restricted(working, bases, reference)
        starts.append(layout.flatten(_padded(truncated(full, ranks), working.operator.shapes, ranks)))
    for index in range(random_starts if starts else max(1, random_starts)):
        starts.append(_random_start(working, layout, generator, (0.1, 1.0, 0.3)[index % 3]))
    return torch.cat(starts)


def _without_saddles(
    problem: Problem,
    layout: FactorLayout,
    point: Minimum,
    tolerance: float,
    best_dual: float,
    enough: float,
    max_evaluations: int,
) -> tuple[Minimum, Inertia]:
    """Leave saddles by their curvature, four at most; the last point and what is known of its curvature."""
    function, goal = objective_on(problem, layout), tolerance * gradient_scale(problem)
    curvature = Inertia(None, 0.0, "not asked for")
    for _ in range(4):
        factors = {**zero_factors(problem.operator), **layout.unflatten(point.x)}
        state = certify_point(problem, factors, best_dual)
        if state.certificate.relative_gap <= max(enough, 1e-12) or float(point.gradient_norm) > goal:
            break
        curvature = inertia(problem, factors, state)
        if curvature.negative in (0, None):
            break
        kept = {name: factors[name] for name in layout.parts}
        flat = layout.flatten(escape_direction(problem, kept, state).direction)
        size = max(float(point.x.norm()), 1e-6)
        trials = torch.cat([point.x + sign * share * size * flat for share in (0.01, 0.1) for sign in (1, -1)])
        lower = minimize(function, trials, tolerance=goal, max_evaluations=max_evaluations)
        lower = _best_of(lower, point.evaluations)
        if not float(lower.value) < float(function(point.x)[0]):
            point = replace(point, evaluations=lower.evaluations)
            break
        point = lower
        curvature = Inertia(None, curvature.tau, "not determined after a saddle was left")
    return point, curvature


def _padded(factors: Factors, shapes: Mapping[str, tuple[int, int]], ranks: dict[str, int]) -> Factors:
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


def _random_start(problem: Problem, layout: FactorLayout, generator: torch.Generator, scale: float) -> Tensor:
    """Gaussian factors whose penalty is ``scale`` times the loss at zero."""
    x = torch.randn(1, layout.size, generator=generator, dtype=torch.float64).to(problem.operator.device)
    x = x.to(problem.operator.dtype)
    penalty = float(problem.penalty_of(layout.unflatten(x)))
    return x * math.sqrt(scale * max(problem.objective_at_zero, 1e-300) / penalty)
