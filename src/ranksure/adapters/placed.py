"""A loaded adapter computing with other factors for a while: what a file with those factors would give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.adapters.loaded import Adapter
from ranksure.factors import Factors
from ranksure.network.targets import base_layer, to_weight_shape


@contextmanager
def placed(read: Adapter, factors: Factors, dtype: torch.dtype) -> Iterator[None]:
    """Let PEFT's layers compute with these factors, rounded to ``dtype`` as a file would hold them.

    The scale stays. Rank 0 becomes one column of zeros. On leaving, the layers have their own parameters again.

    Args:
        read: the adapter, active in its model.
        factors: ``u`` (m, r) and ``v`` (n, r) for every module.
        dtype: of the stored factors.
    """
    kept: list[tuple[Any, str, nn.Parameter]] = []
    try:
        for name, (u, v) in factors.items():
            block = read.blocks[name]
            if not u.shape[1]:
                u, v = u.new_zeros(u.shape[0], 1), v.new_zeros(v.shape[0], 1)
            root = math.sqrt(block.scale)
            for own, key, value in _places(block.module, read.name, (v / root).T, u / root):
                old = own[key] if isinstance(own, nn.ParameterDict) else getattr(own, key)
                kept.append((own, key, old))
                _put(own, key, nn.Parameter(value.to(dtype).to(old).contiguous(), requires_grad=False))
        yield
    finally:
        for own, key, old in reversed(kept):
            _put(own, key, old)


def _places(layer: Any, adapter: str, a: Tensor, b: Tensor) -> list[tuple[Any, str, Tensor]]:
    inner = base_layer(layer)
    if isinstance(inner, nn.Embedding):
        return [(layer.lora_embedding_A, adapter, a), (layer.lora_embedding_B, adapter, b)]
    if isinstance(inner, nn.Conv2d):
        a, b = a.reshape(len(a), *inner.weight.shape[1:]), b[:, :, None, None]
    return [(layer.lora_A[adapter], "weight", a), (layer.lora_B[adapter], "weight", b)]


def _put(own: Any, key: str, value: nn.Parameter) -> None:
    if isinstance(own, nn.ParameterDict):
        own[key] = value
    else:
        setattr(own, key, value)


@contextmanager
def merged(read: Adapter, factors: Factors, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Let the layers compute with merged weights ``W + u v^T`` (rounded to ``dtype``) in place of the adapter.

    Args:
        read: the adapter, active in its model.
        factors: for every module.
        dtype: of the merged weights; the base network's by default. Computation stays in the base's dtype.
    """
    kept: list[tuple[nn.Module, nn.Parameter]] = []
    nothing = {name: (u[:, :0], v[:, :0]) for name, (u, v) in factors.items()}
    try:
        for name, (u, v) in factors.items():
            layer = base_layer(read.blocks[name].module)
            weight: Any = layer.weight
            delta = to_weight_shape(layer, (u @ v.T).to(weight.device))
            value = (weight.detach().double() + delta).to(dtype or weight.dtype).to(weight.dtype)
            kept.append((layer, weight))
            layer.weight = nn.Parameter(value.contiguous(), requires_grad=False)
        with placed(read, nothing, torch.float32):
            yield
    finally:
        for layer, weight in reversed(kept):
            layer.weight = weight
