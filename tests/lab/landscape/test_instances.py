"""The explicit instances against independent constructions, an independent optimum, and dense second derivatives."""

from __future__ import annotations

import math

import pytest
import torch

from ranksure.certificate import certify_point
from ranksure.errors import SettingError
from ranksure.factors import Factors
from ranksure.lab.landscape.instances import Trap, gaussian_problem, spurious_instance, two_block_instance
from ranksure.theory.bounds import existence_rank, is_within_existence, landscape_rank, meets_landscape
from tests.helpers import (
    convex_optimum,
    factored_objective,
    flatten,
    jacobians_of,
    joined,
    objective,
    updates,
)
from tests.helpers import spurious_instance as reference_instance
from tests.refusals import refusal

OTHER = {"lam": 0.05, "c": 1.5, "s": 2.0, "rho": 1.7}


def derivatives(trap: Trap, at: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient, and eigenvalues of the Hessian, of an objective that shares no code with the package."""
    x = flatten(at)
    phi = lambda y: factored_objective(trap.problem, at, y)  # noqa: E731
    return torch.func.grad(phi)(x), torch.linalg.eigvalsh(torch.func.hessian(phi)(x))


@pytest.mark.parametrize("r", [1, 2, 3, 5])
@pytest.mark.parametrize("settings", [{}, OTHER])
def test_the_instance_is_that_of_the_tests_own_construction(r, settings):
    trap = spurious_instance(r, **settings)
    problem, factors, best, excess = reference_instance(r, **settings)
    assert torch.equal(jacobians_of(trap.problem)["w"], jacobians_of(problem)["w"])
    assert torch.equal(trap.problem.labels, problem.labels)
    assert trap.problem.penalty == problem.penalty
    assert all(torch.equal(a, b) for a, b in zip(trap.factors["w"], factors["w"], strict=True))
    assert torch.allclose(updates(trap.optimum)["w"], best["w"], rtol=1e-14, atol=1e-14)
    assert trap.excess == pytest.approx(excess, rel=1e-12)  # there it is measured, here it is the closed form


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("r", [1, 2, 3])
def test_the_trap_is_a_strict_minimum_up_to_rotations_and_the_optimum_has_rank_one(r, extra):
    trap = spurious_instance(r, extra=extra)
    gradient, eigenvalues = derivatives(trap, trap.factors)
    assert float(gradient.abs().max()) <= 1e-14
    lam, n, c, s, rho = 0.1, r * (r + 3) // 2, math.sqrt(2), 1.0, 2.0
    strong = 2 * c**2 * s / n
    # The whole spectrum, derived in docs/theory/landscape.md: flat along rotations only, negative nowhere.
    spectrum = [0.0] * (r * (r - 1) // 2) + [2 * lam] * r**2 + [2 * strong] * (r * (r + 1) // 2)
    spectrum += [strong - lam * (rho - 1)] * r + [lam * (1 + rho)] * r + [lam] * (2 * r * extra)
    expected = torch.tensor(sorted(spectrum), dtype=torch.float64)
    assert eigenvalues.shape == expected.shape and float((eigenvalues - expected).abs().max()) <= 1e-12
    assert min(value for value in spectrum if value != 0) > 0
    value, _ = convex_optimum(trap.problem)
    assert objective(trap.problem, updates(trap.optimum)) == pytest.approx(value, rel=1e-7)
    assert objective(trap.problem, updates(trap.factors)) - value == pytest.approx(trap.excess, rel=1e-5)
    assert trap.optimum["w"][0].shape[1] == 1
    found = certify_point(trap.problem, trap.factors).certificate
    assert found.spectral_ratio == pytest.approx(trap.spectral_ratio, rel=1e-12)
    assert certify_point(trap.problem, trap.optimum).certificate.relative_gap <= 1e-12


@pytest.mark.parametrize("r", [1, 2, 3])
def test_one_more_column_makes_it_a_saddle(r):
    trap = spurious_instance(r, extra=1)
    size = r + 2
    zero = torch.zeros(size, 1, dtype=torch.float64)
    gradient, eigenvalues = derivatives(trap, joined(trap.factors, {"w": (zero, zero)}))
    assert float(gradient.abs().max()) <= 1e-14
    assert float(eigenvalues[0]) == pytest.approx(0.1 * (1 - trap.spectral_ratio), rel=1e-9)


def test_the_threshold_lies_between_r_and_r_plus_one_by_the_count_alone():
    for r in range(1, 7):
        trap = spurious_instance(r, extra=1)
        n, shapes = trap.problem.operator.n_samples, dict(trap.problem.operator.shapes)
        assert landscape_rank(n) == r + 1 and existence_rank(n) == r
        assert not meets_landscape({"w": r}, n, shapes) and meets_landscape({"w": r + 1}, n, shapes)
        assert r + 1 < min(shapes["w"])  # not clipped
        assert int(torch.linalg.matrix_rank(trap.problem.operator.gram())) == n


def test_beyond_the_condition_the_point_is_a_saddle():
    """The closed form's condition is the boundary: just inside strict, just outside refused (and truly a saddle)."""
    n, lam, rho = 5, 0.1, 2.0
    edge = n * lam * (rho - 1) / 2
    inside = spurious_instance(2, c=math.sqrt(1.01 * edge))
    _, eigenvalues = derivatives(inside, inside.factors)
    assert float(eigenvalues[1]) > 0
    refusal(SettingError, "saddle", spurious_instance, 2, c=math.sqrt(0.99 * edge))
    problem, factors, _, _ = reference_instance(2, c=math.sqrt(0.99 * edge))
    outside = Trap(problem, {"w": 2}, factors, {}, 0.0, rho)
    assert float(derivatives(outside, factors)[1][0]) < -1e-4


def test_two_blocks_pass_in_the_sum_only_and_trap():
    trap = two_block_instance()
    problem = trap.problem
    shapes, n = dict(problem.operator.shapes), problem.operator.n_samples
    assert n == 2 and trap.ranks == {"first": 1, "second": 3}
    assert not is_within_existence(trap.ranks, n)  # 7 > 2: the sum form is satisfied
    assert not meets_landscape(trap.ranks, n, shapes)
    for name in shapes:
        assert int(torch.linalg.matrix_rank(problem.operator.gram([name]))) == 2
    gradient, eigenvalues = derivatives(trap, trap.factors)
    assert float(gradient.abs().max()) <= 1e-14
    assert float(eigenvalues[0]) >= 0.05 - 1e-12  # strict: no rotation moves a rank-1 block or a zero one
    value, _ = convex_optimum(problem)
    assert objective(problem, updates(trap.optimum)) == pytest.approx(value, rel=1e-7)
    assert objective(problem, updates(trap.factors)) - value == pytest.approx(trap.excess, rel=1e-5)


def test_gaussian_problems_have_the_lambda_that_they_say():
    problem = gaussian_problem(7, (4, 5), share=0.2, seed=3)
    zero = {"w": (torch.zeros(4, 1), torch.zeros(5, 1))}
    assert certify_point(problem, zero).certificate.spectral_ratio == pytest.approx(5.0, rel=1e-9)
    assert int(torch.linalg.matrix_rank(problem.operator.gram())) == 7
    other = gaussian_problem(7, (4, 5), share=0.2, seed=4)
    assert not torch.equal(jacobians_of(problem)["w"], jacobians_of(other)["w"])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 0}, "r >= 1"),
        ({"r": 1, "extra": -1}, "extra >= 0"),
        ({"r": 1, "rho": 1.0}, "above 1"),
        ({"r": 1, "lam": 0.0}, "positive"),
        ({"r": 1, "s": math.inf}, "finite"),
    ],
)
def test_settings_without_an_instance_are_refused(settings, match):
    refusal(SettingError, match, spurious_instance, **settings)


def test_settings_without_a_problem_are_refused():
    refusal(SettingError, "between 0 and 1", two_block_instance, share=1.0)
    refusal(SettingError, "N >= 1", gaussian_problem, 0, (2, 2))
    refusal(SettingError, "share", gaussian_problem, 2, (2, 2), share=1.0)
