"""Batched L-BFGS: right optimum, right quasi-Newton matrix, honest flags."""

import math

import pytest
import torch
from scipy.optimize import rosen, rosen_der

from ranksure.factors import FactorLayout
from ranksure.solvers.lbfgs import _Memory, minimize, objective_on
from tests.helpers import (
    LOSS_NAMES,
    factored_objective,
    flatten,
    generator_of,
    randn,
    random_factors,
    random_problem,
)


def quadratic(size, condition, seed=0):
    g = generator_of(seed)
    q = torch.linalg.qr(randn(size, size, generator=g)).Q
    values = torch.logspace(0, math.log10(condition), size, dtype=torch.float64)
    h, b = (q * values) @ q.T, randn(size, generator=g)

    def function(x):
        return 0.5 * ((x @ h) * x).sum(1) - x @ b, x @ h - b

    return function, torch.linalg.solve(h, b)


def rosenbrock(x):
    rows = x.numpy()
    value = torch.tensor([rosen(row) for row in rows], dtype=torch.float64)
    return value, torch.stack([torch.from_numpy(rosen_der(row)) for row in rows])


@pytest.mark.parametrize("history", [1, 5, 20])
@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_quadratic(history, condition):
    function, best = quadratic(12, condition)
    starts = 3 * randn(4, 12, generator=generator_of(1))
    keep = starts.clone()
    # Rounding of the values, about eps times the condition, limits how small a gradient can be found.
    result = minimize(function, starts, tolerance=1e-8 * condition, history=history, max_evaluations=5000)
    assert bool(result.converged.all())
    assert torch.equal(starts, keep)
    for row in result.x:
        torch.testing.assert_close(row, best, rtol=0, atol=1.1e-8 * condition)
    value, gradient = function(result.x)
    torch.testing.assert_close(result.value, value)
    torch.testing.assert_close(result.gradient_norm, gradient.norm(dim=1))


def test_long_memory_ends_a_quadratic_fast():
    """With a memory of the dimension's size, quasi-Newton needs about one step per dimension."""
    function, _ = quadratic(10, 1e3)
    assert minimize(function, torch.zeros(1, 10).double(), tolerance=1e-9, history=20).evaluations < 60


def test_rosenbrock_from_many_starts():
    starts = torch.cat([randn(5, 4, generator=generator_of(2)), torch.tensor([[-1.2, 1.0, -1.2, 1.0]]).double()])
    result = minimize(rosenbrock, starts, tolerance=1e-9)
    assert bool(result.converged.all())
    for value in result.value.tolist():  # the second is the known local minimum of four dimensions
        assert value == pytest.approx(0, abs=1e-12) or value == pytest.approx(3.70142, abs=1e-4)


def test_a_batch_is_not_worse_than_its_rows_alone():
    function, _ = quadratic(8, 100.0)
    starts = 2 * randn(3, 8, generator=generator_of(3))
    together = minimize(function, starts, tolerance=1e-9)
    alone = [minimize(function, row[None], tolerance=1e-9) for row in starts]
    assert together.evaluations <= 4 * max(one.evaluations for one in alone)
    for row, one in zip(together.value, alone, strict=True):
        assert float(row) == pytest.approx(float(one.value), abs=1e-12)


@pytest.mark.parametrize("stored", [0, 1, 3, 7])
def test_memory_is_the_bfgs_matrix(stored):
    """The compact form against the textbook update of the inverse Hessian, ring buffer wrapped or not."""
    g = generator_of(stored)
    size, history = 6, 4
    h = randn(size, size, generator=g)
    h = h @ h.T + torch.eye(size).double()
    memory = _Memory(2, size, history, torch.zeros(1, dtype=torch.float64))
    pairs = []
    for _ in range(stored):
        s = randn(2, size, generator=g)
        memory.store(s, s @ h)
        pairs.append((s, s @ h))
    gradient = randn(2, size, generator=g)
    for row in range(2):
        inverse = torch.eye(size, dtype=torch.float64)
        kept = pairs[-history:]
        if kept:
            s, y = kept[-1][0][row], kept[-1][1][row]
            inverse *= (s @ y) / (y @ y)
        for s, y in kept:
            s, y = s[row], y[row]
            rho = 1 / (s @ y)
            left = torch.eye(size, dtype=torch.float64) - rho * torch.outer(s, y)
            inverse = left @ inverse @ left.T + rho * torch.outer(s, s)
        torch.testing.assert_close(memory.direction(gradient)[row], -inverse @ gradient[row])


