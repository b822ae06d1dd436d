"""A finished run with its data, whatever its task: what ``certify``, ``grow`` and ``compress`` start from.

Sequence classifiers and causal language models are loaded by themselves (``runs/saved/base.py``). Other tasks need
their data to be made: prompts have verbalisers, images and recordings a processor. An adapter that ranksure wrote holds
``task.json``, which says which task it is and with what settings.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ranksure.adapters.saved import AdapterFiles, read_files
from ranksure.errors import AdapterError, SettingError, settings_of
from ranksure.losses import CrossEntropy
from ranksure.network.checkpoints import check_checkpoint, device_named
from ranksure.runs.saved.base import (
    LoadedRun,
    Places,
    TaskType,
    base_config,
    base_name,
    load_base,
    refuse_lost,
    saved_outputs,
    tokenizer_of,
    with_adapter,
)
from ranksure.runs.saved.data import DataSettings, RunData, read_data, run_data
from ranksure.tasks.load import KINDS, load_samples, load_task
from ranksure.tasks.options import RowOptions, values_of
from ranksure.tasks.task import TASK_FILE, Task
from ranksure.tasks.text import MeanPooled

_AUTO_ENDINGS = {"ForImageClassification": "image", "ForAudioClassification": "speech"}


def open_run(
    adapter_dir: str | os.PathLike[str],
    data: Any,
    settings: DataSettings | None = None,
    *,
    task_options: dict[str, Any] | None = None,
    **places: Any,
) -> tuple[LoadedRun, RunData]:
    """Load a LoRA adapter with its base model, and its training data as batches.

    Args:
        adapter_dir: folder of the adapter.
        data: its training data.
        settings: columns, lengths, batches.
        task_options: ``template``, ``verbalizers``, ``image_size``, ``max_seconds``: in place of the adapter's
            ``task.json``.
        **places: see :class:`~ranksure.runs.saved.base.Places`.

    Raises:
        AdapterError: no adapter there, or files that do not fit one another.
        ModelError: the base model cannot be loaded, or its head was never trained.
        DataError: data that cannot be used.
        SettingError: an option has no meaning here.
    """
    settings, where = settings or DataSettings(), settings_of(Places, "open_run", places)
    files = read_files(Path(adapter_dir).expanduser(), where.adapter)
    record = _record(files.folder)
    kind = _kind(files, record, where)
    if kind is not None:
        return _made(files, kind, record, data, settings, where, task_options or {})
    run = _loaded(files, replace(where, task={"text": "SEQ_CLS"}.get(where.task or "", where.task)))
    return run, read_data(run, data, settings)


def task_of(folder: Path) -> str | None:
    """The task of an adapter that is opened with its data, by its ``task.json``; None for all others.

    Raises:
        AdapterError: the file is damaged.
    """
    return _made_from_data(_record(folder))


def _made_from_data(record: dict[str, Any]) -> str | None:
    """A classifier of texts with a head of its own is loaded by itself."""
    kind = record.get("kind")
    return None if kind == "text" and record.get("pooling") != "mean" else kind


def _record(folder: Path) -> dict[str, Any]:
    """The content of ``task.json``; empty where there is none."""
    path = folder / TASK_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("schema") != 1 or content.get("kind") not in KINDS:
            raise ValueError("it has another form")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read ({error}): restore it, or remove it and name the `task`") from None
    return content


def _kind(files: AdapterFiles, record: dict[str, Any], where: Places) -> str | None:
    """The task that is made from its data; None for what is loaded by itself."""
    found, task = _made_from_data(record), where.task
    if task in KINDS and task != "text":
        if found is not None and found != task:
            raise SettingError(f"the adapter was trained for the task {found}, not {task}: leave `task` out")
        return task
    if found is not None or task is not None or files.config.task_type is not None:
        return found
    config = base_config(base_name(files, where.base), where.of_hub(files))
    own = (getattr(config, "architectures", None) or [""])[0]
    return next((kind for ending, kind in _AUTO_ENDINGS.items() if own.endswith(ending)), None)


def _made(
    files: AdapterFiles,
    kind: str,
    record: dict[str, Any],
    data: Any,
    settings: DataSettings,
    where: Places,
    asked: dict[str, Any],
) -> tuple[LoadedRun, RunData]:
    """A run whose task is made from its data."""
    settings.refuse_packing(f"this adapter is for the task {kind}")
    samples = load_samples(kind, data, **values_of(settings, RowOptions))
    if (labels := record.get("labels")) is not None:
        samples = samples.with_label_names(labels)
    notes, total = list(samples.notes), len(samples)
    samples = settings.few(samples)
    options = {name: record[name] for name in KINDS[kind].options if record.get(name) is not None}
    options |= {name: value for name, value in asked.items() if value is not None}
    if settings.max_length is not None:
        options["max_length"] = settings.max_length
    if "offsets" in record:
        options["calibrate"] = record["offsets"]
    name, size = base_name(files, where.base), settings.batch_size or 32
    own = {"device": where.device, "dtype": where.dtype, **where.of_hub(files)}
    made = load_task(kind, name, samples, batch_size=size, **options, **own)
    run = _run_of(made, kind, files, name)
    return run, run_data(
        made.model,
        samples,
        made.features(samples),
        made.collator,
        settings,
        made.batch_size,
        inputs_of=made.adapted,
        kind=CrossEntropy.name,
        form=f"labelled {samples.noun}s",
        notes=[*notes, *made.notes, *made.remarks(samples)],
        n_rows=len(samples),
        total_rows=total,
        max_length=getattr(made, "max_length", None),
        label_names=samples.label_names,
        kind_is_known=True,
    )


def _run_of(task: Task[Any], kind: str, files: AdapterFiles, base: str) -> LoadedRun:
    """The task's network with the adapter on it."""
    _install_pooled_head(task, files, base)
    wrapped = with_adapter(task.adapted, files, base, False)
    model: nn.Module = wrapped
    if task.prefix:
        # The adapter's layers sit in the model inside the frame; its configuration is what certify looks for.
        model = task.model
        object.__setattr__(model, "peft_config", wrapped.peft_config)
    model.eval()
    model.requires_grad_(False)
    notes = list(files.notes)
    return LoadedRun(model, task.processor, kind, files.folder, base, files.sha256, notes, wrapped, task.prefix)


