"""Rows for the network itself: batches with labels, and the losses of held-out rows at an update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.data.samples import Samples
from ranksure.factors import Factors
from ranksure.losses import Loss, accuracy
from ranksure.network.batches import by_row
from ranksure.network.logits import Batch, predict
from ranksure.network.prefix import cached_prefix
from ranksure.network.side_path import applied
from ranksure.tasks.task import Task


def labelled(task: Task[Any], samples: Samples) -> tuple[list[dict[str, Any]], Tensor]:
    """Batches with ``labels``, rows of like length together, and the way back to the order of the rows."""
    batches, back = task.batches_by_length(samples)
    labels = task.labels(samples)[torch.argsort(back)].split(by_row(batches).sizes)
    return [{**batch, "labels": own} for batch, own in zip(batches, labels, strict=True)], back


@dataclass
class HeldOutRows:
    """Rows that the solver never sees, on the network itself."""

    model: nn.Module
    targets: dict[str, nn.Module]
    loss: Loss
    batches: Sequence[Batch]
    back: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def measured(self, factors: Factors) -> tuple[Tensor, float | None]:
        """Loss of each row, and the share classified correctly (None for regression)."""
        with applied(self.targets, factors):
            logits = predict(self.model, self.batches).double()[self.back]
        return self.loss.value(logits, self.labels), accuracy(logits, self.labels, self.loss)

    def mean(self, factors: Factors) -> tuple[float, float | None]:
        """Mean loss and accuracy."""
        losses, share = self.measured(factors)
        return float(losses.mean()), share


@contextmanager
def held_out_rows(
    task: Task[Any], targets: Mapping[str, nn.Module], samples: Samples | None, loss: Loss, memory_bytes: float
) -> Iterator[HeldOutRows | None]:
    """Held-out rows, for which the frozen layers run once; None where there are none."""
    if samples is None or not len(samples):
        yield None
        return
    batches, back = task.batches_by_length(samples)
    with cached_prefix(task.model, batches, targets, memory_bytes):
        yield HeldOutRows(task.model, dict(targets), loss, batches, back, task.labels(samples))
