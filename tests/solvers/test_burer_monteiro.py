"""The certified solver against a convex solver, and the landscape at fixed rank."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksure.certificate import certify_point, lambda_max
from ranksure.curvature import inertia
from ranksure.factors import balanced, ranks_of, singular_values, truncated
from ranksure.losses import get_loss
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator
from ranksure.operators.matrix_free import MatrixFreeOperator
from ranksure.problem import Problem
from ranksure.solvers.burer_monteiro import _add_directions, solve
from ranksure.solvers.fixed_rank import solve_fixed_rank
from tests.helpers import (
    LOSS_NAMES,
    convex_optimum,
    flatten,
    objective,
    random_factors,
    random_problem,
    spurious_instance,
    token_group,
    updates,
)

SHAPES = {"a": (3, 4), "b": (4, 2), "c": (2, 2)}


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("share", [0.03, 0.3, 0.8])
@pytest.mark.parametrize("blocks", [1, 3])
def test_optimum_agrees_with_cvxpy(loss, share, blocks):
    shapes = dict(list(SHAPES.items())[:blocks])
    problem = random_problem(1, loss, 6, 3, shapes, share, weighted=blocks == 3)
    solution = solve(problem, tolerance=1e-9)
    upper, delta = convex_optimum(problem)
    assert solution.status == "converged"
    assert solution.remedy == ""
    assert solution.certificate.relative_gap <= 1e-9
    found = objective(problem, updates(solution.factors))
    assert found == pytest.approx(upper, rel=1e-6)
    assert solution.certificate.objective == pytest.approx(found, rel=1e-10)
    assert solution.certificate.dual <= found
    if loss == "squared-error" and share > 0.1:  # data determines the update well enough to compare it
        for name, update in updates(solution.factors).items():
            torch.testing.assert_close(update, delta[name], rtol=0, atol=2e-3)


@settings(max_examples=25)
@given(
    st.integers(0, 100_000),
    st.sampled_from(LOSS_NAMES),
    st.integers(2, 3),
    st.integers(1, 6),
    st.floats(0.01, 1.2),
    st.booleans(),
)
def test_random_problems_are_solved(seed, loss, k, n, share, weighted):
    problem = random_problem(seed, loss, n, k, SHAPES, share, weighted=weighted)
    solution = solve(problem, tolerance=1e-7)
    if solution.certificate.gap > 1e-11 * problem.objective_at_zero:  # else as near as float64 can tell
        assert solution.status == "converged"
        assert solution.certificate.relative_gap <= 1e-7
    upper, _ = convex_optimum(problem)
    assert solution.certificate.objective == pytest.approx(upper, rel=1e-6)
    # the theory's existence bound, up to directions that the pruning could not tell from zero
    assert all(r <= min(SHAPES[name]) for name, r in solution.ranks.items())


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_factored_operator_with_reduction(loss):
    """Solved on the span, lifted back, certified on the full operator."""
    k = 2
    c = 1 if loss == "cross-entropy" else 2
    groups = [
        token_group([2, 1, 0, 2], 15, {"a": 14, "b": 3}, c, 1),
        token_group([1, 2, 1, 1], 20, {"e": 3}, c, 2, index=True),
    ]
    problem = random_problem(2, loss, k=k, operator=FactoredOperator(groups, 4), share=0.2)
    solution = solve(problem, tolerance=1e-8)
    assert solution.status == "converged"
    assert {name: len(u) for name, (u, _) in solution.factors.items()} == {"a": 14, "b": 3, "e": 3}
    upper, _ = convex_optimum(problem)
    assert objective(problem, updates(solution.factors)) == pytest.approx(upper, rel=1e-6)
    assert certify_point(problem, solution.factors).certificate.relative_gap <= 1.1e-8
    stored = random_problem(2, loss, k=k, operator=FactoredOperator(groups, 4).to(torch.float32), share=0.2)
    low = solve(stored, tolerance=1e-8)
    assert low.status == "converged"
    assert low.certificate.objective == pytest.approx(upper, rel=1e-4)


def test_a_block_without_tokens_stays_at_rank_zero():
    groups = [token_group([0, 0, 0], 4, {"none": 3}, 1, 0), token_group([1, 2, 1], 4, {"some": 3}, 1, 0)]
    problem = random_problem(1, operator=FactoredOperator(groups, 3), share=0.2)
    solution = solve(problem)
    assert solution.status == "converged"
    assert solution.ranks["none"] == 0
    assert solution.ranks["some"] > 0


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_zero_at_lambda_max(loss, factor):
    problem = random_problem(3, loss)
    solution = solve(problem.with_penalty(factor * lambda_max(problem)))
    assert solution.status == "converged"
    assert set(solution.ranks.values()) == {0}
    assert solution.evaluations == 0
    just_below = solve(problem.with_penalty(0.95 * lambda_max(problem)))
    assert sum(just_below.ranks.values()) > 0


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_rounds_never_raise_the_objective(loss):
    problem = random_problem(4, loss, 8, 3, SHAPES, 0.05)
    objectives, duals = [], []
    solution = solve(
        problem,
        tolerance=1e-9,
        progress=lambda _, certificate: (objectives.append(certificate.objective), duals.append(certificate.dual)),
    )
    assert len(objectives) > 1
    assert objectives[0] == pytest.approx(problem.objective_at_zero)
    for before, after in pairwise(objectives):
        assert after <= before + 1e-12
    for before, after in pairwise(duals):
        assert after >= before
    gaps = [gap for _, gap in solution.history]
    seconds = [second for second, _ in solution.history]
    assert len(gaps) == len(objectives)
    assert gaps[-1] <= 1e-9 < gaps[0]
    assert seconds == sorted(seconds)
    assert solution.seconds >= seconds[-1]


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_warm_start(loss):
    problem = random_problem(5, loss, 8, 3, SHAPES, 0.2)
    cold = solve(problem, tolerance=1e-8)
    again = solve(problem, tolerance=1.1e-8, start=cold.factors, best_dual=cold.certificate.dual)
    assert again.evaluations == 0
    assert again.certificate.objective == pytest.approx(cold.certificate.objective, rel=1e-12)
    nearby = problem.with_penalty({name: 0.8 * value for name, value in problem.penalty.items()})
    warm = solve(nearby, tolerance=1e-8, start=cold.factors)
    fresh = solve(nearby, tolerance=1e-8)
    assert warm.status == fresh.status == "converged"
    assert warm.certificate.objective == pytest.approx(fresh.certificate.objective, rel=1e-7)
    partial = solve(problem, tolerance=1e-8, start={"a": cold.factors["a"]})
    assert partial.certificate.objective == pytest.approx(cold.certificate.objective, rel=1e-7)


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_new_directions_are_the_best_of_their_cone(loss):
    """Old columns by sqrt(a), new ones by sqrt(b): no other scaling of either is lower, and the start is not."""
    problem = random_problem(12, loss, 6, 3, SHAPES, 0.2)
    factors = random_factors(SHAPES, 1, 3, scale=0.7)
    state = certify_point(problem, factors)
    added = _add_directions(problem, factors, state)
    value = float(problem.value_and_gradient(added)[0])
    assert value < float(problem.value_and_gradient(factors)[0]) - 1e-6
    assert any(ranks_of(added)[name] > 1 for name in SHAPES)
    for old, new in ((1.02, 1.0), (0.98, 1.0), (1.0, 1.02), (1.0, 0.98)):
        scaled = {}
        for name, (u, v) in added.items():
            by = torch.full((u.shape[1],), new, dtype=torch.float64)
            by[:1] = old
            scaled[name] = (u * by, v * by)
        assert float(problem.value_and_gradient(scaled)[0]) > value - 1e-9
    for name, (u, _) in factors.items():  # the directions themselves are the gradient's top singular pairs
        if ranks_of(added)[name] > 1:
            p, _, qt = torch.linalg.svd(state.gradients[name])
            new_u, new_v = added[name][0][:, 1], added[name][1][:, 1]
            assert float(-(new_u @ p[:, 0]) * (qt[0] @ new_v)) == pytest.approx(float(new_u.norm() * new_v.norm()))
            torch.testing.assert_close(
                added[name][0][:, 0] / u[:, 0], (added[name][0][:, 0] / u[:, 0])[0].expand(len(u))
            )


def test_matrix_free_network():
    """No reduction, no float64 promotion: solved and certified in the network's own dtype."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    model.forward = lambda x: model[0](x)
    batches = [{"x": torch.randn(6, 4, generator=torch.Generator().manual_seed(0))}]
    low = MatrixFreeOperator(model, batches, {"0": model[0]}, torch.eye(3))
    problem = random_problem(1, "logistic", k=3, operator=low, share=0.3)
    solution = solve(problem, tolerance=1e-2)
    assert solution.status == "converged"
    upper, _ = convex_optimum(problem)
    assert upper <= solution.certificate.objective + 1e-5
    assert solution.certificate.gap >= solution.certificate.objective - upper - 1e-5
    fixed = solve_fixed_rank(problem, {"0": 1}, random_starts=2, tolerance=1e-3)
    assert fixed.curvature.negative is None
    double = model.double()
    exact = MatrixFreeOperator(double, [{"x": batches[0]["x"].double()}], {"0": double[0]}, torch.eye(3).double())
    problem = random_problem(1, "logistic", k=3, operator=exact, share=0.3)
    solution = solve(problem, tolerance=1e-7)
    assert solution.status == "converged"
    assert solution.certificate.objective == pytest.approx(convex_optimum(problem)[0], rel=1e-6)


