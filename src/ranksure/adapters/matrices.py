"""PEFT's matrices A and B of an adapted module: where they are, their shapes, their scale, their names in a file.

An update is ``delta = s B A``. With ``u = sqrt(s) B`` and ``v = sqrt(s) A^T`` it is ``u v^T``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ranksure.errors import AdapterError
from ranksure.network.targets import base_layer

PREFIX = "base_model.model."
"""What PEFT puts before a module's name in the base network, in a ``PeftModel`` and in its files."""

Place = tuple[Any, str]
"""A module that holds a parameter, and the parameter's name there."""


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Every LoRA wrapper of a model by its qualified name in the base network."""
    return {n.removeprefix(PREFIX): module for n, module in model.named_modules() if isinstance(module, LoraLayer)}


def active_adapters(layers: Mapping[str, Any]) -> list[str]:
    """Names of the adapters that are active in any of the layers."""
    return sorted({name for layer in layers.values() for name in layer.active_adapters})


def chosen_adapter(layers: Mapping[str, Any], adapter: str | None, default: str) -> str:
    """The adapter that is named, else the one that is active, else the default.

    Raises:
        AdapterError: several are active, and none is named.
    """
    active = active_adapters(layers)
    if adapter is not None:
        return adapter
    if len(active) > 1:
        raise AdapterError(f"several adapters are active ({', '.join(active)}): name one (adapter=)")
    return active[0] if active else default


def places(layer: Any, adapter: str) -> tuple[Place, Place]:
    """Where A and B of a layer's adapter are."""
    if adapter in layer.lora_embedding_A:
        return (layer.lora_embedding_A, adapter), (layer.lora_embedding_B, adapter)
    return (layer.lora_A[adapter], "weight"), (layer.lora_B[adapter], "weight")


def matrices(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of a layer's adapter, in PEFT's shapes."""
    (a, of_a), (b, of_b) = places(layer, adapter)
    return getattr(a, of_a), getattr(b, of_b)


def scale_of(name: str, layer: Any, adapter: str) -> float:
    """The scale ``s`` of a layer's adapter.

    Raises:
        AdapterError: it is not positive.
    """
    scale = float(layer.scaling[adapter])
    if not 0 < scale < math.inf:
        raise AdapterError(f"the adapter's scale for {name} is {scale:g} (lora_alpha over r); it must be positive")
    return scale


def to_factors(a: Tensor, b: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """``u`` (m, r) and ``v`` (n, r), float64 on the CPU, from matrices in PEFT's shapes."""
    a, b = a.detach().cpu().double().flatten(1), b.detach().cpu().double().flatten(1)
    root = math.sqrt(scale)
    return root * b, root * a.T.contiguous()


def to_matrices(module: nn.Module, u: Tensor, v: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """A and B in PEFT's shapes for this module, or for its wrapper."""
    layer, root = base_layer(module), math.sqrt(scale)
    a, b = (v / root).T, u / root
    if isinstance(layer, nn.Conv2d):
        return a.reshape(len(a), *layer.weight.shape[1:]), b[:, :, None, None]
    return a, b


def zero_column(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What stands for rank 0, which PEFT does not have."""
    return u.new_zeros(u.shape[0], 1), v.new_zeros(v.shape[0], 1)


def stored(module: nn.Module, name: str, u: Tensor, v: Tensor, scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """One module's factors as an adapter's file holds them, on the CPU.

    Raises:
        AdapterError: a value overflows ``dtype``.
    """
    u, v = (part.detach().to("cpu", torch.float64) for part in (u, v))
    a, b = (part.to(dtype).contiguous() for part in to_matrices(module, u, v, scale))
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterError(f"factors of {name} overflow {dtype}: store them in float32")
    key_a, key_b = file_keys(name, isinstance(base_layer(module), nn.Embedding))
    return {key_a: a, key_b: b}


def file_keys(name: str, embedding: bool) -> tuple[str, str]:
    """Names of A and B in an adapter's file."""
    kind, end = ("lora_embedding", "") if embedding else ("lora", ".weight")
    return f"{PREFIX}{name}.{kind}_A{end}", f"{PREFIX}{name}.{kind}_B{end}"


def file_factors(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor] | None:
    """One module's factors from an adapter's file whose scales are 1; None where it holds none."""
    for embedding in (False, True):
        a, b = (tensors.get(key) for key in file_keys(name, embedding))
        if a is not None and b is not None:
            return to_factors(a, b)
    return None


def is_factor(key: str) -> bool:
    """Whether a tensor of an adapter's file is one of its matrices."""
    return ".lora_" in key


def is_a(key: str) -> bool:
    """Whether a tensor of an adapter's file is an A, whose rank is its first dimension."""
    return ".lora_A" in key or ".lora_embedding_A" in key


def module_of(key: str) -> str:
    """The module that a matrix of an adapter's file belongs to."""
    return key.removeprefix(PREFIX).partition(".lora_")[0]
