"""From tokenised rows to batches: padding on the right, and packing of several rows into one sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.data.conversations import IGNORED
from ranksure.errors import SettingError, one_line
from ranksure.network.logits import device_of, frozen

Feature = Mapping[str, Any]
_FILL = {"attention_mask": 0, "token_type_ids": 0, "position_ids": 0, "labels": IGNORED, "special_tokens_mask": 1}


@dataclass(frozen=True)
class Collator:
    """Rows side by side, padded on the right; usable as ``data_collator`` of a Trainer.

    Attributes:
        pad_token_id: id of the padding token, whose attention mask is 0 and whose label is -100.
        label_dtype: dtype of labels that are one number (or one list of targets) per row.
    """

    pad_token_id: int
    label_dtype: torch.dtype = torch.long

    def __call__(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """A batch of tensors ``(B, L)``, ``labels`` ``(B,)`` where rows have one."""
        length = max(len(row["input_ids"]) for row in features)
        out: dict[str, Tensor] = {}
        for key in features[0]:
            values = [row[key] for row in features]
            if key == "labels" and not (isinstance(values[0], list) and self.label_dtype == torch.long):
                out[key] = torch.tensor(values, dtype=self.label_dtype)
                continue
            fill = self.pad_token_id if key == "input_ids" else _FILL.get(key, 0)
            out[key] = torch.tensor([[*value, *[fill] * (length - len(value))] for value in values])
        return out


@dataclass(frozen=True)
class PackedCollator:
    """The same for packed rows: with a mask that keeps the rows of a sequence apart.

    The mask is additive, ``(B, 1, L, L)``: 0 where a token may look (at its own row, up to itself), the dtype's
    lowest value elsewhere. transformers hands such a mask to the attention as it is (eager and SDPA).

    Attributes:
        pad_token_id: id of the padding token.
        dtype: the network's dtype, which the mask must have.
    """

    pad_token_id: int
    dtype: torch.dtype = torch.float32

    def __call__(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """A batch of tensors ``(B, L)`` with ``position_ids``, and the mask."""
        out = Collator(self.pad_token_id)(features)
        row = (out["position_ids"] == 0).cumsum(1)  # padding has position 0: every such token is a row of its own
        length = row.shape[1]
        allowed = (row[:, :, None] == row[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
        lowest = torch.tensor(torch.finfo(self.dtype).min, dtype=self.dtype)
        out["attention_mask"] = torch.where(allowed, torch.zeros((), dtype=self.dtype), lowest)[:, None]
        return out


def packed(features: Sequence[Feature], length: int) -> list[dict[str, list[int]]]:
    """Rows joined, in order, into sequences of at most ``length`` tokens.

    Positions restart with every row, and a row's first token carries no loss (alone it would not either), so the
    terms of the loss are those of the rows apart.

    Args:
        features: ``input_ids`` and ``labels``, none longer than ``length``.
        length: tokens per sequence.
    """
    out: list[dict[str, list[int]]] = []
    for row in features:
        ids, labels = list(row["input_ids"]), [IGNORED, *row["labels"][1:]]
        if not out or len(out[-1]["input_ids"]) + len(ids) > length:
            out.append({"input_ids": [], "position_ids": [], "labels": []})
        out[-1]["input_ids"] += ids
        out[-1]["position_ids"] += range(len(ids))
        out[-1]["labels"] += labels
    return out


def check_packing(model: nn.Module, features: Sequence[Feature], collator: PackedCollator) -> None:
    """Refuse (``SettingError``) a model whose logits of the two shortest rows differ when packed, or that cannot."""
    few = sorted(features, key=lambda row: len(row["input_ids"]))[:2]
    joined = packed([{**row, "labels": row["input_ids"]} for row in few], sum(len(row["input_ids"]) for row in few))
    device = device_of(model)
    try:
        with frozen(model), torch.no_grad():
            together = model(**_inputs(collator(joined), device)).logits[0]
            apart = [model(**_inputs(Collator(collator.pad_token_id)([row]), device)).logits[0] for row in few]
    except Exception as error:  # whatever an attention that takes no such mask raises
        raise SettingError(f"this model does not take packed rows ({one_line(error)}): leave packing out") from None
    alone = torch.cat(apart).double()
    difference = float((together.double() - alone).abs().max())
    if not difference <= 256 * torch.finfo(collator.dtype).eps * (1 + float(alone.abs().max())):
        raise SettingError(
            f"this model does not keep packed rows apart (its logits change by {difference:.2g}): leave packing out"
        )


def _inputs(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items() if key != "labels"}


class Batches(Sequence[dict[str, Tensor]]):
    """Rows in batches, in order; each is collated when it is asked for, so that one is in memory at a time."""

    def __init__(self, rows: Sequence[Feature], size: int, collate: Callable[[Any], Mapping[str, Any]]) -> None:
        self._rows, self._collate = rows, collate
        self._starts = range(0, len(rows), size)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        low = self._starts[index]
        return dict(self._collate(self._rows[low : low + self._starts.step]))


def in_batches(features: Sequence[Mapping[str, Any]], size: int, by_length: bool) -> Iterator[list[Any]]:
    """Rows in batches, in order, or rows of like length together (images have none)."""
    order = list(range(len(features)))
    if by_length:
        order.sort(key=lambda i: -_length(features[i]))  # the largest batch first: memory fails early
    for low in range(0, len(order), size):
        yield [features[i] for i in order[low : low + size]]


def _length(row: Mapping[str, Any]) -> int:
    """Tokens of a text, or samples of a waveform."""
    return next((len(row[key]) for key in ("input_ids", "input_values") if key in row), 0)
