"""What a capture costs: against a plain forward and backwards, against per-sample jacrev, and in bytes."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from benchmarks.measure import Row, Size, duration, paired, ratios
from benchmarks.setting import N_OUTPUTS, Batch, Setting, contrasts, setting
from ranksure.capture import capture


def capture_rows(size: Size) -> list[Row]:
    chosen = setting(size.samples)
    rows = []
    for layers in ("last", "all"):
        targets = chosen.targets(layers)
        ours, plain = paired(
            lambda t=targets: capture(chosen.model, chosen.batches, t, contrasts()),
            lambda t=targets: plain_passes(chosen, t),
            size.runs,
        )
        note = f"N={size.samples}, {layers}-layer q,v, K={N_OUTPUTS}; ours {duration(statistics.median(ours))}"
        name = f"capture vs 1 forward + K backwards, {layers} layer{'s' if layers == 'all' else ''}"
        rows.append(Row(name, "x", ratios(ours, plain), "<=", 1.5, note=note, details={"ours_seconds": ours}))
    rows += [_jacrev_row(size, "last"), _jacrev_row(size, "all")]
    operator = capture(chosen.model, chosen.batches, chosen.targets("last"), contrasts()).operator
    share = operator.nbytes / operator.dense_nbytes
    note = f"{operator.nbytes / 2**20:.1f} of {operator.dense_nbytes / 2**20:.1f} MiB, float32, one contrast of both"
    rows.append(Row("stored bytes vs dense Jacobian", "of", [share], "<=", 1 / 8, note=note))
    return rows


def plain_passes(chosen: Setting, targets: dict[str, nn.Module]) -> None:
    """One forward and K backwards to the target weights per batch; gradients are dropped."""
    weights = [module.weight for module in targets.values()]
    for parameter in chosen.model.parameters():
        parameter.requires_grad_(False)
    for weight in weights:
        assert isinstance(weight, Tensor)
        weight.requires_grad_(True)
    for batch in chosen.batches:
        total = chosen.model(**batch).logits.sum(0)
        for k in range(N_OUTPUTS):
            torch.autograd.grad(total[k], weights, retain_graph=k + 1 < N_OUTPUTS)  # pyright: ignore[reportArgumentType]
    for parameter in chosen.model.parameters():
        parameter.requires_grad_(True)


def _jacrev_row(size: Size, layers: str) -> Row:
    """Per-sample ``jacrev`` in a loop, eager attention: ``vmap(jacrev)`` fails on current transformers."""
    chosen = setting(size.jacrev_samples)
    targets = chosen.targets(layers)
    weights = {f"{name}.weight": module.weight.detach() for name, module in targets.items()}  # pyright: ignore

    def jacobian(sample: Batch) -> dict[str, Tensor]:
        def logits(some: dict[str, Tensor]) -> Tensor:
            return functional_call(chosen.model, some, (), dict(sample)).logits[0]

        return jacrev(logits)(weights)  # pyright: ignore[reportReturnType]

    def loop() -> None:
        chosen.model.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
        for batch in chosen.batches:
            lengths = batch["attention_mask"].sum(1).tolist()
            for index, length in enumerate(lengths):  # every sample at its own length: no padding
                jacobian({key: value[index : index + 1, :length] for key, value in batch.items()})

        chosen.model.set_attn_implementation("sdpa")  # pyright: ignore[reportCallIssue]

    ours, theirs = paired(lambda: capture(chosen.model, chosen.batches, targets, contrasts()), loop, size.runs)
    note = (
        f"N={size.jacrev_samples}, {layers}-layer q,v, no padding in the loop; ours {duration(statistics.median(ours))}"
    )
    name = f"capture vs per-sample jacrev, {layers} layer{'s' if layers == 'all' else ''}"
    return Row(name, "x", ratios(theirs, ours), ">=", 3, note=note, details={"ours_seconds": ours})
