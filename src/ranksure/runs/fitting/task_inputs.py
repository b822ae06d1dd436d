"""A task (texts, prompts, images, speech) for a fit: rows and targets as a plan reads them, its head in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ranksure.bundled.rotten_tomatoes import REVIEWS_SHA256, rotten_tomatoes
from ranksure.data.samples import Samples
from ranksure.errors import AdapterError, SettingError
from ranksure.losses import Loss
from ranksure.network.targets import block_shape
from ranksure.planner.prepare import Prepared, prepare, read_samples
from ranksure.planner.settings import PlanSettings
from ranksure.progress import Clock
from ranksure.records.task import task_record
from ranksure.runs.fitting.inputs import Setup
from ranksure.runs.fitting.plan_folder import PlanFolder
from ranksure.runs.fitting.settings import FitSettings
from ranksure.tasks.linearise import fit_new_head
from ranksure.tasks.load import loss_for
from ranksure.tasks.options import TaskOptions, values_of
from ranksure.tasks.task import Task
from ranksure.tasks.text import MeanPooled

_BATCH = 32

# Options that a plan and a fit share: the plan's value stands unless the fit is given another than its default.
SHARED = tuple(values_of(TaskOptions(), TaskOptions, "batch_size", "device", "seed"))


def task_setup(
    model: Any,
    data: Any,
    settings: FitSettings,
    plan: PlanFolder | None,
    tokenizer: Any,
    clock: Clock,
    prepared: Prepared | None = None,
) -> Setup:
    """Read model and rows (or take those that the plan was ``prepared`` from), fit or load the head.

    Raises:
        RanksureError: whatever in the input cannot be used, in one line.
    """
    notes: list[str] = []
    same = prepared is not None
    if prepared is None:
        prepared, same = _prepared(model, data, settings, plan, tokenizer, clock, notes)
    task, loss = prepared.task, prepared.loss
    notes += prepared.notes
    if plan is not None and not same:
        notes.append("These are not the rows that the plan was made on, so its prediction is not compared.")
    _head(task, prepared.split.train, loss, plan, clock)
    heads = task.saved_modules or []
    if settings.train_head and task.head is None:
        raise SettingError(f"`train_head`: the task {task.kind} has no head to train; leave it out")
    if settings.train_head and not any(f"{task.head}.".startswith(f"{name}.") for name in heads):
        heads = [*heads, task.head]
    held, padding = prepared.split.report, task.settle_padding(prepared.split.train)
    return Setup(
        base=task.model,
        prefix=task.prefix,
        heads=heads,
        task_type=None if task.prefix else task.peft_task_type,
        kind=loss.name,
        record=task_record(task, loss.name),
        features=task.features(prepared.split.train),
        held=None if held is None else task.features(held),
        collator=padding.collate,
        shapes={name: block_shape(module) for name, module in prepared.targets.items()},
        name=task.name,
        revision=task.revision,
        pooling=task.pooling,
        task=task,
        n_outputs=task.n_outputs,
        label_names=task.label_names,
        batch_size=settings.batch_size or _BATCH,
        source=prepared.split.train.source,
        sha256=prepared.split.train.sha256,
        same_data=same,
        own_length=padding.own_length,
        notes=notes,
    )


def _prepared(
    model: Any,
    data: Any,
    settings: FitSettings,
    plan: PlanFolder | None,
    tokenizer: Any,
    clock: Clock,
    notes: list[str],
) -> tuple[Prepared, bool]:
    """Model and rows as a plan would read them, and whether they are those of the plan."""
    if model is None and plan is None:
        raise SettingError("give `model`, or `plan` with a plan's folder")
    model = plan.record.model if model is None and plan is not None else model
    if data is None:
        if plan is None or plan.record.data.sha256 != REVIEWS_SHA256:
            raise SettingError("give `data`: the rows to train on")
        data = rotten_tomatoes()
    options = _plan_settings(settings, plan)
    options = replace(options, loss=loss_for(options.task, model, options, notes))
    rows = read_samples(data, options, options.split)
    same = plan is not None and rows.sha256 == plan.record.data.sha256
    samples = settings.samples
    if samples is None:
        samples = plan.record.n_samples if plan is not None and same else len(rows)
    same = same and plan is not None and samples == plan.record.n_samples
    return prepare(model, rows, replace(options, samples=samples), tokenizer, clock), same


def _plan_settings(settings: FitSettings, plan: PlanFolder | None) -> PlanSettings:
    """How a plan would read the same rows and model."""
    values: dict[str, Any] = {"samples": 4, "seed": settings.seed}
    defaults = FitSettings()
    made = {} if plan is None else plan.asked()
    offsets = None if plan is None else plan.offsets()
    if plan is not None:
        if settings.loss not in (None, plan.record.loss):
            raise SettingError(
                f"the plan was made with `loss` {plan.record.loss}, not {settings.loss}: leave it out, or plan again"
            )
        values |= {"pooling": plan.record.pooling, "seed": plan.record.seed}
        values["target_modules"] = plan.record.target_modules
    for name in SHARED:
        if name in made:
            values[name] = made[name]
        if plan is None or getattr(settings, name) != getattr(defaults, name):
            values[name] = getattr(settings, name)
    if plan is not None:
        values["loss"] = plan.record.loss
    if offsets is not None:
        values["calibrate"] = offsets  # other rows would give others
    return PlanSettings(
        **values,
        weight_decay=1.0,  # any number: nothing is solved here
        ranks=(settings.rank or 1,),
        memory=settings.memory,
        batch_size=settings.batch_size or _BATCH,
        device=settings.device,
    )


def _head(task: Task[Any], rows: Samples, loss: Loss, plan: PlanFolder | None, clock: Clock) -> None:
    """Install the plan's head and what it drew, or fit one where the checkpoint has none; a trained one stays."""
    if plan is not None and plan.record.pooling == task.pooling and (task.head_is_new or task.new_modules):
        _load_head(task, plan)
        return
    if not task.head_is_new:
        return
    with clock.stage("head", "Fitting the new head") as advance:
        fit_new_head(task, rows, loss, advance)


def _load_head(task: Task[Any], plan: PlanFolder) -> None:
    tensors = plan.head()
    assert task.head is not None
    if isinstance(task.model, MeanPooled):
        tensors = {f"head.{key}": value for key, value in tensors.items()}
    own: dict[str, Tensor] = dict(task.model.named_parameters()) | dict(task.model.named_buffers())
    expected = {
        f"{name}.{key}"
        for name in ([task.head] if isinstance(task.model, MeanPooled) else task.new_modules)
        for key in task.model.get_submodule(name).state_dict()
    }
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)[0]
        raise AdapterError(f"the head in {plan.folder} does not fit the model: {odd} is only in one of the two")
    with torch.no_grad():
        for key, value in tensors.items():
            if own[key].shape != value.shape:
                raise AdapterError(
                    f"{key} in {plan.folder} has shape {tuple(value.shape)}, not {tuple(own[key].shape)}"
                )
            own[key].copy_(value)
