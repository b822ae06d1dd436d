"""A finished run with its data, whatever its task: what ``certify``, ``grow`` and ``compress`` start from.

Sequence classifiers and causal language models are loaded by themselves (``runs/saved/base.py``). Other tasks need
their data to be made: prompts have verbalisers, images and recordings a processor. An adapter that ranksure wrote holds
``task.json``, which says which task it is, with which loss and settings.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from msgspec.structs import replace
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ranksure.adapters.saved import AdapterFiles, read_files
from ranksure.errors import AdapterError, SettingError, settings_of
from ranksure.files import put_back
from ranksure.losses import CrossEntropy, get_loss
from ranksure.network.checkpoints import check_checkpoint, device_named
from ranksure.records.task import TASK_FILE, TaskRecord, read_task
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
from ranksure.runs.saved.data import (
    ASSUMED,
    DataSettings,
    RunData,
    as_trained,
    loss_by_head,
    read_data,
    run_data,
)
from ranksure.tasks.load import KINDS, load_samples, load_task, loss_for
from ranksure.tasks.options import ModelOptions, RowOptions, values_of
from ranksure.tasks.task import Task
from ranksure.tasks.text import MeanPooled

HEAD_FILE = "head.safetensors"
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

    Returns:
        The run and its rows: ``ranksure.certify(run.model, rows.batches, **rows.objective)``.

    Raises:
        AdapterError: no adapter there, or files that do not fit one another.
        ModelError: the base model cannot be loaded, or its head was never trained.
        DataError: data that cannot be used.
        SettingError: an option has no meaning here.
    """
    settings, where = settings or DataSettings(), settings_of(Places, "open_run", places)
    files = _read(adapter_dir, where)
    trained = _trained(files.folder)
    settings = as_trained(trained, settings)
    kind = _kind(files, trained, where)
    if kind is not None:
        return _made(files, kind, trained, data, settings, where, task_options or {})
    run = _loaded(files, where, replace(trained, loss=settings.loss))
    return run, read_data(run, data, settings)


def task_of(folder: Path) -> str | None:
    """The task of an adapter that is opened with its data, by its ``task.json``; None for all others.

    Raises:
        AdapterError: the file is damaged.
    """
    return _made_from_data(_trained(folder))


def _made_from_data(trained: TaskRecord) -> str | None:
    """A classifier of texts with a head of its own is loaded by itself."""
    kind = trained.kind
    return None if kind == "CAUSAL_LM" or (kind == "text" and trained.pooling != "mean") else kind


def _trained(folder: Path) -> TaskRecord:
    """The adapter's own record; empty where there is none."""
    found = read_task(folder) or TaskRecord()
    if found.kind not in (None, "CAUSAL_LM", *KINDS):
        raise AdapterError(f"{folder / TASK_FILE} names the task {found.kind}, which this version of ranksure lacks")
    return found


def _kind(files: AdapterFiles, trained: TaskRecord, where: Places) -> str | None:
    """The task that is made from its data; None for what is loaded by itself."""
    found, task = _made_from_data(trained), where.task
    if task in KINDS and task != "text":
        if trained.kind is not None and trained.kind != task:
            raise SettingError(f"the adapter was trained for the task {trained.kind}, not {task}: leave `task` out")
        return task
    if trained.kind is not None or task is not None or files.config.task_type is not None:
        return found
    config = base_config(base_name(files, where.base), where.of_hub(files))
    own = (getattr(config, "architectures", None) or [""])[0]
    return next((kind for ending, kind in _AUTO_ENDINGS.items() if own.endswith(ending)), None)


def _made(
    files: AdapterFiles,
    kind: str,
    trained: TaskRecord,
    data: Any,
    settings: DataSettings,
    where: Places,
    asked: dict[str, Any],
) -> tuple[LoadedRun, RunData]:
    """A run whose task is made from its data."""
    settings.refuse_packing(f"this adapter is for the task {kind}")
    name, size = base_name(files, where.base), settings.batch_size or 32
    own = {"device": where.device, "dtype": where.dtype, **where.of_hub(files)}
    notes: list[str] = []
    loss = get_loss(_made_loss(files, kind, trained, ModelOptions(loss=settings.loss, **own), name, notes))
    samples = load_samples(kind, data, regression=not loss.of_classes, **values_of(settings, RowOptions))
    if trained.labels is not None:
        samples = samples.with_label_names(trained.labels)
    notes, total = [*samples.notes, *notes], len(samples)
    samples = settings.few(samples)
    options = {each: getattr(trained, each, None) for each in KINDS[kind].options}
    options |= {each: value for each, value in asked.items() if value is not None}
    options |= {"loss": loss.name, "max_length": settings.max_length}
    if trained.offsets is not None:
        options["calibrate"] = trained.offsets
    options = {each: value for each, value in options.items() if value is not None}
    made = load_task(kind, name, samples, batch_size=size, **options, **own)
    run = _run_of(made, kind, files, name, trained)
    return run, run_data(
        made.model,
        samples,
        made.features(samples),
        made.collator,
        settings,
        made.batch_size,
        inputs_of=made.adapted,
        kind=loss.name,
        form=f"labelled {samples.noun}s",
        notes=[*notes, *made.notes, *made.remarks(samples)],
        n_rows=len(samples),
        total_rows=total,
        max_length=getattr(made, "max_length", None),
        label_names=samples.label_names,
        kind_is_known=True,
    )


