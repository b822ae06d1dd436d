"""Null spaces to rounding, kept up to date while they shrink, and coordinates of symmetric matrices."""

from __future__ import annotations

import math
from typing import Any

import scipy.linalg
import torch
from torch import Tensor

_ROW_TOLERANCE = 1e-13
_ROOT = torch.tensor(2.0, dtype=torch.float64).sqrt()


def null_basis(rows: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """Orthonormal basis ``(D, k)`` of the null space of a matrix ``(d, D)``, float64, and its rank ``D - k``.

    With more unknowns than equations most of it comes from a QR factorisation without pivoting, which is accurate to
    rounding whatever the condition. Only a triangle that looks singular is factorised with pivots: what it maps to less
    than ``tolerance`` (a Frobenius norm) is added.
    """
    d, unknowns = rows.shape
    if unknowns <= d:
        # rows w = Q (upper w), so what is sought is what the lower triangle's transpose maps to zero.
        null = _left_null_basis(torch.linalg.qr(rows, mode="r").R.T, tolerance, "L")
        return null, unknowns - null.shape[1]
    packed, scales = torch.geqrf(rows.T)
    dependent = _left_null_basis(packed[:d].triu(), tolerance, "U")
    extra = dependent.shape[1]
    null = torch.zeros(unknowns, extra + unknowns - d, dtype=torch.float64)
    null[:d, :extra] = dependent
    null[d:, extra:].fill_diagonal_(1)
    return torch.ormqr(packed, scales, null).contiguous(), d - extra


def orthogonal_to(null: Tensor, rows: Tensor) -> Tensor:
    """``null`` ``(D, k)`` times an orthonormal basis of what ``rows`` ``(q, k)`` maps to zero, by Householder
    reflections.

    In place: the result ``(D, k - rank(rows))`` is a view of ``null``. Rows that depend on the others cost no column.
    """
    factored: Any = scipy.linalg.qr(rows.T.numpy(), mode="raw", pivoting=True)
    (packed, scales), upper, _ = factored
    rank = int((abs(upper.diagonal()) > _ROW_TOLERANCE).sum())
    scales = torch.from_numpy(scales[:rank])
    v = torch.from_numpy(packed[:, :rank]).tril(-1)
    v.diagonal().fill_(1)
    v, scales = v[:, scales != 0], scales[scales != 0]
    # The product is I - V T V^T; T^-1 is the upper triangle of V^T V with 1 / scales on its diagonal.
    inverse = (v.T @ v).triu(1) + torch.diag(1 / scales)
    kept = null[:, rank:]
    return kept.addmm_(null @ v, torch.linalg.solve_triangular(inverse, v[rank:].T, upper=True), alpha=-1)


def _left_null_basis(triangle: Tensor, tolerance: float, side: str) -> Tensor:
    """Orthonormal ``w`` with ``||triangle^T w||_F <= tolerance``; ``side`` says which triangle, ``U`` or ``L``."""
    size = triangle.shape[0]
    if size == 0:
        return triangle
    # The estimate of the 1-norm of the inverse is from below, seldom by a factor of more than 3.
    (trcon,) = scipy.linalg.get_lapack_funcs(("trcon",), dtype="float64")
    reciprocal = trcon(triangle.numpy(), uplo=side)[0]
    if reciprocal * float(triangle.abs().sum(0).max()) / math.sqrt(size) > 10 * tolerance:
        return triangle.new_zeros(size, 0)  # a lower bound of the least singular value, with room for the estimate
    factored: Any = scipy.linalg.qr(triangle.numpy(), pivoting=True)
    q, upper, _ = factored
    tails = torch.from_numpy(upper).square().sum(1).flip(0).cumsum(0).flip(0).sqrt()
    return torch.from_numpy(q[:, int((tails > tolerance).sum()) :])


def svec(x: Tensor) -> Tensor:
    """Symmetric ``(..., r, r)`` as ``(..., r (r + 1) / 2)``, inner products kept."""
    a, b = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    return x[..., a, b] * torch.where(a == b, 1.0, _ROOT.to(x.device))


def smat(vector: Tensor, r: int) -> Tensor:
    """The inverse of :func:`svec`, for one vector."""
    a, b = torch.triu_indices(r, r)
    out = torch.zeros(r, r, dtype=torch.float64)
    out[a, b] = vector * torch.where(a == b, 0.5, 1 / _ROOT)
    return out + out.T


def symmetric(x: Tensor) -> Tensor:
    """Symmetric part."""
    return (x + x.mT) / 2
