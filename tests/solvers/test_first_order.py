"""First-order LoRA training: the updates are the textbook's, the objective is the true L2 one, runs converge."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ranksure.certificate import certify_point
from ranksure.errors import SettingError
from ranksure.factors import Factors
from ranksure.losses import CrossEntropy, Loss
from ranksure.operators.dense import DenseOperator
from ranksure.perturbation import random_perturbation
from ranksure.problem import Problem
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.first_order import log_spaced, train_lora
from ranksure.solvers.initial import Init, initial_factors
from ranksure.theory.bounds import rank_bounds
from tests.helpers import random_problem
from tests.solvers.definitions import dense_loss, dense_objective, run_torch
from tests.solvers.small import LOSSES, small_problem

OPTIONS = {
    "plain": (False, True, False),
    "freeze-a": (True, True, False),
    "no-weight-decay": (False, False, False),
    "perturbed": (False, True, True),
    "all": (True, False, True),
}


@pytest.mark.parametrize("method", ["gd", "adam"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_updates_are_those_of_torch(method: Any, options: tuple[bool, bool, bool]) -> None:
    freeze_a, decay, perturbed = options
    problem = small_problem(CrossEntropy(), n=5)
    perturbation = random_perturbation(problem, 0.5, seed=1) if perturbed else None
    start = initial_factors(problem, 2, init="large")
    expected = run_torch(problem, start, method, 0.05, 6, freeze_a=freeze_a, decay=decay, perturbation=perturbation)
    run = train_lora(
        problem,
        2,
        method=method,
        learning_rate=0.05,
        start=start,
        steps=6,
        freeze_a=freeze_a,
        weight_decay=decay,
        perturbation=perturbation,
    )
    for name, (u, v) in run.factors.items():
        torch.testing.assert_close(u, expected[name][0], atol=1e-10, rtol=0)
        torch.testing.assert_close(v, expected[name][1], atol=1e-10, rtol=0)
        assert torch.equal(v, start[name][1]) == freeze_a
        lowest = run.solution.factors[name]
        torch.testing.assert_close(lowest[0] @ lowest[1].T, u @ v.T, atol=1e-10, rtol=0)
    last = run.trajectory[-1]
    # Looks report the problem at its lambda, trained with it or not.
    objective = float(dense_objective(problem, expected, perturbation=perturbation))
    assert last.factored_objective == pytest.approx(objective, abs=1e-12)
    assert last.loss == pytest.approx(float(dense_loss(problem, expected)), abs=1e-12)


@pytest.mark.parametrize("method", ["gd", "adam"])
def test_peft_settings_correspond(method: Any) -> None:
    """Torch's own optimiser on PEFT's ``B`` and ``A`` with ``delta = s B A`` and an L2 penalty ``wd``."""
    s, rate, epsilon = 4.0, 0.02, 1e-3
    problem = small_problem(CrossEntropy(), n=5)
    decay = {name: s * value for name, value in problem.penalty.items()}  # lambda = wd / s
    start = initial_factors(problem, 2, init="large")
    peft = {k: ((u / s**0.5).requires_grad_(), (v / s**0.5).requires_grad_()) for k, (u, v) in start.items()}
    groups = [{"params": list(pair), "weight_decay": decay[name]} for name, pair in peft.items()]
    optimiser: Any = torch.optim.SGD(groups, lr=rate) if method == "gd" else torch.optim.Adam(groups, rate, eps=epsilon)
    for _ in range(6):
        optimiser.zero_grad()
        dense_loss(problem, {name: (s * b, a) for name, (b, a) in peft.items()}).backward()
        optimiser.step()
    scale = s if method == "gd" else s**0.5
    run = train_lora(
        problem, 2, method=method, learning_rate=scale * rate, epsilon=epsilon / s**0.5, start=start, steps=6
    )
    for name, (u, v) in run.factors.items():
        torch.testing.assert_close(u, s**0.5 * peft[name][0].detach(), atol=1e-10, rtol=0)
        torch.testing.assert_close(v, s**0.5 * peft[name][1].detach(), atol=1e-10, rtol=0)


def test_inverse_sqrt_schedule() -> None:
    problem = small_problem(CrossEntropy(), n=5)
    start = initial_factors(problem, 2, init="large")
    run = train_lora(problem, 2, method="gd", learning_rate=0.1, schedule="inverse-sqrt", start=start, steps=3)
    x = start
    for t in (1, 2, 3):
        x = run_torch(problem, x, "gd", 0.1 / math.sqrt(t), 1)
    for name, (u, v) in run.solution.factors.items():
        torch.testing.assert_close(u @ v.T, x[name][0] @ x[name][1].T, atol=1e-10, rtol=0)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_gd_above_the_threshold_finds_the_optimum(loss: Loss) -> None:
    problem = small_problem(loss)
    optimum = solve(problem, tolerance=1e-8)
    run = train_lora(problem, 4, method="gd", learning_rate=0.2, init="small", steps=20_000, looks=40, tolerance=1e-4)
    assert run.solution.status == "converged" and run.solution.remedy == ""
    assert run.solution.certificate.relative_gap <= 1e-4
    gain = problem.objective_at_zero - optimum.certificate.objective
    assert run.solution.certificate.objective - optimum.certificate.objective <= 1.01e-4 * gain


def test_adam_and_decaying_sgd_come_close() -> None:
    problem = small_problem(CrossEntropy())
    adam = train_lora(problem, 4, method="adam", learning_rate=0.02, steps=1500, tolerance=1e-4)
    assert adam.solution.status == "converged"
    sgd = train_lora(
        problem, 4, method="sgd", learning_rate=0.3, schedule="inverse-sqrt", batch_size=3, steps=3000, tolerance=3e-2
    )
    assert sgd.solution.status == "converged"
    assert train_lora(problem, 4, method="adam", learning_rate=0.01, batch_size=3, steps=50).solution.evaluations == 50


def test_the_peft_start_is_the_pretrained_network() -> None:
    problem = small_problem(CrossEntropy())
    first = train_lora(problem, 2, method="gd", learning_rate=0.1, steps=1).trajectory[0]
    assert first.step == 0 and first.objective == pytest.approx(problem.objective_at_zero, abs=1e-12)
    assert first.factored_objective > first.objective  # v is not zero


def test_trajectory_is_log_spaced_certified_and_repeatable() -> None:
    problem = small_problem(CrossEntropy())
    runs = [
        train_lora(problem, 2, method="sgd", learning_rate=0.1, batch_size=4, steps=100, looks=5, seed=3)
        for _ in range(2)
    ]
    assert [point.step for point in runs[0].trajectory] == [0, *log_spaced(100, 5)] == [0, 1, 3, 10, 32, 100]
    assert [p.objective for p in runs[0].trajectory] == [p.objective for p in runs[1].trajectory]
    for point in runs[0].trajectory:
        assert point.factored_objective >= point.objective
    own = certify_point(problem, runs[0].solution.factors).certificate
    assert own.objective == pytest.approx(runs[0].trajectory[-1].objective, abs=1e-10)
    assert runs[0].solution.status == "not-converged" and "raise steps" in runs[0].solution.remedy
    different = train_lora(problem, 2, method="sgd", learning_rate=0.1, batch_size=4, steps=100, looks=5, seed=4)
    assert different.trajectory[-1].objective != runs[0].trajectory[-1].objective


def threshold_problem() -> Problem:
    """Three equations: rank 3 is the landscape's threshold (6 > 3); the optimum has rank 1 in each of three blocks."""
    return small_problem(CrossEntropy(), n=3, k=2, dense=True, share=0.1, seed=1)


