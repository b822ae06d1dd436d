"""The ranks of a solved problem: the table by uniform rank, the smallest rank, the smallest pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ranksure.certificate import Certificate, captured_interval
from ranksure.factors import Factors, ranks_of, singular_values
from ranksure.problem import Problem
from ranksure.progress import Advance
from ranksure.solvers.descent import SINGLE_PRECISION
from ranksure.solvers.fixed_rank import FixedRank, solve_fixed_rank
from ranksure.solvers.solution import Solution

Verdict = Literal["optimal", "rank-bound", "not-converged"]

OPTIMAL = 1e-4
"""A rank is ``optimal`` when ``(F_r - D*) / (F(0) - D*)`` is at most this."""

_START_BUDGET = 4e11  # floating-point operations spent on random starts of one rank


@dataclass
class TableRow:
    """What one uniform rank reaches; see ``RankTable``.

    ``stationary`` and ``negative_curvature`` are None where they were not looked at: at the optimum itself, which its
    gap judges.
    """

    rank: int
    requested: bool
    factors: Factors
    certificate: Certificate
    starts: int
    stationary: bool | None
    negative_curvature: int | None
    seconds: float
    captured: tuple[float, float] = (0.0, 0.0)
    verdict: Verdict = "not-converged"


@dataclass
class RankTable:
    """Rows by uniform rank, all judged by the same best dual value and best objective."""

    rows: list[TableRow]
    solution: Solution
    best_dual: float
    best_objective: float

    def row(self, rank: int) -> TableRow:
        """The row of a rank."""
        return next(row for row in self.rows if row.rank == rank)

    def captured(self, certificate: Certificate) -> tuple[float, float]:
        """Interval of the share that a point captures, by the best values known."""
        zero = certificate.objective_at_zero
        return captured_interval(zero - certificate.objective, zero - self.best_dual, zero - self.best_objective)

    def judge(self) -> None:
        """Set captured intervals and verdicts from the best values known."""
        self.rows.sort(key=lambda row: row.rank)
        zero = self.solution.certificate.objective_at_zero
        for row in self.rows:
            most = zero - self.best_dual
            row.captured = self.captured(row.certificate)
            share_left = (row.certificate.objective - self.best_dual) / most if most > 0 else 0.0
            if share_left <= OPTIMAL:
                row.verdict = "optimal"
            elif row.stationary and row.negative_curvature == 0:
                row.verdict = "rank-bound"
            else:
                row.verdict = "not-converged"


def clipped(problem: Problem, rank: int) -> dict[str, int]:
    """A uniform rank, clipped to each block."""
    return {name: min(rank, *shape) for name, shape in problem.operator.shapes.items()}


def parameters(problem: Problem, ranks: dict[str, int]) -> int:
    """Trainable parameters of LoRA factors of these ranks."""
    return sum(ranks.get(name, 0) * (m + n) for name, (m, n) in problem.operator.shapes.items())


def choose_starts(problem: Problem, rank: int, asked: int | None, most: int = 8) -> int:
    """Random starts as the size allows: at most 8, fewer when one evaluation is long."""
    if asked is not None:
        return asked
    per_evaluation = 8 * rank * problem.operator.multiplications if rank else 0
    return max(0, min(most, int(_START_BUDGET / (300 * max(per_evaluation, 1)))))


def smallest_within_error(losses: Mapping[int, Tensor]) -> int:
    """Smallest rank whose held-out losses, one a row, are within one paired standard error of the best rank's."""
    best = min(losses, key=lambda rank: float(losses[rank].mean()))
    for rank in sorted(losses):
        difference = losses[rank] - losses[best]
        error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
        if float(difference.mean()) <= error:
            return rank
    return best


def rank_table(
    problem: Problem,
    solution: Solution,
    ranks: list[int],
    *,
    share: float,
    seed: int,
    random_starts: int | None,
    advance: Advance,
) -> tuple[RankTable, int]:
    """Solve at every requested rank, and at those between until the smallest sufficient one is known.

    Returns:
        The table and the smallest uniform rank found to capture at least ``share``.
    """
    table = RankTable([], solution, solution.certificate.dual, solution.certificate.objective)
    needed = max(solution.ranks.values(), default=0)

    def add(rank: int, requested: bool) -> None:
        table.rows.append(_solve_row(problem, table, rank, requested, seed, random_starts))
        table.judge()
        advance(len(table.rows), max(len(ranks), len(table.rows)))

    for rank in sorted(set(ranks)):
        add(rank, True)

    def passes(rank: int) -> bool:
        if rank >= needed:
            return True
        if all(row.rank != rank for row in table.rows):
            add(rank, False)
        return table.row(rank).captured[0] >= share

    low = max((row.rank for row in table.rows if row.rank < needed and row.captured[0] < share), default=0)
    high = min([row.rank for row in table.rows if row.rank > low and row.captured[0] >= share] + [max(needed, low + 1)])
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    if needed and all(row.rank != high for row in table.rows):
        add(high, False)
    return table, high if needed else 0


