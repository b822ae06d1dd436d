"""Rows in batches: made when asked for, and each row again alone or beside others, for checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ranksure.errors import DataError
from ranksure.network.logits import Batch, batch_rows

_LENGTHS = ("input_ids", "input_values", "input_features")


STREAM_ROWS = 20_000
"""Rows that are read of data without a length."""


def has_length(data: Any) -> bool:
    """Whether it says how much it holds, so that it comes to an end."""
    try:
        len(data)
    except (TypeError, NotImplementedError):
        return False
    return True


def labelled_rows(batch: Batch) -> int:
    """Rows by its labels; 1 where it has none."""
    return len(batch["labels"]) if isinstance(batch.get("labels"), Tensor) else 1


def first_rows(batches: Iterable[Batch], rows: int) -> list[Batch]:
    """The first batches, until they hold so many rows."""
    out: list[Batch] = []
    for batch in batches:
        out.append(batch)
        rows -= labelled_rows(batch)
        if rows <= 0:
            break
    return out


def held(batches: Iterable[Batch], stream_rows: int) -> Iterable[Batch]:
    """Batches that can be gone through again and come to an end: an iterator, or data without a length, as a list.

    Raises:
        DataError: it has more than ``stream_rows`` rows.
    """
    if has_length(batches) and iter(batches) is not batches:
        return batches
    found = first_rows(batches, stream_rows + 1)
    if sum(map(labelled_rows, found)) > stream_rows:
        raise DataError(
            f"the batches have no length, and more rows than the {stream_rows:,} that are read of such: pass a list or "
            "a DataLoader of all the training data, or raise `stream_rows`"
        )
    return found


def taken(batch: Batch, rows: Sequence[int], size: int) -> dict[str, Any]:
    """Some of a batch's ``size`` rows, in that order and as far padded as they are there."""
    return {
        key: value[list(rows)] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
        for key, value in batch.items()
    }


def row_length(row: Mapping[str, Any]) -> int:
    """Tokens of a text, or samples or frames of a recording; images have none."""
    return next((len(row[key]) for key in _LENGTHS if key in row), 0)


class Batches(Sequence[dict[str, Any]]):
    """Rows in batches; each is collated when it is asked for, so that one is in memory at a time.

    Args:
        rows: prepared rows, not padded.
        size: rows per batch.
        collate: makes a batch of rows.
        own_length: only rows of one length share a batch.
        by_length: longest rows first (memory fails early), else in their order.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        size: int,
        collate: Callable[[Any], Mapping[str, Any]],
        *,
        own_length: bool = False,
        by_length: bool = False,
    ) -> None:
        self.lengths = [row_length(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -self.lengths[i]) if by_length else list(range(len(rows)))
        self.rows = [rows[i] for i in order]
        self.lengths = [self.lengths[i] for i in order]
        self.own_length = own_length
        self._collate = collate
        starts: list[int] = []
        for i, length in enumerate(self.lengths):
            if not starts or i - starts[-1] == size or (own_length and length != self.lengths[i - 1]):
                starts.append(i)
        self._bounds = [*starts, len(rows)]

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self.of(range(self._bounds[index], self._bounds[index + 1]))

    @property
    def sizes(self) -> list[int]:
        """Rows of each batch."""
        return [high - low for low, high in zip(self._bounds, self._bounds[1:], strict=False)]

    def of(self, rows: Sequence[int]) -> dict[str, Any]:
        """These rows as one batch, padded to the longest of them."""
        return dict(self._collate([self.rows[i] for i in rows]))

    def together(self, rows: Sequence[int]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Rows side by side, with their numbers: all in one batch, or in one for every length."""
        parts: dict[int, list[int]] = {}
        for i in rows:
            parts.setdefault(self.lengths[i] if self.own_length else 0, []).append(i)
        for length, part in parts.items():
            if len(part) == 1 and self.own_length:  # beside whatever shares its length
                part += [i for i, other in enumerate(self.lengths) if other == length and i != part[0]][:1]
            yield self.of(part), part


class Given:
    """Batches as someone made them, taken apart as :class:`Batches` are; a row keeps the padding that it has there."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self.sizes = [batch_rows(batch) for batch in batches]
        self._places = [(b, i) for b, size in enumerate(self.sizes) for i in range(size)]
        masks = [batch.get("attention_mask") for batch in batches]
        flat = [m for m in masks if isinstance(m, Tensor) and m.dim() == 2]
        self.lengths = (
            [n for m in flat for n in m.sum(1).tolist()] if len(flat) == len(masks) else [0] * len(self._places)
        )

    def of(self, rows: Sequence[int]) -> dict[str, Any]:
        """These rows of one batch."""
        places = [self._places[i] for i in rows]
        batch = places[0][0]
        return taken(self._batches[batch], [i for _, i in places], self.sizes[batch])

    def together(self, rows: Sequence[int]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Rows beside others of their batch."""
        parts: dict[int, list[int]] = {}
        for i in rows:
            parts.setdefault(self._places[i][0], []).append(i)
        for batch, part in parts.items():
            if len(part) == 1:
                part += [i for i, (b, _) in enumerate(self._places) if b == batch and i != part[0]][:1]
            yield self.of(part), part


def by_row(batches: Sequence[Batch]) -> Batches | Given:
    """Batches as rows that can be run again alone or side by side."""
    return batches if isinstance(batches, Batches) else Given(batches)


def few_rows(lengths: Sequence[int], seed: int = 0) -> list[int]:
    """The rows that checks look at: the shortest, the longest, and two at random."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    others = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    return list(dict.fromkeys([order[0], order[-1], *others]))[:4]
