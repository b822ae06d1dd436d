"""Inertia and Hessian products against the dense Hessian of an independent objective."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksure.certificate import certify_point
from ranksure.curvature import escape_direction, hessian_vector, inertia
from ranksure.errors import SettingError
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator
from ranksure.operators.matrix_free import MatrixFreeOperator
from ranksure.solvers.fixed_rank import solve_fixed_rank
from tests.helpers import (
    LOSS_NAMES,
    factored_objective,
    flatten,
    jacobians_of,
    random_factors,
    random_problem,
    spurious_instance,
    token_group,
)

SHAPES = {"a": (3, 2), "b": (2, 4), "c": (2, 1)}


def dense_hessian(problem, factors):
    dense = replace(problem, operator=DenseOperator(jacobians_of(problem)))
    return torch.func.hessian(lambda x: factored_objective(dense, factors, x))(flatten(factors))


def state_of(problem, factors):
    return certify_point(problem, factors)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 100_000),
    loss=st.sampled_from(LOSS_NAMES),
    k=st.integers(1, 3),
    ranks=st.tuples(*[st.integers(0, 3)] * 3),
    exponent=st.floats(-2, 0.7),
    share=st.sampled_from([0.05, 0.3, 0.9]),
    weighted=st.booleans(),
)
def test_inertia_counts_the_negative_eigenvalues(seed, loss, k, ranks, exponent, share, weighted):
    k = max(k, 2) if loss == "cross-entropy" else min(k, 2)
    problem = random_problem(seed, loss, 4, k, SHAPES, share, weighted=weighted)
    factors = random_factors(SHAPES, dict(zip(SHAPES, ranks, strict=True)), seed, scale=10**exponent)
    found = inertia(problem, factors, state_of(problem, factors))
    if sum(ranks) == 0:
        assert found.negative == 0
        return
    values = torch.linalg.eigvalsh(dense_hessian(problem, factors)) + found.tau
    if float(values.abs().min()) > 1e-7 * float(values.abs().max()):  # else rounding decides
        assert found.negative == int((values < 0).sum())
        assert found.no_negative_curvature is (found.negative == 0)
    assert found.tau == pytest.approx(1e-4 * min(problem.penalty.values()))


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from(LOSS_NAMES))
def test_hessian_vector_matches_the_dense_hessian(seed, loss):
    problem = random_problem(seed, loss, 4, 2, SHAPES, weighted=True)
    ranks = {"a": 2, "b": 1, "c": 1}
    factors, direction = random_factors(SHAPES, ranks, seed), random_factors(SHAPES, ranks, seed + 1)
    product = flatten(hessian_vector(problem, factors, state_of(problem, factors), direction))
    expected = dense_hessian(problem, factors) @ flatten(direction)
    torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("shift", [1e-4, 0.05, 0.6])
def test_inertia_at_other_shifts(loss, shift):
    """A larger tau lifts eigenvalues over zero one by one; the count follows."""
    problem = random_problem(8, loss, 4, 2, SHAPES, share=0.1)
    factors = random_factors(SHAPES, {"a": 2, "b": 2, "c": 1}, 8, scale=0.2)
    found = inertia(problem, factors, state_of(problem, factors), relative_tau=shift)
    values = torch.linalg.eigvalsh(dense_hessian(problem, factors))
    assert found.negative == int((values < -shift * min(problem.penalty.values())).sum())
    if shift == 1e-4:
        assert found.negative > 0


@settings(max_examples=60)
@given(
    seed=st.integers(0, 100_000),
    loss=st.sampled_from(LOSS_NAMES),
    n=st.sampled_from([3, 40]),  # the data matrix is the smaller one, or the Hessian is
    ranks=st.tuples(*[st.integers(0, 3)] * 3),
    scale=st.sampled_from([0.01, 0.3, 1.0]),
    shift=st.sampled_from([-0.9, -0.1, -1e-3, 1e-4, 0.3, 5.0]),
)
def test_both_signs_of_the_shift_and_the_direction(seed, loss, n, ranks, scale, shift):
    problem = random_problem(seed, loss, n, 2, SHAPES, 0.2, weighted=True)
    factors = random_factors(SHAPES, dict(zip(SHAPES, ranks, strict=True)), seed, scale=scale)
    found = inertia(problem, factors, state_of(problem, factors), shift, direction=True)
    assert found.tau == pytest.approx(shift * min(problem.penalty.values()))
    if sum(ranks) == 0:
        assert (found.negative, found.direction) == (0, None)
        return
    hessian = dense_hessian(problem, factors)
    values = torch.linalg.eigvalsh(hessian)
    if found.negative is None:
        assert "meets the shift" in found.reason
        assert float((values + found.tau).abs().min()) < 1e-7 * float(values.abs().max())
        return
    assert 0 < found.allowance < 1e-9 * float(values.abs().max())
    low, high = (int((values < -found.tau + sign * found.allowance).sum()) for sign in (-1, 1))
    assert low <= found.negative <= high
    assert (found.direction is None) is (found.negative == 0)
    if found.direction is not None:
        d = flatten(found.direction)
        assert float(d.norm()) == pytest.approx(1)
        assert float(d @ hessian @ d) < -found.tau + 1e-9 * float(values.abs().max())


def test_rounding_that_could_change_the_count_is_not_passed_over():
    """Logits around 1e9 carry errors of 1e-7: more than a shift of 1e-4 lambda bears."""
    problem = random_problem(3, "squared-error", 4, 1, SHAPES)
    factors = random_factors(SHAPES, 1, 3)
    offset = 1e9
    moved = replace(problem, base_logits=problem.base_logits + offset, labels=problem.labels + offset)
    found = inertia(moved, factors, state_of(moved, factors))
    assert found.negative is None
    assert "rounding" in found.reason
    assert inertia(problem, factors, state_of(problem, factors)).negative is not None


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("rank", [1, 2])
def test_inertia_at_minima(loss, rank):
    """Minima are degenerate (rotations): the shift must make the count zero, not luck."""
    for seed in range(3):
        problem = random_problem(seed, loss, 5, 2, {"a": (3, 4), "b": (3, 2)}, share=0.2)
        result = solve_fixed_rank(problem, {"a": rank, "b": rank}, random_starts=4, check_curvature=False)
        factors = result.solution.factors
        values = torch.linalg.eigvalsh(dense_hessian(problem, factors))
        found = inertia(problem, factors, state_of(problem, factors))
        assert result.stationary
        assert found.negative == int((values < -found.tau).sum())
        if float(values[0]) > -0.1 * found.tau:
            assert found.no_negative_curvature


@pytest.mark.parametrize("r", [1, 2, 3])
def test_spurious_minimum_is_a_minimum(r):
    """DESIGN section 3, 'the threshold is tight': no negative curvature, only the rotations are flat."""
    problem, trap, _, _ = spurious_instance(r)
    state = state_of(problem, trap)
    _, gradient = problem.value_and_gradient(trap)
    assert float(flatten(gradient).norm()) < 1e-12
    assert inertia(problem, trap, state).negative == 0
    values = torch.linalg.eigvalsh(dense_hessian(problem, trap))
    assert int((values.abs() < 1e-10).sum()) == r * (r - 1) // 2
    assert float(values.min()) > -1e-12
    assert state.certificate.spectral_ratio == pytest.approx(2.0, rel=1e-12)  # rho


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_start_of_lora_is_a_saddle_when_u_and_v_are_zero(loss):
    """At zero factors H is [[lambda, g], [g', lambda]]: negative once per singular value above lambda."""
    problem = random_problem(9, loss, 5, 2, SHAPES, share=0.4)
    zero = {name: (torch.zeros(m, 2).double(), torch.zeros(n, 2).double()) for name, (m, n) in SHAPES.items()}
    state = state_of(problem, zero)
    above = sum(
        int((torch.linalg.svdvals(g) > problem.penalty[name] * (1 + 1e-4)).sum()) for name, g in state.gradients.items()
    )
    assert above > 0
    assert inertia(problem, zero, state).negative == 2 * above


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_escape_direction_at_pefts_start(loss):
    """B = 0 and A Gaussian: the direction found lowers the objective."""
    problem = random_problem(10, loss, 5, 2, SHAPES, share=0.3)
    start = {n: (0 * u, 0.3 * v) for n, (u, v) in random_factors(SHAPES, 2, 3).items()}
    state = state_of(problem, start)
    found = escape_direction(problem, start, state)
    value = found.value
    assert value < 0
    assert found.converged
    x, d = flatten(start), flatten(found.direction)
    assert float(d.norm()) == pytest.approx(1)
    hessian = dense_hessian(problem, start)
    assert value == pytest.approx(float(d @ hessian @ d), rel=1e-8)
    lowest = float(torch.linalg.eigvalsh(hessian)[0])
    assert lowest <= value + 1e-12 <= 0.98 * lowest
    # ... and the lowest objective along it, either way, is below the start's (the slope is not used)
    values = [float(factored_objective(problem, start, x + t * d)) for t in (-0.05, 0.05)]
    assert sum(values) / 2 < float(factored_objective(problem, start, x))


def test_escape_direction_is_repeatable():
    problem = random_problem(10, shapes=SHAPES)
    start = random_factors(SHAPES, 1, 3, scale=0.1)
    state = state_of(problem, start)
    one, two = escape_direction(problem, start, state), escape_direction(problem, start, state)
    assert (one.value, one.residual) == (two.value, two.residual)
    assert torch.equal(flatten(one.direction), flatten(two.direction))
    assert one.direction.keys() == start.keys()


def test_a_limited_iteration_says_so():
    problem, trap, _, _ = spurious_instance(3)
    factors = {"w": tuple(torch.cat([part, torch.zeros(4, 1).double()], 1) for part in trap["w"])}
    state = state_of(problem, factors)
    short = escape_direction(problem, factors, state, max_iterations=1)
    assert not short.converged
    lowest = float(torch.linalg.eigvalsh(dense_hessian(problem, factors))[0])
    assert short.value >= lowest - 1e-12
    full = escape_direction(problem, factors, state)
    assert full.converged
    assert full.value == pytest.approx(lowest, rel=1e-3)
    image = dense_hessian(problem, factors) @ flatten(full.direction)
    assert full.residual == pytest.approx(float((image - full.value * flatten(full.direction)).norm()), rel=1e-6)
    assert full.residual <= 1e-3 * (0.1 - lowest) * 1.01


def test_an_eigenvalue_of_zero_is_found():
    """At a minimum the lowest eigenvalue is that of the rotations; a tolerance relative to it would not do."""
    problem = random_problem(0, "logistic", 12, 2, {"a": (12, 14)}, 0.05)
    stuck = solve_fixed_rank(problem, {"a": 2}, random_starts=2, tolerance=1e-10).solution.factors
    values = torch.linalg.eigvalsh(dense_hessian(problem, stuck))
    assert abs(float(values[0])) < 1e-9 < 1e-3 < float(values[1])
    found = escape_direction(problem, stuck, state_of(problem, stuck), max_iterations=100)
    assert found.converged
    assert abs(found.value) < 1e-6


def test_settings_are_checked():
    problem, trap, _, _ = spurious_instance(1)
    state = state_of(problem, trap)
    with pytest.raises(SettingError, match="above -1"):
        inertia(problem, trap, state, relative_tau=-1)
    with pytest.raises(SettingError, match="positive limit"):
        escape_direction(problem, trap, state, max_iterations=0)
    with pytest.raises(SettingError, match="with columns"):
        escape_direction(problem, {}, state)


def test_factored_and_dense_and_matrix_free_operators_count_alike():
    operator = FactoredOperator([token_group([2, 1, 0, 3], 4, {"a": 3, "b": 2}, 1, 1)], 4)
    embedding = token_group([1, 2, 1, 1], 5, {"e": 3}, 1, 2, index=True)
    operator = FactoredOperator([*operator.groups, embedding], 4)
    problem = random_problem(1, operator=operator, share=0.1)
    factors = random_factors(problem.operator.shapes, {"a": 2, "b": 1, "e": 2}, 5, scale=0.3)
    found = inertia(problem, factors, state_of(problem, factors))
    values = torch.linalg.eigvalsh(dense_hessian(problem, factors))
    assert found.negative == int((values < -found.tau).sum()) > 0

    model = torch.nn.Sequential(torch.nn.Linear(3, 2, dtype=torch.float64))
    model.forward = lambda x: model[0](x)
    targets = {"0": model[0]}
    free = MatrixFreeOperator(model, [{"x": torch.randn(4, 3, dtype=torch.float64)}], targets, torch.eye(2).double())
    problem = random_problem(1, "logistic", operator=free, share=0.1)
    factors = random_factors(free.shapes, 2, 5, scale=0.3)
    found = inertia(problem, factors, state_of(problem, factors))
    values = torch.linalg.eigvalsh(dense_hessian(problem, factors))
    assert found.negative == int((values < -found.tau).sum())


def test_undetermined_is_said():
    problem = random_problem(1)
    factors = random_factors(problem.operator.shapes, 1)
    state = state_of(problem, factors)
    large = inertia(problem, factors, state, max_size=4)
    assert large.negative is None
    assert large.no_negative_curvature is None
    assert "5 rows" in large.reason
    shift = float(torch.linalg.svdvals(state.gradients["a.query"])[0])
    meets = problem.with_penalty(shift / (1 + 1e-4))
    found = inertia(meets, factors, state)
    assert found.negative is None
    assert "meets the shift" in found.reason
    low = problem.to(torch.float32)
    assert "float64" in inertia(low, factors, state).reason
