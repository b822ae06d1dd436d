"""The tail of a half-precision network in float32, for a while.

From the first adapted layer on, weights and hidden states are float32. What lies below runs as it is, and what comes
from there is widened where it enters. Descent needs that: in bfloat16, a step smaller than a hundredth of a value is
lost, and products are slow on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.network.below import mapped, modules_below
from ranksure.network.logits import Batch

_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def promoted(model: nn.Module, targets: Mapping[str, nn.Module], batch: Batch) -> Iterator[list[str]]:
    """All from the first adapted layer on computes in float32 in the context, which gives the widened weights' names.

    Open it before :func:`ranksure.network.prefix.cached_prefix`, which then keeps half-precision tensors. The weights
    afterwards are the very ones from before: what was written into their stand-ins is lost. A weight that is tied to a
    module below (embeddings) is widened in the other module alone. A network without half-precision weights stays as
    it is.

    Args:
        model: the network.
        targets: all modules that are adapted.
        batch: any batch as the network takes it, to see what lies below.
    """
    if not any(p.dtype in _HALF for p in model.parameters()):
        yield []
        return
    below = {name: m for name, m in modules_below(model, batch, targets).items() if not _in_a_layer(model, name)}
    lower = {part for module in below.values() for part in module.modules()}
    with ExitStack() as undo:
        widened: list[str] = []
        same: dict[int, nn.Parameter] = {}
        for name, module in model.named_modules():
            if lower.isdisjoint(module.modules()):
                widened += [f"{name}.{own}" if name else own for own in _widen(module, same, undo)]
                undo.callback(module.register_forward_pre_hook(_wide_inputs, with_kwargs=True).remove)
        yield widened


def _in_a_layer(model: nn.Module, name: str) -> bool:
    """Whether a module is a part of a layer of a stack, as the norm that comes first in an adapted layer."""
    holder = name.rpartition(".")[0]
    while holder:
        name, holder = holder, holder.rpartition(".")[0]
        if isinstance(model.get_submodule(holder), nn.ModuleList):
            return True
    return False


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALF else x


def _widen(module: nn.Module, same: dict[int, nn.Parameter], undo: ExitStack) -> list[str]:
    """A module's own weights and buffers in float32 until the stack is left; tied weights stay tied."""
    found = []
    for name, p in list(module.named_parameters(recurse=False)):
        if p.dtype in _HALF:
            wide = same.setdefault(id(p), nn.Parameter(p.detach().float(), requires_grad=p.requires_grad))
            setattr(module, name, wide)
            undo.callback(setattr, module, name, p)
            found.append(name)
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.dtype in _HALF:
            setattr(module, name, buffer.float())
            undo.callback(setattr, module, name, buffer)
    return found


def _wide_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Hidden states, and masks and positions that were made in the network's own dtype."""
    return tuple(_tried(x) for x in args), {name: _tried(x) for name, x in kwargs.items()}


def _tried(value: Any) -> Any:
    try:
        return mapped(value, _wide)
    except TypeError:  # a cache, a configuration
        return value
