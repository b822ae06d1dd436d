"""Rank bounds: counts against brute force, claims against solved problems, and the counter-examples."""

import dataclasses

import pytest
import torch

from ranksure.certificate import certify_point
from ranksure.curvature import inertia
from ranksure.errors import SettingError
from ranksure.operators.dense import DenseOperator
from ranksure.perturbation import random_perturbation
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.fixed_rank import solve_fixed_rank
from ranksure.theory.bounds import (
    RANK_TOLERANCE,
    Bounds,
    existence_bounds,
    existence_rank,
    explain,
    is_within_existence,
    landscape_bounds,
    landscape_rank,
    landscape_ranks,
    measured_rank,
    meets_landscape,
    numerical_rank,
    rank_bounds,
)
from tests.helpers import (
    LOSS_NAMES,
    convex_optimum,
    dense_operator,
    factored_objective,
    flatten,
    generator_of,
    jacobians_of,
    randn,
    random_problem,
    spurious_instance,
    unflatten,
)

WIDE = {"q": (384, 384), "v": (384, 384)}


def counted_existence(dimension: int) -> int:
    """Largest r with 1 + 2 + ... + r <= dimension, by adding up."""
    r = total = 0
    while total + r + 1 <= dimension:
        r += 1
        total += r
    return r


def test_ranks_are_those_of_a_count():
    for dimension in range(1, 300):
        assert existence_rank(dimension) == counted_existence(dimension)
        assert landscape_rank(dimension) == next(k for k in range(1, 100) if sum(range(1, k + 1)) > dimension)


