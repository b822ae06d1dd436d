"""The dense operator: every ``G_ijc`` stored. The oracle for tests and the classical baseline."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ranksure.factors import Delta, Factors
from ranksure.operators.base import Pullback, TangentOperator

_CHUNK_BYTES = 256 << 20


class DenseOperator:
    """Tangent operator with stored Jacobians.

    Args:
        jacobians: block name -> gradients ``G``, shape ``(N, C, m, n)``.
    """

    def __init__(self, jacobians: Mapping[str, Tensor]) -> None:
        if not jacobians:
            raise ValueError("a tangent operator needs at least one block")
        self.jacobians = dict(jacobians)
        first = next(iter(self.jacobians.values()))
        self.n_samples, self.n_outputs = first.shape[0], first.shape[1]
        self.dtype, self.device = first.dtype, first.device
        self.shapes = {name: (g.shape[2], g.shape[3]) for name, g in self.jacobians.items()}

    @classmethod
    def from_operator(cls, operator: TangentOperator) -> DenseOperator:
        """Store another operator densely, one adjoint per sample and contrast (small sizes only).

        It shares no code with :meth:`~ranksure.operators.factored.FactoredOperator.jacobians`, the fast way.
        """
        n, c = operator.n_samples, operator.n_outputs
        rows: dict[str, list[Tensor]] = {name: [] for name in operator.shapes}
        for index in range(n * c):
            unit = torch.zeros(n * c, dtype=operator.dtype, device=operator.device)
            unit[index] = 1
            for name, g in operator.adjoint(unit.view(n, c)).items():
                rows[name].append(g)
        return cls({name: torch.stack(gs).view(n, c, *operator.shapes[name]) for name, gs in rows.items()})

    def to(self, dtype: torch.dtype) -> DenseOperator:
        """The same operator in another dtype."""
        return DenseOperator({name: g.to(dtype) for name, g in self.jacobians.items()})

    def congruent(self, maps: Mapping[str, tuple[Tensor, Tensor]]) -> DenseOperator:
        """The operator with every gradient ``G`` of a named block replaced by ``L G R^T``, for ``(L, R)``."""
        moved = {name: left @ self.jacobians[name] @ right.T for name, (left, right) in maps.items()}
        return DenseOperator({**self.jacobians, **moved})

    def apply(self, delta: Delta) -> Tensor:
        z = torch.zeros(self.n_samples * self.n_outputs, dtype=self.dtype, device=self.device)
        for name, d in delta.items():
            z += self._rows(name) @ d.reshape(-1)
        return z.view(self.n_samples, self.n_outputs)

    def apply_factors(self, factors: Factors) -> Tensor:
        return self.apply_factors_vjp(factors)[0]

    def apply_factors_vjp(self, factors: Factors) -> tuple[Tensor, Pullback]:
        batch = next(iter(factors.values()))[0].shape[:-2]
        z = torch.zeros(*batch, self.n_samples * self.n_outputs, dtype=self.dtype, device=self.device)
        for name, (u, v) in factors.items():
            z += (u @ v.mT).flatten(-2) @ self._rows(name).T

        def pullback(residual: Tensor) -> Factors:
            flat = residual.reshape(*batch, -1)
            out: Factors = {}
            for name, (u, v) in factors.items():
                g = (flat @ self._rows(name)).view(*batch, *self.shapes[name])
                out[name] = (g @ v, g.mT @ u)
            return out

        return z.view(*batch, self.n_samples, self.n_outputs), pullback

    def adjoint(self, residual: Tensor) -> Delta:
        flat = residual.reshape(-1)
        return {name: (flat @ self._rows(name)).view(shape) for name, shape in self.shapes.items()}

    def jacobian_products(self, name: str, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        g = self.jacobians[name].flatten(0, 1)
        return g @ v, g.mT @ u

    def core_products(self, name: str, u: Tensor, v: Tensor) -> Tensor:
        g = self.jacobians[name].flatten(0, 1)
        step = max(1, _CHUNK_BYTES // (g.element_size() * max(1, g.shape[1] * v.shape[1])))
        return torch.cat([u.T @ (part @ v) for part in g.split(step)])

    def gram(self, blocks: list[str] | None = None) -> Tensor:
        size = self.n_samples * self.n_outputs
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        for name in blocks or list(self.shapes):
            rows = self._rows(name).double()
            gram += rows @ rows.T
        return gram

    def sample_norms(self) -> dict[str, Tensor]:
        return {name: g.double().flatten(2).norm(dim=-1) for name, g in self.jacobians.items()}

    def adjoint_error(self, residual: Tensor) -> dict[str, float]:
        gamma = (residual.numel() + 2) * torch.finfo(self.dtype).eps
        weight = residual.double().abs()
        return {name: gamma * float((weight * norms).sum()) for name, norms in self.sample_norms().items()}

    def _rows(self, name: str) -> Tensor:
        return self.jacobians[name].flatten(0, 1).flatten(1)
