"""The duality gap is never below the true suboptimality, and its parts are what they say."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksure.certificate import captured_interval, certify_point, lambda_max, spectral_upper_bounds
from ranksure.factors import balanced, nuclear_norms
from ranksure.losses import get_loss
from ranksure.operators.base import zero_factors
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator
from ranksure.problem import Problem
from ranksure.solvers.burer_monteiro import solve
from tests.helpers import (
    LOSS_NAMES,
    convex_optimum,
    generator_of,
    joined,
    objective,
    randn,
    random_factors,
    random_problem,
    token_group,
    updates,
)

SHAPE_CHOICES = (
    {"a": (2, 3)},
    {"a": (3, 2), "b": (1, 4)},
    {"a": (2, 2), "b": (3, 2), "c": (2, 1)},
)


@settings(max_examples=45)
@given(
    seed=st.integers(0, 100_000),
    loss=st.sampled_from(LOSS_NAMES),
    k=st.integers(1, 3),
    n=st.integers(1, 5),
    shapes=st.sampled_from(SHAPE_CHOICES),
    share=st.sampled_from([0.02, 0.3, 0.9, 1.5]),
    weighted=st.booleans(),
    exponents=st.tuples(st.floats(-3, 2), st.floats(-3, 2)),
)
def test_gap_is_never_below_the_suboptimality(seed, loss, k, n, shapes, share, weighted, exponents):
    k = max(k, 2) if loss == "cross-entropy" else k
    problem = random_problem(seed, loss, n, k, shapes, share, weighted=weighted)
    upper, best = convex_optimum(problem)  # at or above F*, within the accuracy of the oracle
    slack = 1e-7 * (1 + abs(upper))
    points = [zero_factors(problem.operator)]
    points += [random_factors(shapes, 2, seed + i, scale=10**e) for i, e in enumerate(exponents)]
    svd = {name: torch.linalg.svd(d, full_matrices=False) for name, d in best.items()}
    optimum = {name: (u * s.sqrt(), v.T * s.sqrt()) for name, (u, s, v) in svd.items()}
    noise = random_factors(shapes, 1, seed + 5, scale=1e-2)
    points += [
        optimum,
        {n: (torch.cat([a, noise[n][0]], 1), torch.cat([b, noise[n][1]], 1)) for n, (a, b) in optimum.items()},
    ]
    for factors in points:
        certificate = certify_point(problem, factors).certificate
        assert certificate.objective == pytest.approx(objective(problem, updates(factors)), rel=1e-9)
        assert certificate.dual <= upper + 1e-12 * (1 + abs(upper))  # true bound on F* <= upper
        assert certificate.gap >= certificate.objective - upper  # F* <= upper, so this is the weaker claim ...
        assert certificate.gap >= certificate.objective - certificate.dual
        assert certificate.gap >= 0
        # ... and the stronger one: F* is within the oracle's accuracy of upper, so the dual is too
        assert certificate.objective >= upper - slack
    near = certify_point(problem, optimum).certificate
    assert near.gap <= 1e-4 * (1 + abs(upper))


@settings(max_examples=40)
@given(st.integers(0, 100_000), st.sampled_from(LOSS_NAMES), st.floats(-2, 2), st.floats(-3, 3))
def test_the_dual_point_is_feasible_and_its_value_is_the_bound(seed, loss, exponent, offset):
    """Rebuild ``D(cR)`` from its definition, with plain numpy."""
    problem = random_problem(seed, loss, n=4, k=2, weighted=True)
    factors = random_factors(problem.operator.shapes, 1, seed, scale=10**exponent)
    state = certify_point(problem, factors)
    certificate = state.certificate
    dual = certificate.dual_step * problem.loss.gradient(state.logits, problem.labels) * problem.weights[:, None]
    for name, jacobian in problem.operator.jacobians().items():
        gradient = torch.einsum("icmn,ic->mn", jacobian, dual @ problem.loss.contrasts(2))
        norm = float(torch.linalg.matrix_norm(gradient, 2))
        assert norm <= problem.penalty[name] * (1 + 1e-12)
        full = torch.einsum("icmn,ic->mn", jacobian, problem.residual(problem.dual_variable(state.logits)))
        torch.testing.assert_close(state.gradients[name], full)
        ratio = float(torch.linalg.matrix_norm(full, 2)) / problem.penalty[name]
        assert ratio <= certificate.spectral_ratios[name] <= ratio * (1 + 1e-10) + 1e-12
    a = (dual / problem.weights[:, None]).numpy()
    y = problem.labels.numpy()
    if loss == "cross-entropy":
        p = np.clip(a + np.eye(2)[y], 1e-300, None)
        conjugate = (p * np.log(p)).sum(1)
    elif loss == "logistic":
        p = np.clip(2 * a + y, 1e-300, 1 - 1e-16)  # K = 2: a mean over outputs
        conjugate = (p * np.log(p) + (1 - p) * np.log1p(-p)).mean(1)
    else:
        conjugate = (a**2 / 2 + a * y).sum(1)  # sup of <a, z> - ||z - y||^2 / 2, at z = y + a
    value = float((dual * problem.base_logits).sum()) - float((problem.weights.numpy() * conjugate).sum())
    assert certificate.dual == pytest.approx(value, rel=1e-9, abs=1e-10)
    assert certificate.spectral_ratio == max(certificate.spectral_ratios.values())


@pytest.mark.parametrize("exponent", [-480, -250, -80, 80, 250, 480])
def test_squared_errors_of_any_size(exponent):
    """Labels, logits and lambda times t: objective and bounds times t^2, shares as they were."""
    problem, t = random_problem(3, "squared-error"), 2.0**exponent
    factors = random_factors(problem.operator.shapes, 1, 3, scale=0.5)
    known = certify_point(problem, factors).certificate
    larger = replace(
        problem,
        base_logits=t * problem.base_logits,
        labels=t * problem.labels,
        penalty={name: t * lam for name, lam in problem.penalty.items()},
    )
    found = certify_point(larger, {name: (t * u, v) for name, (u, v) in factors.items()}).certificate
    assert known.relative_gap > 1
    for key in ("relative_gap", "spectral_ratio", "dual_step"):
        assert getattr(found, key) == pytest.approx(getattr(known, key), rel=1e-6)
    for key in ("objective", "dual", "gap", "objective_at_zero"):
        assert getattr(found, key) / t / t == pytest.approx(getattr(known, key), rel=1e-6)


@pytest.mark.parametrize("exponent", [-500, -140, 140, 500])
@pytest.mark.parametrize("split", [0, 1, 2])
@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_the_same_problem_in_other_units(loss, exponent, split):
    """Jacobians and lambda times t, the update over t, however the factors share that: nothing else changes."""
    problem, t = random_problem(3, loss), 2.0**exponent
    factors = random_factors(problem.operator.shapes, 1, 3, scale=0.5)
    known = certify_point(problem, factors).certificate
    operator = DenseOperator({name: t * jacobian for name, jacobian in problem.operator.jacobians().items()})
    other = replace(problem, operator=operator, penalty={name: t * lam for name, lam in problem.penalty.items()})
    a = 2.0 ** (exponent * split // 2)
    found = certify_point(other, {name: (u / a, v * a / t) for name, (u, v) in factors.items()}).certificate
    for key in ("objective", "dual", "gap", "relative_gap", "spectral_ratio", "dual_step"):
        assert getattr(found, key) == pytest.approx(getattr(known, key), rel=1e-6)


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("size", [1e16, 1e30, 1e160, 1e308])
@pytest.mark.parametrize("shift", [False, True])
def test_what_rounding_hides_is_not_certified(loss, size, shift):
    """At a random point, far above the optimum (cvxpy says so of the problem without the offset)."""
    problem = random_problem(3, loss)
    factors = random_factors(problem.operator.shapes, 1, 3, scale=0.5)
    assert certify_point(problem, factors).certificate.objective > 1.2 * convex_optimum(problem)[0]
    logits = problem.base_logits + size if shift else problem.base_logits * size
    labels = problem.labels + size if shift and loss == "squared-error" else problem.labels
    hidden = certify_point(replace(problem, base_logits=logits, labels=labels), factors).certificate
    assert hidden.relative_gap >= 0.5 and hidden.gap >= hidden.objective - hidden.dual


def test_no_update_is_optimal_where_no_direction_leads_down_however_small_the_loss():
    problem = random_problem(3, "cross-entropy")
    sure = torch.nn.functional.one_hot(problem.labels, 2) * 60.0
    problem = replace(problem, base_logits=sure)
    zero = zero_factors(problem.operator)
    assert certify_point(problem, zero).certificate.relative_gap == 0
    # The loss and its slopes are below rounding here, so with a smaller lambda nothing can be said.
    largest = lambda_max(problem)
    below = problem.with_penalty(0.01 * largest)
    assert largest > 0 and certify_point(below, zero).certificate.relative_gap == math.inf


def test_line_formula_for_cross_entropy():
    """DESIGN section 4: along c the conjugate needs p_y and sum_{k != y} p_k log p_k only."""
    loss, g = get_loss("cross-entropy"), generator_of(1)
    z, y = randn(50, 5, generator=g) * 3, torch.randint(5, (50,), generator=g)
    p = torch.softmax(z, 1)
    py = p.gather(1, y[:, None])[:, 0]
    h = (p * p.log()).sum(1) - py * py.log()
    gradient = loss.gradient(z, y)
    for c in (0.1, 0.7, 1.0, 0.999 * loss.max_dual_step(gradient, y)):
        q = 1 - c * (1 - py)
        line = c * h + c * (1 - py) * math.log(c) + q * q.log()
        torch.testing.assert_close(loss.conjugate(c * gradient, y), line, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_dual_step_is_the_best_along_its_line(loss):
    problem = random_problem(11, loss, n=4, k=3)
    for scale in (0.01, 0.3, 3.0):
        state = certify_point(problem, random_factors(problem.operator.shapes, 2, 1, scale=scale))
        dual = problem.dual_variable(state.logits)
        limit = min(
            1 / state.certificate.spectral_ratio,
            problem.loss.max_dual_step(dual / problem.weights[:, None], problem.labels),
        )
        grid = [problem.dual_value(c * dual) for c in np.linspace(0, limit * (1 - 1e-12), 400)]
        assert state.certificate.dual >= max(grid) - 1e-10


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("factor", [1.0, 1.3, 20.0])
def test_zero_is_certified_optimal_at_lambda_max(loss, factor):
    problem = random_problem(2, loss, k=2)
    problem = problem.with_penalty(factor * lambda_max(problem))
    certificate = certify_point(problem, zero_factors(problem.operator)).certificate
    assert certificate.gap <= 1e-10 * problem.objective_at_zero
    assert certificate.relative_gap == 0
    assert certificate.spectral_ratio <= 1 + 1e-12
    below = problem.with_penalty(0.97 * lambda_max(problem))
    certificate = certify_point(below, zero_factors(below.operator)).certificate
    assert certificate.spectral_ratio > 1.02
    assert certificate.gap > 1e-8
    assert certificate.relative_gap == pytest.approx(1, abs=1e-6)  # nothing gained of what the dual allows
    upper, _ = convex_optimum(below)
    assert upper < below.objective_at_zero - 1e-6


def test_known_dual_value_is_used():
    problem = random_problem(3)
    factors = random_factors(problem.operator.shapes, 1)
    alone = certify_point(problem, factors).certificate
    upper, _ = convex_optimum(problem)
    known = certify_point(problem, factors, upper - 1e-6).certificate
    assert known.dual == upper - 1e-6 > alone.dual
    assert known.gap < alone.gap
    assert certify_point(problem, factors, alone.dual - 1).certificate.dual == alone.dual


def test_blocks_left_out_are_zero():
    problem = random_problem(4)
    factors = random_factors(problem.operator.shapes, 1)
    partial = {"a.query": factors["a.query"]}
    zero = zero_factors(problem.operator)
    assert certify_point(problem, partial).certificate == certify_point(problem, {**zero, **partial}).certificate
    assert certify_point(problem, {}).certificate == certify_point(problem, zero).certificate


def test_float32_operator_is_certified_in_float64():
    stored = FactoredOperator([token_group([2, 3, 1], 9, {"a": 8}, 1, 0)], 3).to(torch.float32)
    problem = random_problem(1, operator=stored)
    factors = {"a": tuple(f.float() for f in random_factors(stored.shapes, 1)["a"])}
    certificate = certify_point(problem, factors).certificate
    exact = certify_point(problem.to(torch.float64), {"a": tuple(f.double() for f in factors["a"])}).certificate
    assert certificate == exact
    assert certificate.rounding < 1e-12


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_large_offsets_stay_covered_by_the_rounding_allowance(loss):
    """Logits and targets near 1e7 cancel in the dual: the gap must still cover F - F*."""
    rough = random_problem(6, loss, n=4, k=2)
    step = 2.0**-20  # so that the shifted numbers are exact
    labels = (rough.labels / step).round() * step if loss == "squared-error" else rough.labels
    small = Problem(rough.operator, (rough.base_logits / step).round() * step, labels, rough.loss, rough.penalty)
    optimum = solve(small, tolerance=1e-12).factors
    upper = certify_point(small, optimum).certificate.objective
    shift = 0.0 if loss == "logistic" else 2.0**23
    moved = Problem(
        small.operator,
        small.base_logits + shift,
        labels + shift if loss == "squared-error" else labels,
        small.loss,
        small.penalty,
    )
    for seed in range(20):
        noise = random_factors(small.operator.shapes, 1, seed, scale=1e-5 * seed)
        factors = joined(optimum, noise)
        exact = certify_point(small, factors).certificate
        certificate = certify_point(moved, factors).certificate
        assert certificate.gap >= exact.objective - upper
        assert certificate.dual <= upper + certificate.rounding
        assert abs(certificate.objective - exact.objective) <= certificate.rounding
        assert certificate.rounding < 1e-6


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000), st.floats(-8, 8), st.booleans())
def test_spectral_bound_is_an_upper_bound(m, n, seed, exponent, low_rank):
    g = generator_of(seed)
    matrix = 10**exponent * randn(m, n, generator=g)
    if low_rank:
        matrix = 10**exponent * torch.outer(matrix[:, 0], matrix[0])
    bound = spectral_upper_bounds({"a": matrix}, {"a": 0.0})["a"]
    wide = matrix.numpy().astype(np.longdouble)
    x = np.linalg.svd(matrix.numpy())[2][0].astype(np.longdouble)
    for _ in range(20):  # power iteration in extended precision: any quotient is a lower bound
        x = wide.T @ (wide @ x)
        x = x / np.sqrt((x**2).sum())
    true = np.sqrt(((wide @ x) ** 2).sum())
    assert bound >= true
    assert bound <= float(true) * (1 + 1e-11)
    assert spectral_upper_bounds({"a": matrix}, {"a": 0.5})["a"] == pytest.approx(bound + 0.5)


def test_nuclear_norms():
    factors = random_factors({"a": (4, 3), "b": (2, 5)}, {"a": 2, "b": 7})
    for name, norm in nuclear_norms(factors).items():
        expected = torch.linalg.svdvals(updates(factors)[name]).sum()
        assert norm == pytest.approx(float(expected), rel=1e-12)
        assert norm <= 0.5 * sum(float(f.square().sum()) for f in factors[name]) + 1e-12
    even = balanced(factors)
    for name, norm in nuclear_norms(factors).items():
        assert norm == pytest.approx(0.5 * sum(float(f.square().sum()) for f in even[name]), rel=1e-12)
    assert nuclear_norms(zero_factors(random_problem(0).operator)) == {"a.query": 0.0, "a.value": 0.0}


def test_captured_holds_the_true_share():
    problem = random_problem(7)
    upper, _ = convex_optimum(problem)
    for scale in (0.01, 0.05, 0.2, 2.0):
        for seed in range(5):
            certificate = certify_point(
                problem, random_factors(problem.operator.shapes, 1, seed, scale=scale)
            ).certificate
            true = (problem.objective_at_zero - certificate.objective) / (problem.objective_at_zero - upper)
            low, high = certificate.captured(best_objective=upper)
            assert low <= true + 1e-9
            assert high >= true - 1e-9
    assert captured_interval(0.5, 2.0, 1.0) == (0.25, 0.5)
    assert captured_interval(-1.0, 2.0, 0.5) == (-2.0, -0.5)  # worse than no update at all
    assert captured_interval(0.0, 0.0, 0.0) == (1.0, 1.0)


def test_to_json():
    certificate = certify_point(random_problem(0), {}).certificate
    values = json.loads(json.dumps(certificate.to_json()))
    assert values["gap"] == certificate.gap
    assert values["spectral_ratio"] == certificate.spectral_ratio
    assert set(values["spectral_ratios"]) == {"a.query", "a.value"}


def test_perfect_fit_has_no_residual():
    """Squared error with base equal to the target: nothing to gain, zero is optimal."""
    operator = DenseOperator({"a": randn(3, 1, 2, 2, generator=generator_of(0))})
    base = randn(3, 1, generator=generator_of(1))
    problem = Problem(operator, base, base.clone(), get_loss("squared-error"), {"a": 0.1})
    assert lambda_max(problem) == 0
    certificate = certify_point(problem, {}).certificate
    assert certificate.objective == 0
    assert certificate.relative_gap == 0
