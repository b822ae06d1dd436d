"""A finished run with its data, whatever its task: what ``certify``, ``grow`` and ``compress`` start from.

Sequence classifiers and causal language models are loaded by themselves (``runs/saved/base.py``). Other tasks need
their data to be made: prompts have verbalisers, images and recordings a processor. An adapter that ranksure wrote holds
``task.json``, which says which task it is and with what settings.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ranksure.adapters.saved import AdapterFiles, read_files
from ranksure.errors import AdapterError, ModelError, SettingError
from ranksure.network.checkpoints import check_checkpoint, device_named, load_tokenizer, settle_padding
from ranksure.records.record import RunSource
from ranksure.runs.saved.base import (
    _TOKENIZER_FILES,
    PEFT_PREFIX,
    TaskType,
    _load_base,
    base_config,
    base_name,
    saved_outputs,
    with_adapter,
)
from ranksure.runs.saved.data import DataSettings, RunData, read_data
from ranksure.tasks.collate import in_batches
from ranksure.tasks.load import KINDS, load_samples, load_task
from ranksure.tasks.task import TASK_FILE, Task
from ranksure.tasks.text import MeanPooled

_AUTO_ENDINGS = {"ForImageClassification": "image", "ForAudioClassification": "speech"}
_OPTIONS = ("pooling", "template", "verbalizers", "image_size", "max_seconds", "max_length")


def open_run(
    adapter_dir: str | os.PathLike[str],
    data: Any,
    settings: DataSettings | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    adapter: str | None = None,
    task: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    task_options: dict[str, Any] | None = None,
) -> tuple[LoadedRun, RunData]:
    """Load a LoRA adapter with its base model, and its training data as batches.

    Args:
        adapter_dir: folder of the adapter.
        data: its training data.
        settings: columns, lengths, batches.
        base: the base model, where it is no longer where the adapter's configuration says.
        adapter: which adapter of a folder with several.
        task: ``SEQ_CLS``, ``CAUSAL_LM``, ``text``, ``prompt``, ``image`` or ``speech``, where nothing in the folder
            tells.
        device: ``auto`` or a torch device.
        dtype: of the base model.
        revision: Hub revision of the base model.
        trust_remote_code: allow the base model's own code to run.
        task_options: ``template``, ``verbalizers``, ``image_size``, ``max_seconds``: in place of the adapter's
            ``task.json``.

    Raises:
        AdapterError: no adapter there, or files that do not fit one another.
        ModelError: the base model cannot be loaded, or its head was never trained.
        DataError: data that cannot be used.
        SettingError: an option has no meaning here.
    """
    settings = settings or DataSettings()
    common: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    files = read_files(Path(adapter_dir).expanduser(), adapter)
    record = _record(files.folder)
    kind = _kind(files, record, task, base, revision, trust_remote_code)
    if kind is None:
        named: Any = {"text": "SEQ_CLS"}.get(task or "", task)
        run = load_run(adapter_dir, base=base, adapter=adapter, task=named, revision=revision, **common)
        return run, read_data(run, data, settings)
    return _open(files, kind, record, data, settings, base, revision, common, task_options or {})


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


def _kind(
    files: AdapterFiles, record: dict[str, Any], task: str | None, base: Any, revision: str | None, trust: bool
) -> str | None:
    """The task that is made from its data; None for what is loaded by itself."""
    found = _made_from_data(record)
    record = record if found is not None else {}
    if task in KINDS and task != "text":
        if record and found != task:
            raise SettingError(f"the adapter was trained for the task {found}, not {task}: leave `task` out")
        return task
    if found is not None or task is not None or files.config.task_type is not None:
        return found
    common = {"revision": revision or files.config.revision, "trust_remote_code": trust}
    own = (getattr(base_config(base_name(files, base), common), "architectures", None) or [""])[0]
    return next((kind for ending, kind in _AUTO_ENDINGS.items() if own.endswith(ending)), None)


def _open(
    files: AdapterFiles,
    kind: str,
    record: dict[str, Any],
    data: Any,
    settings: DataSettings,
    base: Any,
    revision: str | None,
    common: dict[str, Any],
    asked: dict[str, Any],
) -> tuple[LoadedRun, RunData]:
    if settings.packing or settings.loss_on != "completion":
        raise SettingError(f"packing and loss_on are for causal language models; this adapter is for the task {kind}")
    columns = ("text_column", "text_pair_column", "image_column", "audio_column", "label_column", "split")
    samples = load_samples(kind, data, **{name: getattr(settings, name) for name in columns})
    if (labels := record.get("labels")) is not None:
        samples = samples.with_label_names(labels)
    notes, total = list(samples.notes), len(samples)
    if settings.samples is not None and settings.samples < total:
        samples = samples.shuffled(settings.seed).subset(range(settings.samples))
    options = {name: record[name] for name in _OPTIONS if record.get(name) is not None}
    options |= {name: value for name, value in asked.items() if value is not None}
    if settings.max_length is not None:
        options["max_length"] = settings.max_length
    if "offsets" in record:
        options["calibrate"] = record["offsets"]
    name = base_name(files, base)
    made = load_task(
        kind,
        name,
        samples,
        batch_size=settings.batch_size or 32,
        revision=revision or files.config.revision,
        **options,
        **common,
    )
    _check_head(made, files, name)
    wrapped = with_adapter(made.adapted, files, name, False)
    model: nn.Module = wrapped
    if made.prefix:
        # The adapter's layers sit in the model inside the frame; its configuration is what certify looks for.
        model = made.model
        object.__setattr__(model, "peft_config", wrapped.peft_config)
    model.eval()
    model.requires_grad_(False)
    features, collator = made.features(samples), made.collator
    notes += [*made.notes, *made.remarks(samples)]
    run = LoadedRun(
        model, made.processor, kind, files.folder, name, files.sha256, list(files.notes), wrapped, made.prefix
    )
    return run, RunData(
        batches=[dict(collator(part)) for part in in_batches(features, made.batch_size, settings.by_length)],
        features=features,
        collator=collator,
        kind="cross-entropy",
        form=f"labelled {samples.noun}s",
        source=samples.source,
        sha256=samples.sha256,
        notes=notes,
        n_rows=len(samples),
        total_rows=total,
        max_length=getattr(made, "max_length", None),
        label_names=samples.label_names,
        kind_is_known=True,
    )


def _check_head(task: Task[Any], files: AdapterFiles, base: str) -> None:
    """Install a mean-pooled head; refuse a head that is random here and was lost."""
    if isinstance(task.model, MeanPooled):
        path = files.folder / "head.safetensors"
        try:
            head = load_file(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise AdapterError(f"{path} cannot be read: {error}") from None
        if {key: value.shape for key, value in head.items()} != {
            key: value.shape for key, value in task.model.head.state_dict().items()
        }:
            raise AdapterError(f"the head in {path} does not fit {base} and the data's {task.n_outputs} classes")
        task.model.head.load_state_dict(head)
        return
    saved = {key.removeprefix(PEFT_PREFIX) for key in files.head}
    for name in task.new_modules:
        if not any(key == name or key.startswith(name + ".") for key in saved):
            raise ModelError(
                f"{name} is neither in {base} nor saved with the adapter, so it is random here and was lost: save the "
                "head with the adapter (modules_to_save), or give the checkpoint that holds it with `base`"
            )


@dataclass(frozen=True)
class LoadedRun:
    """A run as it was saved.

    Attributes:
        model: the base model with the adapter active, in evaluation mode: a ``PeftModel``, or a network around the
            model that is adapted (mean pooling, verbalisers).
        tokenizer: the adapter folder's own, else the base model's; what prepares inputs of other kinds.
        task_type: ``SEQ_CLS`` or ``CAUSAL_LM``, or a task: ``text`` (mean pooling), ``prompt``, ``image``, ``speech``.
        folder: the adapter's folder.
        base: the base model's folder or Hub id.
        adapter_sha256: of the adapter's weights.
        notes: sentences for the user.
        adapted: the ``PeftModel`` itself, where ``model`` is a network around it; None where ``model`` is it.
        prefix: what a module's name in ``adapted`` needs in front to be its name in ``model``.
    """

    model: nn.Module
    tokenizer: Any
    task_type: str
    folder: Path
    base: str
    adapter_sha256: str
    notes: list[str] = field(default_factory=list)
    adapted: PeftModel | None = None
    prefix: str = ""

    @property
    def rewritten(self) -> dict[str, Any]:
        """What ``save`` of a growth or compression has to know of the run."""
        return {"model": self.adapted or self.model, "prefix": self.prefix, "source": self.folder}

    @property
    def source(self) -> RunSource:
        """What a record says of it."""
        return RunSource(
            adapter=str(self.folder),
            adapter_sha256=self.adapter_sha256,
            base=self.base,
            task_type=self.task_type,
            dtype=str(self.dtype).removeprefix("torch."),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the base model."""
        return next(p.dtype for n, p in self.model.named_parameters() if p.is_floating_point() and "lora_" not in n)


