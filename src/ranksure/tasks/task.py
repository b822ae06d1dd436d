"""What every task gives: a network, batches for it, the modules to adapt, and how to read the result.

A planner, a fit or an experiment knows a task by this class only; texts, prompts, images and speech
each have a subclass in a file of their own, and ``tasks/load.py`` makes one from a name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ranksure.data.samples import Samples
from ranksure.network.batches import Batches, row_length
from ranksure.network.checkpoints import peft_targets
from ranksure.network.targets import select_targets
from ranksure.tasks.collate import Padding, harmless_padding

S = TypeVar("S", bound=Samples)


class Kept:
    """What was made of objects, each as long as the object lives (told by identity: samples have no hash)."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[ReferenceType[Any], Any]] = {}

    def __len__(self) -> int:
        return len(self._made)

    def of(self, owner: S, make: Callable[[S], Any]) -> Any:
        """What ``make`` gives for an object, made at the first call."""
        made, key = self._made, id(owner)
        if key not in made or made[key][0]() is not owner:
            made[key] = ref(owner, lambda _: made.pop(key, None)), make(owner)
        return made[key][1]

    def clear(self) -> None:
        """Forget all."""
        self._made.clear()


@dataclass(kw_only=True)
class Task(ABC, Generic[S]):
    """A model with what it needs to run on labelled inputs.

    Attributes:
        model: the network that maps a batch to logits ``(rows, K)``.
        adapted: the model that PEFT wraps; target names are relative to it.
        prefix: what a name in ``adapted`` needs in front to be a name in ``model``; "" where they are one.
        processor: its tokenizer, image processor or feature extractor; saved beside a merged model.
        head: qualified name (in ``model``) of the linear layer that gives the logits; None where the
            logits are read otherwise and no head can be fitted.
        new_modules: qualified names (in ``adapted``) of modules that the checkpoint does not hold, as a
            rule the head; they go into ``modules_to_save``.
        head_is_new: whether the head must be fitted first.
        n_outputs: number of logits ``K``.
        name: model folder or Hub id.
        revision: Hub revision, if one was given.
        batch_size: inputs per batch.
        label_names: class names by id; None for one output of a regression.
        pooling: what the head reads: ``"model"`` for the model's own choice, ``"mean"`` for an average.
        peft_task_type: PEFT's task type of an exported adapter, or None.
        notes: sentences for the user.
        kept: what was prepared, by the samples that live; shared by tasks that read the same inputs alike.
        padding: how rows of several lengths share batches, once rows of two lengths were seen.
    """

    kind: ClassVar[str]

    model: nn.Module
    adapted: PreTrainedModel
    processor: Any
    name: str
    n_outputs: int
    label_names: list[str] | None
    head: str | None = None
    new_modules: list[str] = field(default_factory=list)
    head_is_new: bool = False
    revision: str | None = None
    batch_size: int = 32
    prefix: str = ""
    pooling: str = "model"
    peft_task_type: str | None = None
    notes: list[str] = field(default_factory=list)
    kept: Kept = field(default_factory=Kept, repr=False)
    padding: Padding | None = field(default=None, init=False, repr=False)

    @property
    def tokenizer(self) -> Any:
        """The processor under its name for texts."""
        return self.processor

    @property
    def saved_modules(self) -> list[str] | None:
        """Modules of ``adapted`` that an exported adapter has to bring along; None if there are none."""
        return list(self.new_modules) if self.new_modules and not self.prefix else None

    @abstractmethod
    def prepare(self, samples: S) -> Any:
        """Tokenise the inputs, or make them ready otherwise; not padded, without labels."""

    def prepared(self, samples: S) -> Any:
        """What :meth:`prepare` gives, kept as long as the samples are: the same ones are prepared once."""
        return self.kept.of(samples, self.prepare)

    def rows(self, samples: S) -> list[dict[str, Any]]:
        """One prepared row each."""
        return self.prepared(samples)

    def lengths(self, samples: S) -> list[int] | None:
        """By what rows of like length are put together; None where all are alike."""
        return None

    def batches(self, samples: S) -> Sequence[dict[str, Tensor]]:
        """Batches in the order of the rows, ready for ``model``, each made when it is asked for."""
        return self._batches(samples, self.rows(samples))

    def settle_padding(self, samples: S) -> Padding:
        """Find how these rows share batches without feeling it; ``notes`` say what is out of the ordinary.

        Raises:
            CaptureError: as :func:`~ranksure.tasks.collate.harmless_padding`.
        """
        if self.padding is None and self.lengths(samples) is not None:
            rows = self.rows(samples)
            if len({row_length(row) for row in rows}) > 1:
                self.padding = harmless_padding(self.model, rows, self.collator, self.adapted)
                self.notes.extend(self.padding.notes)
        return self.padding or Padding(self.collator)

    def _batches(self, samples: S, rows: Sequence[dict[str, Any]]) -> Batches:
        padding = self.settle_padding(samples)
        return Batches(rows, self.batch_size, padding.collate, own_length=padding.own_length)

    def batches_by_length(self, samples: S) -> tuple[Sequence[dict[str, Tensor]], Tensor]:
        """Batches of rows of like length, which pad least, and the way back.

        Returns:
            The batches, and ``back`` such that ``outputs[back]`` is in the order of the rows.
        """
        if (lengths := self.lengths(samples)) is None:
            return self.batches(samples), torch.arange(len(samples))
        rows = self.rows(samples)
        if self.settle_padding(samples).own_length:
            lengths = [row_length(row) for row in rows]
        order = torch.argsort(torch.tensor(lengths), stable=True)
        return self._batches(samples, [rows[i] for i in order.tolist()]), torch.argsort(order)

    def features(self, samples: S) -> list[dict[str, Any]]:
        """The rows with ``labels``: a Trainer's ``train_dataset``."""
        labels = self.labels(samples)
        plain = (labels.float() if labels.is_floating_point() else labels).tolist()
        return [{**row, "labels": label} for row, label in zip(self.rows(samples), plain, strict=True)]

    @property
    @abstractmethod
    def collator(self) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        """Makes a batch of rows, with or without labels: a Trainer's ``data_collator``."""

    def labels(self, samples: S) -> Tensor:
        """Class ids ``(N,)``, or float targets ``(N, 1)`` for one output."""
        if self.n_outputs == 1:
            return torch.tensor(samples.labels, dtype=torch.float64)[:, None]
        return torch.tensor(samples.labels, dtype=torch.long)

    def remarks(self, samples: S) -> list[str]:
        """What the user should be told about these rows: truncated, resampled, and the like."""
        return []

    def tokens(self, batch: Mapping[str, Any]) -> int:
        """Token positions of a batch that hold something: an upper estimate of what capture keeps per module."""
        if isinstance(mask := batch.get("attention_mask"), Tensor):
            return int(mask.sum())
        return self.padded_tokens(batch)

    def padded_tokens(self, batch: Mapping[str, Any]) -> int:
        """Token positions that the network computes on."""
        if isinstance(ids := batch.get("input_ids"), Tensor):
            return ids.numel()
        raise NotImplementedError(f"{type(self).__name__} says how many positions a batch has")

    def default_targets(self) -> str | Sequence[str]:
        """Target modules where the user names none: PEFT's for the model, else all linear layers."""
        return peft_targets(self.adapted)

    def queries_and_values(self, *names: tuple[str, str]) -> str | list[str]:
        """The first pair of names that the network's linear layers have, where Hu et al. (2022) put LoRA, else all."""
        modules = self.adapted.named_modules()
        leaves = {name.rsplit(".", 1)[-1] for name, module in modules if isinstance(module, nn.Linear)}
        return next((list(pair) for pair in names if leaves.issuperset(pair)), "all-linear")

    def targets(
        self, wanted: str | Sequence[str] | None, layers: str | int | Sequence[int] | None = None
    ) -> dict[str, nn.Module]:
        """Modules to adapt by name, never one of a head; ``None`` for the default ones.

        Raises:
            TargetError: no module, or one of a type that is not adapted.
        """
        heads = [*self.new_modules, *([self.head] if self.head else [])]
        inside = [name for name, _ in self.adapted.named_modules()]
        exclude = [n for n in inside if any(n == new or n.startswith(new + ".") for new in heads)]
        return select_targets(self.adapted, self.default_targets() if wanted is None else wanted, layers, exclude)

    def alternative(self) -> Task[S] | None:
        """The same weights read in another way, to compare with; None if there is none."""
        return None

    @abstractmethod
    def usage(self) -> str:
        """How inputs reach the model, Markdown for an adapter's README."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What makes the same task again from its model's name and its data: fields of ``task.json``, with ``kind``.

        See :class:`ranksure.records.task.TaskRecord`.
        """
