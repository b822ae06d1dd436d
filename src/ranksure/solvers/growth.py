"""What the solvers that grow low-rank factors share: new directions, steps along them, and what can go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ranksure.factors import Factors, balanced, ranks_of
from ranksure.spectral import top_pairs

MOST_PAIRS = 4
"""New directions of one block in one round."""

T = TypeVar("T")


def descent_pairs(g: Tensor, lam: float, margin: float, most: int = MOST_PAIRS) -> tuple[Tensor, Tensor]:
    """Factors of ``-sum_k (sigma_k - lam) p_k q_k^T`` over the top pairs of a gradient with ``sigma > lam``.

    Args:
        g: ``(m, n)``.
        lam: the block's penalty.
        margin: what counts as above it, relative.
        most: pairs.
    """
    p, sigma, q = (part.to(g) for part in top_pairs(g, most))
    count = int((sigma > lam * (1 + margin)).sum())
    weight = (sigma[:count] - lam).sqrt()
    return -p[:, :count] * weight, q[:, :count] * weight


def combined(factors: Factors, a: float, pairs: Factors, b: float) -> Factors:
    """Factors of ``a delta + b P`` for ``a, b >= 0``."""
    x, y = math.sqrt(a), math.sqrt(b)
    return {
        name: (torch.cat([x * factors[name][0], y * u], 1), torch.cat([x * factors[name][1], y * v], 1))
        for name, (u, v) in pairs.items()
    }


def pruned(
    factors: Factors, point: T, at: Callable[[Factors], T], enough: Callable[[T], bool], shares: Sequence[float]
) -> T:
    """The point without as many of its smallest directions as ``enough`` allows.

    Args:
        factors: the point's.
        point: what is returned where nothing can go.
        at: makes a point of factors.
        enough: whether a point will do.
        shares: of the largest singular value, below which directions go; largest first.
    """
    for share in shares:
        fewer = balanced(factors, drop=share)
        if ranks_of(fewer) == ranks_of(factors):
            break
        found = at(fewer)
        if enough(found):
            return found
    return point
