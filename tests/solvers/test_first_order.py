"""First-order LoRA training: the updates are the textbook's, the objective is the true L2 one, runs converge."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.solvers.small import LOSSES, small_problem

from ranksure.certificate import certify
from ranksure.errors import SettingError
from ranksure.losses import CrossEntropy, Loss
from ranksure.operators.base import Factors
from ranksure.problem import Problem
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.first_order import initial_factors, log_spaced, train_lora


def dense_objective(problem: Problem, factors: Factors, samples: torch.Tensor | None = None) -> torch.Tensor:
    """The factored objective from its definition, one sample gradient at a time, for autograd."""
    n, c = problem.operator.n_samples, problem.operator.n_outputs
    rows = []
    for index in range(n * c):
        unit = torch.zeros(n * c, dtype=torch.float64)
        unit[index] = 1
        grads = problem.operator.adjoint(unit.view(n, c))
        rows.append(sum((grads[name] * (u @ v.T)).sum() for name, (u, v) in factors.items()))
    z = problem.base_logits + torch.stack(rows).view(n, c) @ problem.contrasts.T
    losses = problem.loss.value(z, problem.labels) * problem.weights
    penalty = sum(problem.penalty[k] / 2 * (u.square().sum() + v.square().sum()) for k, (u, v) in factors.items())
    return losses.sum() + penalty


def run_torch(problem: Problem, start: Factors, optimiser: str, rate: float, steps: int) -> Factors:
    """The same training by torch's own optimiser on the definition."""
    x = {k: (u.clone().requires_grad_(), v.clone().requires_grad_()) for k, (u, v) in start.items()}
    parameters = [t for pair in x.values() for t in pair]
    kind = {"gd": torch.optim.SGD, "adam": torch.optim.Adam}[optimiser]
    steps_of: Any = kind(parameters, lr=rate)
    for _ in range(steps):
        steps_of.zero_grad()
        dense_objective(problem, x).backward()
        steps_of.step()
    return {k: (u.detach(), v.detach()) for k, (u, v) in x.items()}


@pytest.mark.parametrize("method", ["gd", "adam"])
def test_updates_are_those_of_torch(method: Any) -> None:
    problem = small_problem(CrossEntropy(), n=5)
    start = initial_factors(problem, 2, init="large")
    expected = run_torch(problem, start, method, 0.05, 6)
    run = train_lora(problem, 2, method=method, learning_rate=0.05, start=start, steps=6)
    for name, (u, v) in run.solution.factors.items():
        other = expected[name]
        torch.testing.assert_close(u @ v.T, other[0] @ other[1].T, atol=1e-10, rtol=0)
    last = run.trajectory[-1]
    assert last.factored_objective == pytest.approx(float(dense_objective(problem, expected)), abs=1e-12)


def test_inverse_sqrt_schedule() -> None:
    problem = small_problem(CrossEntropy(), n=5)
    start = initial_factors(problem, 2, init="large")
    run = train_lora(problem, 2, method="gd", learning_rate=0.1, schedule="inverse-sqrt", start=start, steps=3)
    x = start
    for t in (1, 2, 3):
        x = run_torch(problem, x, "gd", 0.1 / math.sqrt(t), 1)
    for name, (u, v) in run.solution.factors.items():
        torch.testing.assert_close(u @ v.T, x[name][0] @ x[name][1].T, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dense", [False, True], ids=["factored", "dense"])
def test_an_epoch_of_mini_batches_is_unbiased(dense: bool) -> None:
    """At a vanishing rate the mean move over an epoch is the full gradient (uneven batches, uneven weights)."""
    problem = small_problem(CrossEntropy(), dense=dense, weighted=True)
    start = initial_factors(problem, 2, init="large")
    rate = 1e-7
    _, gradient = problem.value_and_gradient(start)
    run = train_lora(problem, 2, method="sgd", learning_rate=rate, batch_size=4, start=start, steps=3)  # 4 + 4 + 1
    for name, (u, v) in run.solution.factors.items():
        before = start[name][0] @ start[name][1].T
        expected = -3 * rate * (gradient[name][0] @ start[name][1].T + start[name][0] @ gradient[name][1].T)
        torch.testing.assert_close(u @ v.T - before, expected, atol=1e-10, rtol=0)


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


def test_initialisations() -> None:
    problem = small_problem(CrossEntropy())
    for name, (u, v) in initial_factors(problem, 2).items():
        m, n = problem.operator.shapes[name]
        assert u.shape == (m, 2) and v.shape == (n, 2)
        assert not bool(u.any()) and 0 < float(v.abs().max()) <= 1 / math.sqrt(n)
    for u, v in initial_factors(problem, 2, init="peft-gaussian").values():
        assert not bool(u.any()) and bool(v.any())
    for init, share in (("small", 1e-4), ("large", 10.0)):
        factors = initial_factors(problem, 2, init=init)  # pyright: ignore[reportArgumentType]
        assert float(problem.penalty_of(factors)) == pytest.approx(share * problem.objective_at_zero)
    same, other = (initial_factors(problem, 2, seed=seed)["second"][1] for seed in (0, 1))
    assert torch.equal(same, initial_factors(problem, 2, seed=0)["second"][1]) and not torch.equal(same, other)
    assert initial_factors(problem, 99)["second"][0].shape == (3, 3)
    assert initial_factors(problem, {"second": 1})["first.query"][0].shape == (5, 0)


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
    own = certify(problem, runs[0].solution.factors).certificate
    assert own.objective == pytest.approx(runs[0].trajectory[-1].objective, abs=1e-10)
    assert runs[0].solution.status == "not-converged" and "raise steps" in runs[0].solution.remedy
    different = train_lora(problem, 2, method="sgd", learning_rate=0.1, batch_size=4, steps=100, looks=5, seed=4)
    assert different.trajectory[-1].objective != runs[0].trajectory[-1].objective


def test_divergence_and_time_limits_say_so() -> None:
    problem = small_problem(LOSSES[2])
    lost = train_lora(problem, 2, method="gd", learning_rate=1e3, init="large", steps=200)
    assert lost.solution.status == "not-converged" and "lower the learning rate" in lost.solution.remedy
    timed = train_lora(problem, 2, method="gd", learning_rate=1e-3, steps=10**6, max_seconds=0.02)
    assert 0 < timed.solution.evaluations < 10**6 and "max_seconds" in timed.solution.remedy
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
    ):
        with pytest.raises(SettingError):
            train_lora(problem, 2, **{**good, **wrong})
    for ranks in (0, -1, {"nowhere": 2}):
        with pytest.raises(SettingError):
            train_lora(problem, ranks, **good)
