"""The factored operator: packed token factors, never a Jacobian.

For a layer ``y = W x`` the gradient of contrast ``c`` of sample ``i`` is ``G_ic = sum_t b_tc a_t^T``
over the sample's tokens ``t`` (``a``: layer input, ``b``: gradient at its output). Tokens are packed
raggedly, samples one after another, so that forward and adjoint are a few large matrix products.
Blocks that read the same tokens of the same input share one copy of it (a *group*).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ranksure.factors import Delta, Factors
from ranksure.operators.base import Pullback, TangentOperator
from ranksure.operators.span import SpanBases, reduce_groups
from ranksure.operators.tokens import Group, Packed

_READING = 16  # multiplications of a matrix product in the time that one stored number is read


class FactoredOperator(TangentOperator):
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
        first = found[0][1].outputs[found[0][0]]
        shapes = {n: (where[n].outputs[n].shape[2], where[n].width) for n in order or list(where)}
        super().__init__(shapes, n_samples, first.shape[1], first.dtype, first.device)
        self._packed = [Packed(group, n_samples) for group in self.groups]

    # ---- other forms of the same map

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> FactoredOperator:
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
        groups: list[Group] = []
        for group, offsets in ((packed.group, packed.offsets) for packed in self._packed):
            lengths = (offsets[1:] - offsets[:-1])[samples]
            new_sample = torch.repeat_interleave(torch.arange(len(samples), device=self.device), lengths)
            first = torch.repeat_interleave(offsets[:-1][samples] - (lengths.cumsum(0) - lengths), lengths)
            rows = first + torch.arange(len(new_sample), device=self.device)
            outputs = {name: b[rows] for name, b in group.outputs.items()}
            groups.append(Group(group.inputs[rows], group.width, new_sample, outputs))
        return FactoredOperator(groups, len(samples), list(self.shapes))

    def restrict(self, blocks: Sequence[str]) -> FactoredOperator:
        keep = set(blocks)
        groups = [
            Group(g.inputs, g.width, g.sample, {n: b for n, b in g.outputs.items() if n in keep}) for g in self.groups
        ]
        return FactoredOperator(groups, self.n_samples, [n for n in self.shapes if n in keep])

    def congruent(self, maps: Mapping[str, tuple[Tensor, Tensor]]) -> FactoredOperator:
        # Named blocks get inputs of their own, since each has its own R; indices become dense rows.
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

    def scaled(self, by: Mapping[str, float]) -> FactoredOperator:
        groups = [
            Group(g.inputs, g.width, g.sample, {n: b * by[n] if n in by else b for n, b in g.outputs.items()})
            for g in self.groups
        ]
        return FactoredOperator(groups, self.n_samples, list(self.shapes))

    def reduced(self) -> tuple[FactoredOperator, SpanBases]:
        groups, bases = reduce_groups(self.groups)
        return FactoredOperator(groups, self.n_samples, list(self.shapes)), bases

    def for_dense_updates(self, most_bytes: int) -> TangentOperator:
        # A product passes over every token, or over every stored gradient; a stored number is read once for each
        # product, while those of a token stay in the cache.
        plain = [group for group in self.groups if not group.is_index]
        by_token = sum(g.n_tokens * self.shapes[n][0] * self.shapes[n][1] for g in plain for n in g.outputs)
        stored = self.n_samples * self.n_outputs * sum(m * n for m, n in self.shapes.values())
        return self if self.dense_nbytes > most_bytes or _READING * stored > by_token else self.stored()

    @property
    def nbytes(self) -> int:
        tensors = [group.inputs for group in self.groups] + [b for g in self.groups for b in g.outputs.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def multiplications(self) -> int:
        return sum(g.n_tokens * (b.shape[1] * b.shape[2] + g.width) for g in self.groups for b in g.outputs.values())

    # ---- the map and its adjoint

    def apply(self, delta: Delta) -> Tensor:
        z = self.zeros(self.n_samples, self.n_outputs)
        for packed in self._packed:
            group = packed.group
            contribution = self.zeros(group.n_tokens, self.n_outputs)
            for name, b in group.outputs.items():
                if name in delta:
                    contribution += torch.einsum("tcm,tm->tc", b, group.project(delta[name].T))
            z += packed.sum(contribution)
        return z

    def apply_factors_vjp(self, factors: Factors) -> tuple[Tensor, Pullback]:
        # Factors enter as a few long rows, never as narrow columns: a product with a handful of columns
        # runs several times slower than the same one with a handful of rows.
        u0 = next(iter(factors.values()))[0]
        batched = u0.dim() == 3
        starts = u0.shape[0] if batched else 1
        c = self.n_outputs
        z: Tensor | None = None
        saved: list[tuple[Group, dict[str, tuple[Tensor, Tensor]]]] = []
        for packed in self._packed:
            group = packed.group
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
            part = packed.sum(total.transpose(0, 1).flatten(1))
            z = part if z is None else z.add_(part)
        if z is None:
            z = self.zeros(self.n_samples, starts * c)
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

    # ---- single gradients

    def jacobian_products(self, name: str, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        packed, c = self._packed_of(name), self.n_outputs
        group, b = packed.group, packed.group.outputs[name]
        left = b * group.project(v[:, None])[:, :, None]
        left = packed.sum(left.flatten(1)).view(self.n_samples * c, -1)
        weight = b @ u
        if group.is_index:
            right = weight.new_zeros(self.n_samples * c, group.width)
            rows = group.sample[:, None] * c + torch.arange(c, device=self.device)
            right.index_put_((rows, group.inputs[:, None].expand_as(rows)), weight, accumulate=True)
            return left, right
        right = weight[:, :, None] * group.inputs[:, None, :]
        return left, packed.sum(right.flatten(1)).view(self.n_samples * c, -1)

    def core_products(self, name: str, u: Tensor, v: Tensor) -> Tensor:
        packed, c = self._packed_of(name), self.n_outputs
        group, b, p, q = packed.group, packed.group.outputs[name], u.shape[1], v.shape[1]
        held = 3 * b.element_size() * (packed.longest * (c * p + q) + c * p * q)
        out = self.zeros(self.n_samples, c * p, q)
        for tokens, samples, table in packed.chunks(held):
            left = (b[tokens] @ u).flatten(1)
            right = v[group.inputs[tokens]] if group.is_index else group.inputs[tokens] @ v
            out[samples] = table(left).mT @ table(right)
        return out.view(self.n_samples * c, p, q)

    def jacobians(self) -> dict[str, Tensor]:
        # Worth its memory to who applies the operator to dense updates thousands of times, where samples have many
        # more tokens than contrasts.
        size, c = self.n_samples, self.n_outputs
        out = {name: self.zeros(size, c, *shape) for name, shape in self.shapes.items()}
        for packed in self._packed:
            group = packed.group
            if group.is_index:
                for name, b in group.outputs.items():
                    by_row = out[name].permute(0, 3, 1, 2)
                    by_row.index_put_((group.sample, group.inputs), b, accumulate=True)
                continue
            held = packed.longest * (group.width + max(c * b.shape[2] for b in group.outputs.values()))
            for tokens, samples, table in packed.chunks(held * group.inputs.element_size()):
                inputs = table(group.inputs[tokens])
                for name, b in group.outputs.items():
                    out[name][samples] = (table(b[tokens].flatten(1)).mT @ inputs).unflatten(1, (c, -1))
        return out

    def gram(self, blocks: Sequence[str] | None = None) -> Tensor:
        chosen = set(blocks or self.shapes)
        size = self.n_samples * self.n_outputs
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        for packed in self._packed:
            names = [name for name in packed.group.outputs if name in chosen]
            if names and packed.group.n_tokens:
                packed.add_gram(gram, names)
        return gram

    def sample_norms(self) -> dict[str, Tensor]:
        squares = {name: total for packed in self._packed for name, total in packed.squared_norms().items()}
        return {name: squares[name].clamp(min=0).sqrt() for name in self.shapes}

    def adjoint_error(self, residual: Tensor) -> dict[str, float]:
        # |fl(sum_t w_t a_t^T) - exact| <= gamma sum_t |w_t| |a_t|^T entrywise (Higham 2002, 3.5), and
        # the Frobenius norm of that bound is at most gamma sum_tc |R_tc| ||b_tc|| ||a_t||.
        out: dict[str, float] = {}
        for packed in self._packed:
            gamma = (packed.group.n_tokens + self.n_outputs + 2) * torch.finfo(self.dtype).eps
            weight = residual.double().abs().index_select(0, packed.group.sample)
            for name, norm in packed.token_norms.items():
                out[name] = gamma * float((weight * norm).sum())
        return out

    def _packed_of(self, name: str) -> Packed:
        return next(packed for packed in self._packed if name in packed.group.outputs)


def _rows(factor: Tensor) -> Tensor:
    """``(m, r)`` as ``(r, m)``; a batch ``(S, m, r)`` as ``(S * r, m)``."""
    return factor.T.contiguous() if factor.dim() == 2 else factor.mT.flatten(0, 1)


def _factor(rows: Tensor, starts: int, batched: bool) -> Tensor:
    """The inverse of :func:`_rows`."""
    return rows.unflatten(0, (starts, rows.shape[0] // starts)).mT if batched else rows.T
