"""A causal language model for a fit: supervised fine-tuning on prompts and completions, or conversations."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from ranksure.bundled.names import named_model
from ranksure.errors import SettingError
from ranksure.losses import CrossEntropy
from ranksure.network.checkpoints import (
    check_checkpoint,
    device_named,
    load_tokenizer,
    load_weights,
    peft_targets,
    settle_padding,
)
from ranksure.network.targets import block_shape, select_targets
from ranksure.progress import Clock
from ranksure.records.task import TaskRecord
from ranksure.runs.fitting.inputs import Setup
from ranksure.runs.fitting.settings import FitSettings
from ranksure.runs.saved.data import DataSettings, RunData, is_causal, read_data

_BATCH = 4

# Options that are those of the data.
_SAME = ("prompt_column", "completion_column", "messages_column", "max_length", "seed", "loss_on", "packing")
_SAME += ("batch_size",)


def causal_setup(model: Any, data: Any, settings: FitSettings, tokenizer: Any, clock: Clock) -> Setup:
    """Read model and rows.

    Raises:
        RanksureError: whatever in the input cannot be used, in one line.
    """
    if model is None or data is None:
        raise SettingError("a causal language model needs `model` and `data`")
    if settings.linear or settings.train_head or settings.pooling != "model":
        raise SettingError("the linear optimum, a trained head and mean pooling are for classification only")
    if settings.loss not in (None, CrossEntropy.name):
        raise SettingError(f"`loss` {settings.loss} is no loss of a causal language model: leave it out")
    model = named_model(model)
    notes: list[str] = []
    with clock.stage("load", "Reading data and model"):
        if isinstance(model, PreTrainedModel):
            loaded, name = model, str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
            if tokenizer is None:
                raise SettingError("a model in memory needs its tokenizer: pass tokenizer=")
            if not is_causal(loaded):
                raise SettingError(f"{type(loaded).__name__} is no causal language model: leave the task out")
        else:
            name = os.fspath(model)
            loaded = _load(name, settings, notes)
            tokenizer = tokenizer or load_tokenizer(name, settings.revision, settings.trust_remote_code)
        settle_padding(loaded, tokenizer, name)
        loaded.to(device_named(settings.device))  # pyright: ignore[reportArgumentType]
        rows = _read(loaded, tokenizer, data, settings, settings.samples, settings.split)
        held = None
        if settings.eval_data is not None:
            held = _read(loaded, tokenizer, settings.eval_data, settings, settings.heldout or None, settings.eval_split)
    wanted = peft_targets(loaded) if settings.target_modules is None else settings.target_modules
    targets = select_targets(loaded, wanted, settings.layers_to_transform)
    return Setup(
        base=loaded,
        prefix="",
        heads=[],
        task_type="CAUSAL_LM",
        kind=CrossEntropy.name,
        features=rows.features,
        held=None if held is None else held.features,
        collator=rows.collator,
        shapes={name: block_shape(module) for name, module in targets.items()},
        name=name,
        revision=settings.revision,
        pooling=None,
        n_outputs=None,
        label_names=None,
        batch_size=settings.batch_size or _BATCH,
        source=rows.source,
        sha256=rows.sha256,
        same_data=False,
        record=_record(settings, rows),
        own_length=rows.own_length,
        notes=[*notes, *rows.notes, *(held.notes if held else [])],
    )


def _record(settings: FitSettings, rows: RunData) -> TaskRecord:
    """What the adapter's folder says of its loss."""
    mean: dict[str, Any] = {"weighting": settings.weighting, "loss_on": settings.loss_on}
    return TaskRecord(kind="CAUSAL_LM", loss=rows.kind, max_length=rows.max_length, **mean)


def _read(
    model: PreTrainedModel, tokenizer: Any, data: Any, settings: FitSettings, samples: int | None, split: str | None
) -> RunData:
    same: dict[str, Any] = {name: getattr(settings, name) for name in _SAME}
    return read_data((model, tokenizer), data, DataSettings(**same, split=split, samples=samples))


def _load(name: str, settings: FitSettings, notes: list[str]) -> PreTrainedModel:
    check_checkpoint(name, settings.dtype)
    common: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    noun = "a causal language model"
    return load_weights(AutoModelForCausalLM, noun, name, notes, dtype=settings.dtype, **common)[0]
