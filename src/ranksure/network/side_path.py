"""Run a network with W0 + u v^T without touching a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ranksure.errors import AdapterError
from ranksure.factors import Factors
from ranksure.network.targets import base_layer, block_shape, scaled


def check_factors(targets: Mapping[str, nn.Module], factors: Factors) -> None:
    """Check that every pair of factors fits its module.

    Raises:
        AdapterError: a name without module, a pair whose shapes do not fit, a non-finite value.
        TargetError: a module of an unsupported kind.
    """
    for name, (u, v) in factors.items():
        if name not in targets:
            raise AdapterError(f"there are factors for {name}, which is not a module of this network")
        m, n = block_shape(targets[name])
        if u.ndim != 2 or v.ndim != 2 or (u.shape[0], v.shape[0]) != (m, n) or u.shape[1] != v.shape[1]:
            raise AdapterError(
                f"factors of {name} have shapes {tuple(u.shape)} and {tuple(v.shape)}; expected ({m}, r) and ({n}, r)"
            )
        if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
            raise AdapterError(f"factors of {name} hold a value that is not finite")


@contextmanager
def applied(targets: dict[str, nn.Module], factors: Factors) -> Iterator[None]:
    """Make the network compute with ``W0 + u v^T`` in the target modules, through forward hooks.

    Each target's output gains the low-rank side path ``u (v^T x)``. No weight changes, so a weight tied to another
    module is adapted in this module's use only. A target may itself be a PEFT wrapper: the update comes on top of its
    adapters. Gradients flow to the factors; run a backward pass with gradient checkpointing inside the block.

    The side path is computed in the input's dtype, but in float32 for half-precision inputs, and rounded to the
    output's dtype once: what PEFT does with its default ``autocast_adapter_dtype=True``, in the same order of
    operations. A module whose ``forward`` the network bypasses (``nn.MultiheadAttention``'s ``out_proj``) stays
    unadapted.

    Args:
        targets: modules by qualified name (``padding_idx`` of an Embedding as in PEFT: its row is added, but has no
            gradient).
        factors: ``{name: (u, v)}``; targets without factors, or with rank 0, stay as they are.

    Raises:
        AdapterError, TargetError: as :func:`check_factors`.
    """
    check_factors(targets, factors)
    handles = []
    try:
        for name, (u, v) in factors.items():
            if u.shape[1]:
                hook = _side_path_hook(base_layer(targets[name]), u, v)
                handles.append(targets[name].register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _side_path_hook(layer: nn.Module, u: Tensor, v: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        dtype = torch.promote_types(output.dtype if isinstance(layer, nn.Embedding) else x.dtype, torch.float32)
        side = _side_path(layer, x, u.to(x.device, dtype), v.to(x.device, dtype))
        return (output + side).to(output.dtype)

    return hook


def _side_path(layer: nn.Module, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``(u v^T)`` applied to the layer's input, by the operations and in the order that PEFT uses."""
    if isinstance(layer, nn.Embedding):
        return scaled(layer, F.embedding(x, v, padding_idx=layer.padding_idx, sparse=layer.sparse) @ u.T)
    x = x.to(u.dtype)
    if isinstance(layer, nn.Conv2d):
        kernel = v.T.reshape(-1, *layer.weight.shape[1:])
        inner = F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation)
        return F.conv2d(inner, u[:, :, None, None])
    return F.linear(F.linear(x, v.T), u)


def side_path(module: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    """What a block update ``(m, n)`` adds to the module's output for the input ``x``."""
    layer = base_layer(module)
    if isinstance(layer, nn.Embedding):
        return scaled(layer, F.embedding(x, delta.T))
    if isinstance(layer, nn.Conv2d):
        kernel = delta.view(layer.out_channels, layer.in_channels, *layer.kernel_size)
        return F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation)
    assert isinstance(layer, (nn.Linear, Conv1D))
    return F.linear(x, delta)