def _solve_row(
    problem: Problem, table: RankTable, rank: int, requested: bool, seed: int, random_starts: int | None
) -> TableRow:
    ranks = clipped(problem, rank)
    solution = table.solution
    if all(solution.ranks[name] <= allowed for name, allowed in ranks.items()):  # the optimum itself fits
        return TableRow(rank, requested, solution.factors, solution.certificate, 1, None, None, 0.0)
    found: FixedRank = solve_fixed_rank(
        problem,
        ranks,
        reference=solution.factors,
        random_starts=choose_starts(problem, rank, random_starts),
        seed=seed + rank,
        best_dual=table.best_dual,
        enough=0.1 * OPTIMAL,
    )
    result = found.solution
    table.best_dual = max(table.best_dual, result.certificate.dual)
    table.best_objective = min(table.best_objective, result.certificate.objective)
    return TableRow(
        rank,
        requested,
        result.factors,
        result.certificate,
        found.starts,
        found.stationary,
        found.curvature.negative,
        result.seconds,
    )


def solve_again(
    problem: Problem, solution: Solution, ranks: dict[str, int], enough: float, reference: Factors | None = None
) -> Solution:
    """Descend at fixed ranks from a truncation of ``reference`` (default: the optimum), to a relative gap."""
    return solve_fixed_rank(
        problem,
        ranks,
        reference=solution.factors if reference is None else reference,
        tolerance=SINGLE_PRECISION,
        best_dual=solution.certificate.dual,
        max_evaluations=400,
        enough=enough,
        check_curvature=False,
    ).solution


def captures(
    problem: Problem, solution: Solution, ranks: dict[str, int], share: float, reference: Factors | None = None
) -> Solution | None:
    """A point of these ranks that captures at least ``share``; None if not found."""
    # A little more than asked, so that rounding cannot undo it.
    found = solve_again(problem, solution, ranks, 0.98 * (1 - share), reference)
    return found if found.certificate.captured()[0] >= share else None


def smallest_uniform(problem: Problem, solution: Solution, share: float) -> int:
    """Smallest uniform rank found to capture ``share``, by bisection below the optimum's own rank."""
    low, high = 0, max(solution.ranks.values(), default=0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if captures(problem, solution, clipped(problem, middle), share) else (middle, high)
    return high


def smallest_pattern(
    problem: Problem, solution: Solution, share: float, advance: Advance
) -> tuple[dict[str, int], Solution]:
    """Smallest rank of every module found to capture ``share``, counted in parameters.

    Directions are ordered by their penalty; bisection finds how many of the largest suffice after
    solving again, and then each module in turn gives up its last direction where the rest make up
    for it.

    Returns:
        Ranks by block (zero for a module left out) and the point that reaches the share.
    """
    values = singular_values(solution.factors)
    order = sorted(
        ((problem.penalty[name] * float(s), name) for name, column in values.items() for s in column),
        key=lambda pair: pair[0],
        reverse=True,
    )
    best_ranks, best = dict(ranks_of(solution.factors)), solution

    def first(count: int) -> dict[str, int]:
        kept = dict.fromkeys(values, 0)
        for _, name in order[:count]:
            kept[name] += 1
        return kept

    low, high, tried = 0, len(order), 0
    while high - low > 1:
        middle = (low + high) // 2
        found = captures(problem, solution, first(middle), share)
        tried += 1
        advance(tried, tried + 1)
        if found is not None:
            high, best_ranks, best = middle, first(middle), found
        else:
            low = middle
    stuck: set[str] = set()
    while True:
        left = [name for name, rank in best_ranks.items() if rank > 0 and name not in stuck]
        if not left or sum(best_ranks.values()) <= 1:
            return best_ranks, best
        weakest = min(left, key=lambda name: problem.penalty[name] * _last_value(best, name))
        fewer = {**best_ranks, weakest: best_ranks[weakest] - 1}
        found = captures(problem, solution, fewer, share, best.factors)
        tried += 1
        advance(tried, tried + 1)
        if found is None:
            stuck.add(weakest)
        else:
            best_ranks, best = fewer, found


def _last_value(solution: Solution, name: str) -> float:
    values = singular_values({name: solution.factors[name]})[name]
    return float(values[-1]) if len(values) else 0.0
