"""Rank reduction (Theorem 3.1) against dense matrices: ranks, predictions and objective are recomputed here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ranksure.errors import SettingError
from ranksure.factors import Factors, ranks_of
from ranksure.losses import get_loss
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator
from ranksure.operators.matrix_free import MatrixFreeOperator
from ranksure.problem import Problem
from ranksure.solvers.proximal import proximal_gradient
from ranksure.theory.extreme_point import EPS
from ranksure.theory.null_space import null_basis, orthogonal_to, smat, svec
from ranksure.theory.rank_reduction import RankReduction, reduce_factors, reduce_rank
from tests.helpers import (
    LOSS_NAMES,
    convex_optimum,
    dense_operator,
    densified,
    generator_of,
    objective,
    randn,
    random_factors,
    random_problem,
    token_group,
    updates,
)
from tests.refusals import refusal


def matrix_of(operator: DenseOperator) -> np.ndarray:
    """The operator as one matrix, ``(N C, sum of m n)``."""
    return torch.cat([g.double().flatten(0, 1).flatten(1) for g in operator.jacobians().values()], 1).numpy()


def nuclear(factors: Factors, penalty: dict[str, float]) -> float:
    return sum(penalty[n] * float(np.linalg.norm((u @ v.T).double().numpy(), "nuc")) for n, (u, v) in factors.items())


def assert_reduced(
    found: RankReduction, operator: DenseOperator, before: Factors, penalty: dict[str, float], accuracy: float = 1e-9
) -> None:
    """Everything that is promised, from dense matrices."""
    after = found.factors
    a = matrix_of(operator)
    rank = int(np.linalg.matrix_rank(a)) if a.size else 0
    for name, (u, v) in after.items():
        assert u.dtype == torch.float64 and u.shape == (operator.shapes[name][0], v.shape[1])
        if u.shape[1]:
            assert float(u.norm(dim=0).min()) > 0
        largest = float(u.square().sum())
        torch.testing.assert_close(u.T @ u, v.T @ v, rtol=0, atol=1e-13 * largest)
    ranks = ranks_of(after)
    assert found.ranks_after == ranks
    assert found.count_after == sum(r * (r + 1) // 2 for r in ranks.values())
    assert found.count_after <= found.independent <= rank
    assert found.removed == sum(found.ranks_before.values()) - sum(ranks.values()) >= 0

    def flat(factors: Factors) -> np.ndarray:
        zero = {n: torch.zeros(shape, dtype=torch.float64) for n, shape in operator.shapes.items()}
        return torch.cat([d.double().flatten() for d in {**zero, **updates(factors)}.values()]).numpy()

    start, end = a @ flat(before), a @ flat(after)
    change = float(np.abs(end - start).max(initial=0.0))
    assert change <= accuracy * max(1.0, np.abs(start).max(initial=0.0))
    assert found.change == pytest.approx(change, rel=0.5, abs=1e-12 * max(1.0, np.abs(start).max(initial=0.0)))
    first = nuclear(before, penalty)
    assert nuclear(after, penalty) <= first * (1 + 1e-12)
    assert found.penalty_before == pytest.approx(first, rel=1e-9)
    assert found.penalty_after == pytest.approx(nuclear(after, penalty), rel=1e-9)


@st.composite
def cases(draw) -> tuple[DenseOperator, Factors, dict[str, float], int]:
    """Unequal blocks and ranks, ranks above the sides and zero, unbalanced columns, dependent equations."""
    names = ["a", "b", "c"][: draw(st.integers(1, 3))]
    shapes = {name: (draw(st.integers(1, 9)), draw(st.integers(1, 9))) for name in names}
    seed = draw(st.integers(0, 10_000))
    g = generator_of(seed)
    operator = dense_operator(seed, draw(st.integers(1, 12)), draw(st.integers(1, 2)), shapes, 10 ** draw(scales))
    if draw(st.booleans()):  # equations that repeat, and combinations of others
        mixing = randn(operator.n_samples + 3, operator.n_samples, generator=g)
        mixing[:2] = torch.eye(operator.n_samples, dtype=torch.float64)[:1]
        operator = DenseOperator({n: torch.tensordot(mixing, j, 1) for n, j in operator.jacobians().items()})
    ranks = {name: draw(st.integers(0, 11)) for name in names}
    factors = {}
    for name, (u, v) in random_factors(shapes, ranks, seed, scale=10 ** draw(scales)).items():
        sizes = 10 ** (draw(st.sampled_from([0.0, 2.0])) * randn(u.shape[1], generator=g))
        factors[name] = (u * sizes, v / sizes * 10 ** draw(scales))
    penalty = {name: 10 ** draw(scales) for name in names}
    return operator, factors, penalty, seed


scales = st.sampled_from([-2.0, 0.0, 1.0])


@settings(max_examples=150)
@given(cases())
def test_any_factors_reach_the_bound_with_the_same_predictions(case):
    operator, factors, penalty, seed = case
    assert_reduced(reduce_factors(operator, factors, penalty, seed=seed), operator, factors, penalty)


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_the_objective_of_a_problem_never_rises(loss, seed):
    problem = random_problem(seed, loss, n=4, weighted=True, shapes={"a": (6, 5), "b": (4, 7)})
    factors = random_factors(dict(problem.operator.shapes), {"a": 5, "b": 4}, seed)
    found = reduce_rank(problem, factors, seed=seed)
    before, after = objective(problem, updates(factors)), objective(problem, updates(found.factors))
    assert found.removed > 0 and after < before
    assert_reduced(found, problem.operator, factors, dict(problem.penalty))  # pyright: ignore[reportArgumentType]


def flat_face(seed: int, rank: int, equations: int) -> tuple[Problem, Factors]:
    """A problem with an optimum of the given rank that lies on a face of optima: every G has the same core trace.

    With ``g = A^*(R) = -lambda I`` at the point, all ``X >= 0`` with the same predictions are optimal.
    """
    g = generator_of(seed)
    jacobians = randn(equations, 1, rank, rank, generator=g)
    jacobians[0, 0] = torch.eye(rank, dtype=torch.float64)
    x = torch.diag(0.5 + torch.rand(rank, generator=g, dtype=torch.float64))
    lam = 0.1
    labels = torch.einsum("icmn,mn->ic", jacobians, x)
    labels[0] += equations * lam / 2  # so that the weighted residual is -lambda on the first equation, else zero
    problem = Problem(
        DenseOperator({"w": jacobians}),
        torch.zeros(equations, 1, dtype=torch.float64),
        labels,
        get_loss("squared-error"),
        {"w": lam},
    )
    return problem, {"w": (x.sqrt(), x.sqrt())}


@pytest.mark.parametrize(("rank", "equations"), [(6, 5), (10, 12), (20, 30)])
def test_from_an_optimum_to_an_optimum_of_low_rank(rank, equations):
    """The penalty has no slope at an optimum: directions are drawn, and the objective stays what it was."""
    problem, factors = flat_face(rank, rank, equations)
    found = reduce_rank(problem, factors, seed=1)
    assert_reduced(found, problem.operator, factors, dict(problem.penalty))  # pyright: ignore[reportArgumentType]
    assert found.removed > 0
    before, after = objective(problem, updates(factors)), objective(problem, updates(found.factors))
    assert after == pytest.approx(before, rel=1e-12)
    if rank == 6:
        optimum, _ = convex_optimum(problem)
        assert after == pytest.approx(optimum, rel=1e-7)


def test_a_proximal_solution_reaches_the_bound():
    problem, _ = flat_face(3, 8, 6)
    solution = proximal_gradient(problem, tolerance=1e-9)
    found = reduce_rank(problem, solution.factors)
    assert solution.status == "converged" and solution.ranks["w"] == 8
    assert found.ranks_after["w"] <= 3
    assert_reduced(found, problem.operator, solution.factors, dict(problem.penalty))  # pyright: ignore


def test_hand_made_case():
    """One equation <I, delta> = 3 on a 3 x 3 block: rank 1 is left, with the trace it had."""
    operator = DenseOperator({"w": torch.eye(3, dtype=torch.float64)[None, None]})
    unit = torch.eye(3, dtype=torch.float64)
    found = reduce_factors(operator, {"w": (unit, unit)}, 2.0)
    u, v = found.factors["w"]
    assert u.shape == (3, 1) and float(u.T @ v) == pytest.approx(3.0, rel=1e-14)
    assert (found.count_before, found.count_after, found.independent, found.equations) == (6, 1, 1, 1)
    assert found.penalty_after == pytest.approx(6.0, rel=1e-14)


def test_many_columns_join_in_stages():
    """More unknowns than a stage takes: several null spaces, the same promises."""
    shapes = {"a": (40, 30), "b": (30, 30), "c": (6, 30), "d": (5, 5)}
    operator = dense_operator(5, 30, 2, shapes)
    factors = random_factors(shapes, {"a": 30, "b": 28, "c": 6}, 1)
    seen: list[tuple[int, int]] = []
    found = reduce_factors(operator, factors, 0.3, progress=lambda removed, left: seen.append((removed, left)))
    assert_reduced(found, operator, factors, dict.fromkeys(shapes, 0.3))
    assert found.stages > 3
    assert found.ranks_before == {"a": 30, "b": 28, "c": 6, "d": 0}
    assert [removed + left for removed, left in seen] == [64] * len(seen)
    assert seen[-1] == (found.removed, sum(found.ranks_after.values()))
    assert [removed for removed, _ in seen] == sorted({removed for removed, _ in seen})


def test_small_singular_values_are_not_null():
    """Equations of size 1e-6 must be kept; equations at rounding level must not stand in the way of the bound."""
    g = generator_of(0)
    base, noise = randn(6, 1, 8, 8, generator=g), randn(6, 1, 8, 8, generator=g)
    factors = random_factors({"w": (8, 8)}, 8, 1)
    for size, most in ((1e-6, 12), (1e-17, 6)):
        operator = DenseOperator({"w": torch.cat([base, base + size * noise])})
        found = reduce_factors(operator, factors)
        assert found.independent == most and found.count_after <= most
        start, end = (operator.apply(updates(x)) for x in (factors, found.factors))
        # What tells the copies apart is of this size: the two halves' difference is kept to rounding.
        assert float((end - start).abs().max()) <= 1e-12 * float(start.abs().max())
        assert found.tolerance < 1e-6 * 0.1


def test_on_the_span_of_the_tokens_or_not():
    """Wide blocks of few tokens: the reduced problem gives the same promises, and lifts back."""
    groups = [
        token_group([2, 1, 0, 3, 2], 30, {"q": 25, "k": 12}, 2, 3),
        token_group([1] * 5, 40, {"e": 9}, 2, 4, True),
    ]
    operator = FactoredOperator(groups, 5)
    problem = random_problem(2, "cross-entropy", k=3, operator=operator)
    factors = random_factors(dict(operator.shapes), {"q": 7, "k": 12, "e": 5}, 3)
    dense = densified(operator)
    inside, outside = reduce_rank(problem, factors), reduce_factors(operator, factors, problem.penalty)
    for found in (inside, outside):
        assert_reduced(found, dense, factors, dict(problem.penalty))
    assert not problem.reduced[1].is_trivial  # pyright: ignore[reportOptionalMemberAccess]
    # Factors within the spans: the same walk in other coordinates, up to rounding.
    bases = problem.reduced[1]
    assert bases is not None
    spanned = bases.lift(bases.restrict(factors))
    one, other = reduce_rank(problem, spanned), reduce_factors(operator, spanned, problem.penalty)
    assert one.ranks_after == other.ranks_after
    for name, delta in updates(one.factors).items():
        torch.testing.assert_close(delta, updates(other.factors)[name], rtol=1e-6, atol=1e-8)


def test_a_float32_operator_is_promoted():
    operator = dense_operator(0, 6, 1, {"a": (6, 7), "b": (8, 6)})
    single = operator.to(torch.float32)
    factors = {n: (u.float(), v.float()) for n, (u, v) in random_factors(dict(operator.shapes), 6).items()}
    found = reduce_factors(single, factors)
    wide = {n: (u.double(), v.double()) for n, (u, v) in factors.items()}
    assert_reduced(found, single.to(torch.float64), wide, {"a": 1.0, "b": 1.0})


def test_a_linear_term_is_part_of_the_objective():
    """Perturbed problems have one: loss plus linear term plus penalty must not rise."""
    problem = random_problem(1, "squared-error", n=4, k=1, shapes={"a": (6, 5), "b": (4, 7)})
    g = generator_of(4)
    linear = {}
    for name, shape in problem.operator.shapes.items():
        term = randn(*shape, generator=g)
        linear[name] = 0.9 * problem.penalty[name] * term / torch.linalg.matrix_norm(term, 2)
    bent = Problem(problem.operator, problem.base_logits, problem.labels, problem.loss, problem.penalty, linear=linear)
    factors = random_factors(dict(problem.operator.shapes), 5, 2)
    found = reduce_rank(bent, factors)
    assert found.count_after <= 4

    def value(x: Factors) -> float:
        return objective(problem, updates(x)) + sum(float((linear[n] * d).sum()) for n, d in updates(x).items())

    assert value(found.factors) <= value(factors) * (1 + 1e-12)
    difference = value(factors) - value(found.factors)
    assert found.penalty_before - found.penalty_after == pytest.approx(difference, rel=1e-8)


def test_nothing_to_do_leaves_the_update_alone():
    operator = dense_operator(0, 50, 1, {"a": (6, 7), "b": (8, 6)})
    factors = random_factors(dict(operator.shapes), {"a": 3, "b": 2}, 7)
    found = reduce_factors(operator, factors)
    assert found.removed == 0 and found.count_after == 9 and found.independent == 9
    for name, delta in updates(found.factors).items():
        torch.testing.assert_close(delta, updates(factors)[name], rtol=1e-12, atol=1e-12)
    empty = reduce_factors(operator, {})
    assert empty.factors == {} and empty.change == 0 and empty.count_after == 0


def test_mistakes_are_told():
    operator = dense_operator(0, 3, 1, {"a": (4, 5)})
    good = random_factors({"a": (4, 5)}, 2)
    u, v = good["a"]
    refusal(SettingError, "does not have", reduce_factors, operator, {"b": (u, v)})
    refusal(SettingError, "not (4, r) and (5, r)", reduce_factors, operator, {"a": (v, u)})
    refusal(SettingError, "not (4, r) and (5, r)", reduce_factors, operator, {"a": (u[None], v[None])})
    refusal(SettingError, "not finite", reduce_factors, operator, {"a": (u * math.nan, v)})
    refusal(SettingError, "lambda of a must be positive", reduce_factors, operator, good, {"a": 0.0})
    refusal(SettingError, "lambda of a must be positive", reduce_factors, operator, good, {})
    model = nn.Linear(5, 4)
    free = MatrixFreeOperator(model, [{"input": torch.zeros(2, 5)}], {"": model}, torch.eye(4))
    problem = Problem(free, torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), get_loss("cross-entropy"), {"": 1.0})
    refusal(SettingError, "MatrixFreeOperator", reduce_rank, problem, {"": (torch.ones(4, 1), torch.ones(5, 1))})


# ---- the linear algebra underneath


@settings(max_examples=80)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 12), st.integers(0, 1000))
def test_null_basis_is_orthonormal_null_and_complete(d, unknowns, rank, seed):
    g = generator_of(seed)
    rank = min(rank, d, unknowns)
    rows = randn(d, rank, generator=g) @ randn(rank, unknowns, generator=g)
    null, found = null_basis(rows, 64 * EPS * float(rows.norm()))
    assert (found, null.shape) == (rank, (unknowns, unknowns - rank))
    torch.testing.assert_close(null.T @ null, torch.eye(unknowns - rank, dtype=torch.float64), rtol=0, atol=1e-13)
    assert float((rows @ null).norm()) <= 1e-13 * float(rows.norm())
    equations = randn(min(3, unknowns), unknowns, generator=g) @ null if unknowns else null.T
    equations = torch.cat([equations, equations[:1]])  # a row that depends on the others
    independent = min(3, unknowns - rank)
    smaller = orthogonal_to(null.clone(), equations)
    assert smaller.shape == (unknowns, unknowns - rank - independent)
    assert float((equations @ null.T @ smaller).abs().max() if smaller.numel() else 0.0) <= 1e-12
    torch.testing.assert_close(
        smaller.T @ smaller, torch.eye(smaller.shape[1], dtype=torch.float64), rtol=0, atol=1e-13
    )


def test_coordinates_keep_inner_products():
    g = generator_of(0)
    x, y = randn(5, 5, generator=g), randn(5, 5, generator=g)
    x, y = x + x.T, y + y.T
    assert float(svec(x) @ svec(y)) == pytest.approx(float((x * y).sum()), rel=1e-13)
    torch.testing.assert_close(smat(svec(x), 5), x)
