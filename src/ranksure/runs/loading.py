"""A finished LoRA run, loaded: base model, adapter, tokenizer, each checked against the others."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from ranksure.errors import AdapterError, ModelError, SettingError
from ranksure.runs.adapter_files import AdapterFiles, check_fit, read_files
from ranksure.runs.data import DataSettings, RunData, read_data
from ranksure.tasks.checkpoints import (
    check_checkpoint,
    device_named,
    load_tokenizer,
    load_weights,
    looks_local,
    quiet,
    settle_padding,
)
from ranksure.tasks.sources import one_line, shown

__all__ = ["DataSettings", "LoadedRun", "RunData", "load_run", "read_data"]

TaskType = Literal["SEQ_CLS", "CAUSAL_LM"]
_HEADS = ("score", "classifier", "classifier.out_proj", "classification_head.out_proj")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model", "vocab.json")
PEFT_PREFIX = "base_model.model."


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
            "head with the adapter (modules_to_save), or give the checkpoint that holds it with --base"
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


# ---------------------------------------------------------------------------------------------------------------------
# which base model, which task


def base_name(files: AdapterFiles, base: str | os.PathLike[str] | None) -> str:
    """The base model: the one given, else the one that the adapter records.

    Raises:
        AdapterError: none is recorded.
        ModelError: the recorded folder is not there.
    """
    if base is not None:
        return os.fspath(base)
    recorded = files.config.base_model_name_or_path
    if not recorded:
        raise AdapterError(f"{files.folder} does not record its base model: name it with --base")
    if looks_local(recorded) and not Path(recorded).expanduser().is_dir():
        raise ModelError(
            f"the base model that the adapter records, {recorded}, is not there: give its place with --base"
        )
    return recorded


def _task(files: AdapterFiles, asked: str | None, base: str, common: dict[str, Any]) -> TaskType:
    recorded = getattr(files.config.task_type, "value", files.config.task_type)
    if asked is not None:
        if asked not in ("SEQ_CLS", "CAUSAL_LM"):
            raise SettingError(f"unknown task {asked!r}: use SEQ_CLS or CAUSAL_LM")
        if recorded is not None and recorded != asked:
            raise SettingError(f"the adapter was trained for {recorded}, not {asked}: leave --task out")
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
        "does not tell: add --task SEQ_CLS or CAUSAL_LM"
    )


def saved_outputs(files: AdapterFiles) -> int | None:
    """Number of outputs of the head that was saved with the adapter, if any."""
    for name, tensor in files.head.items():
        module = name.removeprefix(PEFT_PREFIX).rpartition(".")[0]
        if name.endswith(".weight") and tensor.dim() == 2 and module in _HEADS:
            return int(tensor.shape[0])
    return None


# ---------------------------------------------------------------------------------------------------------------------
# loading


def base_config(name: str, common: dict[str, Any], **more: Any) -> Any:
    """The base model's configuration.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        with quiet():
            return AutoConfig.from_pretrained(name, **common, **more)
    except Exception as error:
        raise ModelError(f"the configuration of base model {name} cannot be read: {one_line(error)}") from None


def _load_base(
    name: str, task: TaskType, files: AdapterFiles, dtype: str, common: dict[str, Any], notes: list[str]
) -> tuple[PreTrainedModel, set[str]]:
    """The base model, and the names of parameters that its checkpoint does not hold."""
    more: dict[str, Any] = {}
    if task == "SEQ_CLS" and (outputs := saved_outputs(files)) is not None:
        more["num_labels"] = outputs
    config = base_config(name, common, **more)
    auto: Any = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    arguments = {**common, "config": config, "dtype": dtype, "ignore_mismatched_sizes": task == "SEQ_CLS"}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loaded, info = load_weights(auto, name, notes, **arguments)
    except Exception as error:  # a damaged folder fails in ways of many libraries
        what = "a sequence classifier" if task == "SEQ_CLS" else "a causal language model"
        raise ModelError(f"base model {name} cannot be loaded as {what}: {one_line(error)}") from None
    lacking = [entry[0] if isinstance(entry, (tuple, list)) else entry for entry in info["mismatched_keys"]]
    _fit_embeddings(loaded, files)
    return loaded, {*info["missing_keys"], *lacking}


def _fit_embeddings(network: PreTrainedModel, files: AdapterFiles) -> None:
    """Resize the embeddings where the run did (added tokens), which PEFT then saves with the adapter."""
    embedding: Any = network.get_input_embeddings()
    place = next((name for name, module in network.named_modules() if module is embedding), None)
    saved = files.tensors.get(f"{PEFT_PREFIX}{place}.weight")
    if saved is not None and saved.dim() == 2 and saved.shape[0] != embedding.weight.shape[0]:
        with quiet():
            network.resize_token_embeddings(saved.shape[0], mean_resizing=False)


def with_adapter(network: PreTrainedModel, files: AdapterFiles, base: str, trainable: bool) -> PeftModel:
    """The base model under the adapter: what ``PeftModel.from_pretrained`` does, with nothing left as initialised."""
    files.config.inference_mode = not trainable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each thing that PEFT would warn of here is checked below
        try:
            model = get_peft_model(network, files.config)
        except Exception as error:  # target modules that are not there, ranks that are not numbers, ...
            targets = shown(files.config.target_modules, 80)
            raise AdapterError(
                f"the adapter {files.folder} (target_modules {targets}) does not fit {base}: {one_line(error)}"
            ) from None
        assert isinstance(model, PeftModel)
        if files.config.target_parameters is None:  # else PEFT renames tensors; such runs are never certified
            expected = _saved_by_peft(model, False)
            check_fit(files, expected, {**expected, **_saved_by_peft(model, True)}, base)
        try:
            result = set_peft_model_state_dict(model, files.tensors)
        except Exception as error:
            raise AdapterError(f"the weights in {files.folder} do not fit {base}: {one_line(error)}") from None
    if unexpected := list(result.unexpected_keys):
        raise AdapterError(f"{files.folder}: {unexpected[0]} has no place in {base} under its configuration")
    return model


def _saved_by_peft(model: PeftModel, embeddings: bool) -> Mapping[str, Tensor]:
    return get_peft_model_state_dict(model, save_embedding_layers=embeddings)
