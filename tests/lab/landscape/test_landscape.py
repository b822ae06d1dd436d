"""Batches of starts: their distribution, the batch itself, and the judgement of ends that are known on paper."""

from __future__ import annotations

import math

import pytest
import torch

from ranksure.factors import FactorLayout, Factors
from ranksure.lab.landscape.census import (
    GLOBAL_TOLERANCE,
    VERDICTS,
    Cell,
    Census,
    census,
    certified_optimum,
    draw_starts,
    judge,
    merged,
    stacked,
)
from ranksure.lab.landscape.instances import gaussian_problem, spurious_instance
from ranksure.losses import get_loss
from ranksure.operators.dense import DenseOperator
from ranksure.perturbation import random_perturbation
from ranksure.problem import Problem
from ranksure.solvers.descent import gradient_scale
from ranksure.solvers.lbfgs import objective_on
from tests.helpers import convex_optimum, joined, objective, random_problem, updates


def judged(problem: Problem, points: list[Factors], norms: list[float] | None = None) -> Census:
    """The judgement of given points, as if starts had ended there."""
    ranks = {name: u.shape[1] for name, (u, _) in points[0].items()}
    layout = FactorLayout(dict(problem.operator.shapes), ranks)
    x = torch.cat([layout.flatten(point) for point in points])
    value, gradient = objective_on(problem, layout)(x)
    norm = gradient.norm(dim=1) / gradient_scale(problem)
    if norms is not None:
        norm = torch.tensor(norms, dtype=torch.float64)
    return judge(problem, certified_optimum(problem), layout, x, value, norm, 1)


def rotated(factors: Factors, seed: int) -> Factors:
    out = {}
    for name, (u, v) in factors.items():
        generator = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(u.shape[1], u.shape[1], generator=generator, dtype=torch.float64)).Q
        out[name] = (u @ q, v @ q)
    return out


def widened(factors: Factors, columns: int) -> Factors:
    zero = {n: (u.new_zeros(u.shape[0], columns), v.new_zeros(v.shape[0], columns)) for n, (u, v) in factors.items()}
    return joined(factors, zero)


def test_starts_are_a_quarter_lora_and_the_rest_over_five_decades():
    problem = random_problem(3, "squared-error")
    ranks = {"a.query": 2, "a.value": 1}
    layout = FactorLayout(dict(problem.operator.shapes), ranks)
    x = draw_starts(problem, ranks, 40, seed=5)
    assert x.shape == (40, layout.size) and x.dtype == torch.float64
    factors = layout.unflatten(x)
    for name, (u, v) in factors.items():
        n = problem.operator.shapes[name][1]
        assert not u[:10].any() and u[10:].all()
        assert 0.5 / math.sqrt(n) < float(v[:10].abs().max()) <= 1 / math.sqrt(n)
    penalty = problem.penalty_of(factors)[10:] / problem.objective_at_zero
    assert torch.allclose(penalty.log10(), torch.linspace(-4, 1, 30, dtype=torch.float64), atol=1e-9)
    assert torch.equal(x, draw_starts(problem, ranks, 40, seed=5))
    assert not torch.equal(x, draw_starts(problem, ranks, 40, seed=6))


def test_stacked_functions_are_their_parts():
    problems = [gaussian_problem(4, (3, 3), seed=s) for s in range(3)]
    layout = FactorLayout(dict(problems[0].operator.shapes), {"w": 2})
    x = torch.randn(6, layout.size, dtype=torch.float64)
    value, gradient = stacked([objective_on(p, layout) for p in problems], [1, 0, 5])(x)
    for row, problem in zip(x, [problems[0]] + 5 * [problems[2]], strict=True):
        expected, slope = objective_on(problem, layout)(row[None])
        index = int((x == row).all(1).nonzero())
        assert float(value[index]) == pytest.approx(float(expected), rel=1e-14)
        assert torch.allclose(gradient[index], slope[0], rtol=1e-13, atol=1e-15)


def test_global_ends_are_within_the_tolerance_of_an_independent_optimum():
    problems = [gaussian_problem(5, (4, 4), seed=s) for s in (1, 2)]
    for problem, found in zip(problems, census(problems, {"w": 3}, 12), strict=True):
        assert found.counts["global"] == found.starts == 12
        best, _ = convex_optimum(problem)
        assert found.lowest <= found.worst_global <= GLOBAL_TOLERANCE
        assert found.optimum.certificate.objective == pytest.approx(best, rel=1e-6)


def test_known_points_get_their_verdicts():
    trap = spurious_instance(2, extra=1)
    zero = {"w": tuple(torch.zeros_like(part) for part in trap.factors["w"])}
    near = {"w": (trap.factors["w"][0] * 1.05, trap.factors["w"][1])}
    points = [
        widened(trap.optimum, 1),
        trap.factors,
        rotated(trap.factors, 1),
        rotated(trap.factors, 2),
        zero,
        near,
    ]
    found = judged(trap.problem, points)  # pyright: ignore[reportArgumentType]
    assert found.counts == {"global": 1, "rank-bound": 0, "spurious": 3, "saddle": 1, "undetermined": 1}
    assert found.starts == 6 and found.counts["spurious"] == 3
    by_verdict = {group.verdict: group for group in found.groups}
    caught = by_verdict["spurious"]
    assert caught.count == 3 and caught.excess == pytest.approx(trap.excess, rel=1e-10)
    assert caught.examined is not None and caught.examined.strict is True and caught.examined.radius is not None
    assert by_verdict["undetermined"].examined is None
    # Ordered by the objective; the saddle at zero is the highest.
    assert [g.relative_gap for g in found.groups] == sorted(g.relative_gap for g in found.groups)
    assert by_verdict["saddle"].relative_gap == pytest.approx(1.0, rel=1e-9)


