"""The base class of tangent operators, whose defaults need no more than a product and its adjoint.

A tangent operator is the linear map ``A`` from block updates to contrasts of the linearised logits:
``A(delta)_ic = sum_j <G_ijc, delta_j>``, where ``G_ijc`` is the gradient of contrast ``c`` of sample
``i`` with respect to block ``j``. Blocks are addressed by the module's qualified name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from ranksure.errors import SettingError
from ranksure.factors import Delta, Factors
from ranksure.operators.span import SpanBases

Pullback: TypeAlias = Callable[[Tensor], Factors]


class TangentOperator:
    """Linear map from block updates to contrasts of logits; every operator agrees with the dense one in float64.

    A new operator hands its sizes to ``super().__init__`` and writes :meth:`apply` and :meth:`adjoint`, or
    :meth:`apply_factors_vjp` alone. The rest follows: where single gradients are asked for, by the adjoints of unit
    vectors, which is right and slow. Override what can be had faster.

    Args:
        shapes: block shapes ``(m, n)`` by name.
        n_samples: ``N``.
        n_outputs: number of contrasts ``C`` per sample.
        dtype: of updates, factors and residuals.
        device: where they are.
    """

    is_stored: ClassVar[bool] = True
    """Whether gradients are at hand, so that another dtype or fewer samples are a matter of arithmetic."""

    stored_as: ClassVar[Callable[[Mapping[str, Tensor]], TangentOperator]]
    """Makes an operator of gradients ``(N, C, m, n)`` by block; set where the dense operator is defined."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        n_samples: int,
        n_outputs: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shapes = dict(shapes)
        self.n_samples, self.n_outputs = n_samples, n_outputs
        self.dtype, self.device = dtype, device

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = {
            n for n in ("apply", "adjoint", "apply_factors_vjp") if getattr(cls, n) is not getattr(TangentOperator, n)
        }
        if not ({"apply", "adjoint"} <= own or "apply_factors_vjp" in own):
            raise TypeError(f"{cls.__name__} must define apply and adjoint, or apply_factors_vjp")

    # ---- the map and its adjoint

    def apply(self, delta: Delta) -> Tensor:
        """``A(delta)``, shape ``(N, C)``, for dense updates (absent blocks count as zero)."""
        if not delta:
            return self.zeros(self.n_samples, self.n_outputs)
        return self.apply_factors({name: (d, torch.eye(d.shape[1]).to(d)) for name, d in delta.items()})

    def adjoint(self, residual: Tensor) -> Delta:
        """``A_j^*(R) = sum_ic R_ic G_ijc`` for ``R`` of shape ``(N, C)``; each ``(m, n)``."""
        units = {name: (z := self.zeros(m, n), torch.eye(n).to(z)) for name, (m, n) in self.shapes.items()}
        return {name: gradient for name, (gradient, _) in self.apply_factors_vjp(units)[1](residual).items()}

    def apply_factors(self, factors: Factors) -> Tensor:
        """``A(u v^T)``, shape ``(N, C)``, or ``(S, N, C)`` for batched factors; at least one block."""
        return self.apply_factors_vjp(factors)[0]

    def apply_factors_vjp(self, factors: Factors) -> tuple[Tensor, Pullback]:
        """``A(u v^T)`` and the map from ``R`` to ``(A_j^*(R) v_j, A_j^*(R)^T u_j)``."""
        first = next(iter(factors.values()))[0]
        if first.dim() == 2:
            z = self.apply({name: u @ v.T for name, (u, v) in factors.items()})
        else:
            each = ({name: u[s] @ v[s].T for name, (u, v) in factors.items()} for s in range(first.shape[0]))
            z = torch.stack([self.apply(delta) for delta in each])

        def pullback(residual: Tensor) -> Factors:
            if residual.dim() == 2:
                grads = self.adjoint(residual)
            else:
                each = [self.adjoint(r) for r in residual]
                grads = {name: torch.stack([g[name] for g in each]) for name in factors}
            return {name: (grads[name] @ v, grads[name].mT @ u) for name, (u, v) in factors.items()}

        return z, pullback

    # ---- single gradients

    def _unit_adjoints(self) -> Iterator[Delta]:
        """The gradients ``G_ic`` of every block, contrast by contrast."""
        size = self.n_samples * self.n_outputs
        for index in range(size):
            unit = self.zeros(size)
            unit[index] = 1
            yield self.adjoint(unit.view(self.n_samples, -1))

    def jacobians(self) -> dict[str, Tensor]:
        """Every gradient ``G_ic``, ``(N, C, m, n)`` by block: :attr:`dense_nbytes` in all."""
        rows: dict[str, list[Tensor]] = {name: [] for name in self.shapes}
        for grads in self._unit_adjoints():
            for name, g in grads.items():
                rows[name].append(g)
        size = (self.n_samples, self.n_outputs)
        return {name: torch.stack(gs).view(*size, *self.shapes[name]) for name, gs in rows.items()}

    def jacobian_products(self, name: str, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``G_ic v`` and ``G_ic^T u`` for vectors ``u`` (m,) and ``v`` (n,): ``(N C, m)`` and ``(N C, n)``."""
        pairs = [(g[name] @ v, g[name].T @ u) for g in self._unit_adjoints()]
        return torch.stack([left for left, _ in pairs]), torch.stack([right for _, right in pairs])

    def core_products(self, name: str, u: Tensor, v: Tensor) -> Tensor:
        """``u^T G_ic v`` for ``u`` (m, p) and ``v`` (n, q), every sample and contrast: ``(N C, p, q)``."""
        return torch.stack([u.T @ (g[name] @ v) for g in self._unit_adjoints()])

    def gram(self, blocks: Sequence[str] | None = None) -> Tensor:
        """``A A^*`` over the named blocks (default: all), ``(N C, N C)``, float64."""
        chosen = blocks or list(self.shapes)
        return torch.stack([self.apply({n: g[n] for n in chosen}).double().flatten() for g in self._unit_adjoints()])

    def sample_norms(self) -> dict[str, Tensor]:
        """Frobenius norms ``||G_ijc||_F`` by block, each ``(N, C)``, float64."""
        norms: dict[str, list[Tensor]] = {name: [] for name in self.shapes}
        for grads in self._unit_adjoints():
            for name, grad in grads.items():
                norms[name].append(grad.double().norm())
        return {name: torch.stack(values).view(self.n_samples, -1) for name, values in norms.items()}

    def adjoint_error(self, residual: Tensor) -> dict[str, float]:
        """Upper bound on the rounding error of :meth:`adjoint` in spectral norm, by block.

        The default holds for a sum over gradients that are exact; override it where they are sums themselves.
        """
        gamma = (residual.numel() + 2) * torch.finfo(self.dtype).eps
        weight = residual.double().abs()
        return {name: gamma * float((weight * norms).sum()) for name, norms in self.sample_norms().items()}

    # ---- other forms of the same map

    def stored(self) -> TangentOperator:
        """The same map with every gradient stored.

        Raises:
            SettingError: the operator holds none (:attr:`is_stored`).
        """
        if not self.is_stored:
            raise SettingError(
                f"a {type(self).__name__} stores no gradients, so it has no other dtype than {self.dtype}, no batches "
                "of samples and no change of basis: capture the network for these"
            )
        return type(self).stored_as(self.jacobians())

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> TangentOperator:
        """The same operator in another dtype or on another device (itself if nothing changes)."""
        if (dtype or self.dtype) == self.dtype and torch.device(device or self.device) == self.device:
            return self
        return self.stored().to(dtype, device)

    def select(self, samples: Tensor) -> TangentOperator:
        """The operator of a subset of samples, in the order given (distinct indices)."""
        return self.stored().select(samples)

    def restrict(self, blocks: Sequence[str]) -> TangentOperator:
        """The operator of a subset of blocks."""
        return self.stored().restrict(blocks)

    def congruent(self, maps: Mapping[str, tuple[Tensor, Tensor]]) -> TangentOperator:
        """The operator with every gradient ``G`` of a named block replaced by ``L G R^T``, for ``(L, R)``."""
        return self.stored().congruent(maps)

    def scaled(self, by: Mapping[str, float]) -> TangentOperator:
        """The operator with every gradient of a named block times a number."""
        return self.stored().scaled(by)

    def reduced(self) -> tuple[TangentOperator, SpanBases]:
        """The same problem on smaller blocks where that is exact, in float64 where it can be, and the way back."""
        return (self.to(torch.float64) if self.is_stored else self), SpanBases()

    def for_dense_updates(self, most_bytes: int) -> TangentOperator:
        """The form of this map, of at most that size, whose products with dense updates are fastest."""
        return self

    # ---- sizes

    def zeros(self, *shape: int) -> Tensor:
        """Zeros in the operator's dtype and on its device."""
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0

    @property
    def dense_nbytes(self) -> int:
        """Bytes that stored gradients of the same dtype would take."""
        per_sample = sum(m * n for m, n in self.shapes.values())
        return self.n_samples * self.n_outputs * per_sample * torch.finfo(self.dtype).bits // 8

    @property
    def multiplications(self) -> float:
        """Of a product with factors of rank one; infinite where that is not known."""
        return math.inf


def zero_factors(operator: TangentOperator, rank: int = 0) -> Factors:
    """Factors of that rank, all zero, one pair per block."""
    return {name: (operator.zeros(m, rank), operator.zeros(n, rank)) for name, (m, n) in operator.shapes.items()}


def check_factors(factors: Factors, operator: TangentOperator) -> None:
    """Refuse unbatched factors that do not fit the operator's blocks.

    Raises:
        SettingError: an unknown block, wrong shapes, or values that are not finite.
    """
    for name, (u, v) in factors.items():
        if name not in operator.shapes:
            raise SettingError(f"the factors name a block {name} that the operator does not have: they do not fit")
        m, n = operator.shapes[name]
        if u.dim() != 2 or v.dim() != 2 or u.shape != (m, u.shape[1]) or v.shape != (n, u.shape[1]):
            shapes = f"{tuple(u.shape)} and {tuple(v.shape)}, not ({m}, r) and ({n}, r)"
            raise SettingError(f"the factors of {name} are {shapes}: they do not fit")
        if not (bool(torch.isfinite(u).all()) and bool(torch.isfinite(v).all())):
            raise SettingError(f"the factors of {name} are not finite")


def cast_factors(factors: Factors, like: TangentOperator) -> Factors:
    """Factors in the operator's dtype and on its device."""
    return {name: (u.to(like.device, like.dtype), v.to(like.device, like.dtype)) for name, (u, v) in factors.items()}
