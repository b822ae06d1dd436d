"""What came of a fit: losses with and without the adapter, and the adapter's folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ranksure.adapters.aliasing import alias_model
from ranksure.adapters.export import export_adapter, export_mean_pooled
from ranksure.adapters.loaded import Adapter
from ranksure.adapters.rewrite import rewrite_adapter, stored_dtype
from ranksure.factors import Factors
from ranksure.files import staged_folder
from ranksure.losses import accuracy, get_loss
from ranksure.network.gradient import Weighting, mean_loss
from ranksure.network.logits import Batch, predict, unlabelled
from ranksure.network.side_path import applied
from ranksure.records.fit import FitHeldOut
from ranksure.records.record import encoded
from ranksure.records.task import carry_loss, write_task
from ranksure.runs.fitting.inputs import SavedStart, Setup
from ranksure.runs.fitting.result import FitResult
from ranksure.tasks.text import MeanPooled


def evaluate(
    model: nn.Module, read: Adapter, setup: Setup, batches: Sequence[Batch], weighting: Weighting
) -> tuple[float, FitHeldOut | None]:
    """Training loss without the adapter; held-out loss and accuracy with it and without it."""
    removed: Factors = {name: (-u, v) for name, (u, v) in read.factors.items()}
    with applied(read.modules, removed):
        zero = mean_loss(model, batches, kind=setup.kind, weighting=weighting)
    if not setup.held:
        return zero, None
    held = setup.batches(setup.held)
    out: dict[str, Any] = {"rows": len(setup.held)}
    for suffix, factors in (("", {}), ("_without_adapter", removed)):
        with applied(read.modules, factors):
            out[f"loss{suffix}"] = mean_loss(model, held, kind=setup.kind, weighting=weighting)
            out[f"accuracy{suffix}"] = None if setup.n_outputs is None else _accuracy(model, held, setup.kind)
    return zero, FitHeldOut(**out)


def write_adapter(model: PeftModel, factors: Factors, setup: Setup, result: FitResult) -> None:
    """Write the adapter at scale 1, with the result beside it, into the result's folder; whole or not at all.

    Raises:
        AdapterError: as :func:`~ranksure.adapters.export.export_adapter`.
    """
    factors = setup.named_as_planned(factors)

    def write(stage: Path) -> None:
        (stage / "certificate.json").write_bytes(encoded(result.certificate.to_json()))
        (stage / "fit.json").write_bytes(encoded(result.record))

    if setup.saved is not None:
        _rewrite(setup.saved, factors, setup, result, write)
        return
    with staged_folder(result.folder, "adapter_config.json") as stage:
        base = alias_model(model).unload()  # pyright: ignore[reportCallIssue]
        common: dict[str, Any] = {
            "base_model_name_or_path": setup.name,
            "revision": setup.revision,
            "shown_path": result.folder,
            "extra_readme": "\n\n".join([*([setup.task.usage()] if setup.task else []), result.readme()]),
        }
        if setup.n_outputs is not None and (setup.task is None or setup.task.head is not None):
            names = setup.label_names if setup.n_outputs > 1 else None
            common["id2label"] = dict(enumerate(names)) if names else None
        if isinstance(base, MeanPooled):
            export_mean_pooled(base.encoder, factors, base.head.weight, base.head.bias, stage, **common)
        else:
            whole = not setup.prefix  # else the network is a frame around the model that is adapted
            export_adapter(
                base if whole else base.get_submodule(setup.prefix.rstrip(".")),
                factors,
                stage,
                head=setup.heads or None,
                num_labels=setup.n_outputs if whole else None,
                task_type=setup.task_type if setup.task is None else setup.task.peft_task_type,
                **common,
            )
        write_task(stage, setup.record)
        write(stage)


def _rewrite(
    saved: SavedStart, factors: Factors, setup: Setup, result: FitResult, write: Callable[[Path], None]
) -> None:
    """The adapter that the fit began with, at the factors found: its head, its scales and its other files stay."""
    run, name = saved.run, saved.read.name
    model = run.adapted or run.model
    none: Factors = {each: (torch.zeros(m, 0), torch.zeros(n, 0)) for each, (m, n) in setup.shapes.items()}

    def write_all(stage: Path) -> None:
        write(stage)
        carry_loss(stage, setup.kind)

    rewrite_adapter(
        model,
        none | factors,
        result.folder,
        adapter=name,
        source=run.folder,
        dtype=torch.promote_types(stored_dtype(model, name, run.folder), torch.float32),
        dropout=0.0,
        title="Training",
        text="\n\n".join(result.sentences()),
        write_more=write_all,
    )


def _accuracy(model: nn.Module, batches: Sequence[Batch], kind: str) -> float | None:
    logits = predict(model, list(map(unlabelled, batches)))
    return accuracy(logits, torch.cat([batch["labels"] for batch in batches]), get_loss(kind))
