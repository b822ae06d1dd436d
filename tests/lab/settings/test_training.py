"""The training loop against closed forms, and against the certified optimum."""

from __future__ import annotations

import math

import pytest
import torch

from ranksure.errors import SettingError
from ranksure.lab.settings.training import Rule, train
from ranksure.losses import get_loss
from ranksure.operators.dense import DenseOperator
from ranksure.problem import Problem
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.initial import initial_factors


def quadratic(target: torch.Tensor):
    """``||u v^T - target||^2 / 2``, whose minimum over factors of full rank is 0."""

    def objective(x):
        u, v = x["w"]
        error = u @ v.T - target
        return float(error.square().sum() / 2), {"w": (error @ v, error.T @ u)}

    return objective


def start(rank: int = 3):
    generator = torch.Generator().manual_seed(0)
    return {"w": tuple(torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (4, 3))}


@pytest.mark.parametrize("rule", [Rule("adam", 0.05, 3000, window=3000), Rule("gd", 0.02, 3000, window=3000)])
def test_it_finds_a_known_minimum(rule):
    target = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    done = train(quadratic(target), start(), rule, target=1e-9)
    assert done.ended == "target" and done.value <= 1e-9
    u, v = done.factors["w"]
    assert torch.allclose(u @ v.T, target, atol=1e-4)


def test_a_rank_that_is_too_low_ends_flat_at_the_best_of_its_rank():
    target = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    done = train(quadratic(target), {"w": tuple(t[:3] for t in start(1)["w"])}, Rule("adam", 0.02, 5000, window=100))
    assert done.ended == "flat" and done.steps < 5000
    assert done.value == pytest.approx((2**2 + 1**2) / 2, abs=1e-4)  # Eckart and Young


def test_the_first_steps_are_torch_s_own():
    target = torch.ones(4, 3, dtype=torch.float64)
    x = [t.clone().requires_grad_() for t in start()["w"]]
    optimizer = torch.optim.Adam(x, lr=0.01)
    values = []
    for _ in range(4):
        value = (x[0] @ x[1].T - target).square().sum() / 2
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    done = train(quadratic(target), start(), Rule("adam", 0.01, 3))
    assert [step for step, _ in done.curve] == [0, 1, 2, 3]
    assert [value for _, value in done.curve] == pytest.approx(values, rel=1e-12)


def test_the_start_is_left_as_it_was():
    begun = start()
    before = [t.clone() for t in begun["w"]]
    train(quadratic(torch.ones(4, 3, dtype=torch.float64)), begun, Rule(steps=5))
    assert all(torch.equal(x, y) for x, y in zip(begun["w"], before, strict=True))


def test_the_lowest_point_is_returned_not_the_last():
    seen = iter([3.0, 1.0, 2.0, 2.5])
    visited = []

    def objective(x):
        visited.append(x["w"][0].clone())
        return next(seen), {"w": tuple(torch.ones_like(t) for t in x["w"])}

    done = train(objective, start(), Rule("gd", 0.1, 3, window=3))
    assert done.value == 1.0 and torch.equal(done.factors["w"][0], visited[1])


def test_divergence_is_one_line():
    with pytest.raises(SettingError, match=r"diverged at step .*learning rate 100"):
        train(lambda x: (math.nan, x), start(), Rule(learning_rate=100))


@pytest.mark.parametrize(
    "bad", [{"method": "sgdm"}, {"learning_rate": 0}, {"steps": 0}, {"window": 0}, {"patience": -1}]
)
def test_bad_rules(bad):
    with pytest.raises(SettingError):
        Rule(**bad)


def test_lora_of_sufficient_rank_ends_at_the_certified_optimum():
    generator = torch.Generator().manual_seed(0)
    operator = DenseOperator({"w": torch.randn(10, 1, 6, 5, generator=generator, dtype=torch.float64)})
    labels = torch.randint(0, 2, (10,), generator=generator)
    problem = Problem(operator, torch.zeros(10, 2), labels, get_loss("cross-entropy"), {"w": 0.05})
    optimum = solve(problem, tolerance=1e-10).certificate
    for rule in (Rule("adam", 0.01, 5000, window=5000), Rule("gd", 0.1, 5000, window=5000)):

        def objective(x):
            value, gradient = problem.value_and_gradient(x)
            return float(value), gradient

        gain = optimum.objective_at_zero - optimum.objective
        done = train(objective, initial_factors(problem, 5), rule, target=optimum.objective + 9e-5 * gain)
        assert -1e-9 <= (done.value - optimum.objective) / gain <= 1e-4
