"""Capture: a network and its batches become a factored tangent operator and base logits.

One forward and C backward passes per batch give the factors of every per-sample gradient, because
samples do not interact: the gradient at a layer's output for the sum over samples holds each
sample's own gradient in that sample's rows. That is checked, not assumed (a backward pass for one
sample alone must leave every other sample's rows exactly zero).

How inputs and gradients are recorded, and for which networks that holds, is in ``network/hooks.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.errors import CaptureError, MemoryBudgetError
from ranksure.network.hooks import Recorder, Uses, input_tokens, output_tokens
from ranksure.network.logits import Batch, batch_rows, check_same_logits, device_of, frozen, logits_of, to_device
from ranksure.network.targets import base_layer, block_shape
from ranksure.operators.factored import FactoredOperator, Group

Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all)."""


@dataclass(frozen=True)
class Captured:
    """What a capture gives.

    Attributes:
        operator: factored tangent operator, ``N`` samples and ``C`` contrasts.
        base_logits: logits of the network as it is, ``(N, K)``, float64.
    """

    operator: FactoredOperator
    base_logits: Tensor


def capture(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Mapping[str, nn.Module],
    contrasts: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    memory_bytes: float | None = None,
    progress: Progress | None = None,
) -> Captured:
    """Capture a network's tangent operator at its current weights.

    Args:
        model: the network; run in evaluation mode with every parameter frozen, both restored.
        batches: batches without labels, in sample order.
        targets: modules by name (see :func:`ranksure.network.targets.select_targets`).
        contrasts: ``(K, C)`` basis of the logits that the loss can see (``Loss.contrasts``).
        dtype: storage of the factors.
        memory_bytes: refuse before the work when the factors would take more than this.
        progress: called after each batch.

    Returns:
        The operator on the CPU and the base logits.

    Raises:
        CaptureError: the network is not deterministic, samples interact, a target has not exactly one
            forward and backward pair per use, or a value is not finite.
        MemoryBudgetError: the first batch shows that the factors would not fit ``memory_bytes``.
    """
    if not batches:
        raise CaptureError("there is no batch to capture")
    sizes = [batch_rows(batch) for batch in batches]
    n_samples = sum(sizes)
    device = device_of(model)
    recorder = Recorder(targets)
    # Backward passes are seeded with whole numbers (Helmert contrasts are, up to scale), which half precision
    # holds exactly; the scale is put back in float32 or wider.
    scales = contrasts.abs().masked_fill(contrasts == 0, torch.inf).amin(0)
    contrasts = contrasts / scales
    packer = _Packer(targets, scales, dtype)
    logits: list[Tensor] = []
    checked = next((index for index, size in enumerate(sizes) if size > 1), 0)
    with frozen(model), ExitStack() as stack:
        recorder.attach(stack)
        for index, batch in enumerate(batches):
            moved = to_device(batch, device)
            if index == checked:
                _check_behaviour(model, _first_rows(moved), recorder, contrasts)
            z, uses = _run(model, moved, recorder, contrasts)
            logits.append(z)
            packer.add(uses, sizes[index], name_of_batch=index)
            if index == 0 and memory_bytes is not None:
                check_memory(packer.nbytes * n_samples / sizes[0], memory_bytes, "the captured factors")
            if progress is not None:
                progress(index + 1, len(batches))
    base = torch.cat(logits)
    if not bool(torch.isfinite(base).all()):
        row = int((~torch.isfinite(base)).any(1).nonzero()[0])
        raise CaptureError(f"the network's logits for sample {row} are not finite (NaN or infinity)")
    return Captured(packer.finish(n_samples), base)


