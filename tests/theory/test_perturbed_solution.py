"""The perturbed optimum against an independent semidefinite solver, its certificate, and its distance."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksure.certificate import certify_point, lambda_max
from ranksure.factors import FactorLayout
from ranksure.perturbation import Perturbation, random_perturbation
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.lbfgs import minimize, objective_on
from ranksure.solvers.proximal import proximal_gradient
from ranksure.theory.bounds import landscape_rank
from ranksure.theory.perturbed_solution import distance_bound, lifted_certificate, solve_perturbed
from tests.helpers import (
    LOSS_NAMES,
    SHAPES,
    convex_optimum,
    dense_operator,
    jacobians_of,
    minimise,
    objective,
    random_factors,
    random_problem,
)

seeds = st.integers(0, 10_000)


def lifted_optimum(perturbation: Perturbation) -> float:
    """``min F_P`` over ``X_j = Q_j Q_j^T`` positive semidefinite, by cvxpy with Clarabel, from its definition."""
    problem = perturbation.unperturbed
    size = problem.operator.n_samples * problem.operator.n_outputs
    flat: cp.Expression = cp.Constant(np.zeros(size))
    penalty: cp.Expression = cp.Constant(0.0)
    for name, g in jacobians_of(problem).items():
        m, width = problem.operator.shapes[name]
        x = cp.Variable((m + width, m + width), PSD=True)
        flat = flat + g.reshape(size, -1).numpy() @ cp.vec(x[:m, m:], order="C")
        cost = problem.penalty[name] / 2 * np.eye(m + width) + perturbation.matrices[name].numpy()
        penalty = penalty + cp.trace(cost @ x)
    return minimise(problem, flat, penalty)


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("size", [0.05, 1.0])
def test_the_perturbed_optimum_is_that_of_the_lifted_semidefinite_problem(loss, size):
    problem = random_problem(4, loss, n=4)
    perturbation = random_perturbation(problem, size * min(problem.penalty.values()), 9)
    found = solve_perturbed(perturbation, tolerance=1e-9)
    expected = lifted_optimum(perturbation)
    assert found.solution.status == "converged"
    assert found.solution.certificate.objective == pytest.approx(expected, rel=1e-6)
    assert found.lifted.feasible
    assert found.lifted.dual == pytest.approx(expected, rel=1e-6)
    assert found.lifted.dual <= expected * (1 + 1e-8)
    assert float(perturbation.objective(found.factors)) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=40)
@given(seed=seeds, loss=st.sampled_from(LOSS_NAMES), size=st.sampled_from([1e-2, 0.3, 2.0]))
def test_the_gap_is_never_below_the_true_suboptimality(seed, loss, size):
    """At any point, for its own and for a borrowed dual; the dual point is feasible on the lifted matrices."""
    problem = random_problem(seed, loss)
    perturbation = random_perturbation(problem, size * min(problem.penalty.values()), seed)
    best = solve(perturbation.problem, tolerance=1e-10)
    scale = 10.0 ** (seed % 5 - 3)
    for point in (random_factors(SHAPES, 2, seed, scale=scale), perturbation.outward(best.factors)):
        certificate = perturbation.certify(point).certificate
        assert certificate.gap >= certificate.objective - best.certificate.objective
        assert certificate.dual <= best.certificate.objective + 1e-12 * abs(best.certificate.objective)
        lifted = lifted_certificate(perturbation, point)
        assert lifted.feasible
        assert lifted.dual == pytest.approx(certificate.dual, abs=1e-9)


def test_an_infeasible_dual_point_is_seen_on_the_lifted_matrices(monkeypatch):
    """The check can fail: at twice the feasible scale an eigenvalue is negative."""
    problem = random_problem(1, share=0.1)
    perturbation = random_perturbation(problem, 0.1 * min(problem.penalty.values()), 1)
    zero = random_factors(SHAPES, 1, 0, scale=0.0)
    state = perturbation.certify(zero)
    assert state.certificate.spectral_ratio > 1
    from dataclasses import replace

    from ranksure.theory import perturbed_solution as module

    doubled = replace(state, certificate=replace(state.certificate, dual_step=2 * state.certificate.dual_step + 1))
    monkeypatch.setattr(module.Perturbation, "certify", lambda self, factors: doubled)
    assert not lifted_certificate(perturbation, zero).feasible


@settings(max_examples=25)
@given(seed=seeds, loss=st.sampled_from(LOSS_NAMES), size=st.sampled_from([1e-3, 0.1, 1.0]))
def test_distance_to_the_unperturbed_optimum(seed, loss, size):
    problem = random_problem(seed, loss)
    perturbation = random_perturbation(problem, size * min(problem.penalty.values()), seed)
    optimum = solve(problem, tolerance=1e-10)
    found = solve_perturbed(perturbation, reference=optimum.factors, tolerance=1e-9)
    excess = found.unperturbed_objective - optimum.certificate.objective
    assert -1e-9 <= excess <= found.distance_bound
    assert excess <= found.a_priori_bound
    assert found.distance_bound <= found.a_priori_bound + optimum.certificate.gap + 1e-12
    # Any reference gives a bound, zero included: then it is F(0) - F* and the gap.
    zero = {name: (u[:, :0], v[:, :0]) for name, (u, v) in optimum.factors.items()}
    assert excess <= distance_bound(perturbation, zero, found.solution.certificate.gap)


def test_distance_against_the_independent_optimum():
    problem = random_problem(11, "logistic")
    perturbation = random_perturbation(problem, 0.2 * min(problem.penalty.values()), 3)
    found = solve_perturbed(perturbation)
    best, _ = convex_optimum(problem)
    delta = {name: u @ v.T for name, (u, v) in found.factors.items()}
    assert objective(problem, delta) == pytest.approx(found.unperturbed_objective, rel=1e-10)
    assert 0 < objective(problem, delta) - best <= found.distance_bound


def test_no_perturbation_is_the_problem_itself():
    problem = random_problem(2)
    found = solve_perturbed(random_perturbation(problem, 0.0, 0), tolerance=1e-9)
    plain = solve(problem, tolerance=1e-9)
    assert found.solution.certificate.objective == pytest.approx(plain.certificate.objective, rel=1e-8)
    assert found.distance_bound <= 1e-6


def test_proximal_gradient_solves_the_perturbed_problem_too():
    problem = random_problem(5, "squared-error")
    perturbation = random_perturbation(problem, 0.3 * min(problem.penalty.values()), 5)
    ours = solve(perturbation.problem, tolerance=1e-8)
    theirs = proximal_gradient(perturbation.problem, tolerance=1e-8)
    assert theirs.status == "converged"
    assert theirs.certificate.objective == pytest.approx(ours.certificate.objective, rel=1e-7)
    backtracked = proximal_gradient(perturbation.problem, tolerance=1e-7, backtracking=True)
    assert backtracked.certificate.objective == pytest.approx(ours.certificate.objective, rel=1e-6)


def test_zero_is_optimal_above_lambda_max_of_the_perturbed_problem():
    problem = random_problem(6)
    perturbation = random_perturbation(problem, 0.2 * min(problem.penalty.values()), 6)
    inner = perturbation.problem
    largest = lambda_max(inner)
    above = solve(inner.with_penalty(largest * 1.001), tolerance=1e-9)
    assert not any(above.ranks.values()) and above.certificate.relative_gap <= 1e-9
    assert any(solve(inner.with_penalty(largest * 0.9), tolerance=1e-9).ranks.values())


@settings(max_examples=15)
@given(seed=seeds, loss=st.sampled_from(LOSS_NAMES), size=st.sampled_from([0.02, 0.2]))
def test_above_the_threshold_every_start_ends_globally_optimal(seed, loss, size):
    """Theorem 4.1: one block, r (r + 1) / 2 > K N, random P: relative gap at most 1e-7 of F_P from every start."""
    n, k = 4, 2 if loss == "cross-entropy" else 1
    shapes = {"w": (5, 4)}
    problem = random_problem(
        seed, loss, n=n, k=k, shapes=shapes, operator=dense_operator(seed, n, 1, shapes), share=0.2
    )
    perturbation = random_perturbation(problem, size * problem.penalty["w"], seed)
    inner = perturbation.problem
    optimum = solve(inner, tolerance=1e-9).certificate
    layout = FactorLayout(dict(inner.operator.shapes), {"w": landscape_rank(n * k)})
    starts = torch.randn(24, layout.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    starts *= 10.0 ** torch.linspace(-2, 1, 24, dtype=torch.float64)[:, None]
    ends = minimize(objective_on(inner, layout), starts, tolerance=1e-10, max_evaluations=4000)
    for row in ends.x:
        certificate = certify_point(inner, layout.unflatten(row[None]), optimum.dual).certificate
        assert certificate.relative_gap <= 1e-7
