"""Which singular directions of a trained adapter matter least, and how many can go within a budget.

Only the order of going is estimated; how many directions go is decided by the true loss. Two orders are tried: by
singular value alone, and by an estimate of the harm per parameter. The harm of removing ``sigma p q^T`` is taken as
``sigma^2 / 2`` times the mean square, over samples, of the loss's derivative along ``p q^T`` (the empirical Fisher
information), averaged over the network without the adapter, with half of it and with all of it: removing directions
moves from the last towards the first, and a network that fits its data well is flat at the last alone. The
derivative's mean is left out: it is zero, or the penalty's price of the direction, at a stationary point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ranksure.adapters.loaded import Adapter
from ranksure.adapters.placed import placed
from ranksure.errors import AdapterError, SettingError
from ranksure.factors import Factors, thin_svd
from ranksure.losses import Kind
from ranksure.network.batch_losses import Forward, Weighting
from ranksure.network.gradient import stream
from ranksure.network.hooks import Streamed, gradient_tokens, input_tokens
from ranksure.network.logits import Batch

LENGTHS = (0.0, 0.5, 1.0)
"""Lengths of the update, as shares, at which derivatives are taken."""

Parts = dict[str, tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Direction:
    """One singular direction ``sigma p q^T`` of one module's update.

    Attributes:
        index: its place among the module's singular values, largest first; ``value`` is ``sigma``.
        harm: estimated increase of the loss without it.
        parameters: parameters that it takes, ``m + n``.
    """

    module: str
    index: int
    value: float
    harm: float
    parameters: int


def without(factors: Factors, removed: Iterable[Direction]) -> Factors:
    """Balanced factors of the updates less these directions."""
    gone: dict[str, set[int]] = {}
    for direction in removed:
        gone.setdefault(direction.module, set()).add(direction.index)
    out: Factors = {}
    for name, (u, v) in factors.items():
        p, s, q = thin_svd(u, v)
        keep = [index for index in range(len(s)) if index not in gone.get(name, ())]
        root = s[keep].sqrt()
        out[name] = (p[:, keep] * root, q[:, keep] * root)
    return out


def null_directions(factors: Factors, dtype: torch.dtype) -> list[Direction]:
    """Directions up to ``eps ||u|| ||v||``: rounding the factors to ``dtype`` moves the update by as much."""
    eps = torch.finfo(dtype).eps
    out = []
    for name, (u, v) in factors.items():
        s = thin_svd(u, v)[1]
        level = eps * float(torch.linalg.matrix_norm(u, 2) * torch.linalg.matrix_norm(v, 2)) if len(s) else 0.0
        size = u.shape[0] + v.shape[0]
        out += [Direction(name, i, x, 0.0, size) for i, x in enumerate(s.tolist()) if x <= level]
    return out


def ranked_directions(
    model: nn.Module,
    batches: Iterable[Batch],
    read: Adapter,
    *,
    kind: Kind | None = None,
    weighting: Weighting = "token",
) -> list[Direction]:
    """All singular directions, those of least estimated harm per parameter first; a gradient pass per length.

    Raises:
        DataError: no labels, or labels that do not fit.
        CaptureError: the loss reaches no adapted module.
    """
    parts: Parts = {name: thin_svd(u, v) for name, (u, v) in read.factors.items()}
    squares = {name: torch.zeros(len(s), dtype=torch.float64) for name, (_, s, _) in parts.items()}
    for length in LENGTHS:
        root = math.sqrt(length)
        shorter = {name: (root * u, root * v) for name, (u, v) in read.factors.items()}
        with placed(read, shorter, torch.float64):
            for name, found in mean_squares(model, batches, read, parts, kind, weighting).items():
                squares[name] += found / len(LENGTHS)
    out = []
    for name, (p, s, q) in parts.items():
        harm, size = 0.5 * s.square() * squares[name], p.shape[0] + q.shape[0]
        out += [Direction(name, i, float(s[i]), float(harm[i]), size) for i in range(len(s))]
    return sorted(out, key=lambda direction: (direction.harm / direction.parameters, direction.value))


def mean_squares(
    model: nn.Module,
    batches: Iterable[Batch],
    read: Adapter,
    parts: Parts,
    kind: Kind | None = None,
    weighting: Weighting = "token",
) -> dict[str, Tensor]:
    """``sum_i d_i^2 / W`` by direction: ``d_i`` the derivative of sample ``i``'s loss along ``p q^T``.

    A sample's loss is the weighted sum over its terms, ``W`` the total weight. ``parts`` holds ``p`` (m, k), values
    (k,), which are not used, and ``q`` (n, k) by module.
    """
    out = {name: torch.zeros(s.shape, dtype=torch.float64) for name, (_, s, _) in parts.items()}
    by_row: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, gradient: Tensor) -> None:
        """Add ``b^T p q^T a``, summed over a sample's tokens, of one use's inputs ``a`` and gradients ``b``."""
        module, (p, _, q) = read.blocks[name].module, parts[name]
        tokens, outputs = input_tokens(module, x), gradient_tokens(module, gradient)
        wide = torch.promote_types(outputs.dtype, torch.float32)
        p, q = p.to(outputs.device, wide), q.to(outputs.device, wide)
        found = (outputs.to(wide) @ p) * (q[tokens] if tokens.dim() == 1 else tokens.to(wide) @ q)
        mine = found.double().reshape(x.shape[0], -1, found.shape[-1]).sum(1)  # a sample's rows lie together
        before = by_row.get(name)
        if before is not None and before.shape != mine.shape:  # position embeddings: one row for all samples
            before, mine = before.sum(0, keepdim=True), mine.sum(0, keepdim=True)
        by_row[name] = mine if before is None else before + mine

    def batch_done() -> None:
        for name, found in by_row.items():
            out[name] += found.square().sum(0).cpu()
        by_row.clear()

    forward = Forward(model, kind, weighting, read.modules.values())
    stream(forward, batches, Streamed(read.modules, add), batch_done)
    return {name: total / max(forward.weight, 1e-300) for name, total in out.items()}


def by_value(order: Sequence[Direction]) -> list[Direction]:
    """The other order: the smallest singular values first."""
    return sorted(order, key=lambda direction: direction.value)


def most_within(order: Sequence[Direction], allowed: Callable[[Sequence[Direction]], bool]) -> Sequence[Direction]:
    """The directions that can go, in the order of going: bisection on the true loss; what is returned was measured.

    Raises:
        SettingError: not even the adapter as it is, rounded to its stored dtype, is within the budget.
        AdapterError: all may go.
    """
    if not allowed(()):
        raise SettingError("the budget is below what rounding the factors alone changes: allow more")
    if allowed(order):
        raise AdapterError("the network without the adapter is within this budget: there is nothing to write")
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if allowed(order[:middle]) else (low, middle)
    return order[:low]
