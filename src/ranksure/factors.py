"""Updates as factors ``u v^T``: their balanced form, and what can be read off it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Delta: TypeAlias = dict[str, Tensor]
"""Block name -> dense update, shape ``(m, n)``."""

Factors: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""Block name -> ``(u, v)`` of shapes ``(m, r)`` and ``(n, r)``; the update is ``u v^T``.

Operators also take a leading batch dimension of starts: ``(S, m, r)`` and ``(S, n, r)``.
"""


def balanced(factors: Factors, drop: float = 1e-10) -> Factors:
    """The same updates, unbatched, with ``u^T u = v^T v`` diagonal and columns by size.

    Singular values below the share ``drop`` of the largest of all blocks go.
    """
    parts = {name: thin_svd(u, v) for name, (u, v) in factors.items()}
    largest = max((float(s[0]) for _, s, _ in parts.values() if len(s)), default=0.0)
    out: Factors = {}
    for name, (p, s, q) in parts.items():
        keep = s > drop * largest if largest > 0 else torch.zeros_like(s, dtype=torch.bool)
        root = s[keep].sqrt()
        out[name] = (p[:, keep] * root, q[:, keep] * root)
    return out


def singular_values(factors: Factors) -> dict[str, Tensor]:
    """Singular values of each update, largest first."""
    return {name: thin_svd(u, v)[1] for name, (u, v) in factors.items()}


def truncated(factors: Factors, ranks: dict[str, int]) -> Factors:
    """Best approximation of each update by one of the given rank (blocks not named keep theirs)."""
    parts = balanced(factors, drop=0.0)
    kept = {name: ranks.get(name, u.shape[1]) for name, (u, _) in parts.items()}
    return {name: (u[:, : kept[name]], v[:, : kept[name]]) for name, (u, v) in parts.items()}


def multiplied(factors: Factors, by: Mapping[str, float]) -> Factors:
    """Updates times positive numbers by block, shared by both factors."""
    roots = {name: math.sqrt(scale) for name, scale in by.items()}
    return {name: (u * r, v * r) if (r := roots.get(name)) else (u, v) for name, (u, v) in factors.items()}


def thin_svd(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(p, s, q)`` with ``u v^T = p diag(s) q^T``, from two QR factorisations."""
    if u.shape[1] == 0:
        return u, u.new_zeros(0), v
    qu, ru = torch.linalg.qr(u)
    qv, rv = torch.linalg.qr(v)
    p, s, qt = torch.linalg.svd(ru @ rv.T, full_matrices=False)
    return qu @ p, s, qv @ qt.T


def ranks_of(factors: Factors) -> dict[str, int]:
    """Number of columns of each block's factors."""
    return {name: u.shape[-1] for name, (u, _) in factors.items()}


def nuclear_norms(factors: Factors) -> dict[str, float]:
    """Nuclear norm of each update ``u v^T``, in float64."""
    out: dict[str, float] = {}
    for name, (u, v) in factors.items():
        if u.shape[1] == 0:
            out[name] = 0.0
            continue
        ru = torch.linalg.qr(u.double(), mode="r").R
        rv = torch.linalg.qr(v.double(), mode="r").R
        out[name] = float(torch.linalg.svdvals(ru @ rv.T).sum())
    return out


class FactorLayout:
    """Maps factors of given ranks to rows of a matrix ``(S, D)`` and back; blocks of rank 0 are left out."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> None:
        self.parts: dict[str, tuple[int, int, int, int]] = {}
        low = 0
        for name, rank in ranks.items():
            if rank == 0:
                continue
            m, n = shapes[name]
            self.parts[name] = (low, m, n, rank)
            low += (m + n) * rank
        self.size = low

    def flatten(self, factors: Factors) -> Tensor:
        """``(S, D)`` from batched factors, ``(1, D)`` from single ones."""
        rows = [part.reshape(part.shape[0] if part.dim() == 3 else 1, -1) for n in self.parts for part in factors[n]]
        return torch.cat(rows, 1)

    def unflatten(self, x: Tensor) -> Factors:
        """Views into ``x``; a single start gives unbatched factors."""
        lead = () if x.shape[0] == 1 else (x.shape[0],)
        out: Factors = {}
        for name, (low, m, n, rank) in self.parts.items():
            mid, high = low + m * rank, low + (m + n) * rank
            out[name] = (x[:, low:mid].reshape(*lead, m, rank), x[:, mid:high].reshape(*lead, n, rank))
        return out
