"""What goes into target modules and what gradients come back: hooks, one record per use.

Hooks sit on the module that a LoRA wrapper presents, and read gradients at the module's *output*, so
they hold for frozen bases, adapted models, tied weights (this use only), modules used several times
and gradient checkpointing of either kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ranksure.errors import CaptureError
from ranksure.network.targets import base_layer, scaled

Uses: TypeAlias = dict[str, list[tuple[Tensor, int, list[Tensor]]]]
"""By module, for each use: inputs, the identity of the input tensor, one gradient per backward pass."""


_PLAIN = {kind.forward for kind in (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)}
_SAME = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative; some steps of float64 networks are in float32
_SAME_HALF = 0.05


class OtherMap(CaptureError):
    """A target module whose output is not its weight times its input: W + u v^T is no adapter of it."""


class Hooks:
    """Forward hooks on modules; a subclass says in :meth:`seen` what becomes of each use."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.in_backward = False

    def attach(self, stack: ExitStack) -> None:
        """Hook every module until the stack is left."""
        for name, module in self.modules.items():
            if _own_forward(layer := base_layer(module)):
                stack.callback(layer.register_forward_hook(self._compare(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(self._hook(name), with_kwargs=True).remove)

    def start(self) -> None:
        """Forget the uses of the batch before."""
        self.in_backward = False

    def backward(self) -> None:
        """What runs from now on until :meth:`start` is a checkpoint's second run."""
        self.in_backward = True

    def seen(self, name: str, x: Tensor) -> Callable[[Tensor], None] | None:
        """A use with the input ``x``: what takes the gradient at its output. Called without gradients too."""
        raise NotImplementedError

    def _compare(self, name: str) -> Callable[..., None]:
        seen: list[str] = []

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not seen and not _is_its_weight(layer, _input(name, layer, args, kwargs, output), output):
                raise OtherMap(
                    f"target module {name} is a {type(layer).__name__}, whose output is not its weight times its "
                    "input: an adapter beside it and one merged into it are two networks; leave it out"
                )
            seen.append(name)

        return hook

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            take = self.seen(name, _input(name, base_layer(module), args, kwargs, output))
            if not torch.is_grad_enabled():
                return None
            if not output.requires_grad:  # frozen base: nothing before this module asks for gradients
                output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            else:  # a linear layer may return a view, whose hooks are lost when it is changed in place
                output = output.clone()
            if take is not None:
                output.register_hook(take)
            return output

        return hook


def _input(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    x = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(x, Tensor) or not isinstance(output, Tensor):
        kind = type(layer).__name__
        raise OtherMap(f"target module {name} is a {kind}, which does not map one tensor to one tensor; leave it out")
    return x


def _own_forward(layer: nn.Module) -> bool:
    """Whether a layer computes by other code than torch's (quantised weights aside, which are no matrices)."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
        return False
    if not weight.is_floating_point() or weight.element_size() == 1:
        return False
    convolves = isinstance(layer, nn.Conv2d) and type(layer)._conv_forward is not nn.Conv2d._conv_forward
    return type(layer).forward not in _PLAIN or convolves or "forward" in vars(layer)


@torch.no_grad()
def _is_its_weight(layer: Any, x: Tensor, output: Tensor) -> bool:
    """Whether an output is ``W x + b``, up to rounding."""
    coarsest = max((t.dtype for t in (x, layer.weight, output) if t.is_floating_point()), key=_eps)
    wide = torch.promote_types(output.dtype, torch.float32)
    try:
        tokens, found = input_tokens(layer, x), output_tokens(layer, output).to(wide)
        weight = layer.weight.to(wide)
        if isinstance(layer, nn.Embedding):
            expected = scaled(layer, weight[tokens])
        else:
            bias = None if layer.bias is None else layer.bias.to(wide)
            expected = F.linear(tokens.to(wide), weight.T if isinstance(layer, Conv1D) else weight.flatten(1), bias)
        far = float((found - expected).norm())
    except (RuntimeError, IndexError):
        return False  # shapes, or indices, that do not fit
    return found.shape == expected.shape and far <= _SAME.get(coarsest, _SAME_HALF) * float(expected.norm())


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


class Streamed(Hooks):
    """Hands every use's input and the gradient at its output on as soon as the gradient is there; keeps neither.

    Args:
        modules: by name.
        take: called with the name, the input and the gradient.

    Attributes:
        reached: uses that a gradient came back to, by module.
    """

    def __init__(self, modules: Mapping[str, nn.Module], take: Callable[[str, Tensor, Tensor], None]) -> None:
        super().__init__(modules)
        self.reached: Counter[str] = Counter()
        self._take = take
        self._waiting: Counter[str] = Counter()  # uses without gradients: a reentrant checkpoint runs them again

    def start(self) -> None:
        super().start()
        self._waiting.clear()

    def finish(self) -> None:
        """Check that every use of the batch was seen with gradients.

        Raises:
            CaptureError: a reentrant checkpoint cut a module off.
        """
        for name, count in self._waiting.items():
            if count > 0:
                raise CaptureError(
                    f"target module {name} got no gradient in {count} of its uses: the network itself takes none there "
                    "(torch.no_grad), or a reentrant checkpoint cuts it off (call model.enable_input_require_grads(), "
                    "or turn checkpointing off)"
                )

    def seen(self, name: str, x: Tensor) -> Callable[[Tensor], None] | None:
        if not torch.is_grad_enabled():
            self._waiting[name] += 0 if self.in_backward else 1
            return None
        version, replayed = x._version, self.in_backward

        def arrived(gradient: Tensor) -> None:
            if x._version != version:
                raise CaptureError(
                    f"the input of target module {name} is changed in place after the module reads it: its gradient "
                    "cannot be taken"
                )
            self.reached[name] += 1
            if replayed:
                self._waiting[name] -= 1
            self._take(name, x.detach(), gradient)

        return arrived


@dataclass
class _Use:
    """One pass of an input through a target module."""

    x: Tensor  # kept: modules that read the same tensor are known by its identity
    pending: bool  # seen without gradients first: a reentrant checkpoint will run it again
    grads: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.version = self.x._version


class Recorder(Hooks):
    """Keeps every use of a batch: its input, and one gradient per backward pass."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(modules)
        self.start()

    def start(self) -> None:
        super().start()
        self._uses: dict[str, list[_Use]] = {name: [] for name in self.modules}
        self._replayed: dict[str, list[_Use]] = {name: [] for name in self.modules}

    def seen(self, name: str, x: Tensor) -> Callable[[Tensor], None] | None:
        if self.in_backward and not any(use.pending for use in self._uses[name]):
            return None  # a checkpoint runs its segment again, whose gradients come to the first run's use
        use = _Use(x, pending=not torch.is_grad_enabled())
        (self._replayed if self.in_backward else self._uses)[name].append(use)
        return use.grads.append

    def collect(self, n_backward: int) -> Uses:
        """Uses by module as (inputs, owner, one gradient per backward pass).

        Raises:
            CaptureError: a use without exactly one gradient per backward pass.
        """
        return {
            name: [self._checked(name, use, n_backward) for use in self._of(name, n_backward)] for name in self._uses
        }

    def _of(self, name: str, n_backward: int) -> list[_Use]:
        """A module's uses, if any; of what a checkpoint ran again, the first replay with all replays' gradients."""
        uses, replayed = self._uses[name], self._replayed[name]
        if not any(use.pending for use in uses):
            return uses
        count = len(uses)
        if not all(use.pending for use in uses) or len(replayed) != n_backward * count:
            raise CaptureError(
                f"target module {name} was run {count} times forward, not each with gradients, and {len(replayed)} "
                f"times again for {n_backward} backward passes: the network itself takes no gradients there "
                "(torch.no_grad; leave it out), or a reentrant checkpoint cuts it off (use_reentrant=False)"
            )
        for index, use in enumerate(replayed[count:]):
            replayed[index % count].grads.extend(use.grads)
        return replayed[:count]

    @staticmethod
    def _checked(name: str, use: _Use, n_backward: int) -> tuple[Tensor, int, list[Tensor]]:
        if len(use.grads) != n_backward:
            raise CaptureError(
                f"target module {name} got {len(use.grads)} gradients in {n_backward} backward passes: the "
                "logits do not depend on it, or a reentrant checkpoint cuts it off (call "
                "model.enable_input_require_grads() or turn checkpointing off)"
            )
        if use.x._version != use.version:
            raise CaptureError(
                f"the input of target module {name} is changed in place after the module reads it; "
                "leave this module out, or make the operation after it out-of-place"
            )
        return use.x.detach(), id(use.x), use.grads


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


def leading_shape(module: nn.Module, grad: Tensor) -> Sequence[int]:
    """The shape whose product is the number of rows of :func:`output_tokens`."""
    if isinstance(base_layer(module), nn.Conv2d):
        return grad.shape[0], grad[0, 0].numel()
    return grad.shape[:-1]


def output_tokens(module: nn.Module, output: Tensor) -> Tensor:
    """An output as rows ``(rows * tokens, m)``."""
    if isinstance(base_layer(module), nn.Conv2d):
        return output.flatten(2).transpose(1, 2).reshape(-1, output.shape[1])
    return output.reshape(-1, output.shape[-1])


def gradient_tokens(module: nn.Module, grad: Tensor) -> Tensor:
    """Gradients at an output as those of ``W x``, ``(rows * tokens, m)``."""
    return scaled(module, output_tokens(module, grad))
