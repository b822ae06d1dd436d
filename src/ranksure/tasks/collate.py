"""From tokenised rows to batches: padding that changes no row's logits, and packing of rows into one sequence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.data.conversations import IGNORED
from ranksure.errors import CaptureError, SettingError, one_line
from ranksure.network.batches import row_length
from ranksure.network.logits import device_of, frozen, logits_of, not_finite, to_device, unlabelled

Feature = Mapping[str, Any]
_FILL = {"labels": IGNORED, "special_tokens_mask": 1}


Collate = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Collator:
    """Rows side by side, padded to the longest; usable as ``data_collator`` of a Trainer.

    Attributes:
        pad_token_id: id of the padding token, whose attention mask is 0 and whose label is -100.
        label_dtype: dtype of labels that are one number (or one list of targets) per row.
        side: where the padding is, ``right`` or ``left``.
        token_type: of the padding.
        positions: give ``position_ids`` that do not count the padding.
    """

    pad_token_id: int
    label_dtype: torch.dtype = torch.long
    side: str = "right"
    token_type: int = 0
    positions: bool = False

    @classmethod
    def of(cls, tokenizer: Any, label_dtype: torch.dtype = torch.long) -> Collator:
        """Pads as the tokenizer does."""
        side, kind = getattr(tokenizer, "padding_side", "right"), getattr(tokenizer, "pad_token_type_id", 0)
        return cls(int(tokenizer.pad_token_id), label_dtype, side, int(kind or 0))

    def __call__(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """A batch of tensors ``(B, L)``, ``labels`` ``(B,)`` where rows have one."""
        length = max(len(row["input_ids"]) for row in features)
        fill = {**_FILL, "input_ids": self.pad_token_id, "token_type_ids": self.token_type}
        out: dict[str, Tensor] = {}
        for key in features[0]:
            values = [row[key] for row in features]
            if key == "labels" and not (isinstance(values[0], list) and self.label_dtype == torch.long):
                out[key] = torch.tensor(values, dtype=self.label_dtype)
                continue
            pads = [[fill.get(key, 0)] * (length - len(value)) for value in values]
            pairs = zip(pads, values, strict=True)
            out[key] = torch.tensor([[*p, *v] if self.side == "left" else [*v, *p] for p, v in pairs])
        if self.positions and "attention_mask" in out:
            out["position_ids"] = (out["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return out


@dataclass(frozen=True)
class Padding:
    """How rows of several lengths share batches so that the logits of none depend on it.

    Attributes:
        collate: pads them.
        own_length: only rows of one length may share a batch.
        notes: sentences for the user.
    """

    collate: Any
    own_length: bool = False
    notes: tuple[str, ...] = ()


_SAME = {torch.float64: 1e-11, torch.float32: 2e-5}  # of a row's values; half precision tells less
_SAME_HALF = 0.05


def harmless_padding(
    model: nn.Module,
    rows: Sequence[Feature],
    collate: Any,
    inputs_of: nn.Module | None = None,
    measure: Callable[[Mapping[str, Any]], Tensor] | None = None,
) -> Padding:
    """Look at the shortest row, alone and beside the longest, and pad in a way that it does not feel.

    As the collator does, if that will do; else with ``position_ids`` (padding on the left moves absolute positions);
    else not at all: where a model reads the padding, rows share a batch with others of their length only.

    Args:
        model: the network.
        rows: prepared rows.
        collate: a :class:`Collator`, or what makes batches otherwise.
        inputs_of: the module whose ``forward`` tells whether ``position_ids`` are taken; ``model`` by default.
        measure: values of a batch, the first row's first; logits by default.

    Raises:
        CaptureError: padded rows give values that are not finite, while a row alone does not.
    """
    lengths = [row_length(row) for row in rows]
    if not lengths or min(lengths) == max(lengths):
        return Padding(collate)
    short, long = (rows[lengths.index(length)] for length in (min(lengths), max(lengths)))
    device, dtype = device_of(model), next((p.dtype for p in model.parameters()), torch.float32)

    def logits(batch: Mapping[str, Any]) -> Tensor:
        inputs = to_device(unlabelled(batch), device)
        wide = {key: x.to(dtype) for key, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
        return logits_of(model, {**inputs, **wide}).flatten()

    def difference(collate: Collate) -> float:
        batch = collate([short, long])
        beside = (measure or logits)(batch).double()[: len(alone)]
        if not bool(torch.isfinite(beside).all()):
            raise CaptureError(not_finite("of padded rows", batch))
        return float((beside - alone).abs().max())

    with frozen(model), torch.no_grad():
        alone = (measure or logits)(collate([short])).double()
        if not len(alone) or not bool(torch.isfinite(alone).all()):
            return Padding(collate)  # whoever runs the rows names the one
        allowed = _SAME.get(dtype, _SAME_HALF) * (1 + float(alone.abs().max()))
        change = difference(collate)
        if change <= allowed:
            return Padding(collate)
        takes = "position_ids" in inspect.signature((inputs_of or model).forward).parameters
        if takes and isinstance(collate, Collator) and collate.side == "left":
            counted = replace(collate, positions=True)
            if difference(counted) <= allowed:
                note = "Padding is on the left, so the model is given position_ids that do not count it."
                return Padding(counted, notes=(note,))
    note = (
        f"The logits of a row change with how far its batch is padded (by {change:.2g} for the shortest row beside the "
        "longest), so only rows of one length share a batch."
    )
    return Padding(collate, own_length=True, notes=(note,))


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
