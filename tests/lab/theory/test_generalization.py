"""The lab's generalisation entry: its population, its batched solver, its verdict, and a bound that is broken."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ranksure.lab.claim import Run
from ranksure.lab.run import THEORY, measure
from ranksure.lab.theory import generalization as lab
from ranksure.losses import CrossEntropy
from ranksure.operators.dense import DenseOperator
from ranksure.problem import Problem
from ranksure.solvers.burer_monteiro import solve
from ranksure.theory.generalization import rademacher_draws
from tests.helpers import generator_of, randn


@pytest.fixture(scope="module")
def population() -> lab.Population:
    return lab.Population.random(10, seed=4)


def as_problem(population: lab.Population, shares: torch.Tensor, lam: float) -> Problem:
    """One sample's rows, one for each (atom, label) that occurs, weighted by how often it does."""
    atom, label = torch.nonzero(shares, as_tuple=True)
    operator = DenseOperator({f"b{j}": population.features[atom, :, j] for j in range(lab.BLOCKS)})
    base = torch.zeros(len(atom), lab.OUTPUTS)
    return Problem(
        operator, base, label, CrossEntropy(), {f"b{j}": lam for j in range(lab.BLOCKS)}, shares[atom, label]
    )


def test_population(population):
    squares = population.features.square().sum((2, 3, 4))
    torch.testing.assert_close(squares, torch.full_like(squares, lab.NORM**2))
    assert float(torch.linalg.svdvals(population.delta).sum()) == pytest.approx(lab.STRENGTH)
    # The truth is the minimiser: its gradient vanishes, and every other point is worse by what excess() says.
    delta = population.delta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(population.risk(delta), delta)
    assert float(gradient.abs().max()) < 1e-14
    other = population.delta + 0.3 * randn(5, *population.delta.shape, generator=generator_of(0))
    excess = population.risk(other) - population.risk(population.delta)
    torch.testing.assert_close(population.excess(other), excess)
    assert float(excess.min()) > 0


def test_samples_have_the_population_law(population):
    shares = population.sample(4000, 500, np.random.default_rng(0))
    torch.testing.assert_close(shares.sum((1, 2)), torch.ones(500, dtype=torch.float64))
    truth = torch.softmax(population.logits(population.delta), -1) / len(population.features)
    error = torch.sqrt(truth * (1 - truth) / (4000 * 500))
    assert float(((shares.mean(0) - truth).abs() / error).max()) < 5
    # The empirical risk of the rows, by the library.
    delta = randn(*population.delta.shape, generator=generator_of(1))
    problem = as_problem(population, shares[0], 1.0)
    logits = problem.logits(problem.operator.apply({f"b{j}": delta[j] for j in range(lab.BLOCKS)}))
    expected = float(problem.data_loss(logits))
    assert float(population.empirical(delta[None], shares[:1])[0]) == pytest.approx(expected)


@pytest.mark.parametrize("n", [30, 3000])
def test_batched_solver_agrees_with_the_certified_one(population, n):
    shares = population.sample(n, 4, np.random.default_rng(1))
    lam = torch.tensor([0.001, 0.01, 0.05, 10.0], dtype=torch.float64)
    delta, gaps = lab.solve(population, shares, lam)
    assert float(gaps.max()) <= lab.TOLERANCE
    for index in range(4):
        problem = as_problem(population, shares[index], float(lam[index]))
        certificate = solve(problem, tolerance=1e-9).certificate
        nuclear = float(torch.linalg.svdvals(delta[index]).sum())
        objective = float(population.empirical(delta, shares)[index] + lam[index] * nuclear)
        assert certificate.dual - 1e-9 <= objective <= certificate.objective + lab.TOLERANCE
    assert not delta[3].any() and delta[0].any()


def test_rademacher_averages_agree_with_the_operator(population):
    n = 12
    shares = population.sample(n, 1, np.random.default_rng(2))
    counts = (shares[0].sum(1) * n).round().long()
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    operator = DenseOperator({f"b{j}": population.features[rows, :, j] for j in range(lab.BLOCKS)})
    draws = rademacher_draws(operator, 2000, seed=1)
    found = population.rademacher(shares, n, np.random.default_rng(3))
    error = float(draws.std()) * math.sqrt(1 / 2000 + 1 / lab.SIGN_DRAWS)
    assert abs(float(found[0]) - float(draws.mean())) < 4 * error


def test_small_run():
    finding, record = measure(THEORY, "generalization", Run(small=True, seed=1))
    assert record.verdict == "reproduced"
    numbers = finding.numbers
    assert numbers["nuclear_norm_of_truth"] == pytest.approx(lab.STRENGTH)
    assert min(numbers["holds_worst"].values()) >= 1 - lab.ETA
    assert numbers["slopes"]["validated"] < -0.8
    for row in numbers["sizes"]:
        assert row["largest_gap"] <= lab.TOLERANCE
        assert row["theorem"]["lambda"] == pytest.approx(2 * row["theorem"]["kappa"])
        expected = 2 * math.sqrt(2) * (2 + math.sqrt(math.log(20))) / math.sqrt(row["n"])
        assert row["theorem"]["kappa"] == pytest.approx(expected)
        assert row["validated"]["excess_median"] < row["theorem"]["excess_median"]
    first, last = numbers["sizes"][0], numbers["sizes"][-1]
    assert first["theorem"]["zero_solutions"] == 1  # the honest part: with few rows nothing is learned
    assert first["theorem"]["excess_median"] == pytest.approx(numbers["excess_of_no_adapter"])
    assert last["theorem"]["zero_solutions"] == 0
    assert len(finding.figure.axes) == 2


def test_a_broken_bound_is_refuted(monkeypatch):
    """A slope ten thousand times too small: the excess risk is above the bound, and the verdict says so."""
    monkeypatch.setattr(lab, "theorem_guarantee", _shrunk(lab.theorem_guarantee))
    finding = lab.measure(Run(small=True, seed=1))
    assert [check.holds for check in finding.checks][:2] == [False, True]
    assert finding.numbers["holds_worst"]["theorem"] < 0.5
    assert finding.verdict(THEORY.verdicts) == "partly"


def test_an_excess_risk_that_does_not_fall_is_refuted(monkeypatch):
    monkeypatch.setattr(lab.Population, "excess", lambda self, delta: 0.1 + 0 * self.risk(delta))
    assert not lab.measure(Run(small=True, seed=1)).checks[2].holds


def _shrunk(make):
    def broken(*args):
        given = make(*args)
        return replace(given, slope=given.slope / 1e4)

    return broken
