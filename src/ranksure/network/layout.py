"""Which row of a batch each token of a target module belongs to: found on a few rows, run alone and side by side.

A row run alone is the truth: whatever a module reads then, in whatever layout, is that row's. Side by side, the tokens
of every use are summed along each dimension that could be the batch's, and the one is taken that gives the rows' own
products with random factors. Where none does (a weight that acts on all rows at once, such as broadcast positions, or
tokens that are routed), rows have to be run one at a time. Logits that change with the neighbours are no function of
the row, and are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ranksure.errors import CaptureError, exhausted, one_line
from ranksure.factors import Factors
from ranksure.network.batches import Batches, Given, few_rows
from ranksure.network.hooks import Uses, gradient_tokens, input_tokens, leading_shape
from ranksure.network.logits import Batch, DoesNotRun, not_finite
from ranksure.network.targets import block_shape

Run = Callable[[Batch, Tensor], tuple[Tensor, Uses]]
"""A forward and C backward passes over a batch, from contrasts ``(K, C)``."""

_LOGITS = {torch.float64: 1e-6, torch.float32: 1e-4}  # some steps of float64 networks are in float32
_PRODUCTS = {torch.float64: 1e-5, torch.float32: 1e-3}  # relative to the root of the sum of the terms' squares
_SILENT = {torch.float64: 1e-7, torch.float32: 1e-5}  # of the loudest module: what is below is rounding of zero
_HALF = (0.1, 0.3, 0.01)  # in another place, a sum is off by about 1.4
_COLUMNS = 4  # random factors of a module


class NoRow(Exception):
    """Tokens that cannot be told apart by row; the argument is the module's name."""