def check_memory(needed: float, budget: float, what: str) -> None:
    """Refuse work that would not fit.

    Raises:
        MemoryBudgetError: ``needed > budget``; says what would help.
    """
    if needed > budget:
        raise MemoryBudgetError(
            f"{what} would take {_size(needed)} of a budget of {_size(budget)}: use fewer modules "
            "(`target_modules`, `layers_to_transform` last), fewer samples (`samples`), a larger "
            "`memory`, or the matrix-free operator from Python"
        )


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _run(
    model: nn.Module, batch: Batch, recorder: Recorder, contrasts: Tensor, rows: slice | None = None
) -> tuple[Tensor, Uses]:
    """One forward and C backward passes; ``rows`` limits the backward passes to some samples."""
    recorder.start()
    with torch.enable_grad():
        z = logits_of(model, batch)
    if z.shape[1] != contrasts.shape[0]:
        raise CaptureError(f"the network has {z.shape[1]} logits, but the loss expects {contrasts.shape[0]}")
    if not z.requires_grad:
        raise CaptureError(
            "no target module reaches the logits with a gradient: check target_modules, and whether a reentrant "
            "checkpoint cuts them off (call model.enable_input_require_grads() or turn checkpointing off)"
        )
    recorder.backward()
    columns = contrasts.shape[1]
    for c in range(columns):
        seed = torch.zeros_like(z)
        seed[rows or slice(None)] = contrasts[:, c].to(z)
        torch.autograd.backward(z, seed, retain_graph=c + 1 < columns)
    return z.detach().double().cpu(), recorder.collect(columns)


def _first_rows(batch: Batch, rows: int = 2) -> Batch:
    """The first samples of a batch: checks of the network's behaviour need no more."""
    return {
        key: value[:rows] if isinstance(value, Tensor) and value.dim() > 0 else value for key, value in batch.items()
    }


def _check_behaviour(model: nn.Module, batch: Batch, recorder: Recorder, contrasts: Tensor) -> None:
    """Two passes over the same rows agree, and a backward pass for the first sample stays in its rows."""
    size = batch_rows(batch)
    recorder.start()
    with torch.enable_grad():  # as in _run, so that both passes take the same kernels
        first = logits_of(model, batch).detach()
    recorder.start()
    z, uses = _run(model, batch, recorder, contrasts[:, :1], rows=slice(0, 1))
    check_same_logits(first, z.to(first))
    if size == 1:
        return
    for name, entries in uses.items():
        for _, _, grads in entries:
            g = grads[0]
            if g.shape[0] % size:
                raise CaptureError(_not_by_sample(name, tuple(g.shape), size))
            if bool(g.reshape(size, -1)[1:].any()):
                raise CaptureError(
                    f"samples interact in target module {name}: the logits of one sample depend on another's rows "
                    "(batch statistics, or a layout whose leading dimension is not the sample); use `batch_size` 1 "
                    "or leave this module out"
                )


def _not_by_sample(name: str, shape: tuple[int, ...], size: int) -> str:
    return (
        f"the output of target module {name} has shape {shape}, whose rows cannot be assigned to {size} samples; "
        "leave this module out"
    )


