"""The training data of a run, tokenised as for training: batches with labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ranksure.choices import Weighting
from ranksure.data.conversations import encode, load_examples
from ranksure.data.samples import matched, value_of
from ranksure.data.texts import Rows
from ranksure.errors import DataError, SettingError
from ranksure.losses import CrossEntropy, Kind, Logistic, Loss, SquaredError, get_loss, loss_meant
from ranksure.network.batch_losses import Forward
from ranksure.network.batches import Batches
from ranksure.network.checkpoints import token_limit, with_embeddings
from ranksure.network.targets import base_network
from ranksure.records.record import DataSource
from ranksure.records.task import TaskRecord
from ranksure.runs.options import ConversationOptions, DataSettings
from ranksure.tasks.classifiers import model_label_names, own_label_order
from ranksure.tasks.collate import Collator, PackedCollator, check_packing, harmless_padding, packed
from ranksure.tasks.load import load_samples
from ranksure.tasks.options import RowOptions, values_of
from ranksure.tasks.text import count_cut, tokenised

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ranksure.runs.saved.base import LoadedRun

CAUSAL_LENGTH = 1024
"""Tokens per row of a causal language model, unless the model's limit or the user says less."""

ASSUMED = "The adapter does not record its loss, which is taken to be {loss}."


@dataclass(frozen=True)
class RunData:
    """Data of a run, ready for a certificate or a Trainer.

    Attributes:
        batches: evaluation batches with ``labels``, tensors on the CPU, made when asked for.
        features: ``input_ids``, ``attention_mask`` (``position_ids`` where packed) and ``labels`` by row (or packed
            sequence), in the data's order: a Trainer's ``train_dataset``.
        collator: pads such rows to a batch: a Trainer's ``data_collator``.
        kind: which loss the model has on them; ``kind_is_known``: whatever loss it would compute itself.
        weighting: of a causal language model's tokens.
        form: ``labelled texts`` (images, ...), ``prompt and completion`` or ``messages``.
        sha256: of the file, or of the rows.
        notes: sentences for the user.
        n_rows: rows that are used, of the ``total_rows`` that the source has.
        max_length: tokens per row, at most; None where rows are no texts.
        own_length: padding is felt, so a batch holds rows of one length only.
    """

    batches: Sequence[dict[str, Any]]
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
    weighting: Weighting = "token"
    own_length: bool = False

    @property
    def objective(self) -> dict[str, Any]:
        """What a certificate, a growth and a compression are told of the loss; a guessed one they check themselves."""
        return {"loss": self.kind if self.kind_is_known else None, "weighting": self.weighting}

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


def run_data(
    model: nn.Module,
    rows: Any,
    features: list[dict[str, Any]],
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    settings: DataSettings,
    batch_size: int,
    *,
    notes: list[str],
    inputs_of: nn.Module | None = None,
    measure: Callable[[Mapping[str, Any]], Tensor] | None = None,
    **more: Any,
) -> RunData:
    """A run's data from its source and its tokenised rows, in batches whose padding the model does not feel."""
    found = harmless_padding(model, features, collator, inputs_of or base_network(model), measure)
    own, by_length = found.own_length, settings.by_length or found.own_length
    batches = Batches(features, batch_size, found.collate, own_length=own, by_length=by_length)
    common = {"source": rows.source, "sha256": rows.sha256, "own_length": own, "notes": [*notes, *found.notes]}
    return RunData(batches, features, found.collate, **common, **more)


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
    if isinstance(run, tuple):
        (model, tokenizer), trained, assumed = run, TaskRecord(), ""
    else:
        model, tokenizer, trained, assumed = run.model, run.tokenizer, run.trained, ASSUMED
    settings = as_trained(trained, settings or DataSettings())
    base: Any = base_network(model)
    if is_causal(base):
        return _causal(base, model, tokenizer, data, settings, assumed if trained.kind is None else "")
    settings.refuse_packing("this one classifies texts")
    return _texts(base, model, tokenizer, data, settings, trained, assumed)


def as_trained(trained: TaskRecord, settings: DataSettings) -> DataSettings:
    """The settings, filled in from the adapter's own record.

    Raises:
        SettingError: they contradict it.
    """
    filled: dict[str, Any] = {}
    for name in ("loss", "weighting", "loss_on"):
        stored, asked = getattr(trained, name), getattr(settings, name)
        if stored is not None and asked not in (None, stored):
            raise SettingError(f"the adapter was trained with `{name}` {stored}, not {asked}: leave `{name}` out")
        filled[name] = stored or asked
    if settings.max_length is None:
        filled["max_length"] = trained.max_length
    return replace(settings, **filled)


def loss_by_head(labels: list[str] | None, outputs: int) -> str:
    """The loss of a fit on texts whose record says its labels and not its loss, as those of schema 1."""
    if labels is None:
        return SquaredError.name
    return Logistic.name if outputs == 1 else CrossEntropy.name


def is_causal(model: nn.Module) -> bool:
    """Whether a transformers model is a causal language model, not a sequence classifier.

    Raises:
        SettingError: it is neither.
    """
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return False
    known: Mapping[Any, Any] = MODEL_FOR_CAUSAL_LM_MAPPING
    own = known.get(type(getattr(model, "config", None)), None)
    if name.endswith(("ForCausalLM", "LMHeadModel")) or type(model) is own:
        return True
    raise SettingError(f"{name} is neither a sequence classifier nor a causal language model: pass your own batches")


# ---------------------------------------------------------------------------------------------------------------------
# causal language models


