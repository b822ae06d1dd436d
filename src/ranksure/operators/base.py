"""The protocol of tangent operators, and the types that solvers exchange.

A tangent operator is the linear map ``A`` from block updates to contrasts of the linearised logits:
``A(delta)_ic = sum_j <G_ijc, delta_j>``, where ``G_ijc`` is the gradient of contrast ``c`` of sample
``i`` with respect to block ``j``. Blocks are addressed by the module's qualified name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ranksure.factors import Delta, Factors

Pullback: TypeAlias = Callable[[Tensor], Factors]


class TangentOperator(Protocol):
    """Linear map from block updates to contrasts of logits; every implementation agrees in float64."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Block shapes ``(m, n)`` by name."""
        ...

    @property
    def n_samples(self) -> int: ...

    @property
    def n_outputs(self) -> int:
        """Number of contrasts ``C`` per sample."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def apply(self, delta: Delta) -> Tensor:
        """``A(delta)``, shape ``(N, C)``, for dense updates (absent blocks count as zero)."""
        ...

    def apply_factors(self, factors: Factors) -> Tensor:
        """``A(u v^T)``, shape ``(N, C)``, or ``(S, N, C)`` for batched factors."""
        ...

    def apply_factors_vjp(self, factors: Factors) -> tuple[Tensor, Pullback]:
        """``A(u v^T)`` and the map from ``R`` to ``(A_j^*(R) v_j, A_j^*(R)^T u_j)``."""
        ...

    def adjoint(self, residual: Tensor) -> Delta:
        """``A_j^*(R) = sum_ic R_ic G_ijc`` for ``R`` of shape ``(N, C)``; each ``(m, n)``."""
        ...

    def gram(self, blocks: list[str] | None = None) -> Tensor:
        """``A A^*`` over the named blocks (default: all), shape ``(N C, N C)``."""
        ...

    def sample_norms(self) -> dict[str, Tensor]:
        """Frobenius norms ``||G_ijc||_F`` by block, each ``(N, C)``."""
        ...

    def adjoint_error(self, residual: Tensor) -> dict[str, float]:
        """Upper bound on the rounding error of :meth:`adjoint` in spectral norm, by block."""
        ...


def zero_factors(operator: TangentOperator, rank: int = 0, dtype: torch.dtype | None = None) -> Factors:
    """Factors of that rank, all zero, one pair per block."""
    dtype = dtype or operator.dtype
    return {
        name: (
            torch.zeros(m, rank, dtype=dtype, device=operator.device),
            torch.zeros(n, rank, dtype=dtype, device=operator.device),
        )
        for name, (m, n) in operator.shapes.items()
    }


def cast_factors(factors: Factors, like: TangentOperator) -> Factors:
    """Factors in the operator's dtype and on its device."""
    return {name: (u.to(like.device, like.dtype), v.to(like.device, like.dtype)) for name, (u, v) in factors.items()}
