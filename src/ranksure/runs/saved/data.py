"""The training data of a run, tokenised as for training: batches with labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ranksure.data.conversations import encode, load_examples
from ranksure.data.texts import Rows, load_rows
from ranksure.errors import DataError, SettingError
from ranksure.losses import Kind
from ranksure.network.checkpoints import token_limit
from ranksure.records.record import DataSource
from ranksure.runs.options import DataSettings
from ranksure.tasks.classifiers import own_label_order
from ranksure.tasks.collate import Collator, PackedCollator, check_packing, in_batches, packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ranksure.runs.saved.open import LoadedRun

CAUSAL_LENGTH = 1024
"""Tokens per row of a causal language model, unless the model's limit or the user says less."""


@dataclass(frozen=True)
class RunData:
    """Data of a run, ready for a certificate or a Trainer.

    Attributes:
        batches: evaluation batches with ``labels``, tensors on the CPU.
        features: ``input_ids``, ``attention_mask`` (``position_ids`` where packed) and ``labels`` by row (or packed
            sequence), in the data's order: a Trainer's ``train_dataset``.
        collator: pads such rows to a batch: a Trainer's ``data_collator``.
        kind: which loss the model has on them.
        form: ``labelled texts`` (images, ...), ``prompt and completion`` or ``messages``.
        source: where the rows come from.
        sha256: of the file, or of the rows.
        notes: sentences for the user.
        n_rows: rows that are used.
        total_rows: rows that the source has.
        max_length: tokens per row, at most; None where rows are no texts.
        label_names: of the classes.
        kind_is_known: whether ``kind`` holds whatever loss the model would compute itself.
    """

    batches: list[dict[str, Any]]
    features: list[dict[str, Any]]
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    kind: Kind
    form: str
    source: str
    sha256: str
    notes: list[str]
    n_rows: int
    total_rows: int
    max_length: int | None
    label_names: list[str] | None = None
    kind_is_known: bool = False

    @property
    def described(self) -> DataSource:
        """What a record says of it."""
        return DataSource(
            source=self.source,
            sha256=self.sha256,
            form=self.form,
            rows=self.n_rows,
            rows_in_source=self.total_rows,
            max_length=self.max_length,
            notes=self.notes,
        )


def read_data(run: LoadedRun | tuple[nn.Module, Any], data: Any, settings: DataSettings | None = None) -> RunData:
    """Read and tokenise a run's data.

    Args:
        run: from :func:`ranksure.runs.saved.open.load_run`, or a model (a PEFT model or its base) and its tokenizer.
        data: what :func:`ranksure.data.texts.load_rows` reads; for causal language models with the columns
            ``prompt`` and ``completion``, or ``messages``.
        settings: columns, lengths, batches.

    Raises:
        DataError: data that cannot be used, or labels that are not the model's.
        SettingError: a setting without meaning here, or packing that the model does not keep apart.
    """
    settings = settings or DataSettings()
    model, tokenizer = run if isinstance(run, tuple) else (run.model, run.tokenizer)
    base = base_network(model)
    return (
        _causal(base, model, tokenizer, data, settings) if is_causal(base) else _texts(base, tokenizer, data, settings)
    )


