"""How the answer moves with the amount of data: nested subsets, and an extrapolation marked as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ranksure.planner.ranks import clipped, smallest_uniform, solve_again
from ranksure.problem import Problem
from ranksure.progress import Advance
from ranksure.records.plan import Extrapolation, Subset
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.solution import Solution

TOLERANCE = 1e-3


def subset_rows(
    problem: Problem, sizes: Sequence[int], ranks: Sequence[int], share: float, advance: Advance
) -> list[Subset]:
    """Solve the problem on nested prefixes of the rows, to a relative gap of 1e-3; lambda goes with ``N^-1/2``."""
    rows: list[Subset] = []
    for index, n in enumerate(sizes):
        factor = (problem.operator.n_samples / n) ** 0.5
        smaller = problem.subset(torch.arange(n)).with_penalty({k: lam * factor for k, lam in problem.penalty.items()})
        solution = solve(smaller, tolerance=TOLERANCE)
        rows.append(subset_row(smaller, solution, n, ranks, share))
        advance(index + 1, len(sizes))
    return rows


def subset_row(problem: Problem, solution: Solution, n: int, ranks: Sequence[int], share: float) -> Subset:
    """The row of a solved subset; captured shares come from the truncated optimum solved again."""
    shares: dict[str, float] = {}
    for rank in ranks:
        if rank >= max(solution.ranks.values(), default=0):
            shares[str(rank)] = solution.certificate.captured()[0]
        else:
            reached = solve_again(problem, solution, clipped(problem, rank), TOLERANCE)
            shares[str(rank)] = reached.certificate.captured()[0]
    return Subset(
        n_samples=n,
        weight_decay=max(problem.penalty.values()),
        relative_gap=solution.certificate.relative_gap,
        ranks=solution.ranks,
        largest_rank=max(solution.ranks.values(), default=0),
        rank_needed=smallest_uniform(problem, solution, share),
        captured=shares,
    )


def extrapolate(rows: Sequence[Subset], total: int) -> Extrapolation | None:
    """Fit ``rank = a N^p`` through the subsets by least squares on logarithms; an extrapolation, not a result.

    Returns:
        The fit and what it says at ``total`` rows; None with fewer than three subsets or a zero rank.
    """
    points = [(row.n_samples, row.rank_needed or 0) for row in rows]
    if len(points) < 3 or any(rank == 0 for _, rank in points):
        return None
    x = np.log([n for n, _ in points])
    y = np.log([rank for _, rank in points])
    slope, intercept = np.polyfit(x, y, 1)
    residual = float(np.sqrt(np.mean((np.polyval([slope, intercept], x) - y) ** 2)))
    return Extrapolation(
        n_samples=total,
        rank_needed=round(float(np.exp(intercept + slope * np.log(total))), 2),
        exponent=round(float(slope), 4),
        rms_log_residual=round(residual, 4),
        points=points,
        note="extrapolation of a power law fitted to the subsets; not certified",
    )
