"""Verdicts on hand-built points, against dense Hessians and an independent convex solver."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksure.certificate import certify_point, lambda_max
from ranksure.curvature import EscapeDirection, hessian_vector
from ranksure.errors import SettingError
from ranksure.losses import get_loss
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator
from ranksure.problem import Problem
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.descent import gradient_scale
from ranksure.solvers.fixed_rank import solve_fixed_rank
from ranksure.theory import stationarity
from ranksure.theory.stationarity import classify
from tests.helpers import (
    LOSS_NAMES,
    convex_optimum,
    factored_objective,
    flatten,
    generator_of,
    jacobians_of,
    objective,
    randn,
    random_factors,
    random_problem,
    spurious_instance,
    token_group,
    unflatten,
    updates,
)
from tests.refusals import refusal

SHAPES = {"a": (3, 2), "b": (2, 4)}


def dense_hessian(problem, factors):
    dense = replace(problem, operator=DenseOperator(jacobians_of(problem)))
    return torch.func.hessian(lambda x: factored_objective(dense, factors, x))(flatten(factors))


def eigenvalues(problem, factors):
    return torch.linalg.eigvalsh(dense_hessian(problem, factors))


def padded(factors, columns=1):
    return {
        name: tuple(torch.cat([part, part.new_zeros(part.shape[0], columns)], 1) for part in pair)
        for name, pair in factors.items()
    }


def beside(factors, distance, seed):
    """The factors moved by random ones, times a distance."""
    shapes = {name: (u.shape[0], v.shape[0]) for name, (u, v) in factors.items()}
    off = random_factors(shapes, {name: u.shape[1] for name, (u, _) in factors.items()}, seed)
    return {n: (u + distance * off[n][0], v + distance * off[n][1]) for n, (u, v) in factors.items()}


def separable_saddle():
    """Two blocks, one sample each: 'a' is stationary along the smaller entry of diag(2, 1), 'b' is at its optimum."""
    a, b = torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    a[0, 0], b[1, 0] = torch.diag(torch.tensor([2.0, 1.0])), 1.0
    labels = torch.tensor([[3.0], [2.0]], dtype=torch.float64)
    problem = Problem(
        DenseOperator({"a": a, "b": b}), 0 * labels, labels, get_loss("squared-error"), {"a": 0.5, "b": 0.5}
    )
    # With weights 1/2, 3 - s = lambda along e_2 and 2 - s = lambda: s = 2.5 and 1.5.
    along = math.sqrt(2.5) * torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    one = math.sqrt(1.5) * torch.ones(1, 1, dtype=torch.float64)
    return problem, {"a": (along, along.clone()), "b": (one, one.clone())}


def verified(problem, factors, found):
    """The escape, from the dense Jacobians: its curvature, and the objective after its step."""
    escape = found.escape
    d = flatten(escape.direction)
    assert float(d.norm()) == pytest.approx(1)
    assert escape.curvature == pytest.approx(float(d @ dense_hessian(problem, factors) @ d), rel=1e-6)
    assert escape.curvature < 0
    x = flatten(factors)
    here, there, back = (
        float(factored_objective(problem, factors, x + t * d)) for t in (0.0, escape.step, -escape.step)
    )
    assert escape.decrease == pytest.approx(here - there, rel=1e-6, abs=1e-13)
    assert escape.mean_decrease == pytest.approx(here - 0.5 * (there + back), rel=1e-6, abs=1e-13)
    assert escape.decrease >= escape.mean_decrease > 0
    torch.testing.assert_close(flatten(escape.apply(factors)), x + escape.step * d)
    return True


# ---- hand-built points


@pytest.mark.parametrize("r", [1, 2, 3])
def test_the_explicit_trap_is_a_strict_spurious_minimum(r):
    problem, trap, _, excess = spurious_instance(r)
    found = classify(problem, trap)
    assert found.verdict == "spurious-local-minimum"
    assert found.excess == pytest.approx(excess, rel=1e-4)
    assert found.better.certificate.objective == pytest.approx(found.certificate.objective - excess, abs=1e-6)
    assert found.strict is True
    values = eigenvalues(problem, trap)[r * (r - 1) // 2 :]  # above the rotations
    assert 0 < found.strict_curvature <= float(values[0]) + 1e-12
    assert found.better_fits is True  # the optimum has rank 1
    assert 0 < found.radius < 1e-9
    assert found.imbalance == {"w": 0.0}
    assert found.certificate.gap >= excess


@pytest.mark.parametrize("r", [1, 2, 3])
def test_the_trap_with_a_zero_column_is_a_saddle(r):
    """Rank r + 1: the top singular pair of the gradient, rho = 2, leads out along the empty column."""
    problem, trap, _, _ = spurious_instance(r)
    found = classify(problem, padded(trap))
    assert found.verdict == "saddle"
    assert found.escape.curvature == pytest.approx(0.1 * (1 - 2), rel=1e-3)  # lambda (1 - rho)
    assert found.lowest_found == pytest.approx(found.escape.curvature)
    assert verified(problem, padded(trap), found)


def test_two_block_saddle():
    problem, saddle = separable_saddle()
    found = classify(problem, saddle)
    assert found.verdict == "saddle"
    assert found.gradient_norm < 1e-12
    assert found.escape.curvature == pytest.approx(-0.5, rel=1e-5)  # lambda - ||g||, g = -(1/2) diag(2, 1)
    assert float(torch.cat(found.escape.direction["b"]).norm()) < 1e-2
    assert verified(problem, saddle, found)


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_optimum_is_global_at_any_ranks(loss):
    problem = random_problem(4, loss, 6, 2, SHAPES, 0.2)
    best = solve(problem, tolerance=1e-9)
    for factors in (best.factors, padded(best.factors, 2)):
        found = classify(problem, factors)
        assert found.verdict == "global"
        assert found.certificate.relative_gap <= 1e-6
        assert max(found.imbalance.values()) < 1e-3
        assert "Global" in found.sentence and "balance" not in found.sentence
    name = max(SHAPES, key=lambda n: float(best.factors[n][0].norm()))
    u, v = best.factors[name]
    unbalanced = classify(problem, {**best.factors, name: (3 * u, v / 3)})
    assert unbalanced.verdict == "global"  # the update is; the factors are not stationary, and it is said
    assert unbalanced.imbalance[name] > 0.9
    assert "balance them" in unbalanced.sentence
    surplus = 0.5 * problem.penalty[name] * float(8 * u.square().sum() - 8 / 9 * v.square().sum())
    assert unbalanced.objective - unbalanced.certificate.objective == pytest.approx(surplus)


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("rank", [1, 2])
def test_zero_factors(loss, rank):
    """u = v = 0: H is [[lambda, g], [g', lambda]], a saddle when ||g|| > lambda; else zero is optimal."""
    problem = random_problem(3, loss, 5, 2, SHAPES, 0.5, uneven=False)
    zero = {n: (torch.zeros(m, rank).double(), torch.zeros(k, rank).double()) for n, (m, k) in SHAPES.items()}
    found = classify(problem, zero)
    assert found.verdict == "saddle"
    assert found.gradient_norm == 0
    lam = next(iter(problem.penalty.values()))
    assert found.escape.curvature == pytest.approx(lam - lambda_max(problem), rel=1e-3)
    assert verified(problem, zero, found)
    assert classify(problem.with_penalty(lambda_max(problem) * 1.001), zero).verdict == "global"


def test_start_of_lora_is_not_stationary():
    """u = 0 and v != 0: the gradient in v is lambda v, in u it is g v; below lambda_max the update is not global."""
    problem = random_problem(3, "logistic", 5, 2, SHAPES, 0.5)
    start = {name: (0 * u, v) for name, (u, v) in random_factors(SHAPES, 2, 1).items()}
    found = classify(problem, start)
    assert found.verdict == "not-stationary"
    g = certify_point(problem, start).gradients
    squares = sum(
        float((g[n] @ v).square().sum() + (problem.penalty[n] * v).square().sum()) for n, (_, v) in start.items()
    )
    assert found.gradient_norm == pytest.approx(math.sqrt(squares) / gradient_scale(problem), rel=1e-12)
    assert found.imbalance == dict.fromkeys(SHAPES, 1.0)
    # at lambda_max and above the zero update is optimal, wherever v is
    assert classify(problem.with_penalty(1.001 * lambda_max(problem)), start).verdict == "global"


def test_rank_zero():
    problem = random_problem(3, "logistic", 5, 2, SHAPES, 0.5)
    found = classify(problem, {})
    assert found.verdict == "spurious-local-minimum"  # its only point, and worse than a higher rank
    assert (found.strict, found.better_fits, found.gradient_norm) == (True, None, 0.0)
    assert found.excess == pytest.approx(problem.objective_at_zero - convex_optimum(problem)[0], rel=1e-4)
    assert classify(problem.with_penalty(1.001 * lambda_max(problem)), {}).verdict == "global"


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_random_points_are_not_stationary(loss):
    for seed in range(5):
        problem = random_problem(seed, loss, 5, 2, SHAPES, 0.3)
        factors = random_factors(SHAPES, {"a": 1, "b": 2}, seed)
        found = classify(problem, factors)
        assert found.verdict == "not-stationary"
        gradient = torch.func.grad(lambda x, p=problem, f=factors: factored_objective(p, f, x))(flatten(factors))
        assert found.gradient_norm == pytest.approx(float(gradient.norm()) / gradient_scale(problem), rel=1e-9)
        assert found.objective == pytest.approx(float(factored_objective(problem, factors, flatten(factors))))
        assert classify(problem, factors, gradient_tolerance=1e9).verdict != "not-stationary"


# ---- nothing without a proof


def test_limits_give_not_determined():
    problem, trap, _, _ = spurious_instance(3)
    small = classify(problem, trap, max_size=4)
    assert small.verdict == "not-determined"
    assert "9 rows" in small.reason
    saddle = classify(problem, padded(trap), max_size=4, max_iterations=1)
    assert (saddle.verdict, saddle.escape, saddle.lowest_found) == ("not-determined", None, None)
    assert classify(problem, padded(trap), max_size=4).verdict == "saddle"  # by the direction alone
    assert classify(problem, padded(trap), max_iterations=1).verdict == "saddle"  # by the inertia
    assert classify(problem, trap, max_iterations=1).verdict == "spurious-local-minimum"


def test_an_unconverged_direction_proves_nothing(monkeypatch):
    problem, saddle = separable_saddle()
    true = classify(problem, saddle).escape.direction
    unconverged = EscapeDirection(-0.25, true, False, 0.1)
    monkeypatch.setattr(stationarity, "escape_direction", lambda *args: unconverged)
    found = classify(problem, saddle, max_size=1)
    assert (found.verdict, found.lowest_found) == ("not-determined", None)


def test_a_converged_direction_that_is_not_the_lowest_hides_nothing(monkeypatch):
    """Lanczos may miss a direction: the factorisation finds it, whichever matrix it factorises."""
    problem, saddle = separable_saddle()
    values, vectors = torch.linalg.eigh(dense_hessian(problem, saddle))
    assert float(values[1]) > 0
    second = EscapeDirection(float(values[1]), unflatten(vectors[:, 1], saddle), True, 0.0)
    monkeypatch.setattr(stationarity, "escape_direction", lambda *args: second)
    found = classify(problem, saddle)
    assert found.verdict == "saddle"
    assert found.curvature.negative == 1
    assert verified(problem, saddle, found)


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_a_residual_gradient_is_not_taken_for_a_saddle(distance):
    """Near a minimum of rank 2 the straight line along a rotation bends the objective down: the gradient's doing."""
    problem, trap, _, _ = spurious_instance(2)
    verdicts, lowest = [], []
    for seed in range(8):
        near = beside(trap, distance, seed)
        verdicts.append(classify(problem, near, gradient_tolerance=1.0).verdict)
        lowest.append(float(eigenvalues(problem, near)[0]))
    assert min(lowest) < -1e-2 * distance  # negative, and it would pass for curvature
    assert "saddle" not in verdicts
    if distance == 1e-6:
        assert set(verdicts) == {"spurious-local-minimum"}


def test_rotations_of_weak_columns_are_not_taken_for_a_saddle():
    """Weak columns shrunk by a thousandth: within the default tolerance, but a line along their rotation descends."""
    sizes, rho = torch.tensor([1.0, 0.001, 0.001], dtype=torch.float64), 1.001
    problem, _, _, _ = spurious_instance(3, rho=rho)
    labels = problem.labels.clone()
    c = math.sqrt(2)
    labels[:3, 0] = c * sizes + problem.operator.n_samples * 0.1 / (2 * c)  # the same gradient at other singular values
    problem = replace(problem, labels=labels)
    trap = torch.cat([torch.diag(sizes.sqrt()), torch.zeros(1, 3, dtype=torch.float64)])
    near = trap * torch.tensor([1.0, 0.999, 0.999])
    for factor in (trap, near):
        found = classify(problem, {"w": (factor, factor.clone())}, tolerance=1e-9)
        assert found.verdict == "spurious-local-minimum"
    assert 1e-9 < found.gradient_norm < found.gradient_tolerance
    skew = torch.zeros(3, 3, dtype=torch.float64)
    skew[1, 2], skew[2, 1] = 1, -1
    turn = flatten({"w": (near @ skew, near @ skew)})
    turn = turn / turn.norm()
    point = {"w": (near, near.clone())}
    curvature = float(turn @ dense_hessian(problem, point) @ turn)
    assert curvature < 0
    assert found.lowest_found == pytest.approx(curvature, rel=1e-2)
    values = [float(factored_objective(problem, point, flatten(point) + t * turn)) for t in (0.0, 3e-4, -3e-4)]
    assert max(values[1:]) < values[0]


def test_global_is_the_gap_and_nothing_else():
    problem = random_problem(4, "logistic", 6, 2, SHAPES, 0.2)
    near = solve(problem, tolerance=1e-2).factors
    gap = certify_point(problem, near).certificate.relative_gap
    assert gap > 1e-6
    assert classify(problem, near, tolerance=1.001 * gap).verdict == "global"
    for gradient_tolerance in (1e-12, 1.0):
        found = classify(problem, near, tolerance=0.999 * gap, gradient_tolerance=gradient_tolerance)
        # a solution proves more about the point than the point itself does
        assert found.verdict != "global" or found.certificate.relative_gap <= 0.999 * gap


def test_the_optimums_dual_proves_more_than_the_points_own():
    """A little off the optimum the own gap is of first order, the excess of second: solving closes the gap."""
    problem = random_problem(0, "logistic", 6, 2, {"a": (3, 2)}, 0.6)
    best = solve(problem, tolerance=1e-9)
    near = beside(best.factors, 1e-3, 5)
    assert certify_point(problem, near).certificate.relative_gap > 2e-5
    for optimum in (best, None):
        found = classify(problem, near, tolerance=1e-5, gradient_tolerance=1.0, optimum=optimum)
        assert found.verdict == "global"
        assert found.certificate.relative_gap <= 1e-5


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_near_the_optimum_nothing_is_spurious(loss):
    """A better point is at hand, a little off the optimum too; the residual gradient explains it."""
    verdicts = set()
    for seed in range(6):
        problem = random_problem(seed, loss, 6, 2, {"a": (3, 2)}, 0.6)
        best = solve(problem, tolerance=1e-10)
        for distance in (1e-2, 1e-3):
            near = beside(best.factors, distance, 5)
            found = classify(problem, near, tolerance=1e-9, gradient_tolerance=1.0)
            assert found.verdict in ("not-determined", "saddle")
            assert found.radius is None
            verdicts.add(found.reason.partition(":")[0][:30])
    assert "a better point is at hand, but" in verdicts


@pytest.mark.parametrize("seed", range(4))
def test_a_descent_that_the_gradient_explains_is_not_the_evidence(seed):
    """Off a saddle the gradient descends too: the step taken is one whose mean over both ways falls."""
    problem, saddle = separable_saddle()
    near = beside(saddle, 0.01, seed)
    found = classify(problem, near, gradient_tolerance=1.0)
    assert found.verdict == "saddle"
    assert verified(problem, near, found)


def test_a_better_point_must_be_at_hand():
    problem, trap, _, _ = spurious_instance(2)
    itself = replace(solve(problem), factors=trap)
    found = classify(problem, trap, optimum=itself)
    assert found.verdict == "not-determined"
    assert "no better point" in found.reason
    # an optimum that claims what it does not reach is certified again
    assert found.excess == 0


def test_settings_and_shapes_are_checked():
    problem, trap, _, _ = spurious_instance(1)
    u, v = trap["w"]
    refusal(SettingError, "w .* do not fit", classify, problem, {"w": (u[:1], v)})
    refusal(SettingError, "other .* do not fit", classify, problem, {"other": (u, v)})
    refusal(SettingError, "not finite", classify, problem, {"w": (u * math.nan, v)})
    refusal(SettingError, "must be positive", classify, problem, trap, tolerance=0)


# ---- what strictness proves


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("loss", ["squared-error", "logistic"])
def test_radius_holds_a_local_minimum(r, loss):
    """Start a little off a minimum: it lies within the radius; and on that sphere the objective is higher."""
    if loss == "squared-error":
        problem, minimum, _, _ = spurious_instance(r)
    else:
        problem = random_problem(1, loss, 12, 2, {"a": (3, 4)}, 0.1)
        minimum = solve_fixed_rank(problem, {"a": r}, random_starts=3, tolerance=1e-12).solution.factors
    near = beside(minimum, 1e-7, 7)
    found = classify(problem, near, gradient_tolerance=1.0)
    assert found.verdict == "spurious-local-minimum"
    assert found.strict is True
    assert found.radius is not None
    name = next(iter(minimum))
    q, target = torch.cat(near[name]), torch.cat(minimum[name])
    p, _, wt = torch.linalg.svd(target.T @ q)
    assert 1e-8 < float((target @ (p @ wt) - q).norm()) <= found.radius
    value = float(factored_objective(problem, near, flatten(near)))
    turns = []  # the directions of the rotations
    for a in range(r):
        for b in range(a):
            skew = torch.zeros(r, r, dtype=torch.float64)
            skew[a, b], skew[b, a] = 1, -1
            turns.append(flatten({name: (near[name][0] @ skew, near[name][1] @ skew)}))
    for seed in range(200):
        d = randn(flatten(near).numel(), generator=generator_of(seed))
        for turn in turns:
            d = d - (d @ turn) / (turn @ turn) * turn
        d = found.radius * d / d.norm()
        assert float(factored_objective(problem, near, flatten(near) + d)) > value


def test_flat_directions_beyond_rotations_are_not_strict():
    """A zero block whose gradient has norm lambda exactly is flat along one more direction than rotations explain."""
    problem, trap, _, _ = spurious_instance(1)
    w = problem.operator.jacobians()["w"]
    labels = torch.cat([problem.labels, torch.tensor([[0.4]], dtype=torch.float64)])
    extra = torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    extra[2] = 1.0
    both = torch.cat([w, torch.zeros(1, *w.shape[1:], dtype=torch.float64)])
    weights = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64)
    joint = Problem(
        DenseOperator({"w": both, "x": extra}), 0 * labels, labels, get_loss("squared-error"), {"w": 0.1, "x": 0.4},
        weights,
    )  # fmt: skip
    zero = torch.zeros(1, 1, dtype=torch.float64)
    point = {**trap, "x": (zero, zero.clone())}  # ||g_x|| = 2 * 0.5 * 0.4 = lambda_x: curvature 0 along (1, 1)
    found = classify(joint, point)
    assert found.verdict == "spurious-local-minimum"
    assert found.strict is False
    assert found.radius is None
    assert "not strict" in found.sentence
    strict = classify(joint.with_penalty({"w": 0.1, "x": 0.42}), point)
    assert strict.strict is True


# ---- property: never wrong


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    loss=st.sampled_from(LOSS_NAMES),
    ranks=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    share=st.sampled_from([0.1, 0.4, 0.8]),
    kind=st.sampled_from(["descended", "padded", "random", "zero"]),
    n=st.sampled_from([4, 25]),
)
def test_verdicts_are_never_wrong(seed, loss, ranks, share, kind, n):
    problem = random_problem(seed, loss, n, 2, SHAPES, share)
    ranks = dict(zip(SHAPES, ranks, strict=True))
    factors = random_factors(SHAPES, ranks, seed, scale=0.0 if kind == "zero" else 1.0)
    if kind in ("descended", "padded"):
        factors = solve_fixed_rank(problem, ranks, random_starts=1, seed=seed, check_curvature=False).solution.factors
        factors = padded(factors) if kind == "padded" else factors
    found = classify(problem, factors)
    best, _ = convex_optimum(problem)
    convex = objective(problem, updates(factors))
    gain = problem.objective_at_zero - best
    if found.verdict == "global":
        assert convex <= best + 1.01e-6 * gain + 1e-9
    elif convex <= best + 1e-8 * gain and found.gradient_norm < 1e-7:
        assert found.verdict == "not-determined"
    if sum(u.numel() for u, _ in factors.values()) == 0:
        return
    values = eigenvalues(problem, factors)
    tau = 1e-4 * min(problem.penalty.values())
    if found.verdict == "spurious-local-minimum":
        assert float(values[0]) >= -2 * tau
        assert convex > best
        assert found.excess == pytest.approx(convex - best, abs=2e-6 * gain + 1e-8)
    if found.verdict == "saddle":
        assert float(values[0]) < 0
        assert verified(problem, factors, found)
    if found.strict:
        flat = sum(u.shape[1] * (u.shape[1] - 1) // 2 for u, _ in factors.values() if u.numel())
        assert int((values < found.strict_curvature * 0.999).sum()) <= flat
    if found.verdict == "not-stationary":
        assert kind == "random" or found.gradient_norm > found.gradient_tolerance
    json.dumps(found.to_json())


def test_a_linear_term_is_part_of_the_curvature():
    """Problems with a linear term, as perturbed ones are: the dense Hessian has it too."""
    base = random_problem(5, "logistic", 5, 2, {"a": (3, 2)}, 0.6)
    term = randn(3, 2, generator=generator_of(5))
    term *= 0.9 * base.penalty["a"] / float(torch.linalg.matrix_norm(term, 2))
    problem = replace(base, linear={"a": term})
    zero = {"a": (torch.zeros(3, 1).double(), torch.zeros(2, 1).double())}

    def with_term(x):
        u, v = unflatten(x, zero)["a"]
        return factored_objective(base, zero, x) + (u @ v.T * term).sum()

    hessian = torch.func.hessian(with_term)(flatten(zero))
    lowest = float(torch.linalg.eigvalsh(hessian)[0])
    found = classify(problem, zero)
    assert lowest < 0
    assert found.verdict == "saddle"
    assert found.escape.curvature == pytest.approx(lowest, rel=1e-3)
    solved = solve_fixed_rank(problem, {"a": 2}, random_starts=2).solution.factors
    assert classify(problem, solved).verdict == "global"


def test_wide_blocks_are_judged_on_the_span_of_their_tokens():
    """Span reduction shrinks both sides; the verdict is that of the whole block, directions come back whole."""
    operator = FactoredOperator([token_group([1, 1, 1, 1], 14, {"a": 12}, 1, 3)], 4)
    problem = random_problem(2, "squared-error", k=1, operator=operator, share=0.1)
    assert problem.reduced[0].operator.shapes["a"] != (12, 14)
    dense = replace(problem, operator=DenseOperator(jacobians_of(problem)))
    stuck = solve_fixed_rank(problem, {"a": 1}, random_starts=4).solution.factors
    pair = [classify(p, stuck) for p in (problem, dense)]
    assert [f.verdict for f in pair] == ["spurious-local-minimum"] * 2
    assert pair[0].strict is pair[1].strict is True
    assert pair[0].curvature.negative == pair[1].curvature.negative == 0
    found = classify(problem, padded(stuck))
    assert found.verdict == "saddle"
    assert found.escape.direction["a"][0].shape == (12, 2)
    assert verified(dense, padded(stuck), found)
    outside = random_factors({"a": (12, 14)}, 1, 0)["a"]
    moved = {"a": (stuck["a"][0] + 1e-3 * outside[0], stuck["a"][1])}
    assert classify(problem, moved).verdict == "not-stationary"
    torch.testing.assert_close(
        classify(problem, moved).gradient_norm, classify(dense, moved).gradient_norm, rtol=1e-9, atol=0
    )
    state = certify_point(problem, padded(stuck))
    image = hessian_vector(problem, padded(stuck), state, found.escape.direction)
    d = flatten(found.escape.direction)
    assert float(d @ flatten(image)) == pytest.approx(found.escape.curvature)


# ---- words


def test_json_and_sentences():
    problem, trap, _, excess = spurious_instance(2)
    found = classify(problem, trap)
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["verdict"] == "spurious-local-minimum"
    assert plain["curvature"]["negative"] == 0
    assert plain["better"]["ranks"] == {"w": 1}
    assert plain["certificate"]["gap"] == found.certificate.gap
    assert f"better by {excess:.4g}" in str(found) == plain["sentence"]
    saddle = json.loads(json.dumps(classify(problem, padded(trap)).to_json()))
    assert set(saddle["escape"]) == {"curvature", "step", "decrease", "mean_decrease"}


def test_the_page_shows_what_its_example_prints():
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "theory" / "stationarity.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- run -->\n```python\n(.*?)^```\n+```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert shown is not None
    path = {"PYTHONPATH": str(root / "src"), "PATH": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", shown[1]], capture_output=True, text=True, env=path, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == shown[2]
