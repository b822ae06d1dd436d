"""Capture: a network and its batches become a factored tangent operator and base logits.

One forward and C backward passes per batch give the factors of every per-sample gradient, because
samples do not interact: the gradient at a layer's output for the sum over samples holds each
sample's own gradient in that sample's rows. Which rows these are is found, and that nothing is lost
or mixed is checked, on a few samples (``network/layout.py``); where it fails, samples run one at a time.

How inputs and gradients are recorded, and for which networks that holds, is in ``network/hooks.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.errors import CaptureError, MemoryBudgetError
from ranksure.network.batches import by_row
from ranksure.network.hooks import Recorder, Uses, gradient_tokens, input_tokens, leading_shape
from ranksure.network.layout import Layout, NoRow, RowCheck, row_of, unassigned
from ranksure.network.logits import Batch, batch_rows, device_of, frozen, logits_of, not_finite, to_device
from ranksure.network.targets import base_layer, block_shape
from ranksure.operators.base import cast_factors
from ranksure.operators.factored import FactoredOperator, Group

Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all)."""


@dataclass(frozen=True)
class Captured:
    """What a capture gives.

    Attributes:
        operator: factored tangent operator, ``N`` samples and ``C`` contrasts.
        base_logits: logits of the network as it is, ``(N, K)``, float64.
        notes: sentences for the user.
    """

    operator: FactoredOperator
    base_logits: Tensor
    notes: list[str] = field(default_factory=list)


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
        CaptureError: the network is not deterministic, its logits of a sample depend on the others, a target has not
            exactly one forward and backward pair per use, or a value is not finite.
        MemoryBudgetError: the first batch shows that the factors would not fit ``memory_bytes``.
    """
    if not batches:
        raise CaptureError("there is no batch to capture")
    rows, recorder = by_row(batches), Recorder(targets)
    # Backward passes are seeded with whole numbers (Helmert contrasts are, up to scale), which half precision
    # holds exactly; the scale is put back in float32 or wider.
    scales = contrasts.abs().masked_fill(contrasts == 0, torch.inf).amin(0)
    run = _Run(model, recorder, device_of(model))
    passes = _Passes(run, targets, contrasts / scales, scales, dtype, memory_bytes, progress)
    with frozen(model), ExitStack() as stack:
        recorder.attach(stack)
        check = RowCheck(run, targets, contrasts / scales, rows)
        try:
            return passes.over(batches, rows.sizes, check.look(), check)
        except NoRow as module:
            n = sum(rows.sizes)
            note = (
                f"The rows of a batch cannot be told apart in {module} (a weight that acts on all of them at once, or "
                "tokens that are routed), so each row ran alone: slower, and as exact."
            )
        try:
            return replace(passes.over((rows.of([i]) for i in range(n)), [1] * n, Layout(), check), notes=[note])
        except NoRow as module:
            raise CaptureError(f"two passes over one row give other gradients in {module}: leave it out") from None


@dataclass(frozen=True)
class _Run:
    """One forward and C backward passes over a batch."""

    model: nn.Module
    recorder: Recorder
    device: torch.device

    def __call__(self, batch: Batch, contrasts: Tensor) -> tuple[Tensor, Uses]:
        """Logits ``(rows, K)``, and what was recorded."""
        self.recorder.start()
        with torch.enable_grad():
            z = logits_of(self.model, to_device(batch, self.device))
        if z.shape[1] != contrasts.shape[0]:
            raise CaptureError(f"the network has {z.shape[1]} logits, but the loss expects {contrasts.shape[0]}")
        if len(z) != (size := batch_rows(batch)):
            raise CaptureError(f"the network gives {len(z)} rows of logits for a batch of {size}")
        if not z.requires_grad:
            raise CaptureError(
                "no target module reaches the logits with a gradient: check target_modules, and whether a reentrant "
                "checkpoint cuts them off (call model.enable_input_require_grads() or turn checkpointing off)"
            )
        self.recorder.backward()
        columns = contrasts.shape[1]
        for c in range(columns):
            seed = contrasts[:, c].to(z).expand_as(z)
            torch.autograd.backward(z, seed, retain_graph=c + 1 < columns)
        return z.detach(), self.recorder.collect(columns)


@dataclass(frozen=True)
class _Passes:
    """The passes over all batches, and what becomes of them."""

    run: _Run
    targets: Mapping[str, nn.Module]
    contrasts: Tensor  # whole numbers
    scales: Tensor
    dtype: torch.dtype
    memory_bytes: float | None
    progress: Progress | None

    def over(self, batches: Iterable[Batch], sizes: Sequence[int], layout: Layout, check: RowCheck) -> Captured:
        """Capture batches of these sizes; as :func:`capture`, and :class:`NoRow`."""
        packer = _Packer(self.targets, self.scales, self.dtype, layout)
        logits: list[Tensor] = []
        for index, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
            z, uses = self.run(batch, self.contrasts)
            if not bool((finite := torch.isfinite(z).all(1)).all()):
                row = packer.first_sample + int((~finite).nonzero()[0])
                raise CaptureError(not_finite(f"for sample {row}", batch))
            logits.append(z.double().cpu())
            packer.add(uses, size, name_of_batch=index)
            if index == 0 and self.memory_bytes is not None:
                check_memory(packer.nbytes * sum(sizes) / size, self.memory_bytes, "the captured factors")
            if self.progress is not None:
                self.progress(index + 1, len(sizes))
        found = Captured(packer.finish(sum(sizes)), torch.cat(logits))
        few = found.operator.select(torch.tensor(check.checked))
        unscaled = 1 / self.scales.to(few.dtype)
        check.confirm(
            lambda pair: few.apply_factors(cast_factors(pair, few)) * unscaled, found.base_logits[check.checked]
        )
        return found


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


class _Packer:
    """Collects each batch's token factors, without zero tokens, and packs them into groups."""

    def __init__(self, targets: Mapping[str, nn.Module], scales: Tensor, dtype: torch.dtype, layout: Layout) -> None:
        self.targets, self.dtype, self.layout = targets, dtype, layout
        self.scales = scales.to("cpu", torch.promote_types(dtype, torch.float32))[:, None]
        self.chunks: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        self.first_sample = 0
        self.nbytes = 0

    def add(self, uses: Uses, size: int, name_of_batch: int) -> None:
        by_input: dict[tuple[int, str, int], list[tuple[str, Tensor, Tensor]]] = {}
        for name, entries in uses.items():
            module = self.targets[name]
            for use, (x, owner, grads) in enumerate(entries):
                tokens = input_tokens(module, x)
                outputs = torch.stack([gradient_tokens(module, g) for g in grads], 1)
                if tokens.shape[0] != outputs.shape[0]:
                    raise CaptureError(unassigned(name, grads[0]))
                if not bool(torch.isfinite(outputs).all()):
                    raise CaptureError(f"the gradient at target module {name} is not finite in batch {name_of_batch}")
                stride = self._stride(name, use, len(entries), leading_shape(module, grads[0]), size, outputs)
                # The unfolding of a convolution depends on the module, so only plain inputs are shared.
                kind = name if isinstance(base_layer(module), nn.Conv2d) else ""
                by_input.setdefault((owner, kind, stride), []).append((name, tokens, outputs))
        for (*_, stride), entries in by_input.items():
            self._pack(entries, row_of(len(entries[0][1]), stride, size, entries[0][2].device) + self.first_sample)
        self.first_sample += size

    def _stride(self, name: str, use: int, uses: int, lead: Sequence[int], size: int, outputs: Tensor) -> int:
        """Of the rows; any will do where no token has a gradient."""
        try:
            return self.layout.stride(name, use, uses, lead, size)
        except NoRow:
            if bool(outputs.any()):
                raise
            return 1

    def _pack(self, entries: list[tuple[str, Tensor, Tensor]], sample: Tensor) -> None:
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
        self._store([entries[i] for i in together], union, sample)
        for i, entry in enumerate(entries):
            if i not in together:
                self._store([entry], masks[i], sample)

    def _store(self, entries: list[tuple[str, Tensor, Tensor]], mask: Tensor, sample: Tensor) -> None:
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
            "sample": sample[rows].cpu(),
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
        used = {name for names in self.chunks for name in names}
        if unused := [name for name in self.targets if name not in used]:
            raise CaptureError(f"target module {unused[0]} was never used in the forward pass; leave it out")
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