def test_limits_are_told():
    problem = random_problem(6, "cross-entropy", 8, 3, SHAPES, 0.03)
    rounds = solve(problem, tolerance=1e-10, max_rounds=1)
    assert rounds.status == "not-converged"
    assert "max_rounds" in rounds.remedy
    assert rounds.certificate.relative_gap > 1e-10
    evaluations = solve(problem, tolerance=1e-10, max_evaluations=3)
    assert evaluations.status == "not-converged"
    assert "evaluations" in evaluations.remedy
    impossible = solve(problem, tolerance=1e-18)
    assert impossible.status == "not-converged"
    assert "rounding" in impossible.remedy
    assert impossible.certificate.relative_gap < 1e-9  # the best point is kept all the same


def test_solutions_are_balanced_and_sparse():
    solution = solve(random_problem(7, "cross-entropy", 6, 2, SHAPES, 0.4), tolerance=1e-8)
    for name, (u, v) in solution.factors.items():
        torch.testing.assert_close(u.T @ u, v.T @ v, rtol=0, atol=1e-10)
        assert u.shape[1] < min(SHAPES[name])
    assert solution.ranks == ranks_of(solution.factors)


def test_balanced_and_truncated():
    factors = random_factors({"a": (5, 4), "b": (3, 6)}, {"a": 3, "b": 5})
    even = balanced(factors)
    for name, update in updates(factors).items():
        torch.testing.assert_close(updates(even)[name], update)
        u, v = even[name]
        values = torch.linalg.svdvals(update)[: u.shape[1]]
        torch.testing.assert_close(u.T @ u, torch.diag(values), rtol=0, atol=1e-10)
        torch.testing.assert_close(v.T @ v, torch.diag(values), rtol=0, atol=1e-10)
        torch.testing.assert_close(singular_values(factors)[name][: len(values)], values)
    assert ranks_of(even) == {"a": 3, "b": 3}  # never more columns than the block has
    cut = truncated(factors, {"a": 2})
    assert ranks_of(cut) == {"a": 2, "b": 3}
    left, values, right = torch.linalg.svd(updates(factors)["a"], full_matrices=False)
    torch.testing.assert_close(updates(cut)["a"], (left[:, :2] * values[:2]) @ right[:2])
    assert ranks_of(truncated(factors, {"a": 0, "b": 99})) == {"a": 0, "b": 3}
    tiny = {"a": factors["a"], "b": (1e-9 * factors["b"][0], 1e-9 * factors["b"][1])}
    assert ranks_of(balanced(tiny))["b"] == 0  # judged against the largest of all blocks
    zero = {name: (0 * u, 0 * v) for name, (u, v) in factors.items()}
    assert ranks_of(balanced(zero)) == {"a": 0, "b": 0}


