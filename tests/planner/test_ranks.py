"""Verdicts, shares and the smallest ranks, found again from the definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ranksure.planner.ranks import (
    OPTIMAL,
    captures,
    choose_starts,
    clipped,
    parameters,
    rank_table,
    smallest_pattern,
    smallest_uniform,
)
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.fixed_rank import solve_fixed_rank
from tests.helpers import convex_optimum, objective, random_problem, spurious_instance, updates

SHAPES = {"a.query": (5, 6), "a.value": (6, 4), "b.query": (3, 3)}


def quiet(done: int, total: int) -> None:
    pass


def hard(seed: int = 0, loss: str = "squared-error", share: float = 0.02):
    """A weak penalty, so that the optimum has large ranks."""
    return random_problem(seed, loss, n=14, k=2, shapes=SHAPES, share=share)


def table_of(problem, ranks, share=0.99, starts=2):
    solution = solve(problem, tolerance=1e-8)
    assert solution.status == "converged"
    found = rank_table(problem, solution, ranks, share=share, seed=0, random_starts=starts, advance=quiet)
    return solution, *found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", ["cross-entropy", "squared-error"])
def test_rows_are_judged_by_the_definitions(seed, loss):
    problem = hard(seed, loss)
    best, _ = convex_optimum(problem)
    zero = objective(problem, {name: u * 0 for name, u in updates(solve(problem).factors).items()})
    _, table, _ = table_of(problem, [1, 2, 3])
    assert table.best_dual <= best + 1e-9 * max(1, abs(best))
    verdicts = set()
    for row in table.rows:
        reached = objective(problem, updates(row.factors))
        assert row.certificate.objective == pytest.approx(reached, rel=1e-7)
        low, high = row.captured
        truth = (zero - reached) / (zero - best)
        assert 0 <= low <= truth + 1e-7
        assert truth - 1e-7 <= high <= 1
        left = (reached - table.best_dual) / (zero - table.best_dual)
        assert (row.verdict == "optimal") == (left <= OPTIMAL)
        if row.verdict == "rank-bound":
            assert row.stationary
            assert row.negative_curvature == 0
        assert all(u.shape[1] <= min(row.rank, *SHAPES[name]) for name, (u, _) in row.factors.items())
        verdicts.add(row.verdict)
    assert table.row(3).certificate.objective <= table.row(1).certificate.objective + 1e-12
    assert "optimal" in verdicts


def test_a_known_trap_is_not_fallen_into():
    """DESIGN's spurious instance: rank 2 has a strict local minimum, and the optimum has rank 1."""
    problem, _, best, _ = spurious_instance(2)
    _, table, needed = table_of(problem, [1, 2])
    assert needed == 1
    assert [row.verdict for row in table.rows] == ["optimal", "optimal"]
    assert table.row(1).certificate.objective == pytest.approx(objective(problem, best), rel=1e-7)


def test_too_small_a_rank_is_rank_bound():
    problem = hard(1)
    _, table, _ = table_of(problem, [1])
    row = table.row(1)
    assert row.verdict == "rank-bound"
    assert row.certificate.spectral_ratio > 1
    assert row.captured[1] < 1 - OPTIMAL


def test_an_unfinished_row_is_not_converged():
    problem = hard(1)
    _, table, _ = table_of(problem, [1])
    table.rows[0] = replace(table.rows[0], stationary=False)
    table.judge()
    assert table.rows[0].verdict == "not-converged"
    table.rows[0] = replace(table.rows[0], stationary=True, negative_curvature=1)
    table.judge()
    assert table.rows[0].verdict == "not-converged"
    table.rows[0] = replace(table.rows[0], negative_curvature=None)
    table.judge()
    assert table.rows[0].verdict == "not-converged"


@pytest.mark.parametrize("limits", [{"max_rounds": 1}, {"max_evaluations": 4}, {"tolerance": 0.05}])
def test_a_solver_that_stopped_early_bounds_no_rank(limits):
    """Its point has unused columns at a larger rank, and rho above 1: a saddle there, which nothing had looked at."""
    problem = hard(1)
    unfinished = solve(problem, **limits)
    assert unfinished.certificate.relative_gap > OPTIMAL and unfinished.certificate.spectral_ratio > 1
    largest = max(unfinished.ranks.values()) + 1
    table, _ = rank_table(problem, unfinished, [largest], share=0.9, seed=0, random_starts=0, advance=quiet)
    row = table.row(largest)
    assert row.factors is unfinished.factors and row.verdict == "not-converged"
    assert row.stationary is None and row.negative_curvature is None
    assert solve(problem, start=row.factors).certificate.objective < row.certificate.objective * (1 - 1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.5, 0.95, 0.999])
def test_smallest_uniform_rank_of_the_table(seed, share):
    """The rank found reaches the share and, of all that were tried, none below it does."""
    problem = hard(seed)
    solution, table, smallest = table_of(problem, [1], share=share)
    assert table.row(smallest).captured[0] >= share
    tried = {row.rank: row.captured[0] for row in table.rows}
    assert all(captured < share for rank, captured in tried.items() if rank < smallest)
    assert smallest == 1 or smallest - 1 in tried  # the rank just below was tried, and failed
    assert smallest <= max(solution.ranks.values())
    assert {row.rank: row.requested for row in table.rows}[1] is True
    assert all(not row.requested for row in table.rows if row.rank != 1)


@pytest.mark.parametrize("seed", range(3))
def test_smallest_pattern_captures_and_is_no_larger(seed):
    problem, share = hard(seed), 0.95
    solution = solve(problem, tolerance=1e-8)
    best, _ = convex_optimum(problem)
    zero = solution.certificate.objective_at_zero
    pattern, point = smallest_pattern(problem, solution, share, quiet)
    reached = objective(problem, updates(point.factors))
    assert (zero - reached) / (zero - best) >= share - 1e-7
    assert {name: u.shape[1] for name, (u, _) in point.factors.items()} == pattern
    assert parameters(problem, pattern) < parameters(problem, solution.ranks)
    # Found again from random starts, knowing nothing but the pattern.
    again = solve_fixed_rank(problem, pattern, random_starts=20, seed=1).solution
    assert (zero - objective(problem, updates(again.factors))) / (zero - best) >= share - 1e-7
    # One direction fewer anywhere was tried and failed.
    for name in [name for name, rank in pattern.items() if rank]:
        assert captures(problem, point_of(solution, point), {**pattern, name: pattern[name] - 1}, share) is None


def point_of(solution, point):
    return replace(point, certificate=solution.certificate)


def test_zero_optimum_needs_nothing():
    problem = random_problem(0, share=1.5, shapes=SHAPES)
    solution, table, smallest = table_of(problem, [1, 2])
    assert smallest == 0
    assert [row.rank for row in table.rows] == [1, 2]
    assert all(row.captured == (1.0, 1.0) and row.verdict == "optimal" for row in table.rows)
    assert smallest_pattern(problem, solution, 0.99, quiet)[0] == dict.fromkeys(SHAPES, 0)
    assert smallest_uniform(problem, solution, 0.99) == 0


def test_parameters_and_clipping():
    problem = hard()
    assert clipped(problem, 4) == {"a.query": 4, "a.value": 4, "b.query": 3}
    assert parameters(problem, {"a.query": 2, "b.query": 1}) == 2 * (5 + 6) + (3 + 3)
    assert parameters(problem, {}) == 0


def test_starts_as_asked():
    problem = hard()
    assert choose_starts(problem, 1, 5) == 5
    assert choose_starts(problem, 1, 0) == 0
    assert math.isfinite(choose_starts(problem, 1, None))
