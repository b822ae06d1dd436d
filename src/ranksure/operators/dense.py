"""The dense operator: every ``G_ijc`` stored. The oracle for tests and the classical baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ranksure.factors import Delta, Factors
from ranksure.operators.base import Pullback, TangentOperator
from ranksure.operators.tokens import at_once


class DenseOperator(TangentOperator):
    """Tangent operator with stored Jacobians.

    Args:
        jacobians: block name -> gradients ``G``, shape ``(N, C, m, n)``.
    """

    def __init__(self, jacobians: Mapping[str, Tensor]) -> None:
        if not jacobians:
            raise ValueError("a tangent operator needs at least one block")
        self._jacobians = dict(jacobians)
        first = next(iter(self._jacobians.values()))
        shapes = {name: (g.shape[2], g.shape[3]) for name, g in self._jacobians.items()}
        super().__init__(shapes, first.shape[0], first.shape[1], first.dtype, first.device)

    @classmethod
    def from_operator(cls, operator: TangentOperator) -> DenseOperator:
        """Store another operator densely, one adjoint per sample and contrast, whatever faster way it has."""
        return cls(TangentOperator.jacobians(operator))

    def jacobians(self) -> dict[str, Tensor]:
        return self._jacobians

    def stored(self) -> DenseOperator:
        return self

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> DenseOperator:
        dtype, device = dtype or self.dtype, torch.device(device or self.device)
        if dtype == self.dtype and device == self.device:
            return self
        return DenseOperator({name: g.to(device, dtype) for name, g in self._jacobians.items()})

    def select(self, samples: Tensor) -> DenseOperator:
        return DenseOperator({name: g[samples] for name, g in self._jacobians.items()})

    def restrict(self, blocks: Sequence[str]) -> DenseOperator:
        return DenseOperator({name: g for name, g in self._jacobians.items() if name in blocks})

    def congruent(self, maps: Mapping[str, tuple[Tensor, Tensor]]) -> DenseOperator:
        moved = {name: left @ self._jacobians[name] @ right.T for name, (left, right) in maps.items()}
        return DenseOperator({**self._jacobians, **moved})

    def scaled(self, by: Mapping[str, float]) -> DenseOperator:
        return DenseOperator({name: g * by[name] if name in by else g for name, g in self._jacobians.items()})

    @property
    def nbytes(self) -> int:
        return self.dense_nbytes

    def apply(self, delta: Delta) -> Tensor:
        z = self.zeros(self.n_samples * self.n_outputs)
        for name, d in delta.items():
            z += self._rows(name) @ d.reshape(-1)
        return z.view(self.n_samples, self.n_outputs)

    def apply_factors_vjp(self, factors: Factors) -> tuple[Tensor, Pullback]:
        batch = next(iter(factors.values()))[0].shape[:-2]
        z = self.zeros(*batch, self.n_samples * self.n_outputs)
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
        g = self._jacobians[name].flatten(0, 1)
        return g @ v, g.mT @ u

    def core_products(self, name: str, u: Tensor, v: Tensor) -> Tensor:
        g = self._jacobians[name].flatten(0, 1)
        step = at_once(g.element_size() * max(1, g.shape[1] * v.shape[1]))
        return torch.cat([u.T @ (part @ v) for part in g.split(step)])

    def gram(self, blocks: Sequence[str] | None = None) -> Tensor:
        size = self.n_samples * self.n_outputs
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        for name in blocks or list(self.shapes):
            rows = self._rows(name).double()
            gram += rows @ rows.T
        return gram

    def sample_norms(self) -> dict[str, Tensor]:
        return {name: g.double().flatten(2).norm(dim=-1) for name, g in self._jacobians.items()}

    def _rows(self, name: str) -> Tensor:
        return self._jacobians[name].flatten(0, 1).flatten(1)


TangentOperator.stored_as = DenseOperator
