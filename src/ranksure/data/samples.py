"""Labelled inputs of any kind: what texts, images and recordings share. All is deterministic given a seed."""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from ranksure.errors import DataError, SettingError, shown

AnySamples = TypeVar("AnySamples", bound="Samples")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Labelled inputs, whose subclasses hold them.

    Attributes:
        labels: a class id per row, from 0; for regression a float.
        label_names: the original label of each class id, as a string; None for regression. A class may
            have no row here (after :meth:`subset`, or where the source names classes that it does not use).
        source: where the rows come from, as messages name it.
        sha256: of the file's bytes; of the rows themselves where the source is not one file. A subset or
            another order keeps it: it names the source.
        notes: what the user should be told about how the rows were read, in sentences.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    """Names of the subclass's fields that hold one entry per row (a field may be None)."""
    noun: ClassVar[str] = "row"
    """What one input is called in messages."""

    labels: list[Any]
    label_names: list[str] | None
    source: str
    sha256: str
    notes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def identities(self) -> list[Hashable]:
        """What makes two rows the same input, a hashable entry per row."""
        columns = [getattr(self, name) for name in self.columns]
        return list(zip(*[column for column in columns if column is not None], strict=True))

    def subset(self: AnySamples, indices: Iterable[int]) -> AnySamples:
        """The rows at ``indices``, in that order.

        Raises:
            SettingError: an index is negative or past the last row.
        """
        chosen = [int(index) for index in indices]
        for index in chosen:
            if not 0 <= index < len(self):
                raise SettingError(f"row index {index} asked of {self.source}, which has rows 0 to {len(self) - 1}")
        columns: dict[str, Any] = {name: getattr(self, name) for name in (*self.columns, "labels")}
        kept = {name: None if column is None else [column[i] for i in chosen] for name, column in columns.items()}
        return replace(self, **kept)

    def shuffled(self: AnySamples, seed: int) -> AnySamples:
        """All rows in a random order whose every prefix has the class shares of the whole.

        With N rows, N_c of class c and k >= 2 classes that have rows, the first n rows hold
        n N_c / N rows of class c, give or take at most 1 - 1/(2k - 2) (so 1/2 for two classes), for
        every n and c at once. So ``shuffled(seed).subset(range(n))`` for N, N/2, N/4 ... are nested,
        stratified samples. Which rows of a class come first is uniformly random. Regression targets
        are shuffled plainly.

        Args:
            seed: 0 to 2**32 - 1; the same seed gives the same order on every machine.

        Raises:
            SettingError: the seed is out of range.
        """
        if not 0 <= seed < 2**32:
            raise SettingError(f"seed {seed} is out of range: use 0 to {2**32 - 1}")
        random = np.random.RandomState(seed)  # its stream is frozen across NumPy versions, default_rng's is not
        order = random.permutation(len(self)).tolist()
        if self.label_names is None or not order:
            return self.subset(order)
        members: dict[int, list[int]] = {int(c): [] for c in random.permutation(len(self.label_names))}
        for index in reversed(order):  # popped from the end below
            members[self.labels[index]].append(index)
        classes = [rows for rows in members.values() if rows]
        return self.subset(classes[c].pop() for c in _fair_sequence([len(rows) for rows in classes]))

    def with_label_names(self: AnySamples, label_names: Sequence[str]) -> AnySamples:
        """The same rows with class ids of another table, such as the training data's.

        Names are compared exactly; where that fails, all of them as values (``1.0`` is 1, ``true`` is True, white
        space at the ends is none).

        Raises:
            DataError: a row's label is not in ``label_names``, or the rows are for regression.
        """
        if self.label_names is None:
            raise DataError(f"{self.source} has regression targets, but classes {listed(label_names)} are expected")
        used = Counter(self.labels)
        present = sorted(used)
        places = matched([self.label_names[label] for label in present], label_names, str, value_of)
        for label, count in () if places is not None else sorted(used.items()):
            if (name := self.label_names[label]) not in label_names:
                raise DataError(
                    f"{self.source} has the label {name!r} ({count} row{'s' * (count != 1)}), which the training data "
                    f"does not have: its labels are {listed(label_names)}; remove or rename it"
                )
        assert places is not None
        ids = dict(zip(present, places, strict=True))
        return replace(self, labels=[ids[label] for label in self.labels], label_names=list(label_names))


_DECIMAL = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?", re.ASCII)


def number_of(name: str) -> int | float | None:
    """The number that a class name is; none where it is a code, such as ``02116``, ``+1`` or ``1e3``."""
    if len(name) > 100 or not _DECIMAL.fullmatch(name):
        return None
    if "." not in name:
        return int(name)
    number = float(name)
    return int(number) if number.is_integer() else number


def value_of(name: str) -> int | float | str:
    """What a class name stands for: a number, a boolean in small letters, or itself without white space at its ends."""
    name = name.strip()
    number = number_of(name)
    if number is not None:
        return number
    return name.lower() if name.lower() in ("true", "false") else name


def matched(names: Sequence[str], known: Sequence[str], *keys: Callable[[str], Hashable]) -> list[int] | None:
    """Where each of ``names`` stands among ``known``, by the first key under which all do and none become one."""
    for key in keys:
        there = {key(name): place for place, name in enumerate(known)}
        wanted = [key(name) for name in names]
        if len(there) == len(known) and len(set(wanted)) == len(wanted) and there.keys() >= set(wanted):
            return [there[name] for name in wanted]
    return None


def listed(names: Sequence[str]) -> str:
    """Names for a message, at most ten of them."""
    return ", ".join(shown(name) for name in names[:10]) + (f" and {len(names) - 10} more" * (len(names) > 10))


def _fair_sequence(counts: Sequence[int]) -> Iterable[int]:
    """Class numbers, each as often as ``counts`` says, in an order that is fair at every prefix.

    The chairman assignment of Tijdeman (1980): with e = 1/(2k - 2), the j-th member of class c may come
    once n N_c/N >= j - 1 + e and may be absent only while n N_c/N <= j - e; earliest deadline first
    then always finds a member. In integers, so exact.
    """
    total, scale = sum(counts), max(2 * len(counts) - 2, 1)

    def release(c: int, j: int) -> int:  # of the j-th member, from 1
        return -(-((j - 1) * scale + 1) * total // (scale * counts[c]))

    def deadline(c: int, j: int) -> int:
        return (j * scale - 1) * total // (scale * counts[c])

    waiting = [(release(c, 1), c, 1) for c in range(len(counts))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    for n in range(1, total + 1):
        while waiting and waiting[0][0] <= n:
            _, c, j = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline(c, j), c, j))
        _, c, j = heapq.heappop(ready)
        yield c
        if j < counts[c]:
            heapq.heappush(waiting, (release(c, j + 1), c, j + 1))
