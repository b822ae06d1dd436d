"""Packed tokens: the groups that a factored operator is made of, and what is computed within one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

Table: TypeAlias = Callable[[Tensor], Tensor]
"""Rows by token to ``(samples, longest)`` rows by sample, zero where a sample is shorter."""

_CHUNK_BYTES = 256 << 20  # held at once by what goes through memory in parts


@dataclass(frozen=True)
class Group:
    """Tokens of one input, packed by sample, and the blocks that read them."""

    inputs: Tensor  # `(T, n)` layer inputs, or `(T,)` integer indices for an embedding (one-hot rows)
    width: int  # `n`
    sample: Tensor  # `(T,)` sample of each token, non-decreasing
    outputs: Mapping[str, Tensor]  # block name -> `(T, C, m)` gradients at the layer's output

    @property
    def is_index(self) -> bool:
        return self.inputs.dim() == 1

    @property
    def n_tokens(self) -> int:
        return self.inputs.shape[0]

    def project(self, v: Tensor) -> Tensor:
        """``A @ v`` for ``v`` of shape ``(n, q)``."""
        return v.index_select(0, self.inputs) if self.is_index else self.inputs @ v

    def project_adjoint(self, x: Tensor) -> Tensor:
        """``A^T @ x`` for ``x`` of shape ``(T, q)``."""
        if self.is_index:
            return x.new_zeros(self.width, x.shape[1]).index_add_(0, self.inputs, x)
        return self.inputs.T @ x

    def project_rows(self, v: Tensor) -> Tensor:
        """``v @ A^T`` for ``v`` of shape ``(q, n)``: :meth:`project` for a few long rows."""
        return v.index_select(1, self.inputs) if self.is_index else v @ self.inputs.T

    def pull_rows(self, x: Tensor) -> Tensor:
        """``x @ A`` for ``x`` of shape ``(q, T)``: :meth:`project_adjoint` for a few long rows."""
        if self.is_index:
            return x.new_zeros(x.shape[0], self.width).index_add_(1, self.inputs, x)
        return x @ self.inputs


class Packed:
    """A group with where each sample's tokens lie (there may be none): sums over samples, and pairs of a sample's
    tokens.
    """

    def __init__(self, group: Group, n_samples: int) -> None:
        self.group, self.n_samples = group, n_samples
        counts = torch.bincount(group.sample, minlength=n_samples)
        self.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        """First token of each sample, and the number of tokens: ``(N + 1,)``."""
        self.n_outputs = next(iter(group.outputs.values())).shape[1]

    @cached_property
    def longest(self) -> int:
        """Most tokens of a sample; at least one."""
        return max(1, int((self.offsets[1:] - self.offsets[:-1]).max()))

    @cached_property
    def token_norms(self) -> dict[str, Tensor]:
        """``||b_tc|| ||a_t||`` by block, each ``(T, C)``, float64."""
        group = self.group
        if group.is_index:
            inputs = torch.ones(group.n_tokens, dtype=torch.float64, device=group.inputs.device)
        else:
            inputs = torch.linalg.vector_norm(group.inputs, dim=1, dtype=torch.float64)
        norm = torch.linalg.vector_norm
        return {n: norm(b, dim=2, dtype=torch.float64) * inputs[:, None] for n, b in group.outputs.items()}

    def sum(self, x: Tensor) -> Tensor:
        """Sum the rows of each sample: ``(T, q) -> (N, q)``."""
        if x.shape[0] == 0:
            return x.new_zeros(self.n_samples, x.shape[1])
        return torch.segment_reduce(x.contiguous(), "sum", offsets=self.offsets, axis=0)

    def chunks(self, sample_bytes: int) -> Iterator[tuple[slice, slice, Table]]:
        """Some samples at a time, within the limit of memory.

        Yields:
            Their tokens, their numbers, and what puts rows of these tokens into a table by sample.
        """
        step = at_once(sample_bytes)
        for low in range(0, self.n_samples, step):
            samples = slice(low, min(low + step, self.n_samples))
            tokens = slice(int(self.offsets[low]), int(self.offsets[samples.stop]))
            yield tokens, samples, self._table(tokens, samples)

    def _table(self, tokens: slice, samples: slice) -> Table:
        sample, count = self.group.sample[tokens], samples.stop - samples.start
        place = torch.arange(tokens.start, tokens.stop, device=self.offsets.device) - self.offsets[sample]
        place = (sample - samples.start) * self.longest + place

        def table(x: Tensor) -> Tensor:
            rows = x.new_zeros(count * self.longest, *x.shape[1:])
            return rows.index_copy_(0, place, x).unflatten(0, (count, self.longest))

        return table

    def add_gram(self, gram: Tensor, names: Sequence[str]) -> None:
        """Add ``A A^*`` over some of the group's blocks, the way that takes fewer multiplications."""
        group, size = self.group, self.n_samples * self.n_outputs
        total = sum(group.outputs[name].shape[2] for name in names)
        by_pairs = group.n_tokens**2 * (group.width + self.n_outputs**2 * total)
        if group.is_index or by_pairs < size**2 * group.width * total:
            gram += self.gram_by_token_pairs(names)
        else:
            for name in names:
                self.add_gram_by_rows(gram, name)

    def gram_by_token_pairs(self, names: Sequence[str]) -> Tensor:
        """``A A^*`` from the products of every two tokens, some rows of them at a time."""
        group, c, tokens = self.group, self.n_outputs, self.group.n_tokens
        device = group.sample.device
        half = torch.zeros(self.n_samples * c, tokens * c, dtype=torch.float64, device=device)
        chunk = at_once(8 * max(1, tokens) * c * c * 3)
        inputs = _wide(group.inputs)
        for low in range(0, tokens, chunk):
            rows = slice(low, min(low + chunk, tokens))
            left = inputs[rows]
            a = (left[:, None] == inputs[None]).double() if group.is_index else left @ inputs.T
            pairs = torch.zeros(a.shape[0], c, tokens, c, dtype=torch.float64, device=device)
            for name in names:
                b = group.outputs[name].double()
                pairs += (b[rows].flatten(0, 1) @ b.flatten(0, 1).T).view_as(pairs)
            pairs *= a[:, None, :, None]
            target = (group.sample[rows, None] * c + torch.arange(c, device=device)).flatten()
            half.index_add_(0, target, pairs.view(-1, tokens * c))
        folded = self.sum(half.view(-1, tokens, c).transpose(0, 1).reshape(tokens, -1))
        return folded.view(self.n_samples, -1, c).transpose(1, 2).reshape(self.n_samples * c, -1)

    def add_gram_by_rows(self, gram: Tensor, name: str) -> None:
        """Add ``D D^T`` for the dense rows ``D`` of one block, a slice of its ``m`` at a time."""
        group, b, size = self.group, self.group.outputs[name], self.n_samples * self.n_outputs
        table = self._table(slice(0, group.n_tokens), slice(0, self.n_samples))
        inputs = table(group.inputs.double())
        step = at_once(8 * size * group.width)
        for low in range(0, b.shape[2], step):
            left = table(b[:, :, low : low + step].double()).flatten(2)
            rows = (left.mT @ inputs).reshape(size, -1)
            gram.addmm_(rows, rows.T)

    def squared_norms(self) -> dict[str, Tensor]:
        """Squared Frobenius norms of each gradient, ``(N, C)`` float64 by block.

        From the token pairs within each sample, or from the gradients themselves (some samples at a time),
        whichever takes fewer multiplications.
        """
        group, c, longest = self.group, self.n_outputs, self.longest
        zero = torch.zeros(self.n_samples, c, dtype=torch.float64, device=group.sample.device)
        out = {name: zero.clone() for name in group.outputs}
        most = c * max(b.shape[2] for b in group.outputs.values())
        by_pairs = group.is_index or longest * (group.width + most) <= most * group.width
        held = longest * (group.width + most) + (longest**2 * (1 + c) if by_pairs else most * group.width)
        for tokens, samples, table in self.chunks(8 * held) if group.n_tokens else ():
            a = table(_wide(group.inputs[tokens]))
            if group.is_index:  # what is padded has outputs of zero, whatever its index
                a = (a[:, :, None] == a[:, None, :]).double()
            elif by_pairs:
                a = a @ a.mT
            for name, b in group.outputs.items():
                left = table(_wide(b[tokens]))
                if by_pairs:
                    left = left.transpose(1, 2)
                    total = torch.einsum("sctu,stu->sc", left @ left.mT, a)
                else:
                    rows = left.flatten(2).mT @ a
                    total = rows.unflatten(1, (c, -1)).square().sum((2, 3))
                out[name][samples] = total
        return out


def at_once(nbytes: int) -> int:
    """How many things of this size go through memory at once; at least one."""
    return max(1, _CHUNK_BYTES // max(1, nbytes))


def _wide(x: Tensor) -> Tensor:
    """In float64; indices stay whole."""
    return x.double() if x.is_floating_point() else x
