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
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ranksure.data.texts import Rows
from ranksure.errors import ModelError, SettingError, one_line
from ranksure.losses import get_loss
from ranksure.network.checkpoints import load_tokenizer, settle_padding, token_limit, with_embeddings
from ranksure.network.logits import frozen
from ranksure.tasks.classifiers import Modality
from ranksure.tasks.collate import Collator
from ranksure.tasks.options import Loading
from ranksure.tasks.task import Task

Pooling = Literal["model", "mean"]


def tokenised(tokenizer: Any, rows: Rows, max_length: int) -> list[dict[str, Any]]:
    """The tokens of each row, at most ``max_length``; not padded."""
    encoded = tokenizer(rows.texts, rows.pairs, truncation=True, max_length=max_length)
    return [{key: encoded[key][i] for key in encoded} for i in range(len(rows))]


def count_cut(tokenizer: Any, rows: Rows, tokens: list[dict[str, Any]], max_length: int) -> int:
    """How many of them were longer; only those that reach ``max_length`` are tokenised again, whole."""
    full = [i for i, row in enumerate(tokens) if len(row["input_ids"]) >= max_length]
    if not full:
        return 0
    few = rows.subset(full)
    whole = tokenizer(few.texts, few.pairs, truncation=False, verbose=False)["input_ids"]
    return sum(len(ids) > max_length for ids in whole)


class MeanPooled(nn.Module):
    """An encoder whose last hidden states, of a width, are averaged over real tokens and read by a linear head."""

    def __init__(self, encoder: PreTrainedModel, n_outputs: int, width: int) -> None:
        super().__init__()
        self.encoder = encoder
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
    def collator(self) -> Collator:
        if self.padding is not None:
            return self.padding.collate
        return Collator.of(self.tokenizer, torch.float32 if self.n_outputs == 1 else torch.long)

    def prepare(self, samples: Rows) -> list[dict[str, Any]]:
        return with_embeddings(self.adapted, tokenised(self.tokenizer, samples, self.max_length), self.tokenizer)

    def lengths(self, samples: Rows) -> list[int]:
        """In characters."""
        pairs = samples.pairs or [""] * len(samples)
        return [len(text) + len(pair) for text, pair in zip(samples.texts, pairs, strict=True)]

    def count_truncated(self, rows: Rows) -> int:
        """How many texts have more than ``max_length`` tokens."""
        return count_cut(self.tokenizer, rows, self.rows(rows), self.max_length)

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


_MODALITY = Modality(
    AutoModelForSequenceClassification, "a sequence classifier", "tokenizer", "tokenizer", load_tokenizer
)


def load_text_task(
    model: str | os.PathLike[str] | PreTrainedModel,
    rows: Rows,
    *,
    tokenizer: Any = None,
    loss: str = "cross-entropy",
    pooling: Pooling = "model",
    max_length: int | None = None,
    **loading: Any,
) -> TextTask:
    """Load a checkpoint (or take a loaded model) for labelled texts.

    Args:
        model: folder, Hub id, or a sequence-classification model in memory.
        rows: the data; its classes give the number of logits.
        tokenizer: needed with a model in memory, else loaded beside the model.
        loss: ``cross-entropy`` (one logit per class), ``logistic`` (two classes, one logit) or
            ``squared-error`` (regression, one logit).
        pooling: ``model`` for the model's own head input, ``mean`` for the mean of the last hidden states.
        max_length: tokens per text; by default the model's limit, at most 256.
        **loading: see :class:`~ranksure.tasks.options.Loading`.

    Raises:
        ModelError: the model cannot be found, loaded or used for these labels.
        SettingError: an option has no meaning here.
    """
    options = Loading(**loading)
    n_outputs = get_loss(loss).outputs_for(None if rows.label_names is None else len(rows.label_names))
    found = _MODALITY.open(model, tokenizer, n_outputs, options, type(get_loss(loss)))
    if pooling not in ("model", "mean"):
        raise SettingError(f"unknown pooling {pooling!r}: use model or mean")
    settle_padding(found.model, found.processor, found.name)
    task = TextTask(
        **found.task_fields(rows, n_outputs, options, own_head=pooling == "model"),
        peft_task_type="SEQ_CLS",
        max_length=token_limit(found.model, found.processor, max_length),
    )
    return task.with_mean_pooling() if pooling == "mean" else task


def _hidden_width(encoder: PreTrainedModel, tokenizer: Any) -> int:
    """The width of an encoder's last hidden states; a ``ModelError`` where they are not one for each token."""
    name = type(encoder).__name__
    if "attention_mask" not in tokenizer.model_input_names:
        raise ModelError(f"mean pooling needs an attention mask, which the tokenizer of {name} does not give")
    ids = torch.zeros(1, 8, dtype=torch.long, device=encoder.device)
    try:
        with frozen(encoder), torch.no_grad():
            hidden = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    except Exception as error:  # an encoder-decoder, say, which asks for the decoder's tokens too
        raise ModelError(f"{name} cannot be run for mean pooling: {one_line(error)}") from None
    if hidden.shape[:2] != ids.shape:
        raise ModelError(
            f"mean pooling needs a hidden state per token, but {name} gives {hidden.shape[1]} for {ids.shape[1]} tokens"
        )
    return hidden.shape[-1]


def _mean_pooled(task: TextTask, encoder: PreTrainedModel) -> TextTask:
    wrapped = MeanPooled(encoder, task.n_outputs, _hidden_width(encoder, task.tokenizer))
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
