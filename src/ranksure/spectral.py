"""Spectral norms of gradients: an upper bound that is one, and the top pair of what the factors cannot follow.

Small matrices get all singular values. For others the Lanczos iteration on the Gram matrix ``W^T W`` of the smaller
side gives the top pair (a lower bound of the norm), and a Cholesky factorisation of ``b I - W^T W``, ``b`` just above
the square of it, proves that nothing is above. Everything is in float64, scaled to a largest entry of one.

For an ``m x n`` matrix, ``n <= m``, this takes ``m n^2 + n^3 / 3`` multiplications and two ``n x n`` matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SMALL = 96  # smaller side up to which all singular values are cheaper
_SMALL_PAIRS = 1024  # the same where several pairs are wanted
_MARGINS = (1e-6, 1e-4, 1e-2, 1e-1)
_EPS = torch.finfo(torch.float64).eps

Pair = tuple[Tensor, Tensor, Tensor]
"""Unit vectors and a singular value: ``p`` (m,), ``sigma``, ``q`` (n,)."""


def norm_bound(w: Tensor) -> float:
    """An upper bound on ``||w||_op``, within 1e-6 of it as a rule; float64.

    Args:
        w: ``(m, n)``, finite, any dtype, any scale.
    """
    return norms(w, w.new_zeros(w.shape[0], 0), w.new_zeros(w.shape[1], 0))[0]


def top_pair(w: Tensor) -> Pair:
    """Largest singular value with its vectors, float64.

    ``sigma`` is ``||W q||`` for a unit ``q``: a lower bound on the norm, up to rounding, whatever the iteration did.

    Args:
        w: ``(m, n)``, finite.
    """
    return norms(w, w.new_zeros(w.shape[0], 0), w.new_zeros(w.shape[1], 0))[1]


def norms(w: Tensor, left: Tensor, right: Tensor) -> tuple[float, Pair]:
    """An upper bound on ``||w||_op``, and the top pair of ``(I - U U^T) w (I - V V^T)``; float64.

    The Gram matrix of the second is that of the first after changes of low rank: it is formed once.

    Args:
        w: ``(m, n)``, finite, any dtype, any scale.
        left: ``U`` (m, r), orthonormal columns.
        right: ``V`` (n, r), orthonormal columns.
    """
    wide, scale = _scaled(w)
    left, right = left.double(), right.double()
    if min(w.shape) <= _SMALL:
        bound = float(torch.linalg.svdvals(wide)[0]) * (1 + 16 * max(w.shape) * _EPS)
        p, s, qt = torch.linalg.svd(outside(wide, left, right), full_matrices=False)
        return scale * bound, (p[:, 0], scale * s[0], qt[0])
    if w.shape[0] < w.shape[1]:
        bound, (q, sigma, p) = norms(w.T, right, left)
        return bound, (p, sigma, q)
    gram = _gram(wide)
    bound = scale * _proved(gram, len(wide)) if scale > 0 else 0.0
    if left.shape[1] or right.shape[1]:
        reached = left.T @ wide
        gram.addmm_(reached.T, reached, alpha=-1)  # of (I - U U^T) W
        seen = gram @ right
        gram.addmm_(seen, right.T, alpha=-1)
        gram.addmm_(right, right.T @ gram, alpha=-1)
    q = _top_vector(gram)
    q = q - right @ (right.T @ q)
    q = q / q.norm()
    p = wide @ q
    p = p - left @ (left.T @ p)
    sigma = p.norm()
    if float(sigma) > 0:
        p = p / sigma
    else:
        p = _orthogonal(_start(len(p)).to(p), left.T)
        p = p / p.norm()
    return bound, (p, scale * sigma, q)


def top_pairs(w: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest singular values with their vectors: ``p`` (m, k), ``s`` (k,) descending, ``q`` (n, k); float64.

    All pairs of a small matrix; block power iteration for a large one, whose values are lower bounds.

    Args:
        w: ``(m, n)``.
        k: how many; at most ``min(m, n)`` come back.
    """
    wide, scale = _scaled(w)
    k = min(k, *w.shape)
    if min(w.shape) <= _SMALL_PAIRS:
        p, s, qt = torch.linalg.svd(wide, full_matrices=False)
    else:
        q = torch.linalg.qr(_random(wide.shape[1], k + 8).to(wide.device)).Q
        found = torch.zeros(k, dtype=torch.float64, device=wide.device)
        for _ in range(100):
            q, r = torch.linalg.qr(wide.T @ torch.linalg.qr(wide @ q).Q)
            values = torch.linalg.svdvals(r)[:k]
            if bool((values - found <= 1e-9 * values).all()):
                break
            found = values
        p, s, rt = torch.linalg.svd(wide @ q, full_matrices=False)
        qt = rt @ q.T
    return p[:, :k], scale * s[:k], qt[:k].T


