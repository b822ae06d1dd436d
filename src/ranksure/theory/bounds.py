"""Rank bounds of the linearised problem, for existence and for the landscape apart, and what each is good for.

Existence (Theorem 3.1 of Jang, Lee and Ryu 2024): an optimum exists with ``sum_j r_j (r_j + 1) / 2 <= dim``, so no
block needs more than the largest ``r`` with ``r (r + 1) / 2 <= dim``. Landscape (Theorem 4.1): LoRA has no spurious
local minima (of the objective plus ``sum_j <P_j, Q_j Q_j^T>``, for almost every positive semidefinite P) when
``r_j (r_j + 1) / 2 > dim_j`` or ``r_j = min(m_j, n_j)`` for *every* block by itself: the sum is about existence only.

``dim`` is ``K N`` (the paper), ``K N`` with the outputs that the loss can see (effective), or the measured rank of
the operator (numerical). Counts of parameters are apart, in :mod:`ranksure.theory.capacity`: they bound nothing here.
Derivations and counter-examples: docs/theory/rank-bounds.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ranksure.errors import SettingError
from ranksure.problem import Problem

RANK_TOLERANCE = 1e-6
"""Singular values of the operator below this share of the largest count as zero."""

_RESOLUTION = 1e-7  # a Gram matrix in float64 squares the singular values: smaller shares are its rounding


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

    @property
    def best(self) -> int:
        """The sharpest of the three: ranks measured are never above the counts."""
        return self.effective if self.numerical is None else self.numerical


@dataclass(frozen=True)
class MeasuredRank:
    """Rank of an operator as measured, with how clear-cut it is.

    Attributes:
        rank: singular values above ``tolerance`` times the largest.
        size: number of equations ``N C``: the most that the rank can be.
        tolerance: the share of the largest singular value that counts.
        kept: smallest singular value counted, as a share of the largest (0 where there is none).
        dropped: largest singular value not counted, as a share of the largest (0 where there is none).
    """

    rank: int
    size: int
    tolerance: float
    kept: float
    dropped: float


@dataclass(frozen=True)
class BlockRank:
    """Rank at which one block has no spurious local minima, and what decides it.

    Attributes:
        rank: the smaller of ``counted`` and ``full``.
        counted: smallest ``r`` with ``r (r + 1) / 2 > dimension``.
        full: ``min(m, n)``.
        dimension: ``dim_j``, the count or measured rank of the block's own operator.
    """

    rank: int
    counted: int
    full: int
    dimension: int

    @property
    def clipped(self) -> bool:
        """Whether the block's size decides."""
        return self.counted > self.full

    @property
    def reason(self) -> str:
        """Why this rank, in one clause."""
        if self.clipped:
            return (
                f"rank {self.full} = min(m, n), clipped from {self.counted}: full-rank factors that are stationary "
                "have spectral ratio 1, so none of them is spurious"
            )
        return f"rank {self.rank}: {unknowns([self.rank])} > {self.dimension}"


