"""Is a batch's loss the sum of its rows' own? Four rows of a pass are run again, each alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.errors import CaptureError
from ranksure.network.batch_losses import Forward
from ranksure.network.batches import Batches, taken
from ranksure.network.logits import Batch

_SAME = {torch.float64: 1e-6, torch.float32: 1e-4}  # some steps of float64 networks are in float32
_SAME_HALF = 0.1
_MULTIPLE = 8  # collators pad to a batch's longest row, or to the next multiple of this


class RowsInteract(CaptureError):
    """The loss of a row depends on the rows beside it, or on how far its batch is padded."""


@dataclass
class _Row:
    batch: dict[str, Any]
    losses: Tensor
    length: int
    chance: float


class LossCheck:
    """Keeps four rows as they come, the shortest, the longest and two at random, with their losses beside the others.

    Args:
        batches: what will come; of rows that were collated here, the padding is known to do no harm.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._random = torch.Generator().manual_seed(0)
        self._own_padding = isinstance(batches, Batches)
        self._kept: dict[str, _Row] = {}
        self._widths: set[int] = set()
        self._filled = True  # no batch is padded further than its own rows ask for

    def see(self, batch: Batch, forward: Forward) -> None:
        """After the batch has gone through ``forward``."""
        rows, losses = forward.last
        labels = batch.get("labels", batch.get("label"))
        if not isinstance(labels, Tensor) or not len(labels):
            return
        mask, lengths = batch.get("attention_mask"), [0] * len(labels)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            lengths, width = (mask > 0).sum(1).tolist(), mask.shape[1]
            self._widths.add(width)
            self._filled &= max(lengths) > width - min(width & -width, _MULTIPLE)
        if len(labels) < 2:
            return
        chances = torch.rand(len(labels), generator=self._random).tolist()
        for i, (length, chance) in enumerate(zip(lengths, chances, strict=True)):
            wanted = self._wanted(length, chance)
            if wanted:
                row = _Row(taken(batch, [i], len(labels)), losses[rows == i], length, chance)
                self._kept |= dict.fromkeys(wanted, row)

    def _wanted(self, length: int, chance: float) -> list[str]:
        """In which of the four places a row is kept."""
        kept = self._kept
        out = [] if "shortest" in kept and length >= kept["shortest"].length else ["shortest"]
        out += [] if "longest" in kept and length < kept["longest"].length else ["longest"]
        last = max(("one", "other"), key=lambda place: kept[place].chance if place in kept else 2.0)
        return out + [last] * (last not in kept or chance < kept[last].chance)

    def finish(self, forward: Forward) -> None:
        """Run the rows that were kept alone.

        Raises:
            RowsInteract: a loss is another one.
            CaptureError: the network is not deterministic.
        """
        for row in {id(row): row for row in self._kept.values()}.values():
            if (change := _change(forward, row.batch, row.losses)) > 0:
                if _change(forward, row.batch, _alone(forward, row.batch)) > 0:
                    raise CaptureError(
                        "the network is not deterministic: two passes over one row give different losses; turn off "
                        "dropout or sampling that ignores model.eval()"
                    )
                raise RowsInteract(
                    f"samples interact: the loss of a row changes by {change:.2g} with the rows beside it in its batch "
                    "(batch statistics, routing of limited capacity): the mean loss is not one of the rows; use "
                    "batches of one row"
                )
        if self._own_padding or (len(self._widths) == 1 and not self._filled):
            return  # one width for all, whatever they hold: that padding is part of every row
        shortest = self._kept.get("shortest")
        bare = None if shortest is None else _unpadded(shortest.batch)
        if shortest and bare and (change := _change(forward, bare, shortest.losses)) > 0:
            raise RowsInteract(
                f"the loss of a row changes by {change:.2g} with how far its batch is padded, so the mean loss depends "
                "on the batches: pass rows of one length in a batch, or position_ids that do not count the padding"
            )


def _change(forward: Forward, batch: Batch, losses: Tensor) -> float:
    """How far a row's losses alone are from those it had; 0 within rounding."""
    alone = _alone(forward, batch)
    count = len(alone)
    if not count or count < len(losses) - 1:  # without its padding, a row has nothing that predicts its first token
        return 0.0 if len(losses) <= count + 1 else float("inf")
    losses = losses[len(losses) - count :]
    change = float((alone - losses).abs().max())
    allowed = _SAME.get(_dtype(forward.model), _SAME_HALF) * (1 + float(losses.abs().max()))
    return change if change > allowed else 0.0


def _alone(forward: Forward, batch: Batch) -> Tensor:
    fresh = Forward(forward.model, forward.kind, forward.weighting)
    fresh.losses_only(batch)
    return fresh.losses


def _dtype(model: nn.Module) -> torch.dtype:
    """The coarsest of the network's."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(kinds, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _unpadded(batch: Batch) -> dict[str, Any] | None:
    """One row without the places that its mask hides; None where there are none, or the network needs them."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool((keep := mask[0] > 0).all()):
        return None
    flat = [key for key, x in batch.items() if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == len(keep)]
    if set(flat) <= {"attention_mask", "labels", "label"}:
        return None
    return {key: value[:, keep] if key in flat else value for key, value in batch.items()}