def _install_pooled_head(task: Task[Any], files: AdapterFiles, base: str) -> None:
    """Install a mean-pooled head; refuse a head that is random here and was lost."""
    if not isinstance(task.model, MeanPooled):
        refuse_lost(task.new_modules, files, base)
        return
    path = files.folder / "head.safetensors"
    try:
        head = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    own = task.model.head.state_dict()
    if {key: value.shape for key, value in head.items()} != {key: value.shape for key, value in own.items()}:
        raise AdapterError(f"the head in {path} does not fit {base} and the data's {task.n_outputs} classes")
    task.model.head.load_state_dict(head)


def load_run(adapter_dir: str | os.PathLike[str], *, trainable: bool = False, **places: Any) -> LoadedRun:
    """Load a LoRA adapter with its base model and tokenizer.

    Args:
        adapter_dir: folder that PEFT's ``save_pretrained`` (or a Trainer's checkpoint) wrote.
        trainable: make the adapter (and what is saved with it) require gradients.
        **places: see :class:`~ranksure.runs.saved.base.Places`; ``task`` is ``SEQ_CLS`` or ``CAUSAL_LM``, where
            neither the configuration nor the weights tell.

    Raises:
        AdapterError: no adapter there, a damaged file, or a configuration, weights and base model that disagree.
        ModelError: the base model or the tokenizer cannot be found or loaded, or its head was never trained.
        SettingError: an option has no meaning here.
    """
    where = settings_of(Places, "load_run", places)
    return _loaded(read_files(Path(adapter_dir).expanduser(), where.adapter), where, trainable)


def _loaded(files: AdapterFiles, where: Places, trainable: bool = False) -> LoadedRun:
    notes, name, common = list(files.notes), base_name(files, where.base), where.of_hub(files)
    check_checkpoint(name, where.dtype)
    kind = _task(files, where.task, name, common)
    network, untrained = load_base(name, kind, files, where.dtype, common, notes)
    model = with_adapter(network, files, name, trainable)
    refuse_lost(sorted(untrained), files, name)
    model.to(device_named(where.device))
    model.train(trainable)
    if not trainable:
        model.requires_grad_(False)  # PEFT leaves biases that were trained as they are
    return LoadedRun(model, tokenizer_of(network, files, name, common), kind, files.folder, name, files.sha256, notes)


def _task(files: AdapterFiles, asked: str | None, base: str, common: dict[str, Any]) -> TaskType:
    recorded = getattr(files.config.task_type, "value", files.config.task_type)
    if asked is not None:
        if asked not in ("SEQ_CLS", "CAUSAL_LM"):
            raise SettingError(f"unknown task {asked!r}: use SEQ_CLS or CAUSAL_LM")
        if recorded is not None and recorded != asked:
            raise SettingError(f"the adapter was trained for {recorded}, not {asked}: leave `task` out")
        return cast(TaskType, asked)
    if recorded in ("SEQ_CLS", "CAUSAL_LM"):
        return cast(TaskType, recorded)
    if recorded is not None:
        raise AdapterError(
            f"the adapter's task is {recorded}; only SEQ_CLS and CAUSAL_LM are loaded (in Python, pass any "
            "PEFT model and its batches to ranksure.certify)"
        )
    if saved_outputs(files) is not None:
        return "SEQ_CLS"
    architectures = getattr(base_config(base, common), "architectures", None) or [""]
    if architectures[0].endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    if architectures[0].endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    raise SettingError(
        f"{files.folder} does not say what it was trained for, and {base} ({architectures[0] or 'no architecture'}) "
        "does not tell: add `task` SEQ_CLS or CAUSAL_LM"
    )
