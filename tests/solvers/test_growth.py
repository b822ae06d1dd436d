"""New directions, steps along them and what can go, against dense matrices."""

from __future__ import annotations

import torch

from ranksure.factors import Factors, balanced, ranks_of, singular_values
from ranksure.solvers.growth import combined, descent_pairs, pruned
from tests.helpers import generator_of, randn


def test_pairs_are_the_gradient_beyond_the_penalty():
    g = randn(6, 9, generator=generator_of(0))
    p, s, qt = torch.linalg.svd(g, full_matrices=False)
    lam = float(s[1] + s[2]) / 2
    u, v = descent_pairs(g, lam, 0.0)
    torch.testing.assert_close(u @ v.T, -(p[:, :2] * (s[:2] - lam)) @ qt[:2])
    assert descent_pairs(g, lam, 0.0, most=1)[0].shape == (6, 1)
    assert descent_pairs(g, float(s[0]), 1e-9)[0].shape == (6, 0)


def test_a_step_is_a_sum_of_updates():
    g = generator_of(1)
    factors: Factors = {"a": (randn(5, 2, generator=g), randn(4, 2, generator=g))}
    pairs: Factors = {"a": (randn(5, 1, generator=g), randn(4, 1, generator=g))}
    u, v = combined(factors, 0.3, pairs, 2.0)["a"]
    expected = 0.3 * factors["a"][0] @ factors["a"][1].T + 2 * pairs["a"][0] @ pairs["a"][1].T
    torch.testing.assert_close(u @ v.T, expected)


def test_as_many_small_directions_go_as_is_allowed():
    sizes = torch.tensor([1.0, 5e-2, 5e-3, 5e-5]).double()
    q = torch.linalg.qr(randn(6, 4, generator=generator_of(2))).Q
    factors = balanced({"a": (q * sizes, q)})
    asked: list[int] = []

    def enough(rank: int) -> bool:
        asked.append(rank)
        return rank >= 2

    at = lambda x: ranks_of(x)["a"]  # noqa: E731
    assert pruned(factors, 4, at, enough, [0.5, 1e-2, 1e-4, 1e-6]) == 2
    assert asked == [1, 2]
    assert pruned(factors, 4, at, lambda rank: rank == 4, [1e-6]) == 4
    assert len(singular_values(factors)["a"]) == 4
