"""Descent on factors in two precisions, and how starts enter the working problem.

A large problem is descended in float32 while the wanted accuracy allows it, then in float64; every
certificate is computed in float64 whatever the descent used.
"""

from __future__ import annotations

import math

from torch import Tensor

from ranksure.factors import FactorLayout, Factors, balanced
from ranksure.operators.base import cast_factors, zero_factors
from ranksure.operators.span import SpanBases
from ranksure.problem import Problem
from ranksure.solvers.lbfgs import Minimum, minimize, objective_on

SINGLE_PRECISION = 3e-5
"""Relative gradient norm down to which float32 is trusted."""

_LARGE = 64 << 20  # bytes of float64 factors above which float32 is worth a copy


def restricted(working: Problem, bases: SpanBases, start: Factors | None) -> Factors:
    """A start in the working problem's coordinates: balanced, every block present; zero for None."""
    if start is None:
        return zero_factors(working.operator)
    return {**zero_factors(working.operator), **balanced(cast_factors(bases.restrict(start), working.operator))}


def gradient_scale(problem: Problem) -> float:
    """Natural size of the factored gradient: ``lambda ||x||`` at the largest ``x`` that can help."""
    return math.sqrt(2 * max(problem.objective_at_zero, 1e-300) * min(problem.penalty.values()))


def descend(
    problem: Problem,
    layout: FactorLayout,
    x: Tensor,
    *,
    tolerance: float,
    max_evaluations: int,
    stop_below: float | None = None,
) -> Minimum:
    """Minimise over factors of the working problem.

    Args:
        problem: its ``working`` form is descended.
        layout: how rows of ``x`` hold the factors.
        x: starts ``(S, D)``, float64.
        tolerance: gradient norm to reach, in units of :func:`gradient_scale`.
        max_evaluations: most evaluations, both precisions together.
        stop_below: stop as soon as any value is at most this.

    Returns:
        Points in float64. Where float32 alone met the tolerance, values and norms are float32's.
    """
    working, _ = problem.working
    scale = gradient_scale(working)
    used = 0
    operator = working.operator
    if operator.nbytes > _LARGE:
        rough = minimize(
            objective_on(problem.single, layout),
            x.float(),
            tolerance=max(tolerance, SINGLE_PRECISION) * scale,
            max_evaluations=max_evaluations,
            stop_below=stop_below,
        )
        used, x = rough.evaluations, rough.x.double()
        reached = stop_below is not None and bool((rough.value <= stop_below).any())
        if tolerance >= SINGLE_PRECISION or reached:
            return Minimum(x, rough.value.double(), rough.gradient_norm.double(), rough.converged, used)
    result = minimize(
        objective_on(working, layout),
        x,
        tolerance=tolerance * scale,
        max_evaluations=max(1, max_evaluations - used),
        stop_below=stop_below,
    )
    return Minimum(result.x, result.value, result.gradient_norm, result.converged, result.evaluations + used)
