"""Where a run began: the slope at the base weights, taken once for the same weights and rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ranksure.adapters.loaded import Adapter
from ranksure.adapters.matrices import matrices
from ranksure.network.gradient import gradient_pass
from ranksure.network.logits import Batch
from ranksure.records.certificate import FirstSlope
from ranksure.runs.certificate.settings import CertifySettings
from ranksure.spectral import norms


def first_slope(
    model: nn.Module, read: Adapter, batches: Iterable[Batch], settings: CertifySettings, known: Sequence[FirstSlope]
) -> FirstSlope:
    """Loss and steepest slope without the adapter's update; one gradient pass, unless ``known`` has them.

    What is known is of the same weights and rows only where its key is the same; batches that are read anew each time
    (a DataLoader) have no key, and nothing known is taken for them.
    """
    key = _key(model, read, batches, settings) if isinstance(batches, Sequence) else None
    for found in known:
        if key is not None and found.key == key:
            return found
    slopes: list[float] = []

    def steepest(_: str, g: Tensor) -> None:
        g = g.cpu() if g.device.type == "mps" else g  # has no float64
        slopes.append(norms(g, g.new_zeros(g.shape[0], 0), g.new_zeros(g.shape[1], 0))[0])

    with read.without():
        done = gradient_pass(model, batches, read.modules, **settings.of_pass, consume=steepest)
    return FirstSlope(loss=done.terms.mean, slope=max(slopes), key=key)


def _key(model: nn.Module, read: Adapter, batches: Sequence[Batch], settings: CertifySettings) -> str:
    """Checksum of the rows, the loss, and all weights but the adapter's own factors."""
    digest = hashlib.blake2b(f"{settings.loss} {settings.weighting} {sorted(read.modules)}".encode(), digest_size=16)
    for batch in batches:
        for name, value in batch.items():
            _add(digest, name, value)
    own = {id(p) for block in read.blocks.values() for p in matrices(block.module, read.name)}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if id(value) not in own:
            _add(digest, name, value)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, name: str, value: object) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {tuple(flat.shape)}".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(f"{name} {value!r}".encode())
