"""A task (texts, prompts, images, speech) for a fit: rows and targets as a plan reads them, its head in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ranksure.bundled.rotten_tomatoes import REVIEWS_SHA256, rotten_tomatoes
from ranksure.data.samples import Samples
from ranksure.errors import AdapterError, SettingError
from ranksure.losses import get_loss
from ranksure.network.targets import block_shape
from ranksure.planner.prepare import prepare, read_samples
from ranksure.planner.settings import PlanSettings
from ranksure.progress import Clock
from ranksure.runs.fitting.inputs import Setup
from ranksure.runs.fitting.plan_folder import PlanFolder
from ranksure.runs.fitting.settings import FitSettings
from ranksure.tasks.linearise import fit_new_head
from ranksure.tasks.options import TaskOptions, values_of
from ranksure.tasks.task import Task
from ranksure.tasks.text import MeanPooled

_BATCH = 32

# Options that a plan and a fit share: the plan's value stands unless the fit is given another than its default.
SHARED = tuple(values_of(TaskOptions(), TaskOptions, "batch_size", "device", "seed"))


def task_setup(
    model: Any, data: Any, settings: FitSettings, plan: PlanFolder | None, tokenizer: Any, clock: Clock
) -> Setup:
    """Read model and rows, fit or load the head.

    Raises:
        RanksureError: whatever in the input cannot be used, in one line.
    """
    if model is None and plan is None:
        raise SettingError("give `model`, or `plan` with a plan's folder")
    model = plan.record.model if model is None and plan is not None else model
    if data is None:
        if plan is None or plan.record.data.sha256 != REVIEWS_SHA256:
            raise SettingError("give `data`: the rows to train on")
        data = rotten_tomatoes()
    options = _plan_settings(settings, plan)
    rows = read_samples(data, options, options.split)
    same = plan is not None and rows.sha256 == plan.record.data.sha256
    samples = settings.samples
    if samples is None:
        samples = plan.record.n_samples if plan is not None and same else len(rows)
    same = same and plan is not None and samples == plan.record.n_samples
    prepared = prepare(model, rows, replace(options, samples=samples), tokenizer, clock)
    task, notes = prepared.task, list(prepared.notes)
    if plan is not None and not same:
        notes.append("These are not the rows that the plan was made on, so its prediction is not compared.")
    _head(task, prepared.split.train, settings, plan, clock)
    heads = task.saved_modules or []
    if settings.train_head and not heads:
        if task.head is None:
            raise SettingError(f"`train_head`: the task {task.kind} has no head to train; leave it out")
        heads = [task.head]
    held, padding = prepared.split.report, task.settle_padding(prepared.split.train)
    return Setup(
        base=task.model,
        adapted=task.adapted,
        prefix=task.prefix,
        heads=heads,
        task_type=None if task.prefix else task.peft_task_type,
        kind=options.loss,
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


def _plan_settings(settings: FitSettings, plan: PlanFolder | None) -> PlanSettings:
    """How a plan would read the same rows and model."""
    values: dict[str, Any] = {"samples": 4, "seed": settings.seed}
    defaults = FitSettings()
    made = {} if plan is None else plan.record.settings
    offsets = None
    if plan is not None:
        values |= {"pooling": plan.record.pooling, "loss": plan.record.loss, "seed": plan.record.seed}
        values["target_modules"] = plan.record.target_modules
        offsets = plan.record.task.get("offsets")
    for name in SHARED:
        if name in made and not isinstance(made[name], dict):  # not data that was in memory
            values[name] = made[name]
        if plan is None or getattr(settings, name) != getattr(defaults, name):
            values[name] = getattr(settings, name)
    if plan is not None and offsets is not None:
        values["calibrate"] = tuple(offsets)  # other rows would give others
    return PlanSettings(
        **values,
        weight_decay=1.0,  # any number: nothing is solved here
        ranks=(settings.rank or 1,),
        memory=settings.memory,
        batch_size=settings.batch_size or _BATCH,
        device=settings.device,
    )


def _head(task: Task[Any], rows: Samples, settings: FitSettings, plan: PlanFolder | None, clock: Clock) -> None:
    """Install the plan's head, or fit one where the checkpoint has none; a trained one stays."""
    if not task.head_is_new:
        return
    if plan is not None and plan.record.pooling == task.pooling:
        _load_head(task, plan)
        return
    loss = get_loss(plan.record.loss if plan is not None else settings.loss)
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
