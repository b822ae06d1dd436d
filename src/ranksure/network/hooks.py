"""What goes into target modules and what gradients come back: hooks, one record per use.

Hooks sit on the module that a LoRA wrapper presents, and read gradients at the module's *output*, so
they hold for frozen bases, adapted models, tied weights (this use only), modules used several times
and gradient checkpointing of either kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksure.errors import CaptureError
from ranksure.network.targets import base_layer

Uses: TypeAlias = dict[str, list[tuple[Tensor, int, list[Tensor]]]]
"""By module, for each use: inputs, the identity of the input tensor, one gradient per backward pass."""


@dataclass
class Use:
    """One pass of an input through a target module."""

    module: str
    inputs: Tensor
    version: int
    owner: int  # identity of the input tensor, so that modules that read the same tensor share it
    pending: bool  # seen without gradients first: a reentrant checkpoint will run it again
    grads: list[Tensor] = field(default_factory=list)


class Recorder:
    """Forward hooks on the targets: inputs when seen, gradients at the outputs during backward."""

    def __init__(self, targets: Mapping[str, nn.Module]) -> None:
        self.targets = targets
        self.uses: list[Use] = []
        self.backward = False
        self.replayed: list[Use] = []
        self._keep: dict[int, Tensor] = {}

    def attach(self, stack: ExitStack) -> None:
        for name, module in self.targets.items():
            handle = module.register_forward_hook(self._hook(name), with_kwargs=True)
            stack.callback(handle.remove)

    def start(self) -> None:
        self.uses, self.replayed, self.backward = [], [], False
        self._keep = {}

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not isinstance(output, Tensor):
                raise CaptureError(f"target module {name} does not map one tensor to one tensor")
            use = self._record(name, x, pending=not torch.is_grad_enabled())
            if not torch.is_grad_enabled():
                return None
            if not output.requires_grad:  # frozen base: nothing before this module asks for gradients
                output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            else:  # a linear layer may return a view, whose hooks are lost when it is changed in place
                output = output.clone()
            if use is not None:
                output.register_hook(use.grads.append)
            return output

        return hook

    def _record(self, name: str, x: Tensor, pending: bool) -> Use | None:
        if self.backward:  # a checkpoint runs its segment again
            waiting = any(use.pending and use.module == name for use in self.uses)
            if not waiting:
                return None
        # Keeping the tensor alive keeps its identity unique among the inputs of this batch.
        self._keep[id(x)] = x
        use = Use(name, x.detach(), x._version, id(x), pending)
        (self.replayed if self.backward else self.uses).append(use)
        return use

    def collect(self, n_backward: int) -> Uses:
        """Uses by module as (inputs, owner, one gradient per backward pass).

        Raises:
            CaptureError: a use without exactly one gradient per backward pass.
        """
        out: Uses = {name: [] for name in self.targets}
        for name in self.targets:
            uses = [use for use in self.uses if use.module == name]
            replayed = [use for use in self.replayed if use.module == name]
            if any(use.pending for use in uses):
                if not all(use.pending for use in uses) or len(replayed) != n_backward * len(uses):
                    raise CaptureError(
                        f"target module {name} was run {len(uses)} times forward but {len(replayed)} times again for "
                        f"{n_backward} backward passes; turn gradient checkpointing off (or use_reentrant=False)"
                    )
                count = len(uses)
                merged = [
                    Use(name, replayed[i].inputs, replayed[i].version, replayed[i].owner, False) for i in range(count)
                ]
                for index, use in enumerate(replayed):
                    merged[index % count].grads.extend(use.grads)
                uses = merged
            if not uses:
                raise CaptureError(f"target module {name} was never used in the forward pass; leave it out")
            for use in uses:
                if len(use.grads) != n_backward:
                    raise CaptureError(
                        f"target module {name} got {len(use.grads)} gradients in {n_backward} backward passes: the "
                        "logits do not depend on it, or a reentrant checkpoint cuts it off (call "
                        "model.enable_input_require_grads() or turn checkpointing off)"
                    )
                kept = self._keep.get(use.owner)
                if kept is not None and kept._version != use.version:
                    raise CaptureError(
                        f"the input of target module {name} is changed in place after the module reads it; "
                        "leave this module out, or make the operation after it out-of-place"
                    )
                out[name].append((use.inputs, use.owner, use.grads))
        return out


def input_tokens(module: nn.Module, x: Tensor) -> Tensor:
    """Inputs as rows ``(rows * tokens, n)``, or ``(rows * tokens,)`` indices for an embedding."""
    layer = base_layer(module)
    if isinstance(layer, nn.Embedding):
        return x.reshape(-1)
    if isinstance(layer, nn.Conv2d):
        padding = layer.padding
        if isinstance(padding, str):
            total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            if padding == "same":
                x = F.pad(x, [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2])
            padding = 0
        columns = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])
    return x.reshape(-1, x.shape[-1])


def output_tokens(module: nn.Module, grad: Tensor) -> Tensor:
    """Gradients at the output as rows ``(rows * tokens, m)``."""
    if isinstance(base_layer(module), nn.Conv2d):
        return grad.flatten(2).transpose(1, 2).reshape(-1, grad.shape[1])
    return grad.reshape(-1, grad.shape[-1])