@pytest.mark.parametrize(
    "dimension", [10**6, 10**6 + 1, 2**40, 10**15 * (10**15 + 1) // 2 - 1, 10**15 * (10**15 + 1) // 2]
)
def test_ranks_of_large_dimensions(dimension):
    r, s = existence_rank(dimension), landscape_rank(dimension)
    assert r * (r + 1) // 2 <= dimension < (r + 1) * (r + 2) // 2
    assert s * (s + 1) // 2 > dimension >= (s - 1) * s // 2


def test_nothing_to_fit_needs_no_rank():
    assert existence_rank(0) == 0
    assert landscape_rank(0) == 1


def test_the_papers_example():
    existence = existence_bounds(64, 2, 1, 60, WIDE)
    landscape = landscape_bounds(64, 2, 1, {"q": 60, "v": 20}, WIDE)
    assert (existence.paper, landscape.paper) == (15, 16)
    assert (existence.effective, landscape.effective) == (10, 11)
    assert (existence.numerical, landscape.numerical) == (10, 11)  # 10 * 11 / 2 = 55 <= 60 < 66
    assert existence == Bounds(15, 10, 10)


def test_not_measured_is_none():
    assert existence_bounds(64, 2, 1, None, WIDE).numerical is None
    assert landscape_bounds(64, 2, 1, None, WIDE).numerical is None


def test_clipping_to_the_blocks():
    # Existence is about one block taking all of it, so the largest block clips; so it does for the landscape.
    shapes = {"small": (3, 50), "large": (7, 9)}
    assert existence_bounds(100, 5, 4, 300, shapes) == Bounds(7, 7, 7)
    assert landscape_bounds(100, 5, 4, {"small": 1, "large": 300}, shapes) == Bounds(7, 7, 7)
    only_small = landscape_bounds(100, 5, 4, {"small": 300, "large": 1}, shapes)
    assert only_small.numerical == 3  # the small block needs its full rank 3, the large one rank 2
    assert existence_bounds(4, 2, 1, 1, shapes) == Bounds(3, 2, 1)


def test_landscape_needs_every_block_by_itself():
    """The worst block decides; the sum form would allow less."""
    bounds = landscape_bounds(64, 2, 1, {"q": 5, "v": 45}, WIDE)
    assert bounds.numerical == landscape_rank(45) == 10
    existence = existence_bounds(64, 2, 1, 45, WIDE)
    assert bounds.numerical is not None and existence.numerical is not None
    assert bounds.numerical > existence.numerical


@pytest.mark.parametrize("rank", [0, 1, 4, 7])
def test_numerical_rank_of_a_known_operator(rank):
    g = generator_of(rank)
    a = randn(9, rank, generator=g) @ randn(rank, 30, generator=g)
    assert numerical_rank(a @ a.T) == rank


def test_numerical_rank_counts_singular_values_above_the_tolerance():
    q = torch.linalg.qr(randn(6, 6, generator=generator_of(0))).Q
    s = torch.tensor([1.0, 1e-2, 30 * RANK_TOLERANCE, 0.1 * RANK_TOLERANCE, 1e-9, 0.0], dtype=torch.float64)
    assert numerical_rank((q * s.square()) @ q.T * 1e4) == 3
    assert numerical_rank((q * s.square()) @ q.T * 1e4, tolerance=1e-3) == 2


def test_numerical_rank_of_float32_gradients_ignores_their_rounding():
    """A float32 operator of rank 5 has full rank at machine precision, not at this tolerance."""
    g = generator_of(3)
    a = (randn(40, 5, generator=g) @ randn(5, 200, generator=g)).float().double()
    assert torch.linalg.matrix_rank(a) > 5
    assert numerical_rank(a @ a.T) == 5


def test_gram_of_an_operator_gives_its_rank():
    operator = dense_operator(0, 6, 2, {"w": (2, 3)})  # 12 equations, 6 unknowns
    assert numerical_rank(operator.gram()) == 6


def test_the_sum_form_of_existence():
    assert is_within_existence({"q": 10, "v": 2}, 58) and not is_within_existence({"q": 10, "v": 2}, 57)
    assert is_within_existence({"q": 0, "v": 0}, 0)
    for dimension in range(1, 40):  # one block alone: the single-number bound
        rank = existence_rank(dimension)
        assert is_within_existence({"q": rank}, dimension) and not is_within_existence({"q": rank + 1}, dimension)
    with pytest.raises(SettingError):
        is_within_existence({"q": -1}, 3)
    with pytest.raises(SettingError):
        existence_rank(-1)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_optima_satisfy_the_sum_form(n):
    """Ranks of an independent convex solver's optimum, which is unique here, over three blocks together."""
    problem = random_problem(
        n, "squared-error", n=n, k=1, shapes={"a": (3, 4), "b": (4, 2), "c": (3, 3)}, share=0.05, uneven=False
    )
    _, delta = convex_optimum(problem)
    largest = max(float(torch.linalg.matrix_norm(d, 2)) for d in delta.values())
    ranks = {name: int((torch.linalg.svdvals(d) > 1e-4 * largest).sum()) for name, d in delta.items()}
    assert sum(ranks.values()) >= 1
    assert is_within_existence(ranks, numerical_rank(problem.operator.gram()))


def test_landscape_ranks_say_what_decides():
    blocks = landscape_ranks({"q": 60, "v": 20}, {"q": (384, 384), "v": (3, 50)})
    assert (blocks["q"].rank, blocks["q"].clipped) == (11, False)
    assert blocks["q"].reason == "rank 11: 66 > 60"
    assert (blocks["v"].rank, blocks["v"].counted, blocks["v"].full, blocks["v"].clipped) == (3, 6, 3, True)
    assert "min(m, n)" in blocks["v"].reason and "clipped from 6" in blocks["v"].reason
    shapes = {"q": (9, 9), "v": (2, 9)}
    assert landscape_ranks(6, shapes)["q"].rank == 4
    assert meets_landscape({"q": 4, "v": 2}, 6, shapes)
    for short in ({"q": 3, "v": 2}, {"q": 4, "v": 1}, {"q": 4}):
        assert not meets_landscape(short, 6, shapes)


def trapped(problem, ranks, starts=60):
    """Starts that end more than 1e-3 above the certified optimum."""
    optimum = solve(problem, tolerance=1e-9).certificate.objective
    found = solve_fixed_rank(problem, ranks, random_starts=starts, check_curvature=False)
    return sum(value > optimum + 1e-3 for value in found.objectives)


@pytest.mark.parametrize("r", [1, 2])
def test_the_landscape_bound_is_tight(r):
    """One equation fewer than the next threshold: a trap at rank r, none at the bound r + 1."""
    problem, _, _, _ = spurious_instance(r)
    bounds = rank_bounds(problem)
    assert bounds.equations.best == (r + 1) * (r + 2) // 2 - 1
    assert bounds.landscape.numerical == r + 1 and not bounds.blocks["w"].clipped
    assert trapped(problem, {"w": r}) > 0
    assert trapped(problem, {"w": r + 1}) == 0


def sum_form_instance():
    """The trap of rank 1 beside a block of 3 x 3 that never pays: ranks (1, 3), two equations."""
    problem, trap, _, excess = spurious_instance(1)
    wide = randn(2, 1, 3, 3, generator=generator_of(0))
    wide *= 1.06 / torch.linalg.matrix_norm(wide, 2)[..., None, None]  # below c = sqrt 2, where it would start to pay
    problem = dataclasses.replace(
        problem,
        operator=DenseOperator({"w": jacobians_of(problem)["w"], "wide": wide}),
        penalty={"w": problem.penalty["w"], "wide": problem.penalty["w"]},
    )
    zeros = torch.zeros(3, 3, dtype=torch.float64)
    return problem, {**trap, "wide": (zeros, zeros.clone())}, excess


def test_the_sum_form_is_not_enough_for_the_landscape():
    problem, trap, excess = sum_form_instance()
    ranks, shapes = {"w": 1, "wide": 3}, problem.operator.shapes
    bounds = rank_bounds(problem)
    assert bounds.measured is not None and bounds.measured_blocks is not None
    dimensions = {name: block.rank for name, block in bounds.measured_blocks.items()}
    assert bounds.measured.rank == 2 and dimensions == {"w": 2, "wide": 2}
    assert sum(r * (r + 1) // 2 for r in ranks.values()) == 7 > bounds.measured.rank  # the sum form would pass
    assert not meets_landscape(ranks, dimensions, shapes) and meets_landscape({"w": 2, "wide": 3}, dimensions, shapes)

    # A strict local minimum, from the Hessian of the definition, and again by inertia.
    flat = flatten(trap)
    value, gradient = problem.value_and_gradient(trap)
    assert float(flatten(gradient).abs().max()) < 1e-14
    hessian = torch.func.hessian(lambda x: factored_objective(problem, trap, x))(flat)
    assert float(torch.linalg.eigvalsh(hessian)[0]) > 0.01
    assert inertia(problem, trap, certify_point(problem, trap)).no_negative_curvature
    # It is spurious by the independent solver, and starts do end there.
    optimum, _ = convex_optimum(problem)
    assert float(value) - optimum == pytest.approx(excess, abs=1e-6) and excess > 0.05
    assert trapped(problem, ranks) > 0
    assert trapped(problem, {"w": 2, "wide": 3}) == 0


def test_the_sum_forms_trap_survives_a_perturbation():
    """So Theorem 4.1 itself, which is about almost every P, fails at these ranks."""
    problem, trap, _ = sum_form_instance()
    for seed in range(3):
        perturbation = random_perturbation(problem, 0.002, seed=seed)

        def perturbed(x, perturbation=perturbation):
            return factored_objective(problem, trap, x) + perturbation.penalty_of(unflatten(x, trap))

        x = flatten(trap)
        for _ in range(8):  # Newton
            x = x - torch.linalg.solve(torch.func.hessian(perturbed)(x), torch.func.grad(perturbed)(x))
        assert float(torch.func.grad(perturbed)(x).abs().max()) < 1e-13
        assert float(torch.linalg.eigvalsh(torch.func.hessian(perturbed)(x))[0]) > 0.01
        assert float(perturbed(x)) > solve(perturbation.problem, tolerance=1e-9).certificate.objective + 0.04


def test_measured_rank_tells_its_tolerance_and_how_clear_it_is():
    q = torch.linalg.qr(randn(6, 6, generator=generator_of(0))).Q
    s = torch.tensor([1.0, 1e-2, 3e-5, 2e-7, 0.0, 0.0], dtype=torch.float64)
    found = measured_rank((q * s.square()) @ q.T * 1e4)
    assert (found.rank, found.size, found.tolerance) == (3, 6, RANK_TOLERANCE)
    assert found.kept == pytest.approx(3e-5, rel=1e-3) and found.dropped == pytest.approx(2e-7, rel=0.1)
    assert found.tolerance == RANK_TOLERANCE
    zero = measured_rank(torch.zeros(4, 4))
    assert (zero.rank, zero.kept, zero.dropped) == (0, 0.0, 0.0)
    full = measured_rank(torch.eye(3))
    assert (full.rank, full.kept, full.dropped) == (3, 1.0, 0.0)
    for tolerance in (1e-9, 1.0, float("nan")):
        with pytest.raises(SettingError):
            measured_rank(torch.eye(3), tolerance)


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_bounds_of_a_problem_are_those_of_its_counts(loss):
    problem = random_problem(loss=loss, n=5, k=3)  # blocks of 3 x 4 and 4 x 2
    effective = 10 if loss == "cross-entropy" else 15
    jacobians = {name: g.reshape(effective, -1) for name, g in jacobians_of(problem).items()}
    each = {name: int(torch.linalg.matrix_rank(j)) for name, j in jacobians.items()}
    whole = int(torch.linalg.matrix_rank(torch.cat(list(jacobians.values()), 1)))
    bounds = rank_bounds(problem)
    assert bounds.equations == Bounds(15, effective, whole)
    assert bounds.measured_blocks is not None
    assert {name: block.rank for name, block in bounds.measured_blocks.items()} == each
    assert {name: block.dimension for name, block in bounds.blocks.items()} == each
    shapes = problem.operator.shapes
    assert bounds.existence == existence_bounds(5, 3, effective // 5, whole, shapes)
    assert bounds.landscape == landscape_bounds(5, 3, effective // 5, each, shapes)
    unmeasured = rank_bounds(problem, max_size=9)
    assert unmeasured.measured is None and unmeasured.existence.numerical is None
    assert unmeasured.existence.best == bounds.existence.effective
    assert {block.dimension for block in unmeasured.blocks.values()} == {effective}


def test_explanations_put_each_number_to_its_claim():
    problem = random_problem(n=40, k=2, shapes={"q": (12, 12), "v": (3, 12)})
    bounds = rank_bounds(problem)
    told = explain(bounds)
    assert "some optimum" in told.existence and "sum r(r+1)/2 <= 40 over all blocks" in told.existence
    assert "paper 12, effective 8, numerical 8" in told.existence and "does not say that training" in told.existence
    assert (
        "almost every positive semidefinite P" in told.landscape
        and "at P = 0 the theorem claims nothing" in told.landscape
    )
    assert "q needs the most, rank 9: 45 > 40; 1 of 2 blocks are clipped" in told.landscape
    assert "rank 40 of 40 at tolerance 1e-06" in told.measured
    assert told.capacity == "" and told.lines == [told.existence, told.landscape, told.measured]
    told = explain(rank_bounds(problem, max_size=9), capacity=2)
    assert "not measured" in told.existence and "too large" in told.measured
    assert "rank 2" in told.capacity and "promises nothing about training" in told.capacity
    assert str(told).splitlines() == told.lines and len(told.lines) == 4