@pytest.mark.parametrize("init", ["peft", "peft-gaussian", "small", "large"])
@pytest.mark.parametrize("perturbed", [False, True])
def test_gd_at_the_threshold_ends_at_the_optimum_from_every_start(init: Init, perturbed: bool) -> None:
    problem = threshold_problem()
    assert rank_bounds(problem).landscape.numerical == 3
    perturbation = random_perturbation(problem, 0.1 * max(problem.penalty.values())) if perturbed else None
    target = problem if perturbation is None else perturbation.problem
    optimum = solve(target, tolerance=1e-10)
    assert list(optimum.ranks.values()) == [1, 1, 1]
    run = train_lora(
        problem,
        3,
        method="gd",
        learning_rate=0.2,
        init=init,
        steps=20_000,
        looks=60,
        tolerance=1e-7,
        perturbation=perturbation,
        optimum=optimum,
    )
    last = run.trajectory[-1]
    assert run.solution.status == "converged"
    assert last.excess is not None and abs(last.excess) <= 1e-6 * problem.objective_at_zero
    # The perturbed objective of the factors themselves, from its definition, against the solver's optimum.
    value = float(dense_objective(problem, run.factors, perturbation=perturbation))
    assert value == pytest.approx(optimum.certificate.objective, abs=1e-6 * problem.objective_at_zero)
    assert run.solution.certificate.spectral_ratio == pytest.approx(1, abs=1e-2)
    for name, (u, v) in run.solution.factors.items():
        own = run.factors[name]
        torch.testing.assert_close(u @ v.T, own[0] @ own[1].T, atol=1e-10, rtol=0)


