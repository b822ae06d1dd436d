"""Proximal gradient: against the certified solver, cvxpy's arithmetic of the step, and its own certificate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ranksure.certificate import certify_point, lambda_max
from ranksure.errors import SettingError
from ranksure.factors import nuclear_norms
from ranksure.losses import CrossEntropy, Loss, SquaredError
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator
from ranksure.problem import Problem
from ranksure.solvers import proximal
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.proximal import proximal_gradient, smoothness_bound, threshold_singular_values
from tests.helpers import token_group
from tests.solvers.small import LOSSES, factored_operator, small_problem


@pytest.mark.parametrize("dense", [False, True], ids=["factored", "dense"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_reaches_the_optimum_of_the_certified_solver(loss: Loss, dense: bool) -> None:
    problem = small_problem(loss, dense=dense)
    found = proximal_gradient(problem, tolerance=1e-9)
    reference = solve(problem, tolerance=1e-9)
    assert found.status == "converged" and found.remedy == ""
    assert found.certificate.relative_gap <= 1e-9
    assert found.certificate.objective == pytest.approx(reference.certificate.objective, abs=2e-9)
    for name, (u, v) in found.factors.items():  # the optimal update, not only its value
        other = reference.factors[name]
        torch.testing.assert_close(u @ v.T, other[0] @ other[1].T, atol=2e-3, rtol=0)


def test_cvxpy_agrees() -> None:
    cp = pytest.importorskip("cvxpy")
    problem = small_problem(SquaredError(), n=5, k=2, share=0.2, dense=True)
    operator = problem.operator
    assert isinstance(operator, DenseOperator)
    x = {name: cp.Variable(shape) for name, shape in operator.shapes.items()}
    rows = {name: g.flatten(0, 1).flatten(1).numpy() for name, g in operator.jacobians().items()}
    z = sum(rows[name] @ cp.vec(x[name], order="C") for name in x)
    residual = problem.base_logits.flatten().numpy() + z - problem.labels.flatten().numpy()
    penalty = sum(problem.penalty[name] * cp.normNuc(x[name]) for name in x)
    optimum = cp.Problem(cp.Minimize(cp.sum_squares(residual) / (2 * 5) + penalty)).solve(solver=cp.CLARABEL)
    assert proximal_gradient(problem, tolerance=1e-8).certificate.objective == pytest.approx(optimum, abs=1e-6)


def test_factors_are_the_update_balanced() -> None:
    problem = small_problem(CrossEntropy())
    found = proximal_gradient(problem, tolerance=1e-6)
    for u, v in found.factors.values():
        torch.testing.assert_close(u.T @ u, v.T @ v, atol=1e-10, rtol=0)
        torch.testing.assert_close(u.T @ u, torch.diag(torch.diagonal(u.T @ u)), atol=1e-10, rtol=0)
    own = certify_point(problem, found.factors).certificate
    assert own.objective == pytest.approx(found.certificate.objective, abs=1e-12)


@pytest.mark.parametrize("dense", [False, True], ids=["factored", "dense"])
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
def test_smoothness_is_that_of_the_stacked_rows(dense: bool, weighted: bool) -> None:
    problem = small_problem(CrossEntropy(), dense=dense, weighted=weighted)
    rows = DenseOperator.from_operator(problem.operator)
    stacked = torch.cat([rows.jacobians()[name].flatten(0, 1).flatten(1) for name in rows.shapes], 1)
    scaled = problem.weights.repeat_interleave(2).sqrt()[:, None] * stacked
    bound, sure = smoothness_bound(problem)
    assert sure
    assert bound == pytest.approx(0.5 * float(torch.linalg.svdvals(scaled)[0]) ** 2, rel=1e-10)


def test_power_iteration_is_close_and_says_it_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small_problem(CrossEntropy(), weighted=True)
    exact, _ = smoothness_bound(problem)
    monkeypatch.setattr(proximal, "_GRAM_LIMIT", 0)
    estimate, sure = smoothness_bound(problem)
    assert not sure
    assert exact <= estimate <= 1.11 * exact
    assert proximal_gradient(problem, tolerance=1e-7).status == "converged"


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("threshold", [1e-9, 0.5, 2.0, 100.0])
@pytest.mark.parametrize("expected", [None, 1, 5])
def test_thresholding_is_that_of_the_singular_values(
    shape: tuple[int, int], threshold: float, expected: int | None
) -> None:
    x = torch.randn(*shape, dtype=torch.float64)
    p, s, q = threshold_singular_values(x, threshold, expected)
    u, full, vt = torch.linalg.svd(x, full_matrices=False)
    exact = u @ torch.diag((full - threshold).clamp(min=0)) @ vt
    torch.testing.assert_close((p * s) @ q.T, exact, atol=1e-10, rtol=0)
    torch.testing.assert_close(p.T @ p, torch.eye(len(s), dtype=torch.float64), atol=1e-8, rtol=0)
    assert bool((s > 0).all()) and bool((s.diff() <= 0).all())


def test_plain_iterations_never_raise_the_objective_and_are_slower() -> None:
    problem = small_problem(CrossEntropy(), share=0.05)
    seen: list[float] = []
    plain = proximal_gradient(
        problem, accelerate=False, check_every=1, max_iterations=60, progress=lambda _, c: seen.append(c.objective)
    )
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(seen))
    fast = proximal_gradient(problem, max_iterations=60)
    assert fast.certificate.relative_gap < 0.5 * plain.certificate.relative_gap


def test_backtracking_saves_a_step_that_is_too_large() -> None:
    problem = small_problem(SquaredError())
    bound, _ = smoothness_bound(problem)
    large = 50 / bound
    assert proximal_gradient(problem, step=large, backtracking=True, tolerance=1e-8).status == "converged"
    lost = proximal_gradient(problem, step=large, max_iterations=2000)
    assert lost.status == "not-converged" and "step is too large" in lost.remedy
    assert lost.certificate.objective <= problem.objective_at_zero + 1e-12  # the best point seen is kept


def test_gradients_are_stored_where_samples_have_many_tokens_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operator = FactoredOperator([token_group([40] * 6, 7, {"a": 5, "b": 4}, 2, 0, False)], 6)
    labels = torch.arange(6) % 3
    problem = Problem(operator, torch.zeros(6, 3, dtype=torch.float64), labels, CrossEntropy(), {"a": 1.0, "b": 1.0})
    problem = problem.with_penalty(0.1 * lambda_max(problem))
    counted: list[str] = []
    whole = FactoredOperator.jacobians
    monkeypatch.setattr(FactoredOperator, "jacobians", lambda self: counted.append("stored") or whole(self))
    stored = proximal_gradient(problem, tolerance=1e-9)
    monkeypatch.setattr("ranksure.solvers.proximal._STORED_BYTES", 0)
    factored = proximal_gradient(problem, tolerance=1e-9)
    assert counted == ["stored"]
    assert stored.certificate.objective == pytest.approx(factored.certificate.objective, rel=1e-9)
    assert stored.status == factored.status == "converged"
    for name, (u, v) in stored.factors.items():
        w, x = factored.factors[name]
        torch.testing.assert_close(u @ v.T, w @ x.T, atol=1e-4, rtol=0)


def test_limits_and_starts() -> None:
    problem = small_problem(CrossEntropy(), share=0.05)
    short = proximal_gradient(problem, tolerance=1e-10, max_iterations=7, check_every=3)
    assert short.status == "not-converged" and "max_iterations" in short.remedy and short.evaluations == 7
    assert len(short.history) == 1 + 3  # the start, 3, 6, 7
    timed = proximal_gradient(problem, tolerance=1e-14, max_seconds=1e-9)
    assert timed.evaluations == 1 and "max_seconds" in timed.remedy
    solved = solve(problem, tolerance=1e-9)
    assert proximal_gradient(problem, start=solved.factors, tolerance=1e-6).evaluations == 0
    for wrong in ({"step": 0.0}, {"step": math.inf}, {"check_every": 0}, {"max_iterations": 0}, {"max_seconds": 0.0}):
        with pytest.raises(SettingError):
            proximal_gradient(problem, **wrong)


def test_zero_at_lambda_max() -> None:
    problem = small_problem(CrossEntropy(), share=1.0 + 1e-9)
    found = proximal_gradient(problem)
    assert found.status == "converged" and set(found.ranks.values()) == {0}
    assert found.certificate.objective == pytest.approx(problem.objective_at_zero, abs=1e-12)


def test_float32_iterations_are_certified_in_float64() -> None:
    exact = small_problem(CrossEntropy())
    single = exact.to(torch.float32)
    found = proximal_gradient(single, tolerance=1e-5)
    assert found.status == "converged"
    assert all(u.dtype == torch.float32 for u, _ in found.factors.values())
    assert found.certificate.objective == pytest.approx(solve(exact, tolerance=1e-8).certificate.objective, abs=1e-5)


def test_builders_have_ragged_tokens() -> None:
    operator = factored_operator()
    assert {len(torch.unique(torch.bincount(group.sample))) > 1 for group in operator.groups} == {True}
    assert set(nuclear_norms({"a": (torch.eye(2), torch.eye(2))}).values()) == {2.0}