# ---- fixed rank


@pytest.mark.parametrize(("r", "excess"), [(1, 0.0506), (2, 0.1031), (3, None)])
def test_the_threshold_is_tight(r, excess):
    """DESIGN section 3: a strict trap at rank r, found optimal by nobody, and no trap above."""
    problem, trap, best, stated = spurious_instance(r)
    if excess is not None:
        assert stated == pytest.approx(excess, abs=5e-5)
    state = certify_point(problem, trap)
    assert inertia(problem, trap, state).negative == 0
    solution = solve(problem, tolerance=1e-9)
    assert solution.status == "converged"
    assert solution.certificate.objective == pytest.approx(objective(problem, best), rel=1e-8)
    assert solution.ranks == {"w": 1}
    at_trap = certify_point(problem, trap, solution.certificate.dual).certificate
    assert at_trap.gap == pytest.approx(stated, rel=1e-6)
    # a fixed-rank descent from beside the trap falls back into it ...
    beside = {name: (u + 1e-4, v + 1e-4) for name, (u, v) in trap.items()}
    stuck = solve_fixed_rank(problem, {"w": r}, reference=beside, best_dual=solution.certificate.dual)
    assert stuck.stationary
    assert stuck.curvature.negative == 0
    assert stuck.solution.certificate.gap == pytest.approx(stated, rel=1e-6)
    # ... and does not at rank r + 1
    freed = solve_fixed_rank(problem, {"w": r + 1}, reference=beside, best_dual=solution.certificate.dual)
    assert freed.solution.certificate.relative_gap < 1e-6
    # random starts find the optimum at rank r, too: the trap is local
    many = solve_fixed_rank(problem, {"w": r}, random_starts=20, best_dual=solution.certificate.dual)
    assert many.solution.certificate.relative_gap < 1e-6
    assert many.starts == len(many.objectives) == 20


