"""Text classification (or regression) as a task: model, tokenizer, batches and labels.

The model class is the one that users fine-tune, ``AutoModelForSequenceClassification``. With mean
pooling the same checkpoint's encoder is averaged over its tokens and read by a linear head.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedModel

from ranksure.data.texts import Rows
from ranksure.errors import SettingError
from ranksure.network.checkpoints import device_named, load_tokenizer, settle_padding, token_limit
from ranksure.tasks.classifiers import Classifier, head_name, load_classifier, own_label_order
from ranksure.tasks.task import Task

Pooling = Literal["model", "mean"]


class MeanPooled(nn.Module):
    """An encoder whose last hidden states are averaged over real tokens and read by a linear head.

    Args:
        encoder: an ``AutoModel``; its output has ``last_hidden_state``.
        n_outputs: number of logits.
    """

    def __init__(self, encoder: PreTrainedModel, n_outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        width = int(encoder.config.hidden_size)
        self.head = nn.Linear(width, n_outputs, device=encoder.device, dtype=encoder.dtype)

    def forward(self, **batch: Any) -> Tensor:
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


@dataclass(kw_only=True)
class TextTask(Task[Rows]):
    """A sequence classifier (or regressor) on texts.

    Attributes:
        max_length: tokens per text.
        model_task: under mean pooling, the same checkpoint under its own pooling (weights shared).
    """

    kind: ClassVar[str] = "text"

    max_length: int
    model_task: TextTask | None = None

    @property
    def tokenizer(self) -> Any:
        """The processor under its name for texts."""
        return self.processor

    @property
    def collator(self) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(self.tokenizer)

    def batches(self, samples: Rows) -> list[dict[str, Tensor]]:
        """Tokenised batches in the order of the rows, padded to the longest text of each batch."""
        out: list[dict[str, Tensor]] = []
        for low in range(0, len(samples), self.batch_size):
            high = low + self.batch_size
            pairs = None if samples.pairs is None else samples.pairs[low:high]
            encoded = self.tokenizer(
                samples.texts[low:high],
                pairs,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
            out.append({key: value for key, value in encoded.items() if isinstance(value, Tensor)})
        return out

    def batches_by_length(self, samples: Rows) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Batches of texts of like length, which pad little, and the way back.

        Returns:
            The batches, and ``back`` such that ``outputs[back]`` is in the order of the rows.
        """
        lengths = [len(text) for text in samples.texts]
        if samples.pairs is not None:
            lengths = [n + len(pair) for n, pair in zip(lengths, samples.pairs, strict=True)]
        order = torch.argsort(torch.tensor(lengths), stable=True)
        return self.batches(samples.subset(order.tolist())), torch.argsort(order)

    def count_truncated(self, rows: Rows) -> int:
        """How many texts have more than ``max_length`` tokens."""
        count = 0
        for low in range(0, len(rows), self.batch_size):
            high = low + self.batch_size
            pairs = None if rows.pairs is None else rows.pairs[low:high]
            encoded = self.tokenizer(rows.texts[low:high], pairs, truncation=False, verbose=False)
            count += sum(len(ids) > self.max_length for ids in encoded["input_ids"])
        return count

    def features(self, samples: Rows) -> list[dict[str, Any]]:
        encoded = self.tokenizer(samples.texts, samples.pairs, truncation=True, max_length=self.max_length)
        labels = self.labels(samples)
        if labels.is_floating_point():
            labels = labels.float()
        keys = list(encoded)
        return [{**{key: encoded[key][i] for key in keys}, "labels": labels[i].tolist()} for i in range(len(samples))]

    def remarks(self, samples: Rows) -> list[str]:
        truncated = self.count_truncated(samples)
        if not truncated:
            return []
        return [
            f"{truncated} of the {len(samples)} training texts reach {self.max_length} tokens and are cut there; "
            "raise `max_length` to keep more."
        ]

    def alternative(self) -> TextTask | None:
        return self.with_mean_pooling() if self.pooling == "model" else self.model_task

    def usage(self) -> str:
        return f"Texts: this model's tokenizer, with `padding=True, truncation=True, max_length={self.max_length}`."

    def record(self) -> dict[str, Any]:
        return {"kind": self.kind, "pooling": self.pooling, "max_length": self.max_length}

    def with_mean_pooling(self) -> TextTask:
        """The same encoder (shared, not copied) under mean pooling, with a new head."""
        encoder = self.adapted.base_model if self.pooling == "model" else self.adapted
        return _mean_pooled(self, cast(PreTrainedModel, encoder))


