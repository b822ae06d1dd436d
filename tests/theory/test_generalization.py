"""Theorem 5.1: its constants, its ingredients by exact enumeration, and the whole bound in closed form."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

from ranksure.errors import SettingError
from ranksure.losses import CrossEntropy, Logistic
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator
from ranksure.problem import Problem
from ranksure.solvers.burer_monteiro import solve
from ranksure.theory.generalization import (
    FORMS,
    NOT_LIPSCHITZ,
    ROWS_NORM,
    contraction,
    data_dependent_guarantee,
    generalization_bound,
    rademacher_draws,
    rademacher_upper,
    sharper_guarantee,
    theorem_guarantee,
)
from tests.helpers import densified, generator_of, jacobians_of, randn, random_problem, token_group
from tests.refusals import refusal


def every_average(problem: Problem) -> np.ndarray:
    """``max_j ||(1/N) sum_ic sigma_ic G_ijc||_op / w_j`` for every sign vector, from dense Jacobians."""
    blocks = {name: g.flatten(0, 1).numpy() for name, g in jacobians_of(problem).items()}
    largest = max(problem.penalty.values())
    values = []
    for signs in itertools.product((-1, 1), repeat=len(next(iter(blocks.values())))):
        norms = [np.linalg.norm(np.tensordot(signs, g, 1), 2) * largest / problem.penalty[n] for n, g in blocks.items()]
        values.append(max(norms) / problem.operator.n_samples)
    return np.array(values)


# ---------------------------------------------------------------------------------------------------------------------
# R, S and the Rademacher average, against dense Jacobians and all sign vectors


@pytest.mark.parametrize(("loss", "k", "uneven"), [("logistic", 2, True), ("cross-entropy", 3, True)])
def test_norms_and_rademacher_average(loss, k, uneven):
    problem = random_problem(seed=3, loss=loss, n=4, k=k, uneven=uneven)
    bound = generalization_bound(problem, draws=600, seed=5)
    squares = np.zeros((4, bound.n_contrasts))
    for name, g in jacobians_of(problem).items():
        share = problem.penalty[name] / max(problem.penalty.values())
        assert bound.block_weights[name] == pytest.approx(share)
        squares += (g.numpy() ** 2).sum((2, 3)) / share**2
    assert bound.norm == pytest.approx(math.sqrt(squares.max()), rel=1e-12)
    assert bound.total_norm == pytest.approx(math.sqrt(squares.sum(1).max()), rel=1e-12)
    assert bound.n_outputs == k and bound.n_contrasts == problem.loss.effective_outputs(k)
    exact = every_average(problem)
    error = exact.std() / math.sqrt(600)
    assert abs(bound.rademacher - exact.mean()) < 4 * error
    assert bound.rademacher_error == pytest.approx(error, rel=0.15)
    assert bound.rademacher + 2 * bound.rademacher_error < bound.rademacher_upper
    assert exact.mean() <= bound.total_norm / math.sqrt(4)


def test_factored_and_dense_operators_draw_the_same():
    operator = FactoredOperator([token_group([2, 1, 3], 5, {"q": 3, "v": 2}, 2, 0)], 3)
    draws = rademacher_draws(operator, 7, seed=2)
    torch.testing.assert_close(draws, rademacher_draws(densified(operator), 7, seed=2), rtol=1e-10, atol=0)
    problem = Problem(operator, torch.zeros(3, 3), torch.tensor([0, 1, 2]), CrossEntropy(), {"q": 0.1, "v": 0.1})
    assert generalization_bound(problem, draws=7, seed=2).rademacher == pytest.approx(float(draws.mean()), rel=1e-10)


def test_the_largest_block_is_found():
    """Blocks of uneven sizes: where one is skipped it must not be the largest."""
    shapes = {f"b{j}": (2 + j % 3, 5 - j % 4) for j in range(9)}
    g = generator_of(7)
    jacobians = {
        name: (0.5 + j % 4) * randn(4, 2, *shape, generator=g) for j, (name, shape) in enumerate(shapes.items())
    }
    draws = rademacher_draws(DenseOperator(jacobians), 40, seed=3)
    signs = generator_of(3)
    for value in draws:
        s = 2 * torch.randint(2, (4, 2), generator=signs).double() - 1
        sums = [torch.einsum("ic,icmn->mn", s, jacobian) for jacobian in jacobians.values()]
        assert float(value) == pytest.approx(max(np.linalg.norm(x.numpy(), 2) for x in sums) / 4)


def test_total_norm_is_reached_by_one_row_of_rank_one():
    """``Rad <= S / sqrt(N)`` with equality: no smaller constant would do."""
    g = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0, 3.0])).double()
    draws = rademacher_draws(DenseOperator({"w": g[None, None]}), 5)
    assert draws.numpy() == pytest.approx(float(g.norm()))


# ---------------------------------------------------------------------------------------------------------------------
# the constants, put together from the steps of the proof


def test_constants_of_the_theorem():
    g, r, n, k, eta = 1.3, 0.7, 50, 3, 0.02
    symmetrised = 2 * math.sqrt(2) * g * r * math.sqrt(k) / math.sqrt(n)  # symmetrisation, Maurer, Frobenius
    change = 2 * g * r * math.sqrt(k) / n  # of the supremum when one row changes
    deviation = change * math.sqrt(n * math.log(1 / eta) / 2)  # McDiarmid
    theorem = theorem_guarantee(g, r, n, k, eta)
    assert theorem.kappa == pytest.approx(symmetrised + deviation)
    assert theorem.prescribed == pytest.approx(2 * theorem.kappa)
    assert theorem.excess_risk(5.0) == pytest.approx(30 * theorem.kappa)
    sharper = sharper_guarantee(g, math.sqrt(k) * r, n, k, eta)
    assert sharper.kappa == pytest.approx(theorem.kappa)
    assert sharper.slope == pytest.approx(4 * theorem.kappa + 2 * deviation)
    assert sharper.slope < theorem.slope
    one = sharper_guarantee(g, r, n, 1, eta)
    assert one.kappa == pytest.approx((2 + math.sqrt(2 * math.log(1 / eta))) * g * r / math.sqrt(n))
    assert contraction(1) == 1 and contraction(2) == math.sqrt(2)


def test_monte_carlo_limit_is_capped_and_tightens():
    s, n, eta = 2.0, 10**6, 0.05
    limits = [rademacher_upper(0.0004, s, draws, n, eta) for draws in (32, 128, 1024)]
    assert 0.0004 < limits[2] < limits[1] < limits[0] < s / math.sqrt(n)
    assert rademacher_upper(s / math.sqrt(n), s, 32, n, eta) == s / math.sqrt(n)
    # With few rows the cap binds, and what is lost against the worst case is log(2 / eta) for log(1 / eta).
    few = data_dependent_guarantee(1.0, s, 0.1, 64, 16, 2, eta)
    assert few.kappa == pytest.approx(2 * math.sqrt(2) * s / 4 + s / 4 * math.sqrt(2 * math.log(2 / eta)))
    # With many rows and gradients in many directions it beats the worst case.
    many = data_dependent_guarantee(1.0, s, 0.05 * s / 1000, 1024, 10**6, 2, eta)
    assert many.kappa < 0.8 * sharper_guarantee(1.0, s, 10**6, 2, eta).kappa


@pytest.mark.parametrize("form", FORMS)
def test_monotonicities(form):
    problem = random_problem(seed=1, loss="logistic", n=6, k=1)

    def kappa(**settings: Any) -> float:
        return getattr(generalization_bound(problem, norm=20.0, draws=4, **settings), form).kappa

    assert kappa(eta=0.2) < kappa(eta=0.05) < kappa(eta=0.001)
    looser = generalization_bound(problem, norm=40.0, draws=4)
    assert getattr(looser, form).kappa > kappa()
    guarantee = getattr(looser, form)
    assert looser.excess_risk(2.0, form) == pytest.approx(2 * looser.excess_risk(1.0, form))
    assert guarantee.excess_risk(1.0, gap=0.1) >= guarantee.excess_risk(1.0) + 0.2
    for make in (lambda n: theorem_guarantee(1, 1, n, 2, 0.05), lambda n: sharper_guarantee(1, 1, n, 2, 0.05)):
        assert make(400).slope == pytest.approx(make(100).slope / 2)


# ---------------------------------------------------------------------------------------------------------------------
# every probabilistic step, by enumeration of all samples of a tiny population


POPULATIONS = [(seed, n) for seed in range(3) for n in (2, 4)]


class Tiny:
    """Three equally likely rows, two blocks of one entry each: the nuclear norm is the l1 norm of the plane."""

    def __init__(self, seed: int, spread: float = 1.0) -> None:
        g = generator_of(seed)
        self.features = randn(3, 2, generator=g).numpy()
        self.labels = np.sign(randn(3, generator=g).numpy())
        self.s = float(np.linalg.norm(self.features, axis=1).max())
        side = np.linspace(-1, 1, 41)
        plane = np.array([(a, b) for a in side for b in side])
        self.ball = plane[np.abs(plane).sum(1) <= 1 + 1e-12]

    def losses(self, delta: np.ndarray) -> np.ndarray:
        """Logistic loss (G = 1) of each row: ``(points, 3)``."""
        return np.logaddexp(0, -self.labels * (delta @ self.features.T))

    def deviations(self, samples: np.ndarray, radius: float, centre: np.ndarray) -> np.ndarray:
        """``sup over the ball of (L - L_N)(delta) - (L - L_N)(centre)`` of each sample."""
        each = self.losses(centre + radius * self.ball) - self.losses(centre[None])
        return np.array([(each.mean(1) - each[:, sample].mean(1)).max() for sample in samples])

    def rademacher(self, samples: np.ndarray) -> np.ndarray:
        """``E_sigma max_j |(1/N) sum_i sigma_i G_ij|`` of each sample, over all signs."""
        n = samples.shape[1]
        signs = np.array(list(itertools.product((-1, 1), repeat=n)))
        sums = np.einsum("si,bij->bsj", signs, self.features[samples])
        return np.abs(sums).max(2).mean(1) / n


@pytest.mark.parametrize(("seed", "n"), POPULATIONS)
def test_symmetrisation_and_contraction(seed, n):
    tiny = Tiny(seed)
    samples = np.array(list(itertools.product(range(3), repeat=n)))
    rademacher = tiny.rademacher(samples).mean()
    for centre in (np.zeros(2), np.array([2.0, -1.0])):
        expected = tiny.deviations(samples, 3.0, centre).mean()
        assert 0 < expected <= 2 * 3.0 * rademacher
    assert rademacher <= tiny.s / math.sqrt(n)


@pytest.mark.parametrize(("seed", "n"), POPULATIONS)
def test_concentration_of_the_supremum(seed, n):
    """McDiarmid with differences ``2 G S radius / N``, at every value that the supremum takes."""
    tiny = Tiny(seed)
    samples = np.array(list(itertools.product(range(3), repeat=n)))
    values = tiny.deviations(samples, 3.0, np.zeros(2))
    over = values - values.mean()
    for t in over[over > 1e-9]:
        assert (over >= t - 1e-12).mean() <= math.exp(-(t**2) * n / (2 * (tiny.s * 3.0) ** 2))


@pytest.mark.parametrize("n", [4, 6])
def test_no_step_has_much_to_spare(n):
    """Where the loss is steep everywhere, half the symmetrised mean and less than twice the deviation are reached.

    So a constant that were too small by more than that would be found out by the two tests above.
    """
    tiny = Tiny(0)
    tiny.features = np.array([[1e-3, 1.0], [1e-3, -1.0], [1e-3, 1.0]])
    tiny.labels = np.ones(3)
    tiny.s = float(np.linalg.norm(tiny.features, axis=1).max())
    samples = np.array(list(itertools.product(range(3), repeat=n)))
    values = tiny.deviations(samples, 3.0, np.array([-6e4, 0.0]))
    assert 0.4 < values.mean() / (2 * 3.0 * tiny.rademacher(samples).mean()) <= 1
    over = values - values.mean()
    exponents = [
        -math.log((over >= t - 1e-9).mean()) / (t**2 * n / (2 * (tiny.s * 3.0) ** 2)) for t in over[over > 1e-9]
    ]
    assert 1 <= min(exponents) < 2.6


@pytest.mark.parametrize(("seed", "n"), [*POPULATIONS, (0, 6)])
def test_the_rademacher_average_is_self_bounding(seed, n):
    tiny = Tiny(seed)
    if n == 6:  # one row of three counts: the average moves as much as it can
        tiny.features = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        tiny.s = 1.0
    samples = np.array(list(itertools.product(range(3), repeat=n)))
    z = n * tiny.rademacher(samples) / tiny.s
    below = z.mean() - z
    for t in below[below > 1e-9]:
        assert (below >= t - 1e-12).mean() <= math.exp(-(t**2) / (2 * z.mean()))


def test_the_upper_limit_fails_as_rarely_as_promised():
    """All samples and all signs at once: the limit from one and two draws fails on at most eta / 2, and does fail."""
    n, worst = 4, 0.0
    features = np.array([1.0, 0.0])  # a row that counts with probability 0.1
    chances = np.array([0.9, 0.1])
    samples = list(itertools.product((0, 1), repeat=n))
    signs = np.array(list(itertools.product((-1, 1), repeat=n)))
    law = []  # (probability, average of m draws) for a sample and m sign vectors
    expected = 0.0
    for sample in samples:
        mass = chances[list(sample)].prod()
        values = np.abs(signs @ features[list(sample)]) / n
        expected += mass * values.mean()
        law.append((mass, values))
    for eta in (0.9, 0.5, 0.1):
        for draws in (1, 2):
            fails = 0.0
            for mass, values in law:
                for chosen in itertools.product(values, repeat=draws):
                    limit = rademacher_upper(float(np.mean(chosen)), 1.0, draws, n, eta)
                    fails += mass / len(values) ** draws * (expected > limit)
            assert fails <= eta / 2
            worst = max(worst, fails)
    # Without the allowance for rows and signs the limit would fail often.
    bare = sum(mass * (values < expected).mean() for mass, values in law)
    assert bare > 0.45


@pytest.mark.parametrize("seed", range(6))
def test_six_times_kappa_given_the_event(seed):
    """The deterministic half: where ``sup <= kappa radius`` on the ball of ``4 ||delta_true||``, 6 kappa follows.

    kappa is the smallest number for which the event holds on this very sample, so nothing is to spare there.
    """
    rng = np.random.default_rng(seed)
    tiny = Tiny(seed)
    truth = rng.normal(size=2)
    truth[rng.integers(2)] = 0.0
    size = np.abs(truth).sum()
    chance = 1 / (1 + np.exp(-tiny.features @ truth))  # of a positive label: truth is the population minimiser

    def risk(delta: np.ndarray, positive: np.ndarray, rows: np.ndarray) -> np.ndarray:
        z = delta @ tiny.features.T
        return (rows * (np.logaddexp(0, z) - positive * z)).sum(-1)

    n = 40
    rows = rng.multinomial(n, [1 / 3] * 3)
    positive = rng.binomial(rows, chance) / np.maximum(rows, 1)

    def deviation(points: np.ndarray) -> np.ndarray:
        return risk(points, chance, np.full(3, 1 / 3)) - risk(points, positive, rows / n)

    radius = 4 * size
    kappa = float((deviation(truth + radius * tiny.ball).max() - deviation(truth)) / radius)
    assert kappa > 0
    kept = np.flatnonzero(rows)
    features = torch.from_numpy(tiny.features[kept])
    doubled = torch.cat([features, features])
    mass = torch.from_numpy(np.concatenate([rows[kept] * positive[kept], rows[kept] * (1 - positive[kept])]) / n)
    labels = torch.cat([torch.ones(len(kept)), torch.zeros(len(kept))])[:, None].double()
    some = mass > 0
    problem = Problem(
        DenseOperator({"a": doubled[some, 0][:, None, None, None], "b": doubled[some, 1][:, None, None, None]}),
        torch.zeros(int(some.sum()), 1),
        labels[some],
        Logistic(),
        {"a": 2 * kappa, "b": 2 * kappa},
        mass[some],
    )
    factors = solve(problem, tolerance=1e-9).factors
    delta = np.array([float((u @ v.T).sum()) for u, v in (factors["a"], factors["b"])])
    uniform = np.full(3, 1 / 3)
    excess = float(risk(delta, chance, uniform) - risk(truth, chance, uniform))
    assert -1e-12 <= excess <= 6 * kappa * size
    assert np.abs(delta - truth).sum() <= radius


# ---------------------------------------------------------------------------------------------------------------------
# the whole theorem, exactly: one weight, one feature R, labels of chance p


def failure(n: int, p: float, kappa: float, slope: float, r: float = 1.0) -> float:
    """Exact probability that the excess risk exceeds ``slope |delta_true|`` at ``lambda = 2 kappa``.

    ``L_N(d) = softplus(R d) - p_N R d`` with ``N p_N`` binomial: stationarity soft-thresholds the mean label.
    """
    counts = np.arange(n + 1)
    seen, shift = counts / n, 2 * kappa / r
    level = np.where(seen > 0.5, np.maximum(seen - shift, 0.5), np.minimum(seen + shift, 0.5))
    with np.errstate(divide="ignore"):
        z = np.log(level) - np.log1p(-level)  # R delta, infinite where no penalty holds it
    finite = np.where(np.isfinite(z), z, 0.0)
    truth = math.log(p / (1 - p))
    risk = np.where(np.isfinite(z), np.logaddexp(0, finite) - p * finite, math.inf)
    excess = risk - (math.log1p(math.exp(truth)) - p * truth)
    return float(binom.pmf(counts, n, p)[excess > slope * abs(truth) / r].sum())


@pytest.mark.parametrize("p", [0.55, 0.9, 0.999])
@pytest.mark.parametrize("n", [4, 100, 10_000, 200_000])
@pytest.mark.parametrize("eta", [0.05, 0.5])
def test_exact_probability_of_failure(n, p, eta):
    theorem, sharper = theorem_guarantee(1, 1, n, 1, eta), sharper_guarantee(1, 1, n, 1, eta)
    assert failure(n, p, theorem.kappa, theorem.slope) <= eta
    assert failure(n, p, sharper.kappa, sharper.slope) <= eta


def test_the_exact_probability_can_refute():
    """With kappa a thousand times smaller, or a tenth of the slope, the bound fails: the solutions are not all zero."""
    guarantee = theorem_guarantee(1, 1, 200_000, 1, 0.05)
    assert 2 * guarantee.kappa < 0.4  # less than |p - 1/2| R at p = 0.9: the solution moves
    small = theorem_guarantee(1, 1, 100, 1, 0.05).kappa / 1000
    assert failure(100, 0.9, small, 6 * small) > 0.1
    assert failure(200_000, 0.9, guarantee.kappa, 0.1 * guarantee.kappa) > 0.5


# ---------------------------------------------------------------------------------------------------------------------
# heuristic or not, and mistakes


def test_reasons():
    problem = random_problem(seed=2, n=5)
    bound = generalization_bound(problem, draws=2)
    assert bound.is_heuristic and bound.heuristic == (ROWS_NORM,) and bound.norm_from == "rows"
    known = generalization_bound(problem, draws=2, norm=bound.norm * 1.5)
    assert not known.is_heuristic and known.norm_from == "given"
    assert known.total_norm == pytest.approx(1.5 * bound.norm * math.sqrt(known.n_contrasts))
    both = generalization_bound(problem, draws=2, norm=bound.norm, total_norm=bound.total_norm)
    assert both.theorem == bound.theorem and both.data_dependent == bound.data_dependent
    again = generalization_bound(problem, draws=2, norm=bound.norm * 1.5, reasons=["the head saw these rows"])
    assert again.heuristic == ("the head saw these rows",)


def test_squared_error_is_a_heuristic():
    problem = random_problem(seed=2, loss="squared-error", n=5, k=2)
    bound = generalization_bound(problem, draws=2, norm=100.0)
    assert bound.heuristic == (NOT_LIPSCHITZ,)
    slopes = (problem.base_logits - problem.labels).norm(dim=1)  # times 2 / K = 1
    assert bound.lipschitz == pytest.approx(float(slopes.max()))


def test_json_holds_every_form():
    bound = generalization_bound(random_problem(seed=2, n=5), draws=3)
    data = bound.to_json()
    for form in FORMS:
        assert data[form]["prescribed"] == pytest.approx(2 * data[form]["kappa"])
    assert data["heuristic"] == [ROWS_NORM]


def test_mistakes():
    problem = random_problem(seed=2, n=5)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"eta": 0.0}, "eta must lie"),
        ({"eta": 1.0}, "eta must lie"),
        ({"draws": 1}, "at least 2 draws"),
        ({"norm": 1e-3}, "above the bound given"),
        ({"norm": math.inf}, "above the bound given"),
        ({"total_norm": 1e-3}, "above the bound given"),
    )
    for settings, message in wrong:
        refusal(SettingError, message, generalization_bound, problem, **settings)
    weights = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.3], dtype=torch.float64)
    refusal(SettingError, "no sample weights", generalization_bound, replace(problem, weights=weights))
    name, shape = next(iter(problem.operator.shapes.items()))
    term = torch.full(shape, 1e-3 * problem.penalty[name])
    refusal(SettingError, "no linear term", generalization_bound, replace(problem, linear={name: term}))
