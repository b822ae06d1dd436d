"""Any task's network on rows, for ``benchmarks.advice``: what lies below the targets runs once where it can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.data.samples import Samples
from ranksure.network.logits import Batch, logits_of, unlabelled
from ranksure.network.prefix import Prefix, cached_prefix
from ranksure.tasks.task import Task


@dataclass(frozen=True)
class Labelled:
    """A batch and its labels."""

    batch: Batch
    labels: Tensor


class Whole:
    """Logits of rows; what :class:`benchmarks.advice_tail.Tail` is for one layer of a text classifier.

    Args:
        task: model and inputs.
        targets: adapted modules by their names in the model.
        rows: the rows.
        beside: other rows of the same network, whose cached layers do not hold for these.
        size: rows per batch; the task's by default.
    """

    def __init__(
        self,
        task: Task[Any],
        targets: Mapping[str, nn.Module],
        rows: Samples,
        beside: Whole | None = None,
        size: int | None = None,
    ) -> None:
        self.task, self.targets, self.beside, self.n = task, targets, beside, len(rows)
        self.batches, self.back = labelled(task, rows, size)
        self.prefix: Prefix | None = None

    @contextmanager
    def cached(self) -> Iterator[None]:
        """The layers below the targets do not run again for these rows."""
        with cached_prefix(self.task.model, self.batches, self.targets) as self.prefix:
            try:
                yield
            finally:
                self.prefix = None

    @property
    def chunks(self) -> Iterator[Labelled]:
        """To be used one at a time, as they come."""
        for batch in self.batches if self.prefix is None else self.prefix.batches:
            yield Labelled(batch, batch["labels"])

    def logits(self, chunk: Labelled) -> Tensor:
        """Logits ``(n, K)`` of a chunk, in its order."""
        return logits_of(self.task.model, unlabelled(chunk.batch))

    def all_logits(self) -> Tensor:
        """Logits ``(N, K)`` in the order of the rows, without gradients."""
        other = self.beside.prefix if self.beside is not None else None
        with torch.no_grad(), nullcontext() if other is None else other.paused():
            return torch.cat([self.logits(chunk) for chunk in self.chunks])[self.back]

    def labels(self) -> Tensor:
        """Labels in the order of the rows."""
        return torch.cat([batch["labels"] for batch in self.batches])[self.back]


def labelled(task: Task[Any], rows: Samples, size: int | None = None) -> tuple[list[dict[str, Any]], Tensor]:
    """Batches of rows of like length with their ``labels``, and the way back to the order of the rows."""
    if size is not None:
        task = copy(task)
        task.batch_size = size
    plain, back = task.batches_by_length(rows)
    labels = task.labels(rows)[torch.argsort(back)]
    batches, low = [], 0
    for batch in plain:
        rows_here = next(len(x) for x in batch.values() if isinstance(x, Tensor) and x.dim())
        batches.append({**batch, "labels": labels[low : low + rows_here]})
        low += rows_here
    return batches, back


def in_model(task: Task[Any], names: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Adapted modules by their names in ``task.model``."""
    return {task.prefix + name: task.adapted.get_submodule(name) for name in names}
