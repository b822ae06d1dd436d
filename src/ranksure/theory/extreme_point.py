"""The walk to an extreme point of ``{X >= 0 : L(X) = L(X_0)}``, the core of rank reduction.

``L(X)_ic = sum_j <P_j^T G_ijc Q_j, X_j>`` for fixed orthonormal ``P_j``, ``Q_j``, and symmetric ``X_j``. See
:mod:`ranksure.theory.rank_reduction` and docs/theory/rank-reduction.md.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ranksure.operators.base import TangentOperator
from ranksure.theory.null_space import null_basis, orthogonal_to, smat, svec, symmetric

EPS = torch.finfo(torch.float64).eps
_WIDTH = 1.5  # unknowns of a stage, as a multiple of the equations
_SPARE = 256  # and at least this many more than the equations
_FLAT = 1e-9  # slopes below this share of the steepest conceivable one count as none


@dataclass(frozen=True)
class Walk:
    """How a walk went."""

    independent: int  # most independent equations met in a stage
    stages: int  # null spaces computed


class Face:
    """One block: ``delta = P X Q^T`` with ``X`` inside a face, and the columns that have not joined yet.

    ``p`` and ``q`` are orthonormal, ``(m, r0)`` and ``(n, r0)``, and fixed within a stage. The face is given by the
    orthonormal columns of ``basis`` ``(r0, r)``: ``X = basis diag(values) basis^T`` with positive, ascending values.

    Args:
        name: the block.
        p: left singular vectors, ``(m, r)``.
        values: positive singular values, largest first.
        q: right singular vectors, ``(n, r)``.
        penalty: ``lambda_j``.
        linear: the objective's linear term, ``(m, n)``, or None.
    """

    def __init__(
        self, name: str, p: Tensor, values: Tensor, q: Tensor, penalty: float, linear: Tensor | None = None
    ) -> None:
        self.name, self.penalty, self.linear = name, penalty, linear
        self.waiting = (p, values, q)
        self.p, self.values, self.q = p[:, :0], values[:0], q[:, :0]
        self.basis = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def rank(self) -> int:
        return len(self.values)

    @property
    def n_waiting(self) -> int:
        return len(self.waiting[1])

    @property
    def unknowns(self) -> int:
        """Coordinates of this stage's symmetric matrices."""
        r = self.p.shape[1]
        return r * (r + 1) // 2

    def join(self, count: int) -> None:
        """Begin a stage: fold the face into ``p`` and ``q``, and add the next columns."""
        (p, s, q), now = self.waiting, (self.p @ self.basis, self.values, self.q @ self.basis)
        self.p, self.values, self.q = (
            torch.cat([now[0], p[:, :count]], 1),
            torch.cat([now[1], s[:count]]),
            torch.cat([now[2], q[:, :count]], 1),
        )
        self.waiting = (p[:, count:], s[count:], q[:, count:])
        self.basis = torch.eye(self.rank, dtype=torch.float64)

    def cost(self) -> Tensor:
        """Coordinates of ``C``, the penalty being ``<C, X>``."""
        cost = self.penalty * torch.eye(self.p.shape[1], dtype=torch.float64)
        return svec(cost if self.linear is None else cost + symmetric(self.p.T @ self.linear @ self.q))

    def restrict(self, direction: Tensor) -> Tensor:
        """``S`` of these coordinates, on the face: ``(r, r)``."""
        return self.basis.T @ smat(direction, self.p.shape[1]) @ self.basis

    def step_to_boundary(self, s: Tensor) -> float:
        """Largest ``t`` with ``X + t S`` positive semidefinite."""
        root = self.values.rsqrt()
        lowest = float(torch.linalg.eigvalsh(root[:, None] * s * root)[0]) if self.rank else 0.0
        return -1 / lowest if lowest < 0 else math.inf

    def move(self, step: Tensor) -> None:
        """``X`` plus a symmetric ``(r, r)`` matrix on the face."""
        self.values, rotation = torch.linalg.eigh(torch.diag(self.values) + step)
        self.basis = self.basis @ rotation

    def drop(self, cut: float) -> Tensor | None:
        """Leave the directions ``w`` with eigenvalues up to ``cut``; if any, the equations ``S w = 0`` as rows."""
        count = int((self.values <= cut).sum())
        if count == 0:
            return None
        a, b = torch.triu_indices(self.p.shape[1], self.p.shape[1])
        face, kernel = self.basis, self.basis[:, :count]
        rows = face[a][:, :, None] * kernel[b][:, None, :] + face[b][:, :, None] * kernel[a][:, None, :]
        rows *= torch.tensor([math.sqrt(0.5), 0.5], dtype=torch.float64)[(a == b).long()][:, None, None]
        self.values, self.basis = self.values[count:], face[:, count:]
        return rows.flatten(1).T