def unknowns(ranks: Iterable[int]) -> int:
    """``sum_j r_j (r_j + 1) / 2``: coordinates of symmetric matrices of these sizes."""
    return sum(rank * (rank + 1) // 2 for rank in ranks)


def existence_rank(dimension: int) -> int:
    """Largest ``r`` with ``r (r + 1) / 2 <= dimension``; a SettingError where that is negative."""
    if dimension < 0:
        raise SettingError(f"a number of equations cannot be negative, and this one is {dimension}")
    return (math.isqrt(8 * dimension + 1) - 1) // 2


def landscape_rank(dimension: int) -> int:
    """Smallest ``r`` with ``r (r + 1) / 2 > dimension``."""
    return existence_rank(dimension) + 1


def is_within_existence(ranks: Mapping[str, int], dimension: int) -> bool:
    """Whether ``sum_j r_j (r_j + 1) / 2 <= dimension``, which some optimum satisfies (Theorem 3.1, over blocks).

    An optimum that violates it is not the only one: rank reduction leads from it to one that satisfies it. The
    dimension is the number of equations, or the rank of the whole operator.

    Raises:
        SettingError: a negative rank or dimension.
    """
    if dimension < 0 or any(rank < 0 for rank in ranks.values()):
        raise SettingError("ranks and the number of equations cannot be negative")
    return unknowns(ranks.values()) <= dimension


def landscape_ranks(dimensions: int | Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> dict[str, BlockRank]:
    """Smallest rank of each block by itself at which Theorem 4.1 holds (see docs/mathematics.md for the clipping).

    ``dimensions`` is ``dim_j`` by block (rank of the block's own operator), or one count for all.
    """
    each = dict.fromkeys(shapes, dimensions) if isinstance(dimensions, int) else dimensions
    out: dict[str, BlockRank] = {}
    for name, shape in shapes.items():
        counted, full = landscape_rank(each[name]), min(shape)
        out[name] = BlockRank(min(counted, full), counted, full, each[name])
    return out


def meets_landscape(
    ranks: Mapping[str, int], dimensions: int | Mapping[str, int], shapes: Mapping[str, tuple[int, int]]
) -> bool:
    """Whether *every* block has a rank at which Theorem 4.1 holds; a block left out has rank 0 and fails."""
    return all(ranks.get(name, 0) >= block.rank for name, block in landscape_ranks(dimensions, shapes).items())


def measured_rank(gram: Tensor, tolerance: float = RANK_TOLERANCE) -> MeasuredRank:
    """Rank of an operator from its Gram matrix ``A A^*``, whose eigenvalues are the squared singular values.

    Args:
        gram: ``(N C, N C)``, positive semidefinite up to rounding.
        tolerance: share of the largest singular value above which one counts.

    Raises:
        SettingError: a tolerance that a float64 Gram matrix cannot resolve (below 1e-7), or of 1 and more.
    """
    if not _RESOLUTION <= tolerance < 1:
        raise SettingError(f"the rank tolerance must be in [{_RESOLUTION:g}, 1), not {tolerance:g}")
    size = gram.shape[0]
    values = torch.linalg.eigvalsh(gram.double()) if size else gram.new_zeros(0)
    if size == 0 or not float(values[-1]) > 0:
        return MeasuredRank(0, size, tolerance, 0.0, 0.0)
    shares = (values.clamp(min=0) / values[-1]).sqrt()
    rank = int((values > tolerance**2 * values[-1]).sum())
    dropped = float(shares[size - rank - 1]) if rank < size else 0.0
    return MeasuredRank(rank, size, tolerance, float(shares[size - rank]), dropped)


def numerical_rank(gram: Tensor, tolerance: float = RANK_TOLERANCE) -> int:
    """Rank of an operator from its Gram matrix ``A A^*``: singular values above ``tolerance`` times the largest."""
    return measured_rank(gram, tolerance).rank


def existence_bounds(
    n_samples: int, n_outputs: int, effective_outputs: int, rank: int | None, shapes: Mapping[str, tuple[int, int]]
) -> Bounds:
    """Rank of a block that suffices for an optimum to exist, clipped to the largest block.

    One block may take all of ``sum_j r_j (r_j + 1) / 2 <= dim``; see :func:`is_within_existence` for the sum. The
    outputs are ``K`` and those that the loss can see; the rank is that measured of the whole operator.
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

    As :func:`existence_bounds`, with the measured rank of each block's own operator.
    """

    def uniform(dimensions: int | Mapping[str, int]) -> int:
        return max(block.rank for block in landscape_ranks(dimensions, shapes).values())

    return Bounds(
        uniform(n_outputs * n_samples),
        uniform(effective_outputs * n_samples),
        None if ranks is None else uniform(ranks),
    )


@dataclass(frozen=True)
class RankBounds:
    """Every bound of one problem; no capacity count among them.

    Attributes:
        equations: ``dim`` by the paper's count ``K N``, by the outputs that the loss sees, and as measured.
        existence: rank that suffices for an optimum to exist.
        landscape: uniform rank without spurious local minima.
        blocks: the landscape's rank of every block by itself, from the sharpest dimension known.
        measured: measured rank of the whole operator, or None.
        measured_blocks: measured rank of each block's own operator, or None.
    """

    equations: Bounds
    existence: Bounds
    landscape: Bounds
    blocks: dict[str, BlockRank]
    measured: MeasuredRank | None
    measured_blocks: dict[str, MeasuredRank] | None


def rank_bounds(problem: Problem, *, tolerance: float = RANK_TOLERANCE, max_size: int = 4096) -> RankBounds:
    """All bounds of a problem; ranks are measured (:func:`measured_rank`) where ``N C`` is at most ``max_size``."""
    operator, shapes = problem.reduced[0].operator, dict(problem.operator.shapes)
    n, k = operator.n_samples, problem.n_logits
    effective = problem.loss.effective_outputs(k)
    whole, each = None, None
    if n * operator.n_outputs <= max_size:
        total = torch.zeros((), dtype=torch.float64, device=operator.device)
        each = {}
        for name in shapes:
            gram = operator.gram([name])
            each[name] = measured_rank(gram, tolerance)
            total = total + gram
        whole = measured_rank(total, tolerance)
    rank = None if whole is None else whole.rank
    ranks = None if each is None else {name: block.rank for name, block in each.items()}
    return RankBounds(
        Bounds(k * n, effective * n, rank),
        existence_bounds(n, k, effective, rank, shapes),
        landscape_bounds(n, k, effective, ranks, shapes),
        landscape_ranks(effective * n if ranks is None else ranks, shapes),
        whole,
        each,
    )


@dataclass(frozen=True)
class Explanation:
    """Which bound applies to which claim, one or two sentences each.

    Attributes:
        existence: about an optimum of low rank.
        landscape: about the absence of spurious local minima.
        measured: about the measured rank and its tolerance.
        capacity: about the capacity count; empty where none was given.
    """

    existence: str
    landscape: str
    measured: str
    capacity: str

    @property
    def lines(self) -> list[str]:
        """The sentences that there are."""
        return [line for line in (self.existence, self.landscape, self.measured, self.capacity) if line]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def explain(bounds: RankBounds, capacity: int | None = None) -> Explanation:
    """Say in plain sentences which number supports which claim, a capacity count told apart from the bounds."""
    existence = (
        f"Existence (Theorem 3.1): some optimum has ranks with sum r(r+1)/2 <= {bounds.equations.best} over "
        f"all blocks, so rank {bounds.existence.best} suffices for one to exist ({_origins(bounds.existence)}). "
        "It does not say that training finds it."
    )
    needy = max(bounds.blocks, key=lambda name: bounds.blocks[name].rank)
    clipped = sum(block.clipped for block in bounds.blocks.values())
    landscape = (
        f"Landscape (Theorem 4.1): with rank {bounds.landscape.best} in every block ({_origins(bounds.landscape)}), "
        "the objective plus <P, Q Q^T> has no spurious local minimum for almost every positive semidefinite P; "
        f"at P = 0 the theorem claims nothing. Each block must pass by itself, and {needy} needs the most, "
        f"{bounds.blocks[needy].reason}; {clipped} of {len(bounds.blocks)} blocks are clipped to their size."
    )
    if bounds.measured is None:
        measured = "Measured: nothing, the operator is too large; the bounds count equations."
    else:
        m = bounds.measured
        measured = (
            f"Measured: the operator has rank {m.rank} of {m.size} at tolerance {m.tolerance:g} of its largest "
            f"singular value (smallest counted {m.kept:.1e}, largest left out {m.dropped:.1e}). The bounds called "
            "numerical hold for the operator cut at that tolerance; the others are counts and hold as they are."
        )
    told = ""
    if capacity is not None:
        told = (
            f"Capacity (Park 2026): from rank {capacity} on there are enough parameters to interpolate the labels. "
            "That counts parameters; it promises nothing about training at lambda > 0, and no advice uses it."
        )
    return Explanation(existence, landscape, measured, told)


def _origins(bounds: Bounds) -> str:
    measured = "not measured" if bounds.numerical is None else f"numerical {bounds.numerical}"
    return f"paper {bounds.paper}, effective {bounds.effective}, {measured}"
