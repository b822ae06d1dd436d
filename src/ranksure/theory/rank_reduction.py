"""Rank reduction: from any update to one of low rank with the same predictions and no higher objective.

Theorem 3.1 of Jang, Lee and Ryu (2024), made constructive; the argument is that of Barvinok (1995) and
Pataki (1998). With singular value decompositions ``delta_j = P_j diag(s_j) Q_j^T``, the updates
``P_j X_j Q_j^T`` with ``X_j`` positive semidefinite have nuclear norm ``tr X_j``, and predictions that are
linear in ``X``. So the reduction walks from ``X_j = diag(s_j)`` to an extreme point of
``{X >= 0 : L(X) = L(diag(s))}``, never uphill in ``sum_j lambda_j tr X_j``; there the map ``L`` is
injective on the face, hence ``sum_j r_j (r_j + 1) / 2 <= rank(L) <= rank(A)``. Derived, with the algorithm
and its cost, in docs/theory/rank-reduction.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ranksure.errors import SettingError
from ranksure.factors import Factors, nuclear_norms, ranks_of, thin_svd
from ranksure.operators.base import TangentOperator, check_factors
from ranksure.problem import Problem, uniform_penalty
from ranksure.theory.bounds import unknowns
from ranksure.theory.extreme_point import EPS, Face, Walk, walk_to_extreme_point

_PROBES = 16

Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class RankReduction:
    """What :func:`reduce_rank` found.

    Attributes:
        factors: balanced factors by block, float64, columns by size; rank-0 blocks have no columns.
        ranks_before: rank of each starting update, to rounding (superfluous columns of factors do not count).
        ranks_after: rank of each update returned.
        count_before: ``sum_j r_j (r_j + 1) / 2`` at the start.
        count_after: the same at the end, at most ``independent``.
        equations: number of predictions ``N C``.
        independent: most independent equations found at once. They are singular values above ``tolerance`` of the
            operator on a subspace, so there are no more of them than of the operator itself.
        tolerance: a direction of Frobenius norm 1 that the operator maps to less than this is taken as unseen.
        change: largest absolute change of a contrast of the predictions, recomputed with the operator.
        relative_change: ``change`` over the largest contrast at the start (zero where nothing changed).
        penalty_before: ``sum_j lambda_j ||delta_j||_*``, and the problem's linear term if any, at the start.
        penalty_after: the same at the end.
        stages: null spaces computed.
        seconds: wall-clock time.
    """

    factors: Factors
    ranks_before: dict[str, int]
    ranks_after: dict[str, int]
    count_before: int
    count_after: int
    equations: int
    independent: int
    tolerance: float
    change: float
    relative_change: float
    penalty_before: float
    penalty_after: float
    stages: int
    seconds: float

    @property
    def removed(self) -> int:
        """Ranks removed, over all blocks."""
        return sum(self.ranks_before.values()) - sum(self.ranks_after.values())


def reduce_rank(
    problem: Problem, factors: Factors, *, seed: int = 0, progress: Progress | None = None
) -> RankReduction:
    """Reduce the ranks of an update to ``sum_j r_j (r_j + 1) / 2 <= rank(A)``, without changing a prediction.

    The objective does not rise (Theorem 3.1).

    Works in float64 on the span of the problem's tokens. What the factors have outside of it is dropped, which
    changes no prediction and raises no nuclear norm.

    Args:
        problem: on an operator that holds gradients.
        factors: any factors, ``(m, r)`` and ``(n, r)`` by block, balanced or not; blocks left out are zero.
        seed: seed of the directions drawn where the penalty has no slope, as at an optimum.
        progress: called after every removal with the ranks removed so far and those left.

    Raises:
        SettingError: a matrix-free operator, or factors that do not fit the blocks or are not finite.
    """
    began = time.perf_counter()
    factors = _checked(problem.operator, factors)
    reduced, bases = problem.reduced
    inner, inside = reduced.operator, bases.restrict(factors)
    found, walk, tolerance = _purified(inner, inside, problem.penalty, problem.linear, seed, progress)
    found, whole = bases.lift(found), inner if bases.is_trivial else problem.exact.operator
    return _report(whole, factors, (found, walk, tolerance), problem.penalty, problem.linear, began)


def reduce_factors(
    operator: TangentOperator,
    factors: Factors,
    penalty: float | Mapping[str, float] = 1.0,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> RankReduction:
    """:func:`reduce_rank` for an operator and a penalty, in the operator's own coordinates.

    Raises:
        SettingError: as :func:`reduce_rank`, and for a ``lambda_j`` that is missing or not positive.
    """
    began = time.perf_counter()
    factors = _checked(operator, factors)
    penalties = uniform_penalty(operator, penalty)
    for name in factors:
        if not 0 < penalties.get(name, 0.0) < float("inf"):
            raise SettingError(f"the penalty lambda of {name} must be positive and finite")
    operator = operator.to(torch.float64)
    return _report(operator, factors, _purified(operator, factors, penalties, {}, seed, progress), penalties, {}, began)


def _checked(operator: TangentOperator, factors: Factors) -> Factors:
    """The factors in float64; or a SettingError, also where the operator holds no gradients."""
    if not operator.is_stored:
        raise SettingError(
            f"rank reduction needs a factored or dense operator, not a {type(operator).__name__}: "
            "it works in float64 on stored gradients (capture the network)"
        )
    check_factors(factors, operator)
    return {n: (u.to(operator.device).double(), v.to(operator.device).double()) for n, (u, v) in factors.items()}


def _purified(
    operator: TangentOperator,
    factors: Factors,
    penalty: Mapping[str, float],
    linear: Mapping[str, Tensor],
    seed: int,
    progress: Progress | None,
) -> tuple[Factors, Walk, float]:
    """The reduced factors, how the walk went, and its tolerance."""
    faces = []
    for name, (u, v) in factors.items():
        p, s, q = (x.cpu() for x in thin_svd(u, v))
        rank = _rank(s, operator.shapes[name])
        term = linear[name].cpu() if name in linear else None
        faces.append(Face(name, p[:, :rank], s[:rank], q[:, :rank], penalty[name], term))
    generator = torch.Generator().manual_seed(seed)
    tolerance = 16 * EPS * _frobenius_norm(operator, generator)
    walk = walk_to_extreme_point(operator, faces, tolerance, generator, progress)
    found: Factors = {}
    for face in faces:
        root = face.values.sqrt()
        p, s, q = thin_svd(face.p @ face.basis * root, face.q @ face.basis * root)
        found[face.name] = ((p * s.sqrt()).to(operator.device), (q * s.sqrt()).to(operator.device))
    return found, walk, tolerance


def _frobenius_norm(operator: TangentOperator, generator: torch.Generator) -> float:
    """``||A||_F``, estimated: the mean square of the images of ``u v^T`` with Gaussian ``u`` and ``v``."""
    factors: Factors = {}
    for name, shape in operator.shapes.items():
        u, v = (torch.randn(_PROBES, size, 1, generator=generator, dtype=torch.float64) for size in shape)
        factors[name] = (u.to(operator.device), v.to(operator.device))
    return float(operator.apply_factors(factors).norm()) / math.sqrt(_PROBES)


def _report(
    operator: TangentOperator,
    before: Factors,
    found: tuple[Factors, Walk, float],
    penalty: Mapping[str, float],
    linear: Mapping[str, Tensor],
    began: float,
) -> RankReduction:
    """What was done, measured on the updates before and after."""
    after, walk, tolerance = found
    change = largest = 0.0
    if before:
        start, end = operator.apply_factors(before), operator.apply_factors(after)
        change, largest = float((end - start).abs().max()), float(start.abs().max())

    def penalty_of(factors: Factors) -> float:
        nuclear = sum(penalty[name] * norm for name, norm in nuclear_norms(factors).items())
        return nuclear + sum(float((linear[n] * (u @ v.T)).sum()) for n, (u, v) in factors.items() if n in linear)

    ranks = {name: _rank(thin_svd(u, v)[1], operator.shapes[name]) for name, (u, v) in before.items()}
    return RankReduction(
        factors=after,
        ranks_before=ranks,
        ranks_after=ranks_of(after),
        count_before=unknowns(ranks.values()),
        count_after=unknowns(ranks_of(after).values()),
        equations=operator.n_samples * operator.n_outputs,
        independent=walk.independent,
        tolerance=tolerance,
        change=change,
        relative_change=change / largest if largest > 0 else 0.0,
        penalty_before=penalty_of(before),
        penalty_after=penalty_of(after),
        stages=walk.stages,
        seconds=time.perf_counter() - began,
    )


def _rank(values: Tensor, shape: tuple[int, int]) -> int:
    return int((values > max(shape) * EPS * values[:1]).sum())
