"""The perturbed problem in transformed coordinates is the perturbed problem."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ranksure.certificate import certify_point, lambda_max
from ranksure.errors import SettingError
from ranksure.factors import balanced
from ranksure.operators.factored import FactoredOperator
from ranksure.operators.matrix_free import MatrixFreeOperator
from ranksure.perturbation import Perturbation, random_perturbation
from tests.helpers import LOSS_NAMES, SHAPES, densified, random_factors, random_problem, token_group
from tests.refusals import refusal

seeds = st.integers(0, 10_000)


def perturbed_objective(problem, matrices, factors):
    """``F_P`` from its definition."""
    z = problem.logits(problem.operator.apply_factors(factors))
    value = problem.data_loss(z)
    for name, (u, v) in factors.items():
        q = torch.cat([u, v])
        value = value + problem.penalty[name] / 2 * (u.square().sum() + v.square().sum())
        value = value + torch.trace(matrices[name] @ q @ q.T)
    return value


def small(seed, loss="cross-entropy", size=0.2):
    problem = random_problem(seed, loss)
    return problem, random_perturbation(problem, size * min(problem.penalty.values()), seed)


@given(seed=seeds, loss=st.sampled_from(LOSS_NAMES), size=st.sampled_from([0.0, 1e-3, 0.2, 3.0]))
def test_objective_and_gradient(seed, loss, size):
    problem, perturbation = small(seed, loss, size)
    factors = random_factors(SHAPES, 2, seed)
    leaves = {n: (u.clone().requires_grad_(), v.clone().requires_grad_()) for n, (u, v) in factors.items()}
    expected = perturbed_objective(problem, perturbation.matrices, leaves)
    assert float(perturbation.objective(factors)) == pytest.approx(expected.item(), rel=1e-12)

    value, gradient = problem.value_and_gradient(factors)
    assert float(value + perturbation.penalty_of(factors)) == pytest.approx(expected.item(), rel=1e-12)
    pushed = perturbation.gradient(factors)
    expected.backward()
    for name, (u, v) in leaves.items():
        assert torch.allclose(gradient[name][0] + pushed[name][0], u.grad, atol=1e-12)
        assert torch.allclose(gradient[name][1] + pushed[name][1], v.grad, atol=1e-12)


@given(seed=seeds, loss=st.sampled_from(LOSS_NAMES), size=st.sampled_from([1e-3, 0.2, 3.0]))
def test_the_transformed_problem_has_the_same_values(seed, loss, size):
    problem, perturbation = small(seed, loss, size)
    factors = random_factors(SHAPES, 2, seed)
    inner = perturbation.inward(factors)
    value, _ = perturbation.problem.value_and_gradient(inner)
    expected = perturbed_objective(problem, perturbation.matrices, factors)
    assert float(value) == pytest.approx(expected.item(), rel=1e-10)
    back = perturbation.outward(inner)
    for name, pair in factors.items():
        for a, b in zip(pair, back[name], strict=True):
            assert torch.allclose(a, b, atol=1e-10)


@given(seed=seeds)
def test_the_certificate_s_objective_is_the_lowest_over_factorisations(seed):
    _, perturbation = small(seed)
    factors = random_factors(SHAPES, 2, seed)
    lowest = certify_point(perturbation.problem, perturbation.inward(factors)).certificate.objective
    assert lowest <= float(perturbation.objective(factors)) * (1 + 1e-12)
    canonical = perturbation.outward(balanced(perturbation.inward(factors)))
    assert float(perturbation.objective(canonical)) == pytest.approx(lowest, rel=1e-10)
    for name, (u, v) in factors.items():
        assert torch.allclose(canonical[name][0] @ canonical[name][1].T, u @ v.T, atol=1e-9)


def test_batched_starts():
    problem, perturbation = small(3)
    batch = random_factors(SHAPES, 2, 1, starts=4)
    one = {name: (u[2], v[2]) for name, (u, v) in batch.items()}
    assert torch.allclose(perturbation.penalty_of(batch)[2], perturbation.penalty_of(one))
    assert torch.allclose(perturbation.gradient(batch)["a.query"][0][2], perturbation.gradient(one)["a.query"][0])
    value, gradient = perturbation.problem.value_and_gradient(batch)
    single, slope = perturbation.problem.value_and_gradient(one)
    assert torch.allclose(value[2], single)
    assert torch.allclose(gradient["a.value"][1][2], slope["a.value"][1])
    assert problem.linear == {}


def test_factored_and_dense_operators_agree():
    group = token_group([2, 0, 3, 1, 2], 4, {"q": 3, "v": 2}, 1, 0)
    embedding = token_group([1, 2, 1, 1, 3], 5, {"e": 3}, 1, 1, index=True)
    operator = FactoredOperator([group, embedding], 5)
    problem = random_problem(0, operator=operator)
    matrices = random_perturbation(problem, 0.3 * min(problem.penalty.values()), 5).matrices
    matrices.pop("v")  # a block without P keeps its shared input
    factored, dense = (Perturbation(replace(problem, operator=op), matrices) for op in (operator, densified(operator)))
    factors = random_factors(dict(operator.shapes), 2, 7)
    for one, other in ((factored, dense),):
        a = one.problem.value_and_gradient(one.inward(factors))
        b = other.problem.value_and_gradient(other.inward(factors))
        assert torch.allclose(a[0], b[0])
        for name in factors:
            assert torch.allclose(a[1][name][0], b[1][name][0], atol=1e-10)
            assert torch.allclose(a[1][name][1], b[1][name][1], atol=1e-10)
    assert lambda_max(factored.problem) == pytest.approx(lambda_max(dense.problem))


def test_size_and_rank():
    problem = random_problem(0)
    perturbation = random_perturbation(problem, 0.7, 1, rank=2)
    for name, norm in perturbation.norms.items():
        assert norm == pytest.approx(0.7)
        assert int((torch.linalg.eigvalsh(perturbation.matrices[name]) > 1e-10).sum()) == 2
    again = random_perturbation(problem, 0.7, 1, rank=2)
    assert all(torch.equal(again.matrices[name], p) for name, p in perturbation.matrices.items())
    other = random_perturbation(problem, 0.7, 2, rank=2)
    assert not any(torch.equal(other.matrices[name], p) for name, p in perturbation.matrices.items())


def test_what_is_refused():
    problem = random_problem(0)
    eye = torch.eye(7, dtype=torch.float64)
    refusal(SettingError, "unknown block nothing", Perturbation, problem, {"nothing": eye})
    refusal(SettingError, "a.query must be (7, 7)", Perturbation, problem, {"a.query": eye[:6, :6]})
    with pytest.raises(SettingError, match=r"a\.query is not symmetric"):
        Perturbation(problem, {"a.query": eye + torch.ones(7, 7, dtype=torch.float64).triu(1)})
    refusal(SettingError, "a.query is not positive semidefinite", Perturbation, problem, {"a.query": -eye})
    refusal(SettingError, "a.query is not finite", Perturbation, problem, {"a.query": eye * torch.nan})
    refusal(SettingError, "size of a perturbation", random_perturbation, problem, -1.0)
    refusal(SettingError, "rank of a perturbation", random_perturbation, problem, 1.0, rank=0)
    linear = replace(problem, linear={"a.query": torch.zeros(3, 4)})
    refusal(SettingError, "without a linear term", Perturbation, linear, {})
    free = MatrixFreeOperator.__new__(MatrixFreeOperator)
    free.shapes, free.device, free.n_samples = problem.operator.shapes, problem.operator.device, 5
    refusal(SettingError, "factored or dense", Perturbation, replace(problem, operator=free), {})


def test_a_linear_term_that_is_too_large_is_refused():
    problem = random_problem(0)
    size = problem.penalty["a.query"]
    term = torch.zeros(3, 4, dtype=torch.float64)
    term[0, 0] = size
    refusal(SettingError, "would not be bounded below", replace, problem, linear={"a.query": term})
    assert replace(problem, linear={"a.query": 0.99 * term}).linear["a.query"][0, 0] == pytest.approx(0.99 * size)
    refusal(SettingError, "does not fit", replace, problem, linear={"a.query": term.T})