def _made_loss(
    files: AdapterFiles, kind: str, trained: TaskRecord, asked: ModelOptions, base: str, notes: list[str]
) -> str:
    """The loss asked for or recorded, else the only one that it can have been."""
    if asked.loss is not None:
        return asked.loss
    if kind == "text":
        return loss_by_head(trained.labels, len(_pooled_head(files.folder)["weight"]))
    if trained.kind is None:
        notes.append(ASSUMED.format(loss=loss_for(kind, base, asked, notes)))
    return CrossEntropy.name


def _run_of(task: Task[Any], kind: str, files: AdapterFiles, base: str, trained: TaskRecord) -> LoadedRun:
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
    parts = (files.folder, base, files.sha256, notes, wrapped, task.prefix, trained)
    return LoadedRun(model, task.processor, kind, *parts)


def _install_pooled_head(task: Task[Any], files: AdapterFiles, base: str) -> None:
    """Install a mean-pooled head; refuse a head that is random here and was lost."""
    if not isinstance(task.model, MeanPooled):
        refuse_lost(task.new_modules, files, base)
        return
    head, own = _pooled_head(files.folder), task.model.head.state_dict()
    if {key: value.shape for key, value in head.items()} != {key: value.shape for key, value in own.items()}:
        raise AdapterError(
            f"the head in {files.folder / HEAD_FILE} does not fit {base} and the task's {task.n_outputs} outputs"
        )
    task.model.head.load_state_dict(head)


def _pooled_head(folder: Path) -> dict[str, Tensor]:
    """The tensors of a head on averaged states."""
    path = folder / HEAD_FILE
    try:
        head = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    if "weight" not in head or head["weight"].dim() != 2:
        raise AdapterError(f"{path} holds no head: a matrix named weight is missing")
    return head


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
    files = _read(adapter_dir, where)
    return _loaded(files, where, _trained(files.folder), trainable)


def _read(adapter_dir: str | os.PathLike[str], where: Places) -> AdapterFiles:
    folder = Path(adapter_dir).expanduser()
    put_back(folder)
    return read_files(folder, where.adapter)


def _loaded(files: AdapterFiles, where: Places, trained: TaskRecord, trainable: bool = False) -> LoadedRun:
    notes, name, common = list(files.notes), base_name(files, where.base), where.of_hub(files)
    check_checkpoint(name, where.dtype)
    kind = _task(files, {"text": "SEQ_CLS"}.get(where.task or "", where.task), trained, name, common)
    network, untrained = load_base(name, kind, files, where.dtype, common, notes, _head(trained))
    model = with_adapter(network, files, name, trainable)
    refuse_lost(sorted(untrained), files, name)
    model.to(device_named(where.device))
    model.train(trainable)
    if not trainable:
        model.requires_grad_(False)  # PEFT leaves biases that were trained as they are
    parts = (files.folder, name, files.sha256, notes)
    return LoadedRun(model, tokenizer_of(network, files, name, common), kind, *parts, trained=trained)


def _head(trained: TaskRecord) -> dict[str, Any]:
    """What the record says of a classifier's head, as the base model's configuration has it."""
    if trained.loss is None:
        return {}
    loss = get_loss(trained.loss)
    head: dict[str, Any] = {"problem_type": loss.problem_type}
    if trained.kind == "text":
        head["num_labels"] = loss.outputs_for(None if trained.labels is None else len(trained.labels))
    return head


def _task(files: AdapterFiles, asked: str | None, trained: TaskRecord, base: str, common: dict[str, Any]) -> TaskType:
    recorded = getattr(files.config.task_type, "value", files.config.task_type)
    recorded = recorded or {"text": "SEQ_CLS"}.get(trained.kind or "", trained.kind)
    if asked is not None:
        if asked not in ("SEQ_CLS", "CAUSAL_LM"):
            raise SettingError(f"unknown task {asked!r}: use SEQ_CLS or CAUSAL_LM")
        if recorded is not None and recorded != asked:
            raise SettingError(f"the adapter was trained for {recorded}, not {asked}: leave `task` out")
        return cast(TaskType, asked)
    if recorded in ("SEQ_CLS", "CAUSAL_LM"):
        return cast(TaskType, recorded)
    if recorded is not None:
        both = "; load that without task_type, with which PEFT fails on many" * (recorded == "SEQ_2_SEQ_LM")
        raise AdapterError(
            f"the adapter's task is {recorded}; only SEQ_CLS and CAUSAL_LM are loaded (in Python, pass any "
            f"PEFT model and its batches to ranksure.certify{both})"
        )
    if saved_outputs(files, base, common) is not None:
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
