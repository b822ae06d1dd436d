"""Exact reduction of a factored operator to the span of its tokens, and the way back from there.

Every optimum has its columns in the span of the output gradients and its rows in the span of the
inputs, because the component outside changes no prediction and only adds nuclear norm. Where a span
is smaller than the block, orthonormal bases make the block smaller without changing the problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ranksure.factors import Factors, multiplied
from ranksure.operators.tokens import Group

_WORTH = 0.75  # reduce a side only when it shrinks to this share or less


@dataclass(frozen=True)
class SpanBases:
    """Orthonormal bases by block, ``None`` or absent where a side is not reduced, and scales.

    ``left[name]`` is ``(m, m')``. A right basis is ``(n, n')``, or for embeddings the ``(n',)`` row
    numbers that occur. An update inside is the one outside, in these bases, times ``scales[name]`` (1 where absent).
    """

    left: dict[str, Tensor | None] = field(default_factory=dict)
    right: dict[str, Tensor | None] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def is_trivial(self) -> bool:
        """Whether no side of any block is reduced, and none scaled."""
        return not self.scales and all(basis is None for basis in (*self.left.values(), *self.right.values()))

    def lift(self, factors: Factors) -> Factors:
        """Factors of the reduced blocks as factors of the full ones."""
        up = {
            name: (self._up(self.left.get(name), u, None), self._up(self.right.get(name), v, self.widths.get(name)))
            for name, (u, v) in factors.items()
        }
        return multiplied(up, {name: 1 / scale for name, scale in self.scales.items()})

    def restrict(self, factors: Factors) -> Factors:
        """Projection of full factors onto the spans (predictions on the data are unchanged)."""
        down = {
            name: (_down(self.left.get(name), u), _down(self.right.get(name), v)) for name, (u, v) in factors.items()
        }
        return multiplied(down, self.scales)

    @staticmethod
    def _up(basis: Tensor | None, x: Tensor, width: int | None) -> Tensor:
        if basis is None:
            return x
        if basis.dim() == 2:
            return basis.to(x) @ x
        assert width is not None
        return x.new_zeros(width, x.shape[1]).index_copy_(0, basis, x)


def _down(basis: Tensor | None, x: Tensor) -> Tensor:
    if basis is None:
        return x
    return basis.to(x).T @ x if basis.dim() == 2 else x.index_select(0, basis)


def reduce_groups(groups: Sequence[Group]) -> tuple[list[Group], SpanBases]:
    """The same map on smaller blocks, in float64, and the way back; both are trivial where nothing shrinks."""
    left: dict[str, Tensor | None] = {}
    right: dict[str, Tensor | None] = {}
    widths: dict[str, int] = {}
    reduced: list[Group] = []
    for group in groups:
        inputs, basis, width = _reduce_inputs(group)
        outputs: dict[str, Tensor] = {}
        for name, b in group.outputs.items():
            outputs[name], left[name] = _reduce_outputs(b.double())
            right[name], widths[name] = basis, group.width
        reduced.append(Group(inputs, width, group.sample, outputs))
    return reduced, SpanBases(left, right, widths)


def _reduce_inputs(group: Group) -> tuple[Tensor, Tensor | None, int]:
    if group.n_tokens == 0:  # a gradient that vanishes everywhere: nothing to project on
        return group.inputs if group.is_index else group.inputs.double(), None, group.width
    if group.is_index:
        rows, index = torch.unique(group.inputs, return_inverse=True)
        return index, rows, len(rows)
    inputs = group.inputs.double()
    if group.n_tokens > _WORTH * group.width:
        return inputs, None, group.width
    basis, coordinates = torch.linalg.qr(inputs.T)
    return coordinates.T.contiguous(), basis, basis.shape[1]


def _reduce_outputs(b: Tensor) -> tuple[Tensor, Tensor | None]:
    tokens, contrasts, m = b.shape
    if tokens == 0 or tokens * contrasts > _WORTH * m:
        return b, None
    basis, coordinates = torch.linalg.qr(b.reshape(-1, m).T)
    return coordinates.T.reshape(tokens, contrasts, -1).contiguous(), basis
