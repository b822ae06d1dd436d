"""Spectral norms of large gradients: an upper bound that is one, and the top pair beside it.

Small matrices get all singular values. For large ones an iteration gives the top pair (a lower bound of
the norm), and a Cholesky factorisation of ``(sigma (1 + e))^2 I - W^T W`` proves that nothing is above.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL = 1024
_MARGINS = (1e-6, 1e-4, 1e-2, 1e-1)


def norm_bound(w: Tensor) -> float:
    """An upper bound on ``||w||_op``, within 1e-6 of it as a rule; float64.

    Raises:
        RuntimeError: never for finite ``w``: where no factorisation succeeds all eigenvalues are computed.
    """
    eps = torch.finfo(torch.float64).eps
    inflation = 1 + 16 * max(w.shape) * eps
    wide = w.double()
    if min(w.shape) <= _SMALL:
        return float(torch.linalg.svdvals(wide)[0]) * inflation
    tall = wide if wide.shape[0] >= wide.shape[1] else wide.T
    gram = tall.T @ tall
    # The Gram matrix is wrong by at most about m eps ||w||_F^2, the factorisation by n eps of its trace.
    slack = 4 * sum(w.shape) * eps * float(torch.trace(gram))
    sigma = float(top_pair(wide)[1])
    for margin in _MARGINS:
        bound = (sigma * (1 + margin)) ** 2
        shifted = -gram
        shifted.diagonal().add_(bound)
        _, failed = torch.linalg.cholesky_ex(shifted)
        if not bool(failed):
            return (bound + slack) ** 0.5
    return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0) + slack) ** 0.5


def top_pair(w: Tensor, iterations: int = 100, tolerance: float = 1e-9) -> tuple[Tensor, Tensor, Tensor]:
    """Largest singular value with its vectors ``(p, sigma, q)``; for large matrices by block power iteration.

    ``sigma = p^T w q`` is a lower bound on the norm whatever the iteration did.
    """
    wide = w.double()
    if min(w.shape) <= _SMALL:
        p, s, qt = torch.linalg.svd(wide, full_matrices=False)
        return p[:, 0], s[0], qt[0]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(wide.shape[1], 8, generator=generator, dtype=torch.float64).to(wide.device)
    q = torch.linalg.qr(q).Q
    sigma = torch.zeros((), dtype=torch.float64)
    for _ in range(iterations):
        p = torch.linalg.qr(wide @ q).Q
        q, r = torch.linalg.qr(wide.T @ p)
        found = torch.linalg.matrix_norm(r, 2)
        if bool(found - sigma <= tolerance * found):
            break
        sigma = found
    left, s, rt = torch.linalg.svd(wide @ q, full_matrices=False)
    return left[:, 0], s[0], q @ rt[0]
