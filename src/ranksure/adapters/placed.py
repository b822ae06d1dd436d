"""A loaded adapter computing with other factors for a while: what a file with those factors would give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ranksure.adapters.loaded import Adapter
from ranksure.adapters.matrices import Place, places, to_matrices, zero_column
from ranksure.factors import Factors
from ranksure.network.targets import base_layer, to_weight_shape


@contextmanager
def placed(read: Adapter, factors: Factors, dtype: torch.dtype) -> Iterator[None]:
    """Let PEFT's layers compute with these factors of all modules, rounded to ``dtype`` as a file would hold them.

    The scale stays. Rank 0 becomes one column of zeros. On leaving, the layers have their own parameters again.
    """
    kept: list[tuple[Place, nn.Parameter]] = []
    try:
        for name, (u, v) in factors.items():
            block = read.blocks[name]
            if not u.shape[1]:
                u, v = zero_column(u, v)
            values = to_matrices(block.module, u, v, block.scale)
            for place, value in zip(places(block.module, read.name), values, strict=True):
                old = getattr(*place)
                kept.append((place, old))
                setattr(*place, nn.Parameter(value.to(dtype).to(old).contiguous(), requires_grad=False))
        yield
    finally:
        for place, old in reversed(kept):
            setattr(*place, old)


@contextmanager
def merged(read: Adapter, factors: Factors, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Let the layers compute with merged weights ``W + u v^T`` in place of the adapter.

    The weights are rounded to ``dtype``, by default the base network's, in which the computation stays anyway.
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
