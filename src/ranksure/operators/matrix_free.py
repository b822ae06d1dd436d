"""The matrix-free operator: one network pass per product, nothing stored.

For models and outputs too large to store. ``A(delta)`` is a Jacobian-vector product in forward mode,
``A^*(R)`` a vector-Jacobian product in reverse mode, both at the network's own weights. A target's
update enters through a hook on that module, so a tied weight is moved in this module's use only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ranksure.factors import Delta
from ranksure.network.logits import Batch, batch_rows, device_of, frozen, logits_of, to_device
from ranksure.network.side_path import side_path
from ranksure.network.targets import block_shape
from ranksure.operators.base import TangentOperator


class MatrixFreeOperator(TangentOperator):
    """Tangent operator by automatic differentiation of the network itself.

    Args:
        model: the network, at the weights to linearise around.
        batches: batches without labels, in sample order.
        targets: modules by qualified name (see :func:`ranksure.network.targets.select_targets`).
        contrasts: ``(K, C)`` basis of the logits (see ``Loss.contrasts``).
    """

    is_stored = False

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], targets: Mapping[str, nn.Module], contrasts: Tensor
    ) -> None:
        self.model, self.batches, self.targets = model, list(batches), dict(targets)
        self._rows = [batch_rows(batch) for batch in self.batches]
        shapes = {name: block_shape(module) for name, module in self.targets.items()}
        dtype, device = next(model.parameters()).dtype, device_of(model)
        super().__init__(shapes, sum(self._rows), contrasts.shape[1], dtype, device)
        self.contrasts = contrasts.to(device, dtype)
        self._scales = dict.fromkeys(shapes, 1.0)

    def scaled(self, by: Mapping[str, float]) -> MatrixFreeOperator:
        other = copy.copy(self)
        other._scales = {name: scale * by.get(name, 1.0) for name, scale in self._scales.items()}
        return other

    def apply(self, delta: Delta) -> Tensor:
        delta = {name: d * self._scales[name] for name, d in delta.items()}
        sides = {name: (lambda x, m=self.targets[name], d=d: side_path(m, x, d)) for name, d in delta.items()}
        return self._forward_mode(sides)

    def adjoint(self, residual: Tensor) -> Delta:
        total = {n: self.zeros(*shape) for n, shape in self.shapes.items()}
        low = 0
        for batch, rows in zip(self.batches, self._rows, strict=True):
            part = residual[low : low + rows]
            low += rows
            if not bool(part.any()):
                continue
            deltas = {n: torch.zeros_like(t, requires_grad=True) for n, t in total.items()}
            sides = {n: (lambda x, m=self.targets[n], d=d: side_path(m, x, d)) for n, d in deltas.items()}
            with frozen(self.model), _adding(self.targets, sides), torch.enable_grad():
                z = logits_of(self.model, to_device(batch, self.device)) @ self.contrasts
            grads = torch.autograd.grad(z, list(deltas.values()), part.to(z), allow_unused=True)
            for name, grad in zip(deltas, grads, strict=True):
                if grad is not None:  # pyright: ignore[reportUnnecessaryComparison] (allow_unused gives None)
                    total[name] += grad
        return {name: grad * self._scales[name] for name, grad in total.items()}

    def adjoint_error(self, residual: Tensor) -> dict[str, float]:
        """An estimate, not a bound: the network's own rounding cannot be bounded from outside."""
        slack = 1e3 * torch.finfo(self.dtype).eps
        return {name: slack * float(grad.double().norm()) for name, grad in self.adjoint(residual).items()}

    def _forward_mode(self, sides: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
        out: list[Tensor] = []
        # The math kernel is the one attention kernel with a forward-mode derivative.
        with frozen(self.model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            tangents = {name: _as_tangent(side) for name, side in sides.items()}
            with _adding(self.targets, tangents):
                for batch in self.batches:
                    z = logits_of(self.model, to_device(batch, self.device))
                    tangent = forward_ad.unpack_dual(z).tangent
                    value = torch.zeros_like(z) if tangent is None else tangent
                    out.append(value.detach() @ self.contrasts)
        return torch.cat(out)


def _as_tangent(side: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A path that is zero, with the side path as its forward-mode tangent."""

    def path(x: Tensor) -> Tensor:
        primal = x if not x.is_floating_point() else forward_ad.unpack_dual(x).primal
        direction = side(primal)
        return forward_ad.make_dual(torch.zeros_like(direction), direction)

    return path


@contextmanager
def _adding(
    targets: Mapping[str, nn.Module], sides: Mapping[str, Callable[[Tensor], Tensor]]
) -> Generator[None, None, None]:
    """Add each side path to its module's output."""

    def hook(side: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda module, args, kwargs, output: output + side(args[0] if args else next(iter(kwargs.values())))

    handles = [targets[name].register_forward_hook(hook(side), with_kwargs=True) for name, side in sides.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
