"""The factored operator: packed token factors, never a Jacobian.

For a layer ``y = W x`` the gradient of contrast ``c`` of sample ``i`` is ``G_ic = sum_t b_tc a_t^T``
over the sample's tokens ``t`` (``a``: layer input, ``b``: gradient at its output). Tokens are packed
raggedly, samples one after another, so that forward and adjoint are a few large matrix products.
Blocks that read the same tokens of the same input share one copy of it (a *group*).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ranksure.factors import Delta, Factors
from ranksure.operators.base import Pullback

_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Group:
    """Tokens of one input, packed by sample, and the blocks that read them.

    Attributes:
        inputs: ``(T, n)`` layer inputs, or ``(T,)`` integer indices for an embedding (one-hot rows).
        width: ``n``.
        sample: ``(T,)`` sample of each token, non-decreasing.
        outputs: block name -> ``(T, C, m)`` gradients at the layer's output.
    """

    inputs: Tensor
    width: int
    sample: Tensor
    outputs: Mapping[str, Tensor]

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

    def input_norms(self) -> Tensor:
        if self.is_index:
            return torch.ones(self.n_tokens, dtype=torch.float64, device=self.inputs.device)
        return torch.linalg.vector_norm(self.inputs, dim=1, dtype=torch.float64)


class FactoredOperator:
    """Tangent operator on packed token factors.

    Args:
        groups: token groups; every block belongs to exactly one.
        n_samples: number of samples ``N``.
        order: block names in the network's order (default: as they come).

    Raises:
        ValueError: no block, or a block in two groups.
    """

    def __init__(self, groups: Sequence[Group], n_samples: int, order: Sequence[str] | None = None) -> None:
        self.groups = [group for group in groups if group.outputs]
        found = [(name, group) for group in self.groups for name in group.outputs]
        where = dict(found)
        if not found or len(where) != len(found):
            raise ValueError("a factored operator needs at least one block, each in one group")
        self.n_samples = n_samples
        first = found[0][1].outputs[found[0][0]]
        self.n_outputs, self.dtype, self.device = first.shape[1], first.dtype, first.device
        self.shapes = {n: (where[n].outputs[n].shape[2], where[n].width) for n in order or list(where)}
        self._offsets = [_offsets(group.sample, n_samples) for group in self.groups]
        self._norms: list[dict[str, Tensor]] | None = None

    # ---- size and dtype

    @property
    def nbytes(self) -> int:
        """Bytes held in token factors."""
        tensors = [group.inputs for group in self.groups] + [b for g in self.groups for b in g.outputs.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that stored Jacobians of the same dtype would take."""
        per_sample = sum(m * n for m, n in self.shapes.values())
        return self.n_samples * self.n_outputs * per_sample * torch.finfo(self.dtype).bits // 8

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> FactoredOperator:
        """The same operator in another dtype or on another device (itself if nothing changes)."""
        dtype, device = dtype or self.dtype, torch.device(device or self.device)
        if dtype == self.dtype and device == self.device:
            return self
        groups = [
            Group(
                g.inputs.to(device) if g.is_index else g.inputs.to(device, dtype),
                g.width,
                g.sample.to(device),
                {name: b.to(device, dtype) for name, b in g.outputs.items()},
            )
            for g in self.groups
        ]
        return FactoredOperator(groups, self.n_samples, list(self.shapes))

    def select(self, samples: Tensor) -> FactoredOperator:
        """The operator of a subset of samples, in the order given (distinct indices)."""
        groups = []
        for group, offsets in zip(self.groups, self._offsets, strict=True):
            lengths = (offsets[1:] - offsets[:-1])[samples]
            new_sample = torch.repeat_interleave(torch.arange(len(samples), device=self.device), lengths)
            first = torch.repeat_interleave(offsets[:-1][samples] - (lengths.cumsum(0) - lengths), lengths)
            rows = first + torch.arange(len(new_sample), device=self.device)
            outputs = {name: b[rows] for name, b in group.outputs.items()}
            groups.append(Group(group.inputs[rows], group.width, new_sample, outputs))
        return FactoredOperator(groups, len(samples), list(self.shapes))

    def restrict(self, blocks: Sequence[str]) -> FactoredOperator:
        """The operator of a subset of blocks."""
        keep = set(blocks)
        groups = [
            Group(g.inputs, g.width, g.sample, {n: b for n, b in g.outputs.items() if n in keep}) for g in self.groups
        ]
        return FactoredOperator(groups, self.n_samples, [n for n in self.shapes if n in keep])

    def congruent(self, maps: Mapping[str, tuple[Tensor, Tensor]]) -> FactoredOperator:
        """The operator with every gradient ``G`` of a named block replaced by ``L G R^T``, for ``(L, R)``.

        Named blocks get inputs of their own, since each has its own ``R``; indices become dense rows.
        """
        groups: list[Group] = []
        for group in self.groups:
            rest = {name: b for name, b in group.outputs.items() if name not in maps}
            groups.append(Group(group.inputs, group.width, group.sample, rest))
            for name in group.outputs:
                if name in maps:
                    left, right = maps[name]
                    inputs = group.project(right.T)
                    groups.append(Group(inputs, right.shape[0], group.sample, {name: group.outputs[name] @ left.T}))
        return FactoredOperator(groups, self.n_samples, list(self.shapes))

    # ---- the map and its adjoint

    def apply(self, delta: Delta) -> Tensor:
        z = torch.zeros(self.n_samples, self.n_outputs, dtype=self.dtype, device=self.device)
        for group, offsets in zip(self.groups, self._offsets, strict=True):
            contribution = torch.zeros(group.n_tokens, self.n_outputs, dtype=self.dtype, device=self.device)
            for name, b in group.outputs.items():
                if name in delta:
                    contribution += torch.einsum("tcm,tm->tc", b, group.project(delta[name].T))
            z += _segment_sum(contribution, offsets)
        return z

    def apply_factors(self, factors: Factors) -> Tensor:
        return self.apply_factors_vjp(factors)[0]

    def apply_factors_vjp(self, factors: Factors) -> tuple[Tensor, Pullback]:
        # Factors enter as a few long rows, never as narrow columns: a product with a handful of columns
        # runs several times slower than the same one with a handful of rows.
        u0 = next(iter(factors.values()))[0]
        batched = u0.dim() == 3
        starts = u0.shape[0] if batched else 1
        c = self.n_outputs
        z: Tensor | None = None
        saved: list[tuple[Group, dict[str, tuple[Tensor, Tensor]]]] = []
        for group, offsets in zip(self.groups, self._offsets, strict=True):
            present = [name for name in group.outputs if name in factors]
            if not present:
                continue
            rows = [_rows(factors[name][1]) for name in present]
            projected = group.project_rows(rows[0] if len(rows) == 1 else torch.cat(rows))
            total: Tensor | None = None
            kept: dict[str, tuple[Tensor, Tensor]] = {}
            for name, av in zip(present, projected.split([q.shape[0] for q in rows]), strict=True):
                bu = _rows(factors[name][0]) @ group.outputs[name].flatten(0, 1).T
                by_start = (starts, av.shape[0] // starts, group.n_tokens)
                bu, av = bu.view(*by_start, c), av.view(*by_start, 1)
                kept[name] = (bu, av)
                value = (bu * av).sum(1)
                total = value if total is None else total.add_(value)
            saved.append((group, kept))
            assert total is not None
            part = _segment_sum(total.transpose(0, 1).flatten(1), offsets)
            z = part if z is None else z.add_(part)
        if z is None:
            z = torch.zeros(self.n_samples, starts * c, dtype=self.dtype, device=self.device)
        z = z.view(self.n_samples, starts, c).transpose(0, 1) if batched else z

        def pullback(residual: Tensor) -> Factors:
            by_start = residual if batched else residual.unsqueeze(0)
            out: Factors = {}
            for group, kept in saved:
                weight = by_start.index_select(1, group.sample).unsqueeze(1)  # (S, 1, T, C)
                dv: list[Tensor] = []
                for name, (bu, av) in kept.items():
                    grad_u = (weight * av).flatten(0, 1).flatten(1) @ group.outputs[name].flatten(0, 1)
                    dv.append(((weight * bu).sum(3) if c > 1 else (weight * bu).squeeze(3)).flatten(0, 1))
                    out[name] = (_factor(grad_u, starts, batched), grad_u)  # v's gradient follows
                grads = group.pull_rows(dv[0] if len(dv) == 1 else torch.cat(dv))
                for name, grad_v in zip(kept, grads.split([d.shape[0] for d in dv]), strict=True):
                    out[name] = (out[name][0], _factor(grad_v, starts, batched))
            return {name: out[name] for name in factors if name in out}

        return z, pullback

    def adjoint(self, residual: Tensor) -> Delta:
        out: Delta = {}
        for group in self.groups:
            weight = residual.index_select(0, group.sample)
            for name, b in group.outputs.items():
                w = weight * b[:, 0] if self.n_outputs == 1 else torch.einsum("tc,tcm->tm", weight, b)
                out[name] = group.project_adjoint(w).T
        return {name: out[name] for name in self.shapes}

    def jacobian_products(self, name: str, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``G_ic v`` and ``G_ic^T u`` for vectors ``u`` (m,) and ``v`` (n,): ``(N C, m)`` and ``(N C, n)``."""
        index = next(k for k, group in enumerate(self.groups) if name in group.outputs)
        group, offsets, c = self.groups[index], self._offsets[index], self.n_outputs
        b = group.outputs[name]
        left = b * group.project(v[:, None])[:, :, None]
        left = _segment_sum(left.flatten(1), offsets).view(self.n_samples * c, -1)
        weight = b @ u
        if group.is_index:
            right = weight.new_zeros(self.n_samples * c, group.width)
            rows = group.sample[:, None] * c + torch.arange(c, device=self.device)
            right.index_put_((rows, group.inputs[:, None].expand_as(rows)), weight, accumulate=True)
            return left, right
        right = weight[:, :, None] * group.inputs[:, None, :]
        return left, _segment_sum(right.flatten(1), offsets).view(self.n_samples * c, -1)

    def core_products(self, name: str, u: Tensor, v: Tensor) -> Tensor:
        """``u^T G_ic v`` for ``u`` (m, p) and ``v`` (n, q), every sample and contrast: ``(N C, p, q)``."""
        index = next(k for k, group in enumerate(self.groups) if name in group.outputs)
        group, offsets, c = self.groups[index], self._offsets[index], self.n_outputs
        b, p, q = group.outputs[name], u.shape[1], v.shape[1]
        longest = max(1, int((offsets[1:] - offsets[:-1]).max()))
        held = 3 * b.element_size() * (longest * (c * p + q) + c * p * q)
        out = torch.zeros(self.n_samples, c * p, q, dtype=self.dtype, device=self.device)
        for tokens, samples, place in _sample_chunks(group, offsets, longest, held):
            left = (b[tokens] @ u).flatten(1)
            right = v[group.inputs[tokens]] if group.is_index else group.inputs[tokens] @ v
            x, y = (_padded(part, place, len(samples), longest) for part in (left, right))
            out[samples.start : samples.stop] = x.mT @ y
        return out.view(self.n_samples * c, p, q)

    def jacobians(self) -> dict[str, Tensor]:
        """Every gradient ``G_ic`` stored, ``(N, C, m, n)`` by block: ``dense_nbytes`` in all.

        Worth its memory to who applies the operator to dense updates thousands of times, where samples have many more
        tokens than contrasts.
        """
        size, c = self.n_samples, self.n_outputs
        like = {"dtype": self.dtype, "device": self.device}
        out = {name: torch.zeros(size, c, *shape, **like) for name, shape in self.shapes.items()}
        for group, offsets in zip(self.groups, self._offsets, strict=True):
            if group.is_index:
                for name, b in group.outputs.items():
                    by_row = out[name].permute(0, 3, 1, 2)
                    by_row.index_put_((group.sample, group.inputs), b, accumulate=True)
                continue
            longest = max(1, int((offsets[1:] - offsets[:-1]).max()))
            held = longest * (group.width + max(c * b.shape[2] for b in group.outputs.values()))
            for tokens, samples, place in _sample_chunks(group, offsets, longest, held * group.inputs.element_size()):
                inputs = _padded(group.inputs[tokens], place, len(samples), longest)
                for name, b in group.outputs.items():
                    left = _padded(b[tokens].flatten(1), place, len(samples), longest)
                    out[name][samples.start : samples.stop] = (left.mT @ inputs).unflatten(1, (c, -1))
        return out

    # ---- Gram matrix, norms, rounding

    def gram(self, blocks: list[str] | None = None) -> Tensor:
        chosen = set(blocks or self.shapes)
        size = self.n_samples * self.n_outputs
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        for group, offsets in zip(self.groups, self._offsets, strict=True):
            names = [name for name in group.outputs if name in chosen]
            if not names or group.n_tokens == 0:
                continue
            tokens, width = group.n_tokens, group.width
            by_pairs = tokens**2 * (width + self.n_outputs**2 * sum(self.shapes[n][0] for n in names))
            by_rows = size**2 * width * sum(self.shapes[n][0] for n in names)
            if group.is_index or by_pairs < by_rows:
                gram += self._gram_by_token_pairs(group, offsets, names)
            else:
                for name in names:
                    self._add_gram_by_rows(gram, group, offsets, group.outputs[name])
        return gram

    def _gram_by_token_pairs(self, group: Group, offsets: Tensor, names: list[str]) -> Tensor:
        c, tokens = self.n_outputs, group.n_tokens
        half = torch.zeros(self.n_samples * c, tokens * c, dtype=torch.float64, device=self.device)
        chunk = max(1, _CHUNK_BYTES // (8 * max(1, tokens) * c * c * 3))
        inputs = group.inputs if group.is_index else group.inputs.double()
        for low in range(0, tokens, chunk):
            rows = slice(low, min(low + chunk, tokens))
            left = inputs[rows]
            a = (left[:, None] == inputs[None]).double() if group.is_index else left @ inputs.T
            pairs = torch.zeros(a.shape[0], c, tokens, c, dtype=torch.float64, device=self.device)
            for name in names:
                b = group.outputs[name].double()
                pairs += (b[rows].flatten(0, 1) @ b.flatten(0, 1).T).view_as(pairs)
            pairs *= a[:, None, :, None]
            target = (group.sample[rows, None] * c + torch.arange(c, device=self.device)).flatten()
            half.index_add_(0, target, pairs.view(-1, tokens * c))
        folded = _segment_sum(half.view(-1, tokens, c).transpose(0, 1).reshape(tokens, -1), offsets)
        return folded.view(self.n_samples, -1, c).transpose(1, 2).reshape(self.n_samples * c, -1)

    def _add_gram_by_rows(self, gram: Tensor, group: Group, offsets: Tensor, b: Tensor) -> None:
        """Add ``D D^T`` for the dense rows ``D`` of one block, a slice of its ``m`` at a time."""
        lengths = offsets[1:] - offsets[:-1]
        longest = max(1, int(lengths.max()))
        place = group.sample * longest + torch.arange(group.n_tokens, device=self.device) - offsets[group.sample]
        shape = (self.n_samples * longest, group.width)
        padded = torch.zeros(shape, dtype=torch.float64, device=self.device)
        padded = padded.index_copy_(0, place, group.inputs.double()).view(self.n_samples, longest, -1)
        m, size = b.shape[2], self.n_samples * self.n_outputs
        step = max(1, _CHUNK_BYTES // (8 * size * group.width))
        for low in range(0, m, step):
            part = b[:, :, low : low + step].double()
            left = torch.zeros(shape[0], *part.shape[1:], dtype=torch.float64, device=self.device)
            left = left.index_copy_(0, place, part).view(self.n_samples, longest, -1)
            rows = (left.mT @ padded).reshape(size, -1)
            gram.addmm_(rows, rows.T)

    def sample_norms(self) -> dict[str, Tensor]:
        """Frobenius norms of each gradient, ``(N, C)`` float64 by block.

        From the token pairs within each sample, or from the gradients themselves (some samples at a time),
        whichever takes fewer multiplications.
        """
        out: dict[str, Tensor] = {}
        for group, offsets in zip(self.groups, self._offsets, strict=True):
            for name in group.outputs:
                out[name] = torch.zeros(self.n_samples, self.n_outputs, dtype=torch.float64, device=self.device)
            lengths = offsets[1:] - offsets[:-1]
            longest = int(lengths.max()) if group.n_tokens else 0
            if longest == 0:
                continue
            most = max(b.shape[1] * b.shape[2] for b in group.outputs.values())
            by_pairs = group.is_index or longest * (group.width + most) <= most * group.width
            held = longest * (group.width + most) + (longest**2 * (1 + self.n_outputs) if by_pairs else 0)
            if not by_pairs:
                held += most * group.width
            for tokens, samples, place in _sample_chunks(group, offsets, longest, 8 * held):
                inputs = _padded(_wide(group.inputs[tokens]), place, len(samples), longest)
                if group.is_index:  # what is padded has outputs of zero, whatever its index
                    a = (inputs[:, :, None] == inputs[:, None, :]).double()
                else:
                    a = inputs @ inputs.mT if by_pairs else inputs
                for name, b in group.outputs.items():
                    left = _padded(_wide(b[tokens]), place, len(samples), longest)
                    if by_pairs:
                        left = left.transpose(1, 2)
                        total = torch.einsum("sctu,stu->sc", left @ left.mT, a)
                    else:
                        rows = left.flatten(2).mT @ a
                        total = rows.unflatten(1, (self.n_outputs, -1)).square().sum((2, 3))
                    out[name][samples.start : samples.stop] = total
        return {name: out[name].clamp(min=0).sqrt() for name in self.shapes}

    def adjoint_error(self, residual: Tensor) -> dict[str, float]:
        # |fl(sum_t w_t a_t^T) - exact| <= gamma sum_t |w_t| |a_t|^T entrywise (Higham 2002, 3.5), and
        # the Frobenius norm of that bound is at most gamma sum_tc |R_tc| ||b_tc|| ||a_t||.
        if self._norms is None:
            self._norms = [
                {
                    name: torch.linalg.vector_norm(b, dim=2, dtype=torch.float64) * group.input_norms()[:, None]
                    for name, b in group.outputs.items()
                }
                for group in self.groups
            ]
        eps = torch.finfo(self.dtype).eps
        out: dict[str, float] = {}
        for group, norms in zip(self.groups, self._norms, strict=True):
            gamma = (group.n_tokens + self.n_outputs + 2) * eps
            weight = residual.double().abs().index_select(0, group.sample)
            for name, norm in norms.items():
                out[name] = gamma * float((weight * norm).sum())
        return out


def _offsets(sample: Tensor, n_samples: int) -> Tensor:
    counts = torch.bincount(sample, minlength=n_samples)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _segment_sum(x: Tensor, offsets: Tensor) -> Tensor:
    """Sum the rows of each sample: ``(T, q) -> (N, q)``."""
    if x.shape[0] == 0:
        return x.new_zeros(offsets.shape[0] - 1, x.shape[1])
    return torch.segment_reduce(x.contiguous(), "sum", offsets=offsets, axis=0)


def _rows(factor: Tensor) -> Tensor:
    """``(m, r)`` as ``(r, m)``; a batch ``(S, m, r)`` as ``(S * r, m)``."""
    return factor.T.contiguous() if factor.dim() == 2 else factor.mT.flatten(0, 1)


def _factor(rows: Tensor, starts: int, batched: bool) -> Tensor:
    """The inverse of :func:`_rows`."""
    return rows.unflatten(0, (starts, rows.shape[0] // starts)).mT if batched else rows.T


def _sample_chunks(
    group: Group, offsets: Tensor, longest: int, sample_bytes: int
) -> Iterator[tuple[slice, range, Tensor]]:
    """Some samples at a time, within the limit of memory.

    Yields:
        Their tokens, their numbers, and each token's row in a table of ``(samples * longest)``.
    """
    step = max(1, _CHUNK_BYTES // max(1, sample_bytes))
    for low in range(0, len(offsets) - 1, step):
        samples = range(low, min(low + step, len(offsets) - 1))
        tokens = slice(int(offsets[low]), int(offsets[samples.stop]))
        sample = group.sample[tokens]
        place = torch.arange(tokens.start, tokens.stop, device=offsets.device) - offsets[sample]
        yield tokens, samples, (sample - low) * longest + place


def _wide(x: Tensor) -> Tensor:
    """In float64; indices stay whole."""
    return x.double() if x.is_floating_point() else x


def _padded(x: Tensor, place: Tensor, samples: int, longest: int) -> Tensor:
    """Rows of some samples in a table of ``(samples, longest)``, zero where a sample is shorter."""
    table = x.new_zeros(samples * longest, *x.shape[1:])
    return table.index_copy_(0, place, x).unflatten(0, (samples, longest))
