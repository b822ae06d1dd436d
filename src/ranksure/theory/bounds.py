"""Rank bounds of the linearised problem, for existence and for the landscape apart.

Existence (Theorem 3.1 of Jang, Lee and Ryu 2024): an optimum exists with
``sum_j r_j (r_j + 1) / 2 <= dim``, so no block needs more than the largest ``r`` with
``r (r + 1) / 2 <= dim``. Landscape (Theorem 4.1): LoRA has no spurious local minima (of the randomly
perturbed objective) when ``r_j (r_j + 1) / 2 > dim_j`` for *every* block by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-6
"""Singular values of the operator below this share of the largest count as zero."""


@dataclass(frozen=True)
class Bounds:
    """One kind of bound with three dimensions.

    Attributes:
        paper: from ``K N`` equations, as the paper counts.
        effective: from the outputs that the loss can see (``(K - 1) N`` under softmax).
        numerical: from the measured rank of the operator; None where it was not measured.
    """

    paper: int
    effective: int
    numerical: int | None

    def to_json(self) -> dict[str, int | None]:
        """Plain numbers."""
        return asdict(self)


def existence_rank(dimension: int) -> int:
    """Largest ``r`` with ``r (r + 1) / 2 <= dimension``."""
    return (math.isqrt(8 * dimension + 1) - 1) // 2


def landscape_rank(dimension: int) -> int:
    """Smallest ``r`` with ``r (r + 1) / 2 > dimension``."""
    return existence_rank(dimension) + 1


def numerical_rank(gram: Tensor, tolerance: float = RANK_TOLERANCE) -> int:
    """Rank of an operator from its Gram matrix ``A A^*``: singular values above ``tolerance`` times the largest."""
    values = torch.linalg.eigvalsh(gram.double())
    return int((values > tolerance**2 * values[-1]).sum()) if float(values[-1]) > 0 else 0


def existence_bounds(
    n_samples: int, n_outputs: int, effective_outputs: int, rank: int | None, shapes: Mapping[str, tuple[int, int]]
) -> Bounds:
    """Rank of a block that suffices for an optimum to exist, clipped to the largest block.

    Args:
        n_samples: ``N``.
        n_outputs: ``K``.
        effective_outputs: outputs that the loss can see.
        rank: measured rank of the whole operator, or None.
        shapes: block shapes ``(m, n)``.
    """
    clip = max(min(shape) for shape in shapes.values())
    return Bounds(
        min(clip, existence_rank(n_outputs * n_samples)),
        min(clip, existence_rank(effective_outputs * n_samples)),
        None if rank is None else min(clip, existence_rank(rank)),
    )


def landscape_bounds(
    n_samples: int,
    n_outputs: int,
    effective_outputs: int,
    ranks: Mapping[str, int] | None,
    shapes: Mapping[str, tuple[int, int]],
) -> Bounds:
    """Uniform rank at which no block has spurious local minima, each block clipped to its size.

    Args:
        n_samples: ``N``.
        n_outputs: ``K``.
        effective_outputs: outputs that the loss can see.
        ranks: measured rank of each block's own operator, or None.
        shapes: block shapes ``(m, n)``.
    """

    def uniform(dimension: Mapping[str, int]) -> int:
        return max(min(landscape_rank(dimension[name]), *shape) for name, shape in shapes.items())

    return Bounds(
        uniform(dict.fromkeys(shapes, n_outputs * n_samples)),
        uniform(dict.fromkeys(shapes, effective_outputs * n_samples)),
        None if ranks is None else uniform(ranks),
    )
