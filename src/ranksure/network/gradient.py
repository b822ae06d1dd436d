"""One pass over the data: the gradient of the mean loss in every adapted weight, and every term's loss.

Gradients are taken per use of a module, from its inputs and the gradients at its outputs, never from
``weight.grad``: a tied weight counts in the adapted module's use only. Beyond the model and one batch's
activations, what is held is one gradient per module (or a group of modules per pass, under a memory budget), one
number per term, and the logits of a few positions at a time (:mod:`ranksure.network.batch_losses`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ranksure.errors import CaptureError, DataError, MemoryBudgetError, SettingError
from ranksure.loss_terms import Terms
from ranksure.losses import Kind
from ranksure.network.batch_losses import Forward, Weighting
from ranksure.network.hooks import Streamed, gradient_tokens, input_tokens
from ranksure.network.logits import Batch, frozen
from ranksure.network.row_losses import LossCheck
from ranksure.network.targets import base_layer, block_shape

Progress = Callable[[int], None]
"""Called with the batches done, over all passes."""

Around = Callable[[nn.Module, Iterable[nn.Module], float], AbstractContextManager[object]]
"""Makes the context of a pass from the network, its adapted modules, and the bytes that it may take."""


_LEAST = 16
"""Times the smallest normal number: slopes of the loss below it, and more so the gradients in the network that they
become, lose their digits. (A float16 network is 5% off at slopes of a quarter of that.)"""


class Underflow(CaptureError):
    """The loss is so small that the network's dtype cannot hold its gradients."""


@dataclass(frozen=True)
class GradientPass:
    """What a pass over the data gives.

    Attributes:
        gradients: gradient of the mean loss by module, each ``(m, n)``, float32 (float64 for a float64 model); empty
            where every gradient was consumed.
        terms: every term's loss and weight; ``weight`` is their total weight, ``n_samples`` the rows seen.
        passes: passes over the data that the memory budget asked for.
        unreached: modules that the loss does not depend on; their gradient is zero.
    """

    gradients: dict[str, Tensor]
    terms: Terms
    n_samples: int
    passes: int
    weight: float
    unreached: list[str]


def gradient_pass(
    model: nn.Module,
    batches: Iterable[Batch],
    modules: Mapping[str, nn.Module],
    *,
    kind: Kind | None = None,
    weighting: Weighting = "token",
    memory_bytes: float = math.inf,
    consume: Callable[[str, Tensor], None] | None = None,
    progress: Progress = lambda done: None,
    around: Around = lambda model, modules, memory_bytes: nullcontext(),
    check_rows: bool = True,
) -> GradientPass:
    """Gradient of the mean loss at the network's current weights.

    Args:
        model: the network, adapters active; it is as it was afterwards.
        batches: batches with ``labels``; iterated once per group of modules.
        modules: adapted modules (PEFT's wrappers) by name.
        kind: which loss; by the model's own rules by default, checked against the loss that it computes itself.
        weighting: as :class:`~ranksure.network.batch_losses.Forward`'s.
        memory_bytes: most bytes of gradients to hold at a time.
        consume: takes each module's gradient, which is dropped afterwards: needed for a budget to save anything.
        progress: called after every batch.
        around: a context for each pass, such as :func:`ranksure.adapters.merging.merged`, that changes no output.
        check_rows: whether a few rows are run again alone (needs a network that takes other rows than these batches).

    Raises:
        DataError: no batch, no labels, labels that do not fit, or logits that are not finite.
        SettingError: several passes over an iterator, or a loss that is not the model's own.
        CaptureError: no module that the loss reaches, or a network that is not deterministic.
        RowsInteract: the mean loss depends on how rows are put into batches.
        Underflow: the gradients are too small for the network's dtype.
        MemoryBudgetError: one gradient alone is larger than the budget.
    """
    if len(groups := _groups(modules, memory_bytes)) > 1 and iter(batches) is batches:
        raise SettingError("the gradients need several passes under this memory budget: pass a list or a DataLoader")
    gradients: dict[str, Tensor] = {}
    unreached: list[str] = []
    first: Forward | None = None
    done = itertools.count(1)
    for group in groups:
        sums = _Sums({name: modules[name] for name in group})
        hooks = Streamed(sums.modules, sums.add)
        forward = Forward(model, kind, weighting, sums.modules.values(), check=first is None)
        left = memory_bytes - sum(map(_bytes, sums.modules.values()))
        check = LossCheck(batches) if first is None and check_rows else None
        inside = around(model, modules.values(), left)
        stream(forward, batches, hooks, lambda: progress(next(done)), inside, check)
        first = _agreeing(first, forward)
        _refuse_underflow(model, first.terms())
        for name in group:
            g = sums.pop(name).div_(forward.weight)
            if not bool(torch.isfinite(g).all()):
                raise CaptureError(f"the gradient at target module {name} is not finite")
            if not hooks.reached[name]:
                unreached.append(name)
            (consume or gradients.__setitem__)(name, g)
    assert first is not None
    if len(unreached) == len(modules):
        raise CaptureError("the loss depends on no adapted module: the adapter does nothing in this network")
    return GradientPass(gradients, first.terms(), first.n_samples, len(groups), first.weight, unreached)


