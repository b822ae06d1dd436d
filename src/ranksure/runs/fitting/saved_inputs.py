"""A fit that starts from an adapter: its network, head and targets as they were saved, and the rows."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn

from ranksure.adapters.loaded import read_adapter
from ranksure.adapters.rewrite import base_of
from ranksure.errors import SettingError
from ranksure.losses import get_loss
from ranksure.network.targets import block_shape
from ranksure.progress import Clock
from ranksure.runs.fitting.inputs import SavedStart, Setup
from ranksure.runs.fitting.settings import FitSettings
from ranksure.runs.options import DataSettings
from ranksure.runs.saved.base import LoadedRun
from ranksure.runs.saved.data import RunData
from ranksure.runs.saved.open import open_run
from ranksure.tasks.options import KindOptions, values_of

_RECORDED = ("task", "weighting", "loss_on")  # left as they are they mean what the adapter's own record says


def saved_setup(model: Any, data: Any, settings: FitSettings, tokenizer: Any, clock: Clock) -> Setup:
    """Load the adapter that the settings name, on its base model (or ``model``), and the rows.

    Raises:
        RanksureError: whatever in the input cannot be used, in one line.
    """
    if isinstance(model, nn.Module) or tokenizer is not None:
        raise SettingError("`adapter` is loaded on a base model from disk: give its folder or Hub id, or nothing")
    if data is None:
        raise SettingError("give `data`: the rows to train on")
    with clock.stage("load", "Loading the adapter and reading data"):
        run, rows = _opened(model, data, settings)
    read = read_adapter(run.model)
    if read.untested:
        raise SettingError(f"the certified method cannot start from {run.folder}: {read.untested[0]}")
    base = base_of(run.model, read.name)
    for module in base.modules():  # a model inside the network has PEFT's marks, too
        for mark in ("peft_config", "_hf_peft_config_loaded"):
            vars(module).pop(mark, None)
    names = rows.label_names
    loss = get_loss(rows.kind)
    return Setup(
        base=base,
        prefix=run.prefix,
        heads=[],
        task_type=None,
        kind=rows.kind,
        features=rows.features,
        held=None,
        collator=rows.collator,
        shapes={name.removeprefix(run.prefix): block_shape(module) for name, module in read.modules.items()},
        name=run.base,
        revision=read.config.revision,
        pooling=run.trained.pooling,
        n_outputs=None if run.task_type == "CAUSAL_LM" else loss.outputs_for(None if names is None else len(names)),
        label_names=names,
        batch_size=settings.batch_size or (4 if run.task_type == "CAUSAL_LM" else 32),
        source=rows.source,
        sha256=rows.sha256,
        same_data=False,
        record=run.trained,
        saved=SavedStart(run, read, rows.weighting),
        own_length=rows.own_length,
        notes=[*run.notes, *rows.notes, *read.notes],
    )


def _opened(model: Any, data: Any, settings: FitSettings) -> tuple[LoadedRun, RunData]:
    defaults = FitSettings()
    as_saved = {name for name in _RECORDED if getattr(settings, name) == getattr(defaults, name)}
    shared = {each.name for each in fields(DataSettings)} & {each.name for each in fields(FitSettings)}
    assert settings.adapter is not None
    return open_run(
        settings.adapter,
        data,
        DataSettings(**{name: getattr(settings, name) for name in shared - as_saved}, by_length=True),
        task_options=values_of(settings, KindOptions),
        base=model,
        task=None if "task" in as_saved else settings.task,
        **{name: getattr(settings, name) for name in ("device", "dtype", "revision", "trust_remote_code")},
    )
