"""A finished LoRA run, loaded: base model, adapter, tokenizer, each checked against the others."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from ranksure.adapters.fields import leaves_base
from ranksure.adapters.matrices import is_factor
from ranksure.adapters.renamed import names_of_versions
from ranksure.adapters.saved import CONFIG, AdapterFiles, check_fit
from ranksure.bundled.names import named_model
from ranksure.errors import AdapterError, ModelError, one_line, shown
from ranksure.network.checkpoints import load_tokenizer, load_weights, looks_local, quiet, settle_padding
from ranksure.records.record import RunSource
from ranksure.records.task import TaskRecord
from ranksure.tasks.classifiers import head_name

TaskType = Literal["SEQ_CLS", "CAUSAL_LM"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Places:
    """Where a run's parts are, and how they are loaded.

    Attributes:
        base: the base model, where it is no longer where the adapter's configuration says.
        adapter: which adapter of a folder with several.
        task: ``SEQ_CLS``, ``CAUSAL_LM``, ``text``, ``prompt``, ``image`` or ``speech``, where nothing in the folder
            tells.
        device: ``auto`` or a torch device.
        dtype: of the base model: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``. PEFT keeps
            the adapter's matrices in float32 at least.
        revision: Hub revision of the base model; by default the one that the adapter records.
        trust_remote_code: allow the base model's own code to run.
    """

    base: str | os.PathLike[str] | None = None
    adapter: str | None = None
    task: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def of_hub(self, files: AdapterFiles) -> dict[str, Any]:
        """What every ``from_pretrained`` of the base model is told."""
        return {"revision": self.revision or files.config.revision, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class LoadedRun:
    """A run as it was saved.

    Attributes:
        model: the base model with the adapter active, in evaluation mode: a ``PeftModel``, or a network around one
            (mean pooling, verbalisers).
        tokenizer: the adapter folder's own, else the base model's; what prepares inputs of other kinds.
        task_type: ``SEQ_CLS`` or ``CAUSAL_LM``, or a task: ``text`` (mean pooling), ``prompt``, ``image``, ``speech``.
        base: the base model's folder or Hub id.
        adapter_sha256: of the adapter's weights.
        notes: sentences for the user.
        adapted: the ``PeftModel`` itself, where ``model`` is a network around it; None where ``model`` is it.
        prefix: what a module's name in ``adapted`` needs in front to be its name in ``model``.
        trained: the adapter's own record of what it was trained for, ``task.json``.
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
    trained: TaskRecord = field(default_factory=TaskRecord)

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
        return next(p.dtype for n, p in self.model.named_parameters() if p.is_floating_point() and not is_factor(n))


# ---------------------------------------------------------------------------------------------------------------------
# which base model, which task


def base_name(files: AdapterFiles, base: str | os.PathLike[str] | None) -> str:
    """The base model: the one given, else the one that the adapter records.

    Raises:
        AdapterError: none is recorded.
        ModelError: the recorded folder is not there.
    """
    if base is not None:
        return os.fspath(named_model(base))
    recorded = files.config.base_model_name_or_path
    if not recorded:
        raise AdapterError(f"{files.folder} does not record its base model: name it with `base`")
    if looks_local(recorded) and not Path(recorded).expanduser().is_dir():
        raise ModelError(
            f"the base model that the adapter records, {recorded}, is not there: give its place with `base`"
        )
    return recorded


def saved_outputs(files: AdapterFiles, base: str, common: dict[str, Any]) -> int | None:
    """Number of outputs of the classifier's head that was saved with the adapter, if any; whatever it is called."""
    if not files.head:
        return None
    config = base_config(base, common)
    try:
        with quiet(), torch.device("meta"):
            code = common["trust_remote_code"]
            network = AutoModelForSequenceClassification.from_config(config, trust_remote_code=code)
        head = files.head.get(f"{head_name(network, network.config.num_labels)}.weight")
    except Exception:  # no classifier of this base, or none with a linear head: nothing that was saved is one
        return None
    return None if head is None else int(head.shape[0])


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


def load_base(
    name: str,
    task: TaskType,
    files: AdapterFiles,
    dtype: str,
    common: dict[str, Any],
    notes: list[str],
    head: Mapping[str, Any],
) -> tuple[PreTrainedModel, set[str]]:
    """The base model, and the names of parameters that its checkpoint does not hold.

    ``head`` is what a classifier's configuration is told of its head, where the adapter's record says it.
    """
    more: dict[str, Any] = dict(head) if task == "SEQ_CLS" else {}
    if task == "SEQ_CLS" and "num_labels" not in more and (outputs := saved_outputs(files, name, common)) is not None:
        more["num_labels"] = outputs
    config = base_config(name, common, **more)
    auto: Any = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    noun = "a sequence classifier" if task == "SEQ_CLS" else "a causal language model"
    more = {"head": task == "SEQ_CLS", "elsewhere": set(files.head), "config": config, "dtype": dtype}
    loaded, missing, reshaped = load_weights(auto, noun, name, notes, **more, **common)
    _fit_embeddings(loaded, files)
    return loaded, {*missing, *reshaped}


