"""The problem's values and gradients, and that nothing is rounded on the way."""

from dataclasses import replace

import pytest
import torch

from ranksure.certificate import certify_point
from ranksure.errors import SettingError
from ranksure.factors import truncated
from ranksure.losses import get_loss
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator
from ranksure.perturbation import random_perturbation
from ranksure.problem import Problem
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.fixed_rank import solve_fixed_rank
from ranksure.solvers.proximal import proximal_gradient
from ranksure.solvers.solution import Solution
from tests.helpers import (
    LOSS_NAMES,
    dense_operator,
    factored_objective,
    flatten,
    generator_of,
    jacobians_of,
    objective,
    randn,
    random_factors,
    random_problem,
    token_group,
    updates,
)


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient_match_autograd(loss, weighted):
    problem = random_problem(3, loss, k=3, weighted=weighted)
    factors = random_factors(problem.operator.shapes, {"a.query": 2, "a.value": 1})
    x = flatten(factors).requires_grad_()
    expected = factored_objective(problem, factors, x)
    value, gradient = problem.value_and_gradient(factors)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-13)
    torch.testing.assert_close(flatten(gradient), torch.autograd.grad(expected, x)[0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_batched_starts(loss):
    problem = random_problem(4, loss, k=2)
    factors = random_factors(problem.operator.shapes, 2, starts=3)
    values, gradients = problem.value_and_gradient(factors)
    for s in range(3):
        one = {name: (u[s], v[s]) for name, (u, v) in factors.items()}
        value, gradient = problem.value_and_gradient(one)
        torch.testing.assert_close(values[s], value)
        for name in one:
            torch.testing.assert_close(gradients[name][0][s], gradient[name][0])
            torch.testing.assert_close(gradients[name][1][s], gradient[name][1])


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_objective_at_zero_and_default_weights(loss):
    problem = random_problem(5, loss, n=3, k=2)
    zero = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in problem.operator.shapes.items()}
    assert problem.objective_at_zero == pytest.approx(objective(problem, zero), rel=1e-14)
    assert problem.weights.tolist() == [1 / 3] * 3  # in float64, not 1/3 rounded to float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_dtype_rounds_the_operator_only(dtype):
    g = generator_of(0)
    operator = FactoredOperator([token_group([2, 3, 1], 9, {"a": 8}, 1, 0)], 3).to(dtype)
    base = randn(3, 2, generator=g)
    problem = Problem(operator, base, torch.tensor([0, 1, 1]), get_loss("cross-entropy"), {"a": 0.1})
    exact = torch.nn.functional.cross_entropy(base, problem.labels).item()
    assert problem.objective_at_zero == pytest.approx(exact, rel=1e-14)
    assert problem.to(torch.float64).objective_at_zero == pytest.approx(exact, rel=1e-14)
    reduced, bases = problem.reduced
    assert reduced.operator.dtype == torch.float64
    assert reduced.objective_at_zero == pytest.approx(exact, rel=1e-14)
    small = random_factors(reduced.operator.shapes, 1)
    assert bases is not None
    full = updates(bases.lift(small))
    nuclear = 0.1 * float(torch.linalg.svdvals(full["a"]).sum())
    expected = objective(problem.to(torch.float64), full) - nuclear + float(problem.penalty_of(small))
    assert float(reduced.value_and_gradient(small)[0]) == pytest.approx(expected, rel=1e-12)


def test_float32_operator_computes_in_float32():
    problem = random_problem(0, operator=dense_operator(0, 4, 1, {"a": (3, 2)}).to(torch.float32))
    factors = {name: (u.float(), v.float()) for name, (u, v) in random_factors({"a": (3, 2)}, 1).items()}
    value, gradient = problem.value_and_gradient(factors)
    assert value.dtype == gradient["a"][0].dtype == torch.float32
    exact, _ = problem.to(torch.float64).value_and_gradient(
        {n: (u.double(), v.double()) for n, (u, v) in factors.items()}
    )
    assert float(value) == pytest.approx(float(exact), rel=1e-5)


def test_with_penalty_keeps_what_was_prepared():
    operator = FactoredOperator([token_group([1, 1], 9, {"a": 8}, 1, 0)], 2)
    problem = random_problem(1, operator=operator)
    reduced = problem.reduced[0].operator
    other = problem.with_penalty(0.25)
    assert other.reduced[0].operator is reduced
    assert other.penalty == other.reduced[0].penalty == {"a": 0.25}
    assert problem.penalty != other.penalty


UNITS = {  # of the blocks: the gradients and lambda of each, divided by its unit
    "one block": {"a": 1e6, "b": 1.0, "c": 1.0},
    "two blocks": {"a": 1e4, "b": 1e-4, "c": 1.0},
    "far": dict.fromkeys("abc", 1e-60),
}


def in_other_units(problem: Problem, units: dict[str, float]) -> Problem:
    """The problem of the updates times their units, written out on stored gradients."""
    operator = DenseOperator({name: g / units[name] for name, g in jacobians_of(problem).items()})
    return replace(problem, operator=operator, penalty={name: problem.penalty[name] / units[name] for name in units})


def solved(problem: Problem) -> dict[str, Solution]:
    """By every solver; ``train_lora`` is left out, because a learning rate is stated in the factors' own units."""
    best = solve(problem, tolerance=1e-7)
    ranks = dict.fromkeys(problem.operator.shapes, 1)
    return {
        "solve": best,
        "from a start": solve(problem, tolerance=1e-7, start=truncated(best.factors, ranks)),
        "fixed rank": solve_fixed_rank(problem, ranks, reference=best.factors, random_starts=2).solution,
        "proximal": proximal_gradient(problem, tolerance=1e-4),
        "proximal, from a start": proximal_gradient(problem, tolerance=1e-4, start=best.factors),
    }


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("units", UNITS)
def test_the_same_problem_in_other_units_costs_the_same(loss, units):
    shapes = {"a": (5, 4), "b": (4, 6), "c": (3, 3)}
    problem = random_problem(2, loss, n=8, k=3, shapes=shapes, share=0.1, weighted=True, uneven=False)
    scales = UNITS[units]
    other = in_other_units(problem, scales)
    expected, found = solved(problem), solved(other)
    for way, theirs in expected.items():
        ours = found[way]
        assert ours.status == theirs.status == "converged", way
        assert ours.evaluations <= max(2 * theirs.evaluations, 10), way
        tolerance = 2e-4 if "proximal" in way else 2e-7
        assert ours.certificate.objective == pytest.approx(theirs.certificate.objective, rel=tolerance), way
        # What was certified holds in the units that the problem was stated in, and in those before.
        own = certify_point(other, ours.factors).certificate
        assert own.relative_gap <= max(1.01 * ours.certificate.relative_gap, 2 * tolerance) or way == "fixed rank"
        before = {name: delta / scales[name] for name, delta in updates(ours.factors).items()}
        assert objective(problem, before) == pytest.approx(ours.certificate.objective, rel=1e-9), way


def test_lambdas_that_are_alike_leave_the_problem_as_it_is():
    """No path of a solver changes where every module has one lambda."""
    problem = random_problem(0, uneven=False, n=8)
    assert problem.scales == {} and problem.equilibrated is problem and problem.working[0] is problem.reduced[0]
    assert problem.with_penalty({"a.query": 0.1, "a.value": 0.2}).scales == {}
    other = problem.with_penalty({"a.query": 0.1, "a.value": 0.4})
    penalty = other.working[0].penalty
    assert penalty["a.query"] == pytest.approx(penalty["a.value"], rel=1e-15)
    again = other.with_penalty({"a.query": 0.4, "a.value": 0.1})  # what was prepared at other scales is not taken
    assert again.working[0].penalty == pytest.approx(penalty, rel=1e-15)
    factors = random_factors(problem.operator.shapes, 2)
    for stated in (other, again):
        working, bases = stated.working
        value, inside = stated.value_and_gradient(factors)[0], working.value_and_gradient(bases.restrict(factors))[0]
        torch.testing.assert_close(inside, value, rtol=1e-14, atol=0)
        torch.testing.assert_close(updates(bases.lift(bases.restrict(factors))), updates(factors))


def test_a_linear_term_is_scaled_with_its_block():
    problem = random_problem(1, "squared-error", n=6)
    perturbed = random_perturbation(problem, 0.3 * min(problem.penalty.values())).problem
    units = {"a.query": 1e5, "a.value": 1.0}
    terms = {name: term / units[name] for name, term in perturbed.linear.items()}
    other = replace(in_other_units(replace(perturbed, linear={}), units), linear=terms)
    expected, found = solve(perturbed), solve(other)
    assert found.status == "converged" and found.evaluations <= 2 * expected.evaluations
    assert found.certificate.objective == pytest.approx(expected.certificate.objective, rel=1e-6)


@pytest.mark.parametrize("factored", [False, True])
def test_the_losses_of_subsets_add_up(factored):
    operator = FactoredOperator([token_group([2, 0, 1, 3, 1], 6, {"a": 4}, 1, 0)], 5) if factored else None
    problem = random_problem(2, n=5, weighted=True, operator=operator)
    factors = random_factors(problem.operator.shapes, 2)
    samples = torch.tensor([3, 0, 4, 2, 1])
    total = 0.0
    for part in samples.split(2):
        few = problem.subset(part, problem.weights[part])
        assert few.operator.n_samples == len(part) and few.penalty == problem.penalty
        total += float(few.data_loss(few.logits(few.operator.apply_factors(factors))))
        assert problem.subset(part).weights.tolist() == [1 / len(part)] * len(part)
    whole = problem.data_loss(problem.logits(problem.operator.apply_factors(factors)))
    assert total == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), None])
def test_bad_penalty(value):
    problem = random_problem(0)
    penalty = {"a.query": 0.1} if value is None else {"a.query": 0.1, "a.value": value}
    with pytest.raises(SettingError, match=r"a\.value"):
        problem.with_penalty(penalty)


@pytest.mark.parametrize("weights", [[0.5, 0.5, 0.0], [0.5, 0.5, -0.1], [0.5, 0.5, float("nan")], [0.5, 0.5]])
def test_bad_weights(weights):
    g = generator_of(0)
    with pytest.raises(SettingError, match="3 positive, finite"):
        Problem(
            DenseOperator({"a": randn(3, 1, 2, 2, generator=g)}),
            randn(3, 2, generator=g),
            torch.tensor([0, 1, 0]),
            get_loss("cross-entropy"),
            {"a": 0.1},
            torch.tensor(weights),
        )
