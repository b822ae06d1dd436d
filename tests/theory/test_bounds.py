import pytest
import torch
from tests.helpers import dense_operator, generator_of, randn

from ranksure.theory.bounds import (
    RANK_TOLERANCE,
    existence_bounds,
    existence_rank,
    landscape_bounds,
    landscape_rank,
    numerical_rank,
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
    assert existence.to_json() == {"paper": 15, "effective": 10, "numerical": 10}


def test_not_measured_is_none():
    assert existence_bounds(64, 2, 1, None, WIDE).numerical is None
    assert landscape_bounds(64, 2, 1, None, WIDE).numerical is None


def test_clipping_to_the_blocks():
    # Existence is about one block taking all of it, so the largest block clips; so it does for the landscape.
    shapes = {"small": (3, 50), "large": (7, 9)}
    assert existence_bounds(100, 5, 4, 300, shapes).to_json() == {"paper": 7, "effective": 7, "numerical": 7}
    assert landscape_bounds(100, 5, 4, {"small": 1, "large": 300}, shapes).to_json() == {
        "paper": 7,
        "effective": 7,
        "numerical": 7,
    }
    only_small = landscape_bounds(100, 5, 4, {"small": 300, "large": 1}, shapes)
    assert only_small.numerical == 3  # the small block needs its full rank 3, the large one rank 2
    assert existence_bounds(4, 2, 1, 1, shapes).to_json() == {"paper": 3, "effective": 2, "numerical": 1}


def test_landscape_needs_every_block_by_itself():
    """The worst block decides; the sum form would allow less."""
    bounds = landscape_bounds(64, 2, 1, {"q": 5, "v": 45}, WIDE)
    assert bounds.numerical == landscape_rank(45) == 10
    assert bounds.numerical > existence_bounds(64, 2, 1, 45, WIDE).numerical


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
