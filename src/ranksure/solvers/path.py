"""A path of solutions from ``lambda_max`` down, each started from the one before.

At ``lambda_max`` the optimum is zero; below it the rank grows. A neighbour's solution is a good start,
and its dual variable, scaled by the ratio of the lambdas, is feasible: the first certificate of every
point does just that. Dual *values* never pass from one lambda to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ranksure.certificate import lambda_max
from ranksure.errors import SettingError
from ranksure.problem import Problem
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.solution import Solution


@dataclass(frozen=True)
class PathPoint:
    """One lambda and its certified solution."""

    lam: float
    solution: Solution


def lambda_path(
    problem: Problem,
    *,
    count: int = 12,
    smallest: float = 0.01,
    tolerance: float = 1e-3,
    progress: Callable[[int, PathPoint], None] | None = None,
    stop: Callable[[list[PathPoint]], bool] | None = None,
) -> list[PathPoint]:
    """Solve at ``count`` lambdas, geometrically from ``lambda_max`` to ``smallest * lambda_max``.

    Args:
        problem: the problem; its own penalty is not used (every block gets the path's lambda).
        count: number of lambdas; the first is ``lambda_max``, where the optimum is zero.
        smallest: the last lambda as a share of ``lambda_max``.
        tolerance: relative gap of every point.
        progress: called after each point with its number and the point.
        stop: called after each point with all so far; True ends the path there.

    Raises:
        SettingError: a count below 2, a share outside (0, 1), or gradients that are all zero.
    """
    if count < 2:
        raise SettingError(f"a lambda path needs at least 2 points, not {count}")
    if not 0 < smallest < 1:
        raise SettingError(f"the smallest lambda of a path is a share of lambda_max in (0, 1), not {smallest}")
    largest = lambda_max(problem)
    if largest == 0:
        raise SettingError("no update of the target modules changes the loss (lambda_max is 0): choose other modules")
    _ = problem.reduced  # prepared once; with_penalty keeps it
    points: list[PathPoint] = []
    for index in range(count):
        lam = largest * smallest ** (index / (count - 1))
        start = points[-1].solution.factors if points else None
        points.append(PathPoint(lam, solve(problem.with_penalty(lam), tolerance=tolerance, start=start)))
        if progress is not None:
            progress(index, points[-1])
        if stop is not None and stop(points):
            break
    return points