class _Packer:
    """Collects each batch's token factors, without zero tokens, and packs them into groups."""

    def __init__(self, targets: Mapping[str, nn.Module], scales: Tensor, dtype: torch.dtype) -> None:
        self.targets, self.dtype = targets, dtype
        self.scales = scales.to("cpu", torch.promote_types(dtype, torch.float32))[:, None]
        self.chunks: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        self.first_sample = 0
        self.nbytes = 0

    def add(self, uses: Uses, size: int, name_of_batch: int) -> None:
        by_input: dict[tuple[int, str], list[tuple[str, Tensor, Tensor]]] = {}
        for name, entries in uses.items():
            for x, owner, grads in entries:
                tokens = input_tokens(self.targets[name], x)
                outputs = torch.stack([output_tokens(self.targets[name], g) for g in grads], 1)
                if tokens.shape[0] != outputs.shape[0] or tokens.shape[0] % size:
                    raise CaptureError(_not_by_sample(name, tuple(grads[0].shape), size))
                if not bool(torch.isfinite(outputs).all()):
                    raise CaptureError(f"the gradient at target module {name} is not finite in batch {name_of_batch}")
                # The unfolding of a convolution depends on the module, so only plain inputs are shared.
                kind = name if isinstance(base_layer(self.targets[name]), nn.Conv2d) else ""
                by_input.setdefault((owner, kind), []).append((name, tokens, outputs))
        for entries in by_input.values():
            self._pack(entries, size)
        self.first_sample += size

    def _pack(self, entries: list[tuple[str, Tensor, Tensor]], size: int) -> None:
        """Keep the tokens with a gradient; share the input among modules that keep much the same ones."""
        masks = [outputs.flatten(1).ne(0).any(1) for _, _, outputs in entries]
        union = torch.stack(masks).any(0)
        most = int(union.sum())
        shared = [i for i, mask in enumerate(masks) if 2 * int(mask.sum()) > most]
        seen: set[str] = set()
        together = []
        for i in shared:  # a module that reads the same tensor twice has two uses: they cannot share a chunk
            if entries[i][0] not in seen:
                seen.add(entries[i][0])
                together.append(i)
        self._store([entries[i] for i in together], union, size)
        for i, entry in enumerate(entries):
            if i not in together:
                self._store([entry], masks[i], size)

    def _store(self, entries: list[tuple[str, Tensor, Tensor]], mask: Tensor, size: int) -> None:
        if not entries:
            return
        rows = mask.nonzero()[:, 0]
        tokens = entries[0][1]
        inputs = tokens[rows]
        if inputs.is_floating_point():
            if not bool(torch.isfinite(inputs).all()):
                raise CaptureError(f"the input of target module {entries[0][0]} is not finite")
            inputs = inputs.to("cpu", self.dtype)
        chunk = {
            "inputs": inputs.cpu(),
            "sample": (rows // (tokens.shape[0] // size)).cpu() + self.first_sample,
            "outputs": {
                name: (outputs[rows].to("cpu", self.scales.dtype) * self.scales).to(self.dtype)
                for name, _, outputs in entries
            },
        }
        self.nbytes += sum(t.numel() * t.element_size() for t in (chunk["inputs"], *chunk["outputs"].values()))
        self.chunks.setdefault(tuple(chunk["outputs"]), []).append(chunk)

    def finish(self, n_samples: int) -> FactoredOperator:
        """Pack what was collected; a module that appears with different partners gets its own copy."""
        count: dict[str, int] = {}
        for names in self.chunks:
            for name in names:
                count[name] = count.get(name, 0) + 1
        merged: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for names, chunks in self.chunks.items():
            alone = [name for name in names if count[name] > 1]
            together = tuple(name for name in names if count[name] == 1)
            for part in ([together] if together else []) + [(name,) for name in alone]:
                merged.setdefault(part, []).extend(
                    {**chunk, "outputs": {name: chunk["outputs"][name] for name in part}} for chunk in chunks
                )
        groups = []
        for names in list(merged):
            chunks = merged.pop(names)
            sample = torch.cat([chunk["sample"] for chunk in chunks])
            inputs = torch.cat([chunk["inputs"] for chunk in chunks])
            outputs = {name: torch.cat([chunk["outputs"][name] for chunk in chunks]) for name in names}
            chunks.clear()
            if bool((sample[1:] < sample[:-1]).any()):
                order = torch.argsort(sample, stable=True)
                sample, inputs = sample[order], inputs[order]
                outputs = {name: b[order] for name, b in outputs.items()}
            width = block_shape(self.targets[names[0]])[1]
            groups.append(Group(inputs, width, sample, outputs))
        return FactoredOperator(groups, n_samples, list(self.targets))


def estimate_bytes(targets: Mapping[str, nn.Module], n_samples: int, tokens_per_sample: float, n_contrasts: int) -> int:
    """Bytes of captured float32 factors before any pass: every token kept, inputs shared where widths agree.

    An upper estimate: zero tokens are dropped when they are seen. Convolutions count one token per
    output position of a 224-pixel image at stride 16; images are measured on the first batch instead.
    """
    shapes = [block_shape(module) for module in targets.values()]
    per_token = sum(m * n_contrasts + n for m, n in shapes)
    return math.ceil(n_samples * tokens_per_sample * per_token * 4)
