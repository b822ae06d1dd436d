"""One pass over the data: the gradient of the mean loss in every adapted weight, and every term's loss.

Gradients are taken per use of a module, from its inputs and the gradients at its outputs, never from
``weight.grad``: a tied weight counts in the adapted module's use only. Beyond the model and one batch's
activations, what is held is one gradient per module (or a group of modules per pass, under a memory budget), one
number per term, and the logits of a few positions at a time (:mod:`ranksure.network.batch_losses`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.adapters.merging import merged
from ranksure.errors import CaptureError, DataError, MemoryBudgetError, SettingError
from ranksure.loss_terms import Terms
from ranksure.losses import Kind
from ranksure.network.batch_losses import Forward, Weighting
from ranksure.network.hooks import input_tokens, output_tokens
from ranksure.network.logits import Batch, frozen
from ranksure.network.targets import base_layer, block_shape

Progress = Callable[[int], None]
"""Called with the batches done, over all passes."""


@dataclass(frozen=True)
class GradientPass:
    """What a pass over the data gives.

    Attributes:
        gradients: gradient of the mean loss by module, each ``(m, n)``, float32 (float64 for a float64 model); empty
            where every gradient was consumed.
        terms: every term's loss and weight.
        n_samples: rows seen.
        passes: passes over the data that the memory budget asked for.
        weight: total weight of the terms: their number, or the samples' under sample weighting.
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
    progress: Progress | None = None,
) -> GradientPass:
    """Gradient of the mean loss at the network's current weights.

    Args:
        model: the network, adapters active; run in evaluation mode, everything frozen, both restored.
        batches: batches with ``labels``; iterated once per group of modules.
        modules: adapted modules (PEFT's wrappers) by name.
        kind: which loss; by the model's own rules by default, checked against the loss that it computes itself.
        weighting: of a causal language model's tokens: every ``token`` alike, or every ``sample`` alike.
        memory_bytes: most bytes of gradients to hold at a time.
        consume: takes each module's gradient, which is dropped afterwards: needed for a budget to save anything.
        progress: called after every batch.

    Raises:
        DataError: no batch, no labels, labels that do not fit, or logits that are not finite.
        SettingError: several passes over an iterator, or a loss that is not the model's own.
        CaptureError: no module that the loss reaches, or a network that is not deterministic.
        MemoryBudgetError: one module's gradient alone is larger than the budget.
    """
    groups = _groups(modules, memory_bytes)
    if len(groups) > 1 and iter(batches) is batches:
        raise SettingError("the gradients need several passes under this memory budget: pass a list or a DataLoader")
    gradients: dict[str, Tensor] = {}
    unreached: list[str] = []
    first: Forward | None = None
    done = 0
    for group in groups:
        accumulator = _Accumulator({name: modules[name] for name in group})
        forward = Forward(model, kind, weighting, accumulator.modules.values(), check=first is None)
        with frozen(model), ExitStack() as stack:
            stack.enter_context(
                merged(model, modules.values(), memory_bytes - sum(map(_bytes, accumulator.modules.values())))
            )
            accumulator.attach(stack)
            for batch in batches:
                accumulator.start()
                forward.gradients(batch, accumulator.start, accumulator.backward)
                accumulator.finish()
                done += 1
                if progress is not None:
                    progress(done)
        if not forward.weight:
            raise DataError("the data holds no label: there is no loss to take a gradient of")
        if first is not None and not math.isclose(first.total, forward.total, rel_tol=1e-5, abs_tol=1e-12):
            raise CaptureError(
                f"two passes over the data give the losses {first.mean:.6g} and {forward.mean:.6g}: the network or the "
                "data loader is not deterministic (turn augmentation and drop_last off)"
            )
        first = first or forward
        for name in group:
            g = accumulator.gradient(name).div_(forward.weight)
            if not bool(torch.isfinite(g).all()):
                raise CaptureError(f"the gradient at target module {name} is not finite")
            if not accumulator.reached[name]:
                unreached.append(name)
            if consume is None:
                gradients[name] = g
            else:
                consume(name, g)
    assert first is not None
    if len(unreached) == len(modules):
        raise CaptureError("the loss depends on no adapted module: the adapter does nothing in this network")
    return GradientPass(gradients, first.terms(), first.n_samples, len(groups), first.weight, unreached)


def mean_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    kind: Kind | None = None,
    weighting: Weighting = "token",
    enough: tuple[float, float] | None = None,
) -> float:
    """Mean loss of a forward pass, by the same terms and weights as :func:`gradient_pass`.

    Args:
        model: the network.
        batches: batches with ``labels``.
        kind: which loss.
        weighting: of a causal language model's tokens.
        enough: ``(value, total weight)``: stop as soon as the batches seen prove that the mean over that total
            weight is above the value (losses are never negative); what is returned is then a lower bound.
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


class _Accumulator:
    """Forward hooks that add a module's gradient up as soon as the gradient at its output is there.

    As :class:`~ranksure.network.hooks.Recorder` reads them (see there), but nothing is kept until the end of the batch.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.reached: Counter[str] = Counter()  # uses that a gradient came back to
        self._sums: dict[str, Tensor] = {}
        self._in_backward = False
        self._waiting: Counter[str] = Counter()  # uses without gradients: a reentrant checkpoint runs them again

    def attach(self, stack: ExitStack) -> None:
        for name, module in self.modules.items():
            stack.callback(module.register_forward_hook(self._hook(name), with_kwargs=True).remove)

    def start(self) -> None:
        self._in_backward = False
        self._waiting = Counter()

    def backward(self) -> None:
        """What runs from now on until :meth:`start` is a checkpoint's second run."""
        self._in_backward = True

    def finish(self) -> None:
        """Check that every use of the batch was seen with gradients.

        Raises:
            CaptureError: a reentrant checkpoint cut a module off.
        """
        for name, count in self._waiting.items():
            if count > 0:
                raise CaptureError(
                    f"target module {name} got no gradient in {count} of its uses: a reentrant checkpoint cuts it off "
                    "(call model.enable_input_require_grads(), or turn checkpointing off)"
                )

    def gradient(self, name: str) -> Tensor:
        """The sum so far, ``(m, n)``; what is held is given away."""
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

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not isinstance(output, Tensor):
                raise CaptureError(f"target module {name} does not map one tensor to one tensor")
            if not torch.is_grad_enabled():
                self._waiting[name] += 0 if self._in_backward else 1
                return None
            if not output.requires_grad:  # frozen base: nothing before this module asks for gradients
                output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            else:  # a linear layer may return a view, whose hooks are lost when it is changed in place
                output = output.clone()
            version, replayed = x._version, self._in_backward
            output.register_hook(lambda grad: self._add(name, x, version, grad, replayed))
            return output

        return hook

    def _add(self, name: str, x: Tensor, version: int, grad: Tensor, replayed: bool) -> None:
        module = self.modules[name]
        if x._version != version:
            raise CaptureError(
                f"the input of target module {name} is changed in place after the module reads it: its gradient "
                "cannot be taken"
            )
        self.reached[name] += 1
        if replayed:
            self._waiting[name] -= 1
        tokens, outputs = input_tokens(module, x.detach()), output_tokens(module, grad)
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
