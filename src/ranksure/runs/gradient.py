"""One pass over the data: the gradient of the mean loss in every adapted weight, and every term's loss.

Gradients are taken per use of a module, from its inputs and the gradients at its outputs, never from
``weight.grad``: a tied weight counts in the adapted module's use only. Beyond the model, what is held is
one gradient per module (or a group of modules per pass, under a memory budget) and one number per term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ranksure.errors import CaptureError, DataError, MemoryBudgetError, SettingError
from ranksure.modules import base_layer, block_shape
from ranksure.network import Batch, device_of, frozen, to_device
from ranksure.recording import Recorder, Uses, input_tokens, output_tokens
from ranksure.runs.terms import BatchTerms, Kind, Terms, batch_terms, kind_of

Weighting = Literal["token", "sample"]
Progress = Callable[[int], None]
"""Called with the batches done, over all passes."""


@dataclass(frozen=True)
class GradientPass:
    """What a pass over the data gives.

    Attributes:
        gradients: gradient of the mean loss by module, each ``(m, n)``, float32 (float64 for a float64 model).
        terms: every term's loss and weight.
        n_samples: rows seen.
        passes: passes over the data that the memory budget asked for.
        weight: total weight of the terms: their number, or the samples' under sample weighting.
    """

    gradients: dict[str, Tensor]
    terms: Terms
    n_samples: int
    passes: int
    weight: float


def gradient_pass(
    model: nn.Module,
    batches: Iterable[Batch],
    modules: Mapping[str, nn.Module],
    *,
    kind: Kind | None = None,
    weighting: Weighting = "token",
    memory_bytes: float = math.inf,
    progress: Progress | None = None,
) -> GradientPass:
    """Gradient of the mean loss at the network's current weights.

    Args:
        model: the network, adapters active; run in evaluation mode, everything frozen, both restored.
        batches: batches with ``labels``; iterated once per group of modules.
        modules: adapted modules (PEFT's wrappers) by name.
        kind: which loss; by the model's own rules by default.
        weighting: of a causal language model's tokens: every ``token`` alike, or every ``sample`` alike.
        memory_bytes: most bytes of gradients to hold at a time.
        progress: called after every batch.

    Raises:
        DataError: no batch, no labels, labels that do not fit, or logits that are not finite.
        CaptureError: a module that the loss does not reach, or a network that is not deterministic.
        MemoryBudgetError: one module's gradient alone is larger than the budget.
    """
    if weighting not in ("token", "sample"):
        raise SettingError(f"unknown weighting {weighting!r}: use token or sample")
    groups = _groups(modules, memory_bytes)
    if len(groups) > 1 and iter(batches) is batches:
        raise SettingError("the gradients need several passes under this memory budget: pass a list or a DataLoader")
    gradients: dict[str, Tensor] = {}
    first: _Sums | None = None
    done = 0
    for group in groups:
        sums = _Sums()
        with frozen(model), ExitStack() as stack:
            recorder = Recorder({name: modules[name] for name in group})
            recorder.attach(stack)
            for batch in batches:
                _one_batch(model, batch, recorder, sums, kind, weighting)
                done += 1
                if progress is not None:
                    progress(done)
        if not sums.weight:
            raise DataError("the data holds no label: there is no loss to take a gradient of")
        if first is not None and not math.isclose(first.total, sums.total, rel_tol=1e-5, abs_tol=1e-12):
            raise CaptureError(
                f"two passes over the data give the losses {first.total / first.weight:.6g} and "
                f"{sums.total / sums.weight:.6g}: the network or the data loader is not deterministic (turn shuffling "
                "with augmentation off)"
            )
        first = first or sums
        gradients |= {name: g / sums.weight for name, g in sums.gradients.items()}
    assert first is not None
    for name, g in gradients.items():
        if not bool(torch.isfinite(g).all()):
            raise CaptureError(f"the gradient at target module {name} is not finite")
    weights = torch.cat(first.weights).double() / first.weight
    terms = Terms(first.kind or "cross-entropy", torch.cat(first.losses), weights)
    return GradientPass({name: gradients[name] for name in modules}, terms, first.n_samples, len(groups), first.weight)


def mean_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    kind: Kind | None = None,
    weighting: Weighting = "token",
    enough: tuple[float, float] | None = None,
) -> float:
    """Mean loss of a forward pass, by the same terms and weights as :func:`gradient_pass`.

    Args:
        model: the network.
        batches: batches with ``labels``.
        kind: which loss.
        weighting: of a causal language model's tokens.
        enough: ``(value, total weight)``: stop as soon as the batches seen prove that the mean over that total
            weight is above the value (losses are never negative); what is returned is then a lower bound.
    """
    sums = _Sums()
    with frozen(model), torch.no_grad():
        for batch in batches:
            inputs, labels = _split(batch, device_of(model))
            _add_losses(sums, model, _logits(model, inputs), labels, kind, weighting)
            if enough is not None and sums.total > enough[0] * enough[1]:
                return sums.total / enough[1]
    if not sums.weight:
        raise DataError("the data holds no label: there is no loss")
    return sums.total / sums.weight


class _Sums:
    """Running sums over batches, not yet divided by the total weight."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.losses: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.weight = self.total = 0.0
        self.n_samples = 0
        self.kind: Kind | None = None


def _one_batch(
    model: nn.Module, batch: Batch, recorder: Recorder, sums: _Sums, kind: Kind | None, weighting: Weighting
) -> None:
    inputs, labels = _split(batch, device_of(model))
    recorder.start()
    with torch.enable_grad():
        logits = _logits(model, inputs)
    found, row_weights = _add_losses(sums, model, logits, labels, kind, weighting)
    if not len(found.losses):
        return
    if not logits.requires_grad:
        raise CaptureError(
            "no adapted module reaches the loss with a gradient: check whether a reentrant checkpoint cuts them off "
            "(call model.enable_input_require_grads() or turn checkpointing off)"
        )
    seed = found.seed(row_weights.to(logits.device)).to(logits)
    del found
    recorder.backward = True
    torch.autograd.backward(logits, seed)
    _accumulate(sums.gradients, recorder.targets, recorder.collect(1))


def _accumulate(gradients: dict[str, Tensor], modules: Mapping[str, nn.Module], uses: Uses) -> None:
    for name, entries in uses.items():
        for x, _, grads in entries:
            tokens, outputs = input_tokens(modules[name], x), output_tokens(modules[name], grads[0])
            if tokens.shape[0] != outputs.shape[0]:
                raise CaptureError(f"inputs and outputs of target module {name} have different numbers of rows")
            wide = torch.promote_types(outputs.dtype, torch.float32)
            if name not in gradients:
                shape = block_shape(modules[name])
                gradients[name] = torch.zeros(shape, dtype=wide, device=outputs.device)
            if tokens.dim() == 1:  # an embedding: rows by index
                gradients[name].index_add_(1, tokens, outputs.to(wide).T)
            else:
                gradients[name].addmm_(outputs.to(wide).T, tokens.to(wide))


def _add_losses(
    sums: _Sums, model: nn.Module, logits: Tensor, labels: Tensor, kind: Kind | None, weighting: Weighting
) -> tuple[BatchTerms, Tensor]:
    """Add a batch's losses; returns its terms and the weight of each of its rows."""
    kind = kind or sums.kind or kind_of(getattr(model, "config", None), labels, logits)
    found = batch_terms(kind, logits, labels)
    rows = logits.shape[0]
    counts = torch.bincount(found.rows, minlength=rows).double()
    per_row = 1 / counts.clamp(min=1) if weighting == "sample" else torch.ones(rows, dtype=torch.float64)
    weights = per_row[found.rows]
    sums.kind = kind
    sums.losses.append(found.losses)
    sums.weights.append(weights)
    sums.weight += float(weights.sum())
    sums.total += float((weights * found.losses).sum())
    sums.n_samples += rows
    return found, per_row


def _split(batch: Batch, device: torch.device) -> tuple[dict[str, Any], Tensor]:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise DataError("a batch has no 'labels' tensor: the certificate needs the loss that was trained")
    return to_device({key: value for key, value in batch.items() if key != "labels"}, device), labels


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    output = model(**inputs)
    logits = getattr(output, "logits", output[0] if isinstance(output, (tuple, list)) else output)
    if not isinstance(logits, Tensor) or logits.dim() not in (1, 2, 3):
        raise CaptureError(f"the network returned {type(output).__name__} without logits of shape (B, K) or (B, L, V)")
    return logits[:, None] if logits.dim() == 1 else logits


def _groups(modules: Mapping[str, nn.Module], memory_bytes: float) -> Sequence[list[str]]:
    """Modules in groups whose gradients fit the budget, in order."""
    groups: list[list[str]] = [[]]
    held = 0.0
    for name, module in modules.items():
        m, n = block_shape(module)
        weight = base_layer(module).weight
        assert isinstance(weight, Tensor)
        size = m * n * (8 if weight.dtype == torch.float64 else 4)
        if size > memory_bytes:
            raise MemoryBudgetError(
                f"the gradient of {name} alone takes {size / 2**20:.0f} MiB of a budget of "
                f"{memory_bytes / 2**20:.0f} MiB: raise --memory"
            )
        if held + size > memory_bytes:
            groups.append([])
            held = 0.0
        groups[-1].append(name)
        held += size
    return groups