def load_text_task(
    model: str | os.PathLike[str] | PreTrainedModel,
    rows: Rows,
    *,
    tokenizer: Any = None,
    loss: str = "cross-entropy",
    pooling: Pooling = "model",
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    max_length: int | None = None,
    batch_size: int = 32,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> TextTask:
    """Load a checkpoint (or take a loaded model) for labelled texts.

    Args:
        model: folder, Hub id, or a sequence-classification model in memory.
        rows: the data; its classes give the number of logits.
        tokenizer: needed with a model in memory, else loaded beside the model.
        loss: ``cross-entropy`` (one logit per class), ``logistic`` (two classes, one logit) or
            ``squared-error`` (regression, one logit).
        pooling: ``model`` for the model's own head input, ``mean`` for the mean of the last hidden states.
        revision: Hub revision.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or another torch device.
        max_length: tokens per text; by default the model's limit, at most 256.
        batch_size: texts per batch.
        trust_remote_code: allow the repository's own code to run.
        seed: seed of whatever the checkpoint leaves to chance.

    Raises:
        ModelError: the model cannot be found, loaded or used for these labels.
        SettingError: an option has no meaning here.
    """
    n_outputs = _n_outputs(rows, loss)
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise SettingError("a model in memory needs its tokenizer: pass tokenizer=")
        found = Classifier(model, head_name(model, n_outputs))
        name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    else:
        name = os.fspath(model)
        found = load_classifier(
            AutoModelForSequenceClassification,
            "a sequence classifier",
            name,
            n_outputs,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            seed=seed,
        )
        tokenizer = tokenizer or load_tokenizer(name, revision, trust_remote_code)
    if pooling not in ("model", "mean"):
        raise SettingError(f"unknown pooling {pooling!r}: use model or mean")
    loaded = found.model
    loaded.to(device_named(device))  # pyright: ignore[reportArgumentType]
    settle_padding(loaded, tokenizer, name)
    task = TextTask(
        model=loaded,
        adapted=loaded,
        processor=tokenizer,
        peft_task_type="SEQ_CLS",
        head=found.head,
        new_modules=found.new_modules,
        head_is_new=found.head_is_new,
        n_outputs=n_outputs,
        name=name,
        revision=revision,
        max_length=token_limit(loaded, tokenizer, max_length),
        batch_size=batch_size,
        label_names=rows.label_names,
        notes=found.notes,
    )
    if not task.head_is_new and pooling == "model":
        task.label_names = own_label_order(loaded, rows, task.notes)
    return task.with_mean_pooling() if pooling == "mean" else task


def _mean_pooled(task: TextTask, encoder: PreTrainedModel) -> TextTask:
    wrapped = MeanPooled(encoder, task.n_outputs)
    return replace(
        task,
        model=wrapped,
        adapted=encoder,
        prefix="encoder.",
        pooling="mean",
        peft_task_type="FEATURE_EXTRACTION",
        head="head",
        new_modules=[],
        head_is_new=True,
        model_task=task,
        notes=list(task.notes),
    )


def _n_outputs(rows: Rows, loss: str) -> int:
    if loss == "cross-entropy":
        if rows.label_names is None:
            raise SettingError("cross-entropy needs class labels; for float targets use `loss` squared-error")
        return len(rows.label_names)
    if loss == "logistic" and (rows.label_names is None or len(rows.label_names) != 2):
        found = "float targets" if rows.label_names is None else f"{len(rows.label_names)} classes"
        raise SettingError(f"the logistic loss needs two classes, but {rows.source} has {found}: use cross-entropy")
    return 1