def test_solve_leaves_the_trap():
    problem, trap, best, _ = spurious_instance(1)
    solution = solve(problem, tolerance=1e-9, start=trap)
    assert solution.status == "converged"
    assert solution.certificate.objective == pytest.approx(objective(problem, best), rel=1e-8)


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_fixed_rank_reaches_the_optimum_where_the_rank_allows(loss):
    problem = random_problem(8, loss, 5, 2, SHAPES, 0.2)
    best = solve(problem, tolerance=1e-9)
    result = solve_fixed_rank(
        problem,
        dict.fromkeys(SHAPES, 99),  # clipped to each block
        reference=best.factors,
        best_dual=best.certificate.dual,
    )
    assert result.solution.certificate.relative_gap < 1e-6
    assert result.starts == 1
    assert all(r <= min(SHAPES[name]) for name, r in result.solution.ranks.items())
    ranks = [1, 2]
    objectives = []
    for rank in ranks:
        found = solve_fixed_rank(
            problem,
            dict.fromkeys(SHAPES, rank),
            reference=best.factors,
            random_starts=4,
            best_dual=best.certificate.dual,
        )
        assert all(r <= rank for r in found.solution.ranks.values())
        assert found.stationary or found.solution.certificate.relative_gap <= 1e-7
        assert found.solution.certificate.objective >= best.certificate.dual
        assert found.starts == 5
        assert found.solution.certificate.objective <= min(found.objectives) + 1e-7
        objectives.append(found.solution.certificate.objective)
    assert objectives[1] <= objectives[0] + 1e-7


def test_fixed_rank_zero_and_left_out_blocks():
    problem = random_problem(9, "cross-entropy", 5, 2, SHAPES, 0.2)
    none = solve_fixed_rank(problem, {})
    assert set(none.solution.ranks.values()) == {0}
    assert none.solution.certificate.objective == pytest.approx(problem.objective_at_zero)
    best = solve(problem)
    one = solve_fixed_rank(problem, {"a": 2}, reference=best.factors)
    assert one.solution.ranks["b"] == one.solution.ranks["c"] == 0
    assert one.solution.ranks["a"] > 0
    missing = solve_fixed_rank(problem, {"a": 1, "b": 1}, reference={"a": best.factors["a"]})
    assert missing.stationary


def test_fixed_rank_is_repeatable_and_its_seed_matters():
    problem = random_problem(10, "cross-entropy", 5, 2, SHAPES, 0.1)
    runs = [
        solve_fixed_rank(problem, dict.fromkeys(SHAPES, 1), random_starts=3, seed=seed).objectives for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def saddle_instance():
    """One equation, ``G = diag(2, 1)``: rank 1 along the smaller entry is stationary, a strict saddle."""
    jacobian = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))[None, None]
    target = torch.tensor([[3.0]], dtype=torch.float64)
    problem = Problem(DenseOperator({"w": jacobian}), 0 * target, target, get_loss("squared-error"), {"w": 1.0})
    along = math.sqrt(2.5) * torch.tensor([[0.0], [1.0]], dtype=torch.float64)  # 2 (3 - s) = lambda
    return problem, {"w": (along, along.clone())}, 0.25**2 + 1.375


def test_saddles_are_left():
    problem, saddle, best = saddle_instance()
    _, gradient = problem.value_and_gradient(saddle)
    assert float(flatten(gradient).norm()) < 1e-12
    assert inertia(problem, saddle, certify_point(problem, saddle)).negative > 0
    asked = solve_fixed_rank(problem, {"w": 1}, reference=saddle)
    assert asked.solution.certificate.objective == pytest.approx(best, rel=1e-9)
    unasked = solve_fixed_rank(problem, {"w": 1}, reference=saddle, check_curvature=False)
    assert unasked.solution.certificate.objective == pytest.approx(2.75, rel=1e-9)
    assert unasked.stationary  # so only the curvature tells them apart
    assert unasked.curvature.negative is None


def test_curvature_is_that_of_the_point_returned():
    """The optimum is reached by leaving a saddle: the saddle's negative curvature is not told of it."""
    problem, saddle, best = saddle_instance()
    result = solve_fixed_rank(problem, {"w": 1}, reference=saddle, best_dual=best - 1e-12)
    assert result.solution.certificate.relative_gap <= 1e-7
    assert result.curvature.negative in (0, None)


def test_status_and_remedy_agree():
    problem = random_problem(8, "logistic", 5, 2, SHAPES, 0.2)
    best = solve(problem, tolerance=1e-9)
    full = dict.fromkeys(SHAPES, 9)
    done = solve_fixed_rank(problem, full, reference=best.factors, best_dual=best.certificate.dual).solution
    assert (done.status, done.remedy) == ("converged", "")
    short = solve_fixed_rank(problem, dict.fromkeys(SHAPES, 1), random_starts=2, max_evaluations=2).solution
    assert short.status == "not-converged"
    assert "max_evaluations" in short.remedy