def test_looks_are_certificates_against_the_given_optimum() -> None:
    problem = small_problem(CrossEntropy(), dense=True)
    perturbation = random_perturbation(problem, 0.2)
    for p, target in ((None, problem), (perturbation, perturbation.problem)):
        optimum = solve(target, tolerance=1e-9)
        run = train_lora(
            problem, 2, method="gd", learning_rate=0.1, init="large", steps=30, perturbation=p, optimum=optimum
        )
        factors = run.factors if p is None else p.inward(run.factors)
        own = certify_point(target, factors, optimum.certificate.dual).certificate
        last = run.trajectory[-1]
        assert last.objective == pytest.approx(own.objective, abs=1e-12)
        assert last.relative_gap == pytest.approx(own.relative_gap, rel=1e-9)
        assert last.spectral_ratio == pytest.approx(own.spectral_ratio, rel=1e-9)
        for point in run.trajectory:
            assert point.factored_objective >= point.objective >= optimum.certificate.dual
            assert point.excess == pytest.approx(point.factored_objective - optimum.certificate.objective, abs=1e-15)
        blind = train_lora(problem, 2, method="gd", learning_rate=0.1, init="large", steps=30, perturbation=p)
        assert blind.trajectory[0].excess is None
        # The optimum's dual value is the best there is.
        assert blind.solution.certificate.gap > 1.1 * run.solution.certificate.gap


def ridge(problem: Problem, v: Factors) -> Factors:
    """Minimiser over ``u`` at fixed ``v`` for squared error, from the normal equations."""
    grads = DenseOperator.from_operator(problem.operator).jacobians()
    j = torch.cat([(grads[name] @ v[name][1]).flatten(2) for name in v], 2).flatten(0, 1)
    # a mean of squares, no half
    weights = 2 / problem.n_logits * problem.weights.repeat_interleave(problem.operator.n_outputs)
    target = (problem.labels - problem.base_logits).reshape(-1)
    decay = torch.cat(
        [torch.full((u.numel(),), problem.penalty[name], dtype=torch.float64) for name, (u, _) in v.items()]
    )
    flat = torch.linalg.solve(j.T @ (weights[:, None] * j) + torch.diag(decay), j.T @ (weights * target))
    parts = flat.split([u.numel() for u, _ in v.values()])
    return {name: (part.view(v[name][0].shape), v[name][1]) for name, part in zip(v, parts, strict=True)}


