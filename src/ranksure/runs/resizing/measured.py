"""What a change of ranks changed, measured on the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.adapters.loaded import Adapter
from ranksure.loss_terms import is_shifted, token_places
from ranksure.network.logits import Batch, device_of, frozen, logits_in, to_device, unlabelled
from ranksure.network.targets import base_layer, base_network, parameter_users


def largest_changes(
    model: nn.Module,
    batches: Iterable[Batch],
    reference: Callable[[], AbstractContextManager[None]],
    variants: Mapping[str, Callable[[], AbstractContextManager[None]]],
) -> tuple[dict[str, float], float]:
    """Largest absolute change of a logit under each variant, against the reference, and the largest logit itself.

    ``reference`` and the ``variants`` by name make contexts. Of a network with logits for every token the positions
    that predict a labelled one count.
    """
    out, size = dict.fromkeys(variants, 0.0), 0.0
    with torch.no_grad():
        for batch in batches:
            inputs = to_device(unlabelled(batch), device_of(model))
            with reference(), frozen(model):
                truth = _shown(model, model(**inputs), batch)
            size = max(size, float(truth.abs().max()) if truth.numel() else 0.0)
            for name, make in variants.items():
                with make(), frozen(model):
                    change = (_shown(model, model(**inputs), batch) - truth).abs()
                out[name] = max(out[name], float(change.max()) if change.numel() else 0.0)
    return out, size


def _shown(model: nn.Module, output: Any, batch: Batch) -> Tensor:
    found = logits_in(output)
    labels = batch.get("labels")
    if found.dim() == 3 and isinstance(labels, Tensor):
        rows, places, _ = token_places(found.shape, labels.to(found.device), is_shifted(base_network(model)))
        found = found[rows, places]
    return found.double()


def tied_modules(model: nn.Module, read: Adapter) -> list[str]:
    """Adapted modules whose weight another module uses too: merging would change that one as well."""
    users = parameter_users(model)
    return [name for name, module in read.modules.items() if len(users.get(id(base_layer(module).weight), ())) > 1]