def walk_to_extreme_point(
    operator: TangentOperator,
    faces: Sequence[Face],
    tolerance: float,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> Walk:
    """Move the faces' points, in place, to one where no direction is left that the operator (in float64) does not see.

    A direction of norm 1 that the operator maps to at most ``tolerance`` counts as unseen; ``generator`` draws them
    where the penalty has no slope. ``progress`` is called after every removal with the ranks removed and those left.
    """
    start = sum(face.n_waiting for face in faces)
    equations, independent, stages = operator.n_samples * operator.n_outputs, 0, 0
    while True:
        _join(faces, equations)
        columns = [torch.zeros(equations, 0, dtype=torch.float64)]
        for face in faces:
            if face.rank:
                p, q = face.p.to(operator.device), face.q.to(operator.device)
                columns.append(svec(symmetric(operator.core_products(face.name, p, q))).cpu())
        null, rank = null_basis(torch.cat(columns, 1), tolerance)
        del columns
        independent, stages = max(independent, rank), stages + 1
        if null.shape[1] == 0 and not any(face.n_waiting for face in faces):
            return Walk(independent, stages)
        cost = torch.cat([face.cost() for face in faces])
        while null.shape[1]:
            null = _remove(faces, null, cost, generator)
            if progress is not None:
                left = sum(face.rank + face.n_waiting for face in faces)
                progress(start - left, left)


def _join(faces: Sequence[Face], equations: int) -> None:
    """Begin a stage: let columns join, the smallest face first, until there are enough unknowns.

    The null space of a stage is an (unknowns x (unknowns - equations)) matrix: with all columns at once it could
    not be stored, and with few more unknowns than equations it would be computed too often.
    """
    limit = equations + max(int((_WIDTH - 1) * equations), _SPARE)
    ranks = [face.rank for face in faces]
    unknowns = sum(r * (r + 1) // 2 for r in ranks)
    heap = [(r, index) for index, (r, face) in enumerate(zip(ranks, faces, strict=True)) if face.n_waiting]
    heapq.heapify(heap)
    while heap and (unknowns + heap[0][0] < limit or unknowns <= equations):
        r, index = heapq.heappop(heap)
        unknowns += r + 1
        ranks[index] += 1
        if ranks[index] < faces[index].rank + faces[index].n_waiting:
            heapq.heappush(heap, (r + 1, index))
    for rank, face in zip(ranks, faces, strict=True):
        face.join(rank - face.rank)


def _remove(faces: Sequence[Face], null: Tensor, cost: Tensor, generator: torch.Generator) -> Tensor:
    """Walk to the boundary of the face and onto it; the null basis of ``L`` on the smaller face."""
    slope = null.T @ cost
    if float(slope.norm()) > _FLAT * float(cost.norm()):
        along = slope  # steepest descent of the penalty
    else:
        along = torch.randn(slope.shape, generator=generator, dtype=torch.float64)
        along = along if float(along @ slope) >= 0 else -along
    direction = -(null @ (along / along.norm()))
    sizes = [face.unknowns for face in faces]
    moves = [face.restrict(part) for face, part in zip(faces, direction.split(sizes), strict=True)]

    # A slope that is not positive means that some S_j is not positive semidefinite, so one step is finite.
    steps = [face.step_to_boundary(s) for face, s in zip(faces, moves, strict=True)]
    t = min(steps)
    first = steps.index(t)
    scale = max(float(face.values[-1]) for face in faces if face.rank)
    t = _polished(faces[first].values, moves[first], t, 8 * EPS * scale)
    for face, s in zip(faces, moves, strict=True):
        face.move(t * s)
    scale = max(scale, *(float(face.values[-1]) for face in faces if face.rank))
    cut = max(64 * EPS * scale, float(faces[first].values[0]))  # the step's own eigenvalue is zero by definition

    equations = []
    for face, part in zip(faces, null.split(sizes), strict=True):
        rows = face.drop(cut if face is faces[first] else 64 * EPS * scale)
        if rows is not None:
            equations.append(rows @ part)
    return orthogonal_to(null, torch.cat(equations))


def _polished(values: Tensor, s: Tensor, t: float, accuracy: float) -> float:
    """Newton's method for the zero of the lowest eigenvalue of ``diag(values) + t S``, which is concave in ``t``."""
    for _ in range(20):
        lowest, vectors = torch.linalg.eigh(torch.diag(values) + t * s)
        rate = float(vectors[:, 0] @ s @ vectors[:, 0])
        if abs(float(lowest[0])) <= accuracy or rate >= 0:
            break
        t -= float(lowest[0]) / rate
    return t