def stream(
    forward: Forward,
    batches: Iterable[Batch],
    hooks: Streamed,
    done: Callable[[], None],
    around: AbstractContextManager[object] | None = None,
    check: LossCheck | None = None,
) -> None:
    """A backward pass of every batch's loss with the hooks on, the network frozen; ``done`` is called after each.

    Raises:
        RowsInteract: ``check`` finds that a row's loss depends on its batch.
    """
    with frozen(forward.model), around or nullcontext():
        with ExitStack() as stack:
            hooks.attach(stack)
            for batch in batches:
                hooks.start()
                forward.gradients(batch, hooks.start, hooks.backward)
                hooks.finish()
                if check is not None:
                    check.see(batch, forward)
                done()
        if check is not None:
            check.finish(forward)


def _refuse_underflow(model: nn.Module, terms: Terms) -> None:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).tiny, default=torch.float32)
    if not terms.steepness >= _LEAST * torch.finfo(dtype).tiny:
        raise Underflow(
            f"the loss is {terms.mean:.2g}, whose gradients are too small for {str(dtype).removeprefix('torch.')}: "
            "nothing can be said of what is left of it" + "; load the network in a wider `dtype`" * (dtype.itemsize < 8)
        )


def _agreeing(first: Forward | None, forward: Forward) -> Forward:
    """The first of the passes, with which a later one must agree."""
    if not forward.weight:
        raise DataError("the data holds no label: there is no loss to take a gradient of")
    if first is not None and not math.isclose(first.total, forward.total, rel_tol=1e-5, abs_tol=1e-12):
        raise CaptureError(
            f"two passes over the data give the losses {first.mean:.6g} and {forward.mean:.6g}: the network or the "
            "data loader is not deterministic (turn augmentation and drop_last off)"
        )
    return first or forward


def mean_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    kind: Kind | None = None,
    weighting: Weighting = "token",
    enough: tuple[float, float] | None = None,
) -> float:
    """Mean loss of a forward pass, by the same terms and weights as :func:`gradient_pass`.

    With ``enough``, a value and the total weight, it stops as soon as the batches seen prove that the mean is above the
    value (losses are never negative); what is returned is then a lower bound.
    """
    forward = Forward(model, kind, weighting)
    with frozen(model), torch.no_grad():
        for batch in batches:
            forward.losses_only(batch)
            if enough is not None and forward.total > enough[0] * enough[1]:
                return forward.total / enough[1]
    if not forward.weight:
        raise DataError("the data holds no label: there is no loss")
    return forward.mean


class _Sums:
    """Gradients of modules, ``(m, n)`` each, added up use by use; only the rows with a gradient are multiplied."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Add the part of one use: its input, and the gradient at its output."""
        module = self.modules[name]
        tokens, outputs = input_tokens(module, x), gradient_tokens(module, gradient)
        if tokens.shape[0] != outputs.shape[0]:
            raise CaptureError(f"inputs and outputs of target module {name} have different numbers of rows")
        if int(outputs[:, 0].count_nonzero()) < 0.8 * len(outputs):  # a cheap look first
            keep = outputs.ne(0).any(1)  # padding, and tokens that the loss does not see, have no gradient
            tokens, outputs = tokens[keep], outputs[keep]
        wide = torch.promote_types(outputs.dtype, torch.float32)
        m, n = block_shape(module)
        by_index = tokens.dim() == 1  # an embedding: rows of the transpose by index
        if name not in self._sums:
            shape = (n, m) if by_index else (m, n)
            found = torch.zeros(shape, dtype=wide, device=outputs.device)
            self._sums[name] = found.T if by_index else found
        if by_index:
            self._sums[name].T.index_add_(0, tokens, outputs.to(wide))
        else:
            self._sums[name].addmm_(outputs.to(wide).T, tokens.to(wide))

    def pop(self, name: str) -> Tensor:
        """The sum so far; what is held is given away."""
        found = self._sums.pop(name, None)
        layer = base_layer(self.modules[name])
        if found is None:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            wide = torch.promote_types(weight.dtype, torch.float32)
            return torch.zeros(block_shape(layer), dtype=wide, device=weight.device)
        if isinstance(layer, nn.Embedding):
            if layer.padding_idx is not None:
                found[:, layer.padding_idx] = 0  # torch trains no padding row, and LoRA none of its update
            return found.contiguous()
        return found


def _groups(modules: Mapping[str, nn.Module], memory_bytes: float) -> Sequence[list[str]]:
    """Modules in groups whose gradients fit the budget, in order."""
    groups: list[list[str]] = [[]]
    held = 0.0
    for name, module in modules.items():
        size = _bytes(module)
        if size > memory_bytes:
            raise MemoryBudgetError(
                f"the gradient of {name} alone takes {size / 2**20:.0f} MiB of a budget of "
                f"{memory_bytes / 2**20:.0f} MiB: raise `memory`"
            )
        if held + size > memory_bytes:
            groups.append([])
            held = 0.0
        groups[-1].append(name)
        held += size
    return groups


def _bytes(module: nn.Module) -> int:
    """Bytes of a module's gradient."""
    weight = base_layer(module).weight
    assert isinstance(weight, Tensor)
    return math.prod(block_shape(module)) * (8 if weight.dtype == torch.float64 else 4)


__all__ = ["GradientPass", "Progress", "Weighting", "gradient_pass", "mean_loss"]