def _fit_embeddings(network: PreTrainedModel, files: AdapterFiles) -> None:
    """Resize the embeddings where the run did (added tokens), which PEFT then saves with the adapter: not always both.

    Raises:
        AdapterError: the rows of one that is not tied to the other were not saved.
    """
    embeddings: list[Any] = [network.get_input_embeddings(), network.get_output_embeddings()]
    pair = [each for each in embeddings if each is not None]
    saved = {name: _saved_rows(name, files) for name, module in network.named_modules() if module in pair}
    rows, before = next(filter(None, saved.values()), None), pair[0].weight.shape[0]
    if rows is None or rows == before:
        return
    tied = all(each.weight is pair[0].weight for each in pair)
    for name, found in saved.items():
        if found is None and not tied:
            raise AdapterError(
                f"{files.folder}: the run has {rows} tokens and the base {before}, but PEFT did not save the rows of "
                f"{name} for the others, so they were lost; train again with {name} in modules_to_save"
            )
    with quiet():
        network.resize_token_embeddings(rows, mean_resizing=False)


def _saved_rows(name: str, files: AdapterFiles) -> int | None:
    """Rows of an embedding's weight that was saved with the adapter, under LoRA or not."""
    found = (files.head.get(f"{name}.{inner}weight") for inner in ("", "base_layer."))
    return next((tensor.shape[0] for tensor in found if tensor is not None and tensor.dim() == 2), None)


def tokenizer_of(network: PreTrainedModel, files: AdapterFiles, base: str, common: dict[str, Any]) -> Any:
    """The adapter folder's own tokenizer, else the base model's; both know a padding token afterwards.

    Raises:
        ModelError: it cannot be read.
        AdapterError: it has tokens that were added in training, and their rows were not saved.
    """
    own = any((files.folder / file).is_file() for file in _TOKENIZER_FILES)
    place = str(files.folder) if own else base
    tokenizer = load_tokenizer(place, None if own else common["revision"], common["trust_remote_code"])
    settle_padding(network, tokenizer, place)
    embedding: Any = network.get_input_embeddings()
    if own and len(tokenizer) > (rows := embedding.weight.shape[0]):
        before = len(load_tokenizer(base, common["revision"], common["trust_remote_code"]))
        if len(tokenizer) > before:  # what the base's own tokenizer lacks rows for, the run did without, too
            raise AdapterError(
                f"{files.folder}: the run added tokens ({len(tokenizer)}, the base {before}; embeddings {rows}), but "
                "PEFT saved none of their rows, so they were lost; train again with the embeddings in modules_to_save"
            )
    return tokenizer


def refuse_lost(untrained: Iterable[str], files: AdapterFiles, base: str) -> None:
    """Refuse parameters (or modules) that the base model does not hold, where the adapter's file does not either.

    Raises:
        ModelError: names the first one.
    """
    for name in untrained:
        if not any(key == name or key.startswith(name + ".") for key in files.head):
            raise ModelError(
                f"{name} is neither in {base} nor saved with the adapter, so it is random here and was lost: save the "
                "head with the adapter (modules_to_save), or give the checkpoint that holds it with `base`"
            )


def with_adapter(network: PreTrainedModel, files: AdapterFiles, base: str, trainable: bool) -> PeftModel:
    """The base model under the adapter: what ``PeftModel.from_pretrained`` does, with nothing left as initialised."""
    files.config.inference_mode = not trainable
    with names_of_versions(network, files), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each thing that PEFT would warn of here is checked below
        try:
            model = get_peft_model(network, files.config)
        except Exception as error:  # target modules that are not there, ranks that are not numbers, ...
            if isinstance(error, AttributeError) and files.config.task_type == "SEQ_2_SEQ_LM":
                raise AdapterError(
                    f"peft {peft.__version__} cannot place an adapter of task_type SEQ_2_SEQ_LM with transformers "
                    f"{transformers.__version__} ({one_line(error)}): remove task_type from {files.folder / CONFIG}; "
                    "the weights mean the same without it"
                ) from None
            targets = shown(files.config.target_modules, 80)
            what = f"the adapter {files.folder} (target_modules {targets}) does not fit {base}"
            if not leaves_base(files.config):
                start = files.config.init_lora_weights
                what = f"PEFT cannot load the adapter {files.folder}, as init_lora_weights={start!r} cannot be repeated"
            raise AdapterError(f"{what}: {one_line(error)}") from None
        assert isinstance(model, PeftModel)
        if not files.config.target_parameters:  # else PEFT renames tensors; such runs are never certified
            expected = _saved_by_peft(model, False)
            check_fit(files, expected, {**expected, **_saved_by_peft(model, True)}, base)
        try:
            result = set_peft_model_state_dict(model, files.tensors)
        except Exception as error:
            raise AdapterError(f"the weights in {files.folder} do not fit {base}: {one_line(error)}") from None
    if unexpected := [key for key in result.unexpected_keys if not _saved_twice(key, files.tensors)]:
        raise AdapterError(f"{files.folder}: {unexpected[0]} has no place in {base} under its configuration")
    return model


def _saved_twice(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is a saved module's own copy of what the file holds under its plain name, too.

    PEFT writes such copies of all biases (``bias="all"``) and of embeddings, and passes over them when it loads.
    """
    plain = tensors.get(key.replace(".modules_to_save.", "."))
    return ".modules_to_save." in key and plain is not None and torch.equal(plain, tensors[key])


def _saved_by_peft(model: PeftModel, embeddings: bool) -> Mapping[str, Tensor]:
    try:
        return get_peft_model_state_dict(model, save_embedding_layers=embeddings)
    except NotImplementedError:  # a network that knows no input embeddings (SegFormer): there are none to save
        return get_peft_model_state_dict(model, save_embedding_layers=False)
