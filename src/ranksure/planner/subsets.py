"""How the answer moves with the amount of data: nested subsets, and an extrapolation marked as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ranksure.planner.ranks import clipped, smallest_uniform, solve_again
from ranksure.problem import Problem
from ranksure.progress import Advance
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.solution import Solution

TOLERANCE = 1e-3


@dataclass(frozen=True)
class SubsetRow:
    """The answer on the first ``n`` rows.

    Attributes:
        n: number of rows.
        penalty: lambda, scaled as ``n^-1/2``.
        relative_gap: certified relative gap of the subset's optimum.
        ranks: certified rank of every module.
        rank_needed: smallest uniform rank found to capture the wanted share.
        captured: lower end of the captured share by requested rank.
    """

    n: int
    penalty: float
    relative_gap: float
    ranks: dict[str, int]
    rank_needed: int
    captured: dict[int, float]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "n_samples": self.n,
            "weight_decay": self.penalty,
            "relative_gap": self.relative_gap,
            "ranks": self.ranks,
            "largest_rank": max(self.ranks.values(), default=0),
            "rank_needed": self.rank_needed,
            "captured": {str(rank): share for rank, share in self.captured.items()},
        }


def subset_rows(
    problem: Problem, sizes: Sequence[int], ranks: Sequence[int], share: float, advance: Advance
) -> list[SubsetRow]:
    """Solve the problem on nested prefixes of the rows, to a relative gap of 1e-3; lambda goes with ``N^-1/2``."""
    rows: list[SubsetRow] = []
    for index, n in enumerate(sizes):
        factor = (problem.operator.n_samples / n) ** 0.5
        smaller = problem.subset(torch.arange(n)).with_penalty({k: lam * factor for k, lam in problem.penalty.items()})
        solution = solve(smaller, tolerance=TOLERANCE)
        rows.append(subset_row(smaller, solution, n, ranks, share))
        advance(index + 1, len(sizes))
    return rows


def subset_row(problem: Problem, solution: Solution, n: int, ranks: Sequence[int], share: float) -> SubsetRow:
    """The row of a solved subset; captured shares come from the truncated optimum solved again."""
    needed = smallest_uniform(problem, solution, share)
    shares: dict[int, float] = {}
    for rank in ranks:
        if rank >= max(solution.ranks.values(), default=0):
            shares[rank] = solution.certificate.captured()[0]
        else:
            reached = solve_again(problem, solution, clipped(problem, rank), TOLERANCE)
            shares[rank] = reached.certificate.captured()[0]
    lam = max(problem.penalty.values())
    return SubsetRow(n, lam, solution.certificate.relative_gap, solution.ranks, needed, shares)


def extrapolate(rows: Sequence[SubsetRow], total: int) -> dict[str, Any] | None:
    """Fit ``rank = a N^p`` through the subsets by least squares on logarithms; an extrapolation, not a result.

    Returns:
        The fit and what it says at ``total`` rows; None with fewer than three subsets or a zero rank.
    """
    points = [(row.n, row.rank_needed) for row in rows]
    if len(points) < 3 or any(rank == 0 for _, rank in points):
        return None
    x = np.log([n for n, _ in points])
    y = np.log([rank for _, rank in points])
    slope, intercept = np.polyfit(x, y, 1)
    residual = float(np.sqrt(np.mean((np.polyval([slope, intercept], x) - y) ** 2)))
    return {
        "n_samples": total,
        "rank_needed": round(float(np.exp(intercept + slope * np.log(total))), 2),
        "exponent": round(float(slope), 4),
        "rms_log_residual": round(residual, 4),
        "points": [[n, rank] for n, rank in points],
        "note": "extrapolation of a power law fitted to the subsets; not certified",
    }