def _causal(
    base: PreTrainedModel, model: nn.Module, tokenizer: Any, data: Any, settings: DataSettings, assumed: str
) -> RunData:
    if settings.loss not in (None, CrossEntropy.name):
        raise SettingError(f"a causal language model has the cross-entropy, not the {settings.loss} loss")
    loss_on, weighting = settings.loss_on or "completion", settings.weighting or "token"
    examples = load_examples(
        data, **values_of(settings, ConversationOptions, "loss_on", "packing"), split=settings.split
    )
    total = len(examples)
    if settings.samples is not None and settings.samples < total:
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(settings.seed))[: settings.samples]
        examples = examples.subset(sorted(chosen.tolist()))
    max_length = token_limit(base, tokenizer, settings.max_length, CAUSAL_LENGTH)
    encoded = encode(examples, tokenizer, max_length=max_length, loss_on=loss_on)
    notes = [*examples.notes, *encoded.notes]
    features: list[dict[str, Any]] = with_embeddings(base, list(encoded.features), tokenizer)
    collator: Collator | PackedCollator = Collator(tokenizer.pad_token_id)
    if settings.packing:
        collator = PackedCollator(tokenizer.pad_token_id, base.dtype)
        check_packing(model, features, collator)
        features = list(packed(features, max_length))
        notes.append(f"{len(encoded.features)} rows are packed into {len(features)} sequences that are kept apart.")
    if assumed and settings.loss is None:
        notes.append(assumed.format(loss=f"cross-entropy (`loss_on` {loss_on}, `weighting` {weighting})"))

    def losses(batch: Mapping[str, Any]) -> Tensor:  # the logits would be large
        forward = Forward(model, CrossEntropy.name)
        forward.losses_only(batch)
        return forward.losses

    return run_data(
        model,
        examples,
        features,
        collator,
        settings,
        settings.batch_size or 4,
        kind=CrossEntropy.name,
        form=examples.form,
        notes=notes,
        measure=losses,
        n_rows=len(encoded.features),
        total_rows=total,
        max_length=max_length,
        kind_is_known=settings.packing or settings.loss is not None,
        weighting=weighting,
    )


# ---------------------------------------------------------------------------------------------------------------------
# sequence classification and regression


def _texts(
    base: PreTrainedModel,
    model: nn.Module,
    tokenizer: Any,
    data: Any,
    settings: DataSettings,
    trained: TaskRecord,
    assumed: str,
) -> RunData:
    stated = settings.loss
    if stated is None and trained.kind is not None:
        stated = loss_by_head(trained.labels, _outputs(base))
    loss = _loss(base) if stated is None else get_loss(stated)
    options = values_of(settings, RowOptions)
    rows = cast(Rows, load_samples("text", data, regression=not loss.of_classes, **options))
    notes = list(rows.notes)
    if loss.of_classes:
        recorded = trained.labels or []
        named = set(rows.label_names or []) <= set(recorded)
        rows = rows.with_label_names(recorded if named else _class_names(base, rows, notes))
    if (needed := loss.outputs_for(None if rows.label_names is None else len(rows.label_names))) != _outputs(base):
        what = "numbers" if rows.label_names is None else f"{len(rows.label_names)} classes"
        raise SettingError(
            f"the {loss.name} loss of {what} needs a model of {needed} output{'s' * (needed > 1)}, but this one has "
            f"{_outputs(base)}: say with `loss` what it was trained with, or pass your own batches"
        )
    if stated is None and assumed:
        notes.append(assumed.format(loss=f"{loss.name}, as transformers trains such a model"))
    total, rows = len(rows), settings.few(rows)
    max_length = token_limit(base, tokenizer, settings.max_length)
    tokens = with_embeddings(base, tokenised(tokenizer, rows, max_length), tokenizer)
    if cut := count_cut(tokenizer, rows, tokens, max_length):
        notes.append(f"{cut} of {len(rows)} texts were cut at {max_length} tokens.")
    targets = loss.targets(rows.labels)
    features = [{**row, "labels": label} for row, label in zip(tokens, targets.tolist(), strict=True)]
    collator = Collator.of(tokenizer, torch.float32 if targets.is_floating_point() else torch.long)
    return run_data(
        model,
        rows,
        features,
        collator,
        settings,
        settings.batch_size or 32,
        kind=loss.name,
        form="labelled texts",
        notes=notes,
        n_rows=len(rows),
        total_rows=total,
        max_length=max_length,
        label_names=rows.label_names,
        kind_is_known=stated is not None,
    )


def _loss(base: PreTrainedModel) -> Loss:
    """The loss of a sequence classifier, by transformers' rules."""
    outputs, stated = _outputs(base), getattr(base.config, "problem_type", None)
    loss = loss_meant(stated, outputs)
    if loss.term == "output" and outputs > 1:
        raise SettingError(
            f"the base model has {outputs} labels or targets per text (problem_type {stated}, {loss.name}), which are "
            "not read: pass your own batches, or say with `loss` what else the adapter was trained with"
        )
    return loss


def _outputs(base: PreTrainedModel) -> int:
    return int(cast(int, base.config.num_labels))


def _class_names(base: PreTrainedModel, rows: Rows, notes: list[str]) -> list[str]:
    """The data's label names in the order of the model's outputs."""
    own = rows.label_names or []
    outputs = max(2, _outputs(base))  # one output: the classes 0 and 1
    if len(own) == outputs:
        return list(own_label_order(base, rows, notes) or own)
    for names in (model_label_names(base), [str(i) for i in range(outputs)]):  # by name, or class numbers
        if (places := matched(own, names, str, str.casefold, value_of)) is not None:
            return [own[places.index(i)] if i in places else name for i, name in enumerate(names)]
    raise DataError(
        f"{rows.source} has {len(own)} different labels ({', '.join(own[:5])}), but the model has {outputs} classes "
        f"({', '.join(model_label_names(base)[:5])}): name the classes as the model does, or by "
        "their numbers"
    )