def test_a_trap_is_spurious_even_when_no_start_ended_lower():
    """The optimum has rank 1, so a better update of the same rank is known without any start."""
    trap = spurious_instance(1)
    found = judged(trap.problem, [trap.factors, trap.factors])
    assert found.counts["spurious"] == 2 and found.groups[0].lowest


def test_the_best_of_too_low_a_rank_is_rank_bound_not_spurious():
    """Two equal singular values in the optimum: rank 1 has minima of one common value, the best of their rank."""
    unit = torch.eye(3, dtype=torch.float64)
    # F = (1/9) sum_ab (d_ab - y_ab)^2 + lambda ||d||_*: the optimum soft-thresholds y = 2 e1 e1^T + 2 e2 e2^T.
    entries = torch.stack([torch.outer(unit[a], unit[b]) for a in range(3) for b in range(3)])[:, None]
    labels = torch.diag(torch.tensor([2.0, 2.0, 0.0], dtype=torch.float64)).reshape(9, 1)
    problem = Problem(DenseOperator({"w": entries}), torch.zeros(9, 1), labels, get_loss("squared-error"), {"w": 0.1})
    (found,) = census([problem], {"w": 1}, 16)
    shrunk = 2 - 9 * 0.1 / 2
    best = objective(problem, {"w": shrunk * torch.outer(unit[0], unit[0])})
    assert found.counts["rank-bound"] + found.counts["saddle"] + found.counts["undetermined"] == 16
    assert found.counts["rank-bound"] == sum(g.count for g in found.groups if g.verdict == "rank-bound")
    assert found.optimum.ranks["w"] == 2
    for group in found.groups:
        assert group.excess + found.optimum.certificate.objective == pytest.approx(best, rel=1e-9)
    assert census([problem], {"w": 2}, 16)[0].counts["global"] == 16


def test_ends_that_are_not_stationary_are_undetermined_each_by_itself():
    trap = spurious_instance(1)
    found = judged(trap.problem, [trap.factors] * 3, norms=[1e-3, 1e-3, math.nan])
    assert found.counts["undetermined"] == 3 and found.counts["spurious"] == 0
    assert [group.count for group in found.groups] == [1, 1, 1]


def test_ends_of_equal_objective_but_other_penalty_are_apart():
    trap = spurious_instance(2)
    problem, optimum = trap.problem, certified_optimum(trap.problem)
    layout = FactorLayout(dict(problem.operator.shapes), {"w": 2})
    x = layout.flatten(trap.factors).repeat(4, 1)
    x[2:] *= 1.1
    value = torch.full((4,), optimum.certificate.objective + 0.1, dtype=torch.float64)
    value[1] += 1e-12
    found = judge(problem, optimum, layout, x, value, torch.zeros(4, dtype=torch.float64), 1)
    assert [group.count for group in found.groups] == [2, 2]
    value[1] += 1e-3
    apart = judge(problem, optimum, layout, x, value, torch.zeros(4, dtype=torch.float64), 1)
    assert sorted(group.count for group in apart.groups) == [1, 1, 2]


@pytest.mark.parametrize("size", [0.0, 0.05])
def test_random_starts_are_trapped_at_rank_r_only(size):
    trap = spurious_instance(1, extra=1)
    problem = random_perturbation(trap.problem, size * 0.1, 4).problem
    (below,) = census([problem], {"w": 1}, 100, seed=1)
    (above,) = census([problem], {"w": 2}, 100, seed=1)
    assert below.counts["spurious"] >= 5 and below.counts["spurious"] + below.counts["global"] == 100
    assert above.counts["global"] == 100
    if size == 0:
        assert all(g.excess == pytest.approx(trap.excess, abs=1e-10) for g in below.groups)


def test_the_trap_ends_where_the_objective_says():
    """The ends themselves, evaluated by an objective that shares no code."""
    trap = spurious_instance(2)
    (found,) = census([trap.problem], {"w": 2}, 60, seed=3)
    (group,) = found.groups
    value = objective(trap.problem, updates(group.factors))
    assert value - objective(trap.problem, updates(trap.optimum)) == pytest.approx(trap.excess, rel=1e-9)


def test_cells_add_up_and_know_their_side_of_the_bounds():
    trap = spurious_instance(2, extra=1)
    parts = census([trap.problem, trap.problem], {"w": 2}, 8)
    shapes = dict(trap.problem.operator.shapes)
    cell = Cell("x", {"w": 2}, 5, shapes, 0.0, parts)
    assert cell.starts == 16 and sum(merged(parts).values()) == 16
    assert not cell.above and Cell("x", {"w": 3}, 5, shapes, 0.0, parts).above
    assert cell.has_capacity  # 2 (4 + 4) - 4 = 12 > 6.75
    assert not Cell("x", {"w": 1}, 6, shapes, 0.0, parts).has_capacity  # 7 < 8.1
    record = cell.to_json()
    assert set(record["counts"]) == set(VERDICTS) and record["starts"] == 16 and len(record["parts"]) == 2
