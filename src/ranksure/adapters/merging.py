"""A gradient pass without the adapter's own products: its update is added into the base weights meanwhile."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MERGE_LIMIT = 2**30
"""Most bytes of weights that are copied to be put back: with larger ones the adapter's products hardly count."""


@contextmanager
def merged(model: nn.Module, modules: Iterable[nn.Module], memory_bytes: float = math.inf) -> Iterator[int]:
    """Run adapted linear layers as ``W0 + delta``; afterwards every base weight holds its own bits again.

    A layer is merged when it is first called: where a network reads its weight and never calls it (Jamba's ``dt_proj``,
    WavLM's attention), PEFT's adapter does nothing, and nor does this. Layers are left as they are where the sum would
    not be the same network (weights narrower than float32, which would round the update away; weights that another
    module of ``model`` reads too), and all are where the copies that are kept to put back would exceed ``MERGE_LIMIT``
    or ``memory_bytes``. Yields the number of layers that may be merged.
    """
    readers = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    layers = [module for module in modules if isinstance(module, LoraLayer) and _can(module, readers)]
    size = sum(_weight(layer).nbytes for layer in layers)
    if size > min(MERGE_LIMIT, memory_bytes):
        layers = []
    kept: list[tuple[LoraLayer, Tensor]] = []

    def merge(layer: Any, _: object) -> None:
        handles.pop(layer).remove()
        kept.append((layer, _weight(layer).detach().clone()))
        layer.merge()

    handles: dict[Any, Any] = {layer: layer.register_forward_pre_hook(merge) for layer in layers}
    try:
        yield len(layers)
    finally:
        for handle in handles.values():
            handle.remove()
        for layer, weight in kept:
            if layer.merged:
                layer.unmerge()
            with torch.no_grad():
                _weight(layer).copy_(weight)  # unmerging rounds


def _can(layer: LoraLayer, readers: Counter[int]) -> bool:
    base = layer.get_base_layer()
    if not isinstance(base, (nn.Linear, Conv1D)) or layer.merged or layer.disable_adapters:
        return False
    weight = base.weight
    return weight.dtype in (torch.float32, torch.float64) and readers[id(weight)] == 1


def _weight(layer: LoraLayer) -> Tensor:
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    return weight
