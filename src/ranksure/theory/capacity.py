"""Counts of parameters: a capacity to interpolate, kept apart from the bounds because no advice may use it.

Park (2026, arXiv 2605.03724, "Rethinking the Rank Threshold for LoRA Fine-Tuning") puts
``r (m + n) - r^2 > C K N``, with C about 1.35 for Gaussian features, in place of ``r (r + 1) / 2 > K N``. It counts
the dimension of the rank-``r`` matrices against the equations. At lambda > 0 that promises no landscape: the instance
of docs/theory/rank-bounds.md satisfies it at every rank and has a strict spurious minimum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ranksure.errors import SettingError

CAPACITY_CONSTANT = 1.35
"""Park's constant for independent Gaussian features."""


def degrees_of_freedom(ranks: int | Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Dimension of the updates of these ranks: ``sum_j r_j (m_j + n_j - r_j)``, each rank clipped to its block."""
    total = 0
    for name, (m, n) in shapes.items():
        rank = min(ranks if isinstance(ranks, int) else ranks.get(name, 0), m, n)
        total += rank * (m + n - rank)
    return total


def capacity_rank(
    n_samples: int, n_outputs: int, shapes: Mapping[str, tuple[int, int]], constant: float = CAPACITY_CONSTANT
) -> int | None:
    """Smallest uniform rank with more parameters than ``constant * K * N``: a capacity to interpolate, no more.

    Park states it for one matrix; with several, the dimensions of their sets of rank-``r`` updates add up (the
    extension is ours, and is only a count). It promises nothing about training. Advice must not use it.

    None where even full rank has too few parameters.

    Raises:
        SettingError: a count below 1, or a constant that is not positive and finite.
    """
    if n_samples < 1 or n_outputs < 1 or not 0 < constant < math.inf:
        raise SettingError("a capacity count needs at least one sample and output and a positive, finite constant")
    goal = constant * n_outputs * n_samples
    for rank in range(1, max(min(shape) for shape in shapes.values()) + 1):
        if degrees_of_freedom(rank, shapes) > goal:
            return rank
    return None