def base_network(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model; a plain one as it is."""
    get = getattr(model, "get_base_model", None)
    return cast("PreTrainedModel", get() if callable(get) else model)


def is_causal(model: nn.Module) -> bool:
    """Whether a transformers model is a causal language model, not a sequence classifier.

    Raises:
        SettingError: it is neither.
    """
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return False
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return True
    raise SettingError(f"{name} is neither a sequence classifier nor a causal language model: pass your own batches")


# ---------------------------------------------------------------------------------------------------------------------
# causal language models


def _causal(base: PreTrainedModel, model: nn.Module, tokenizer: Any, data: Any, settings: DataSettings) -> RunData:
    examples = load_examples(
        data,
        prompt_column=settings.prompt_column,
        completion_column=settings.completion_column,
        messages_column=settings.messages_column,
        split=settings.split,
    )
    total = len(examples)
    if settings.samples is not None and settings.samples < total:
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(settings.seed))[: settings.samples]
        examples = examples.subset(sorted(chosen.tolist()))
    max_length = token_limit(base, tokenizer, settings.max_length, CAUSAL_LENGTH)
    encoded = encode(examples, tokenizer, max_length=max_length, loss_on=settings.loss_on)
    notes = [*examples.notes, *encoded.notes]
    features: list[dict[str, Any]] = list(encoded.features)
    collator: Collator | PackedCollator = Collator(tokenizer.pad_token_id)
    if settings.packing:
        collator = PackedCollator(tokenizer.pad_token_id, base.dtype)
        check_packing(model, features, collator)
        features = list(packed(features, max_length))
        notes.append(f"{len(encoded.features)} rows are packed into {len(features)} sequences that are kept apart.")
    return RunData(
        batches=[collator(part) for part in in_batches(features, settings.batch_size or 4, settings.by_length)],
        features=features,
        collator=collator,
        kind="cross-entropy",
        form=examples.form,
        source=examples.source,
        sha256=examples.sha256,
        notes=notes,
        n_rows=len(encoded.features),
        total_rows=total,
        max_length=max_length,
    )


# ---------------------------------------------------------------------------------------------------------------------
# sequence classification and regression


def _texts(base: PreTrainedModel, tokenizer: Any, data: Any, settings: DataSettings) -> RunData:
    if settings.packing or settings.loss_on != "completion":
        raise SettingError("packing and loss_on are for causal language models; this one classifies texts")
    kind = _kind(base)
    rows = load_rows(
        data,
        text_column=settings.text_column,
        label_column=settings.label_column,
        text_pair_column=settings.text_pair_column,
        split=settings.split,
        regression=kind == "squared-error",
    )
    notes = list(rows.notes)
    if kind != "squared-error":
        rows = rows.with_label_names(_class_names(base, rows, notes))
    total = len(rows)
    if settings.samples is not None and settings.samples < total:
        rows = rows.shuffled(settings.seed).subset(range(settings.samples))
    max_length = token_limit(base, tokenizer, settings.max_length)
    arguments = () if rows.pairs is None else (rows.pairs,)
    encoded = tokenizer(rows.texts, *arguments, truncation=True, max_length=max_length, padding=False)
    long = tokenizer(rows.texts, *arguments, truncation=False, padding=False, verbose=False)["input_ids"]
    if cut := sum(len(ids) > max_length for ids in long):
        notes.append(f"{cut} of {len(rows)} texts were cut at {max_length} tokens.")
    keys = [key for key in ("input_ids", "token_type_ids", "attention_mask") if key in encoded]
    labels = [[float(label)] for label in rows.labels] if kind == "logistic" else rows.labels
    features = [{**{key: list(encoded[key][i]) for key in keys}, "labels": labels[i]} for i in range(len(rows))]
    collator = Collator(tokenizer.pad_token_id, torch.long if kind == "cross-entropy" else torch.float32)
    return RunData(
        batches=[collator(part) for part in in_batches(features, settings.batch_size or 32, settings.by_length)],
        features=features,
        collator=collator,
        kind=kind,
        form="labelled texts",
        source=rows.source,
        sha256=rows.sha256,
        notes=notes,
        n_rows=len(rows),
        total_rows=total,
        max_length=max_length,
        label_names=rows.label_names,
    )


def _kind(base: PreTrainedModel) -> Kind:
    """The loss of a sequence classifier, by transformers' rules."""
    stated, outputs = getattr(base.config, "problem_type", None), _outputs(base)
    if stated == "multi_label_classification" and outputs == 1:
        return "logistic"
    if stated == "multi_label_classification":
        raise SettingError("several labels per text (multi_label_classification) are not read: pass your own batches")
    if stated == "regression" and outputs > 1:
        raise SettingError(f"regression with {outputs} targets per text is not read: pass your own batches")
    return "squared-error" if stated == "regression" or (stated is None and outputs == 1) else "cross-entropy"


def _outputs(base: PreTrainedModel) -> int:
    return int(cast(int, base.config.num_labels))


def _class_names(base: PreTrainedModel, rows: Rows, notes: list[str]) -> list[str]:
    """The data's label names in the order of the model's outputs."""
    own = rows.label_names or []
    outputs = max(2, _outputs(base))  # one output of the logistic loss: the classes 0 and 1
    if len(own) == outputs:
        return list(own_label_order(base, rows, notes) or own)
    id2label = cast("dict[int, str]", base.config.id2label)
    named = {str(name).lower(): i for i, name in id2label.items()}
    if len(own) < outputs and all(name.lower() in named for name in own):
        spelt = {name.lower(): name for name in own}
        return [spelt.get(str(id2label[i]).lower(), str(id2label[i])) for i in range(outputs)]
    if all(name.isdigit() and int(name) < outputs for name in own):  # class numbers
        return [str(i) for i in range(outputs)]
    raise DataError(
        f"{rows.source} has {len(own)} different labels ({', '.join(own[:5])}), but the model has {outputs} classes "
        f"({', '.join(str(name) for name in list(id2label.values())[:5])}): name the classes as the model does, or by "
        "their numbers"
    )