def test_memory_skips_pairs_without_curvature_and_forgets_rows():
    g = generator_of(0)
    memory = _Memory(2, 3, 4, torch.zeros(1, dtype=torch.float64))
    s, y = randn(2, 3, generator=g), randn(2, 3, generator=g)
    y[0] = -s[0]  # negative curvature: the row must keep steepest descent
    y[1] = s[1] * 2
    memory.store(s, y)
    gradient = randn(2, 3, generator=g)
    torch.testing.assert_close(memory.direction(gradient)[0], -gradient[0])
    torch.testing.assert_close(memory.direction(gradient)[1], -gradient[1] / 2)
    memory.forget(torch.tensor([False, True]))
    torch.testing.assert_close(memory.direction(gradient)[1], -gradient[1])


def test_limits_and_flags():
    function, _ = quadratic(10, 1e6)
    start = torch.ones(1, 10).double()
    short = minimize(function, start, tolerance=1e-12, max_evaluations=5)
    assert not bool(short.converged)
    assert short.evaluations <= 5 + 30  # a line search in progress is finished
    floor = float(minimize(function, start, tolerance=1e-10).value)
    early = minimize(function, start, tolerance=0.0, stop_below=floor + 1.0)
    assert floor <= float(early.value) <= floor + 1.0
    rounding = minimize(function, start, tolerance=0.0, max_evaluations=100_000)
    assert not bool(rounding.converged)  # stalled, and not called converged
    assert rounding.evaluations < 100_000
    done = minimize(function, start, tolerance=1e12)
    assert done.evaluations == 1
    assert bool(done.converged)


def test_values_never_rise():
    seen = []

    def recorded(x):
        value, gradient = rosenbrock(x)
        seen.append(float(value[0]))
        return value, gradient

    start = torch.tensor([[-1.2, 1.0, 0.5]]).double()
    last = math.inf
    for budget in (1, 10, 20, 40, 80):
        result = minimize(recorded, start, tolerance=1e-10, max_evaluations=budget)
        assert float(result.value) <= last
        assert float(result.value) <= min(seen) + 1e-12 or float(result.value) <= last
        last = float(result.value)


def test_infinite_regions_are_left_alone():
    """A step into a region where the function is not finite is shortened, not taken."""

    def barrier(x):
        inside = (x < 1).all(1)
        value = torch.where(inside, (x - torch.log((1 - x).clamp(min=1e-300)) * 0.1).sum(1), torch.nan)
        return value, 1 + 0.1 / (1 - x)

    def function(x):
        value, gradient = barrier(-x)
        return value, -gradient

    result = minimize(function, torch.tensor([[5.0]]).double(), tolerance=1e-8, max_evaluations=50)
    assert bool(torch.isfinite(result.value).all())
    dead = minimize(function, torch.tensor([[-3.0], [2.0]]).double(), tolerance=1e-8, max_evaluations=50)
    assert not bool(dead.converged[0])


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_layout_round_trip_and_objective(loss):
    problem = random_problem(1, loss)
    ranks = {"a.query": 2, "a.value": 0}
    layout = FactorLayout(dict(problem.operator.shapes), ranks)
    factors = random_factors({"a.query": (3, 4)}, 2)
    assert layout.size == 2 * 7
    flat = layout.flatten(factors)
    assert flat.shape == (1, 14)
    torch.testing.assert_close(flat[0], flatten(factors))
    for got, expected in zip(layout.unflatten(flat)["a.query"], factors["a.query"], strict=True):
        torch.testing.assert_close(got, expected)
    value, gradient = objective_on(problem, layout)(torch.cat([flat, 2 * flat]))
    for row, scale in enumerate((1.0, 2.0)):
        x = (scale * flat[0]).requires_grad_()
        expected = factored_objective(problem, factors, x)
        assert float(value[row]) == pytest.approx(float(expected.detach()), rel=1e-12)
        torch.testing.assert_close(gradient[row], torch.autograd.grad(expected, x)[0])


def test_when_there_is_no_time_left_the_last_accepted_point_comes_back():
    start, asked = torch.tensor([[-1.2, 1.0]]).double(), []

    def stop() -> bool:
        asked.append(True)
        return len(asked) >= 9

    found = minimize(rosenbrock, start, tolerance=1e-12, stop=stop)
    assert found.evaluations <= 9 and not found.converged.any()
    assert float(found.value) <= float(rosenbrock(start)[0]) and float(found.value) == float(rosenbrock(found.x)[0])
    assert minimize(rosenbrock, start, tolerance=1e-12, stop=lambda: True).evaluations == 1