def outside_pairs(w: Tensor, left: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`top_pairs` of ``(I - U U^T) w (I - V V^T)``: what factors with these spaces cannot follow.

    Args:
        w: ``(m, n)``.
        left: ``U`` (m, r), orthonormal columns.
        right: ``V`` (n, r), orthonormal columns.
        k: how many.
    """
    w = w.cpu().double() if w.device.type == "mps" else w.double()  # which has no float64
    return top_pairs(outside(w, left.to(w), right.to(w)), k)


def power_of_two(w: Tensor) -> float:
    """The power of two just below the largest entry, by which a matrix is divided without rounding; 1 where it is zero.

    Args:
        w: finite, any shape and dtype.
    """
    largest = float(w.abs().max()) if w.numel() else 0.0
    return 2.0 ** max(math.frexp(largest)[1] - 1, -1022) if largest > 0 else 1.0


def _scaled(w: Tensor) -> tuple[Tensor, float]:
    """The matrix in float64 with a largest entry of one, so that squares neither overflow nor vanish; its scale."""
    scale = float(w.abs().max()) if w.numel() else 0.0
    return (w.double() / scale if scale > 0 else w.double()), scale


def outside(w: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``(I - U U^T) w (I - V V^T)``: the part of ``w`` that factors with these spaces cannot follow."""
    w = w - left @ (left.T @ w)
    return w - (w @ right) @ right.T


def _gram(w: Tensor, parts: int = 4) -> Tensor:
    """``W^T W``, its lower half copied from the upper one: 5/8 of the multiplications."""
    n = w.shape[1]
    out = w.new_empty(n, n)
    step = -(-n // parts)
    for low in range(0, n, step):
        high = min(low + step, n)
        block = w[:, low:high].T @ w[:, low:]
        out[low:high, low:] = block
        out[high:, low:high] = block[:, high - low :].T
    return out


def _proved(gram: Tensor, m: int) -> float:
    """An upper bound on ``||W||_op`` from the computed ``W^T W``, ``W`` of ``m`` rows."""
    n = len(gram)
    # Rounding of the Gram matrix: |error| <= m eps |W|^T |W|, whose norm is at most m eps ||W||_F^2.
    slack = 2 * m * _EPS * float(gram.trace())
    vector = _top_vector(gram)
    estimate = max(float(vector @ (gram @ vector)), 0.0)
    shifted = torch.empty_like(gram)
    for margin in _MARGINS:
        bound = estimate * (1 + margin) ** 2
        torch.neg(gram, out=shifted).diagonal().add_(bound)
        if not bool(torch.linalg.cholesky_ex(shifted).info):
            # A factorisation that succeeds is one of a matrix within (n + 1) eps trace (Higham 2002, theorem 10.3).
            return (bound + slack + 2 * (n + 2) * _EPS * n * bound) ** 0.5 * (1 + 8 * _EPS)
    top = float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0))
    return (top * (1 + 16 * n * _EPS) + slack) ** 0.5 * (1 + 8 * _EPS)


def _top_vector(s: Tensor, most: int = 200, tolerance: float = 1e-6) -> Tensor:
    """Unit vector near the top eigenvector of a positive semidefinite matrix, by Lanczos, fully reorthogonalised.

    Stops when the residual is below ``tolerance`` of the eigenvalue, or after ``most`` steps.
    """
    n = len(s)
    most = min(most, n)
    basis = s.new_zeros(most, n)
    small = torch.zeros(most, most, dtype=torch.float64)  # tridiagonal, on the CPU
    x = _start(n).to(s)
    used = 0
    y = torch.ones(1, dtype=torch.float64)
    while used < most:
        basis[used] = x
        w = s @ x
        small[used, used] = float(x @ w)
        used += 1
        w = _orthogonal(w, basis[:used])
        beta = float(w.norm())
        if used % 4 == 0 or used == most or beta <= 1e-14 * float(small[0, 0].abs()):
            values, vectors = torch.linalg.eigh(small[:used, :used])
            y = vectors[:, -1]
            if beta * abs(float(y[-1])) <= tolerance * abs(float(values[-1])) or used == most:
                break
        small[used, used - 1] = small[used - 1, used] = beta
        x = w / beta
    found = y.to(s) @ basis[: len(y)]
    return found / found.norm()


def _orthogonal(x: Tensor, basis: Tensor) -> Tensor:
    """``x`` without its part in the span of orthonormal rows; twice is enough."""
    for _ in range(2):
        x = x - (basis @ x) @ basis
    return x


def _start(n: int) -> Tensor:
    x = _random(n, 1)[:, 0]
    return x / x.norm()


def _random(n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