@dataclass(frozen=True)
class _Place:
    """Where the batch is in a tensor's leading shape: the outer or the inner part of one dimension."""

    dimension: int
    inner: bool

    def stride(self, lead: Sequence[int], size: int) -> int | None:
        """Tokens from one row's to the next row's; None where the shape does not allow it."""
        if self.dimension >= len(lead) or lead[self.dimension] % size:
            return None
        after = math.prod(lead[self.dimension + 1 :])
        return after if self.inner else after * (lead[self.dimension] // size)


def row_of(tokens: int, stride: int, size: int, device: torch.device | None = None) -> Tensor:
    """The row of each token."""
    return torch.arange(tokens, device=device) // stride % size


@dataclass
class _Use:
    """What a use of a module adds to each token's products, ``(T, 4)``, and the leading shape of its tokens."""

    products: Tensor
    lead: Sequence[int]

    def by_row(self, place: _Place, size: int) -> Tensor | None:
        stride = place.stride(self.lead, size)
        if stride is None:
            return None
        return self.products.new_zeros(size, _COLUMNS).index_add_(
            0, row_of(len(self.products), stride, size), self.products
        )


@dataclass
class Layout:
    """By module and use, every place of the batch that the rows looked at agree with; None where they say nothing."""

    places: dict[str, list[set[_Place] | None]] = field(default_factory=dict)

    def stride(self, name: str, use: int, uses: int, lead: Sequence[int], size: int) -> int:
        """Token ``t`` is of row ``(t // stride) % size``.

        Raises:
            NoRow: that is not known of this use.
        """
        if size == 1:
            return max(1, math.prod(lead))
        known = self.places.get(name, [])
        places = (known[use] if len(known) == uses else None) or set[_Place]()
        found = {stride for place in places if (stride := place.stride(lead, size)) is not None}
        if len(found) != 1:
            raise NoRow(name)
        return found.pop()


class RowCheck:
    """Looks at four rows of the data: the shortest, the longest and two at random.

    Args:
        run: runs the network.
        targets: modules by name.
        contrasts: ``(K, C)``; the passes start from one random sum of them.
        rows: all rows.

    Attributes:
        checked: the rows that are looked at, by number.
    """

    def __init__(self, run: Run, targets: Mapping[str, nn.Module], contrasts: Tensor, rows: Batches | Given) -> None:
        self._run, self._targets, self._rows = run, targets, rows
        random = torch.Generator().manual_seed(0)
        mix = torch.randint(1, 4, (contrasts.shape[1],), generator=random)  # whole: half precision holds them exactly
        self._mix = (mix * (2 * torch.randint(2, mix.shape, generator=random) - 1)).double()
        self._seed = (contrasts.double().cpu() @ self._mix)[:, None]
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in targets.items():
            u, v = (torch.randn(size, _COLUMNS, generator=random, dtype=torch.float64) for size in block_shape(module))
            self._factors[name] = (u, v)
        self.checked = few_rows(rows.lengths)
        self._logits: dict[int, Tensor] = {}
        self._alone: dict[int, dict[str, list[_Use]]] = {}
        self._dtype = torch.float64  # the coarsest that is met

    def look(self) -> Layout:
        """Run the rows alone, and side by side in another order.

        Raises:
            CaptureError: the network does not run one row alone, is not deterministic, or its rows interact.
        """
        for i in self.checked:
            self._logits[i], self._alone[i] = self._run_alone(i)
            if not bool(torch.isfinite(self._logits[i]).all()):
                raise CaptureError(not_finite(f"for sample {i}", self._rows.of([i])))
        layout = Layout()
        if max(self._rows.sizes) == 1:
            return layout
        for batch, numbers in self._rows.together(self.checked[::-1]):
            if len(numbers) > 1:
                z, own = self._products(*self._run(batch, self._seed))
                self._compare_logits(z, numbers, batch)
                for name, uses in own.items():
                    layout.places[name] = self._narrowed(layout.places.get(name), name, uses, numbers)
        return layout

    def confirm(self, product: Callable[[Factors], Tensor], logits: Tensor) -> None:
        """What was captured of the checked rows is what they gave alone.

        Args:
            product: of their gradients with a batch of S factors, ``(S, rows, C)``, for the contrasts that the passes
                start from.
            logits: theirs, ``(rows, K)``.

        Raises:
            NoRow: it is not, in a module.
            CaptureError: as :meth:`look`.
        """
        self._compare_logits(logits, self.checked, {})
        for name, (u, v) in self._factors.items():
            stored = product({name: (u.T[:, :, None], v.T[:, :, None])})
            allowed = max(_PRODUCTS.get(dtype, _HALF[1]) for dtype in (self._dtype, stored.dtype))
            found = (stored.double() @ self._mix).T
            for own, i in zip(found, self.checked, strict=True):
                every = [use.products for use in self._alone[i].get(name, [])]
                terms = torch.cat([torch.zeros(1, _COLUMNS, dtype=torch.float64), *every])
                if not _same(own, terms, allowed, self._silent(i)):
                    raise NoRow(name)

    def _run_alone(self, row: int) -> tuple[Tensor, dict[str, list[_Use]]]:
        try:
            return self._products(*self._run(self._rows.of([row]), self._seed))
        except (DoesNotRun, RuntimeError, ValueError, IndexError) as error:
            if exhausted(error):
                raise
            why = one_line(error.__cause__ if isinstance(error, DoesNotRun) and error.__cause__ else error)
            raise CaptureError(f"the network does not run row {row} alone: {why}") from None

    def _products(self, z: Tensor, uses: Uses) -> tuple[Tensor, dict[str, list[_Use]]]:
        """Logits in float64, and every token's product with the random factors."""
        out: dict[str, list[_Use]] = {}
        coarsest = [self._dtype, z.dtype]
        for name, entries in uses.items():
            u, v = self._factors[name]
            out[name] = []
            for x, _, (gradient,) in entries:
                tokens, outputs = input_tokens(self._targets[name], x), gradient_tokens(self._targets[name], gradient)
                if len(tokens) != len(outputs):
                    raise CaptureError(unassigned(name, gradient))
                left = outputs.cpu().double() @ u
                right = v[tokens.cpu()] if tokens.dim() == 1 else tokens.cpu().double() @ v
                out[name].append(_Use(left * right, leading_shape(self._targets[name], gradient)))
                coarsest.append(gradient.dtype)
        self._dtype = max(coarsest, key=lambda dtype: torch.finfo(dtype).eps)
        return z.double().cpu(), out

    def _narrowed(
        self, known: list[set[_Place] | None] | None, name: str, uses: list[_Use], numbers: Sequence[int]
    ) -> list[set[_Place] | None]:
        """The places that also these rows, side by side, agree with."""
        alone = [(at, self._alone[i].get(name, [])) for at, i in enumerate(numbers) if i in self._alone]
        if any(len(own) != len(uses) for _, own in alone) or (known is not None and len(known) != len(uses)):
            return []
        out: list[set[_Place] | None] = []
        for index, use in enumerate(uses):
            before = None if known is None else known[index]
            expected = {at: own[index].products for at, own in alone}
            if all(float(p.norm()) <= self._silent(numbers[at]) for at, p in expected.items()):
                out.append(before)
                continue
            allowed = _PRODUCTS.get(self._dtype, _HALF[1])
            every = {_Place(d, inner) for d in range(len(use.lead)) for inner in (False, True)}
            fits: set[_Place] = set()
            for place in every if before is None else before:
                found = use.by_row(place, len(numbers))
                if found is not None and all(_same(found[at], p, allowed) for at, p in expected.items()):
                    fits.add(place)
            out.append(fits)
        return out

    def _silent(self, row: int) -> float:
        """Products of a row below this are the rounding of a gradient that is zero (attention to one place, say)."""
        loudest = max((float(u.products.norm()) for uses in self._alone[row].values() for u in uses), default=0.0)
        return _SILENT.get(self._dtype, _HALF[2]) * loudest

    def _compare_logits(self, z: Tensor, numbers: Sequence[int], batch: Batch) -> None:
        """Rows side by side have the logits of each alone."""
        scale = 1 + max(float(own.abs().max()) for own in self._logits.values())
        for at, i in enumerate(numbers):
            if i not in self._logits:
                continue
            if not bool(torch.isfinite(z[at]).all()):
                raise CaptureError(not_finite(f"for sample {i}", batch))
            difference = float((z[at] - self._logits[i]).abs().max())
            if difference <= _LOGITS.get(self._dtype, _HALF[0]) * scale:
                continue
            if (again := float((self._run_alone(i)[0] - self._logits[i]).abs().max())) > 0.1 * difference:
                raise CaptureError(
                    "the network is not deterministic in evaluation mode: two passes over one row differ by "
                    f"{again:.2g}; turn off dropout or sampling that ignores model.eval()"
                )
            raise CaptureError(
                f"samples interact: the logits of row {i} change by {difference:.2g} with the rows beside it in its "
                "batch (batch statistics, routing of limited capacity, padding without a mask); use `batch_size` 1, "
                "which takes every row alone"
            )


def _same(found: Tensor, terms: Tensor, allowed: float, silent: float = 0.0) -> bool:
    """Whether sums ``(4,)`` are those of these terms, ``(T, 4)``, up to their rounding."""
    return bool((found - terms.sum(0)).norm() <= max(allowed * float(terms.norm()), silent))


def unassigned(name: str, gradient: Tensor) -> str:
    """The refusal of a module whose outputs have another number of rows than its inputs."""
    return (
        f"the output of target module {name} has shape {tuple(gradient.shape)}, whose rows are not those of its input; "
        "leave this module out"
    )