def load_run(
    adapter_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    adapter: str | None = None,
    task: TaskType | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    trainable: bool = False,
) -> LoadedRun:
    """Load a LoRA adapter with its base model and tokenizer.

    Args:
        adapter_dir: folder that PEFT's ``save_pretrained`` (or a Trainer's checkpoint) wrote.
        base: the base model, where it is no longer where the adapter's configuration says.
        adapter: which adapter of a folder with several.
        task: ``SEQ_CLS`` or ``CAUSAL_LM``, where neither the configuration nor the weights tell.
        device: ``auto`` or a torch device.
        dtype: of the base model: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``. PEFT keeps
            the adapter's matrices in float32 at least.
        revision: Hub revision of the base model; by default the one that the adapter records.
        trust_remote_code: allow the base model's own code to run.
        trainable: make the adapter (and what is saved with it) require gradients.

    Raises:
        AdapterError: no adapter there, a damaged file, or a configuration, weights and base model that disagree.
        ModelError: the base model or the tokenizer cannot be found or loaded, or its head was never trained.
        SettingError: an option has no meaning here.
    """
    files = read_files(Path(adapter_dir).expanduser(), adapter)
    notes = list(files.notes)
    name = base_name(files, base)
    check_checkpoint(name, dtype)
    common = {"revision": revision or files.config.revision, "trust_remote_code": trust_remote_code}
    kind = _task(files, task, name, common)
    network, untrained = _load_base(name, kind, files, dtype, common, notes)
    model = with_adapter(network, files, name, trainable)
    saved = {key.removeprefix(PEFT_PREFIX) for key in files.head}
    if lost := sorted(key for key in untrained if key not in saved):
        raise ModelError(
            f"{lost[0]} is neither in {name} nor saved with the adapter, so it is random here and was lost: save the "
            "head with the adapter (modules_to_save), or give the checkpoint that holds it with `base`"
        )
    model.to(device_named(device))
    model.train(trainable)
    if not trainable:
        model.requires_grad_(False)  # PEFT leaves biases that were trained as they are
    own = any((files.folder / file).is_file() for file in _TOKENIZER_FILES)
    place = str(files.folder) if own else name
    tokenizer = load_tokenizer(place, None if own else common["revision"], trust_remote_code)
    settle_padding(network, tokenizer, place)
    rows = cast(Any, network.get_input_embeddings()).weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(f"the tokenizer of {place} has {len(tokenizer)} tokens, but {name} only {rows}")
    return LoadedRun(model, tokenizer, kind, files.folder, name, files.sha256, notes)


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