@pytest.mark.parametrize("method", ["gd", "sgd"])
def test_frozen_a_is_ridge_regression_in_b(method: Any) -> None:
    problem = small_problem(LOSSES[2], weighted=True, dense=True)
    start = initial_factors(problem, 2)
    expected = ridge(problem, start)
    many: dict[str, Any] = {"learning_rate": 0.2, "steps": 3000}
    scales, accuracy = (1.0, 0.0), 1e-9  # convex: the start of u does not matter
    if method == "sgd":
        many = {"learning_rate": 0.1, "steps": 10_000, "schedule": "inverse-sqrt", "batch_size": 4}
        scales, accuracy = (0.0,), 2e-2
    starts = [{name: (scale * torch.ones_like(u), v) for name, (u, v) in start.items()} for scale in scales]
    runs = [train_lora(problem, 2, method=method, start=x, freeze_a=True, looks=2, **many) for x in starts]
    for run in runs:
        for name, (u, v) in run.factors.items():
            assert torch.equal(v, start[name][1])
            torch.testing.assert_close(u, expected[name][0], atol=accuracy, rtol=0)
    # It is the optimum over u only: what the certificate bounds is the distance to every rank with both trained.
    optimum = solve(problem, tolerance=1e-9)
    certificate = runs[-1].solution.certificate
    assert certificate.gap >= certificate.objective - optimum.certificate.objective > 1e-3


def test_without_weight_decay_the_loss_is_lower_and_the_objective_higher() -> None:
    problem = small_problem(CrossEntropy(), dense=True)
    optimum = solve(problem, tolerance=1e-9)
    settings: dict[str, Any] = {"method": "gd", "learning_rate": 0.2, "steps": 2000, "optimum": optimum}
    kept = train_lora(problem, 4, **settings).trajectory[-1]
    dropped = train_lora(problem, 4, weight_decay=False, **settings).trajectory[-1]
    assert dropped.loss < 0.5 * kept.loss
    assert dropped.excess is not None and kept.excess is not None
    assert dropped.excess > 0.1 * problem.objective_at_zero > 1e4 * kept.excess
    assert dropped.relative_gap > 0.1


def test_float32_operators_train_with_every_option() -> None:
    problem = small_problem(CrossEntropy(), dense=True)
    perturbation = random_perturbation(problem, 0.2)
    single = problem.to(torch.float32)
    settings: dict[str, Any] = {"method": "gd", "learning_rate": 0.1, "steps": 50}
    exact = train_lora(problem, 2, perturbation=perturbation, freeze_a=True, weight_decay=False, **settings)
    rough = train_lora(
        single, 2, perturbation=random_perturbation(single, 0.2), freeze_a=True, weight_decay=False, **settings
    )
    assert rough.factors["second"][0].dtype == rough.solution.factors["second"][0].dtype == torch.float32
    assert rough.trajectory[-1].factored_objective == pytest.approx(exact.trajectory[-1].factored_objective, rel=1e-5)


def test_divergence_and_time_limits_say_so() -> None:
    problem = small_problem(LOSSES[2])
    lost = train_lora(problem, 2, method="gd", learning_rate=1e3, init="large", steps=200)
    assert lost.solution.status == "not-converged" and "lower the learning rate" in lost.solution.remedy
    timed = train_lora(problem, 2, method="gd", learning_rate=1e-3, steps=10**6, max_seconds=1e-9)
    assert timed.solution.evaluations == 1 and "max_seconds" in timed.solution.remedy
    assert timed.trajectory[-1].step == timed.solution.evaluations


def test_refusals() -> None:
    problem = small_problem(CrossEntropy())
    good: dict[str, Any] = {"method": "gd", "learning_rate": 0.1}
    for wrong in (
        {"method": "adamw"},
        {"schedule": "cosine"},
        {"batch_size": 3},
        {"method": "sgd"},
        {"method": "sgd", "batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"betas": (1.0, 0.9)},
        {"steps": 0},
        {"looks": 0},
        {"init": "zero"},
        {"freeze_a": True, "start": {"second": (torch.ones(3, 2), torch.zeros(7, 2))}},
        {"perturbation": random_perturbation(problem.with_penalty(0.01), 0.001)},
        {"perturbation": random_perturbation(small_problem(CrossEntropy(), n=5), 0.001)},
        {"optimum": solve(problem.with_penalty(0.01))},
        {"optimum": solve(small_problem(CrossEntropy(), seed=3))},
        {"optimum": solve(problem), "perturbation": random_perturbation(problem, 0.1)},
        {"optimum": solve(random_problem())},
    ):
        with pytest.raises(SettingError):
            train_lora(problem, 2, **{**good, **wrong})
    for ranks in (0, -1, {"nowhere": 2}):
        with pytest.raises(SettingError):
            train_lora(problem, ranks, **good)
