"""Labelled texts: read, checked, coded and shuffled.

:func:`load_rows` turns a table into :class:`Rows`; whatever cannot be used is one clear
:class:`~ranksure.errors.DataError`. Every check is on the whole table, before any is sampled.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import numbers
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ranksure.errors import DataError, SettingError
from ranksure.tasks.sources import Table, read_source, shown

if TYPE_CHECKING:
    import datasets

MAX_CHARACTERS = 100_000
MAX_CLASSES = 1000

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d{1,4})?", re.ASCII | re.IGNORECASE)
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_MISSING = {"na", "n/a", "#n/a", "<na>", "null", "none"}


@dataclass(frozen=True)
class Rows:
    """Labelled texts, ready for a tokenizer and a loss.

    Attributes:
        texts: one text per row.
        pairs: the second text of each row, or None where rows are single texts.
        labels: a class id per row, from 0; for regression a float.
        label_names: the original label of each class id, as a string; None for regression. A class may
            have no row here (after :meth:`subset`, or where the source names classes that it does not use).
        source: where the rows come from, as messages name it.
        sha256: of the file's bytes; of the rows themselves where the source is not one file. A subset or
            another order keeps it: it names the source.
        notes: what the user should be told about how the rows were read, in sentences.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: list[Any]
    label_names: list[str] | None
    source: str
    sha256: str
    notes: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, indices: Iterable[int]) -> Rows:
        """The rows at ``indices``, in that order.

        Raises:
            SettingError: an index is negative or past the last row.
        """
        chosen = [int(index) for index in indices]
        for index in chosen:
            if not 0 <= index < len(self):
                raise SettingError(f"row index {index} asked of {self.source}, which has rows 0 to {len(self) - 1}")
        return replace(
            self,
            texts=[self.texts[i] for i in chosen],
            pairs=None if self.pairs is None else [self.pairs[i] for i in chosen],
            labels=[self.labels[i] for i in chosen],
        )

    def shuffled(self, seed: int) -> Rows:
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

    def with_label_names(self, label_names: Sequence[str]) -> Rows:
        """The same rows with class ids of another table, such as the training data's.

        Raises:
            DataError: a row's label is not in ``label_names``, or the rows are for regression.
        """
        if self.label_names is None:
            raise DataError(f"{self.source} has regression targets, but classes {_listed(label_names)} are expected")
        ids = {name: i for i, name in enumerate(label_names)}
        used = Counter(self.labels)
        for label, count in sorted(used.items()):
            if (name := self.label_names[label]) not in ids:
                raise DataError(
                    f"{self.source} has the label {name!r} ({count} row{'s' * (count != 1)}), which the training data "
                    f"does not have: its labels are {_listed(label_names)}; remove or rename it"
                )
        mapped = [ids[self.label_names[label]] for label in self.labels]
        return replace(self, labels=mapped, label_names=list(label_names))


def load_rows(
    source: str | Path | pd.DataFrame | datasets.Dataset | datasets.DatasetDict,
    *,
    text_column: str = "text",
    label_column: str = "label",
    text_pair_column: str | None = None,
    split: str | None = None,
    regression: bool = False,
) -> Rows:
    """Read a table of labelled texts.

    Args:
        source: a ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` (lines, or one array) or ``.parquet`` file; a
            folder that ``datasets.save_to_disk`` wrote; a Hub id (``owner/name``, or
            ``owner/name:configuration``); a data frame; a data set.
        text_column: the column of texts.
        label_column: the column of labels: strings, integers or booleans, or floats for regression.
            Numbers written as strings or floats (``"1"``, ``1.0``) are the integers they equal; strings
            lose white space at their ends.
        text_pair_column: the column of second texts (entailment, paraphrase), or None.
        split: which split of a Hub or saved data set; by default ``train``, or the only one.
        regression: read labels as finite floats, for the squared error.

    Returns:
        The rows in the source's order. Class ids follow the numeric order of labels that are all
        numbers, the lexicographic order of others, and the given order of a ``datasets.ClassLabel``.
        Texts of more than 100,000 characters are cut there, which ``notes`` tells.

    Raises:
        DataError: the source cannot be read, or a column, row or label cannot be used.
        SettingError: the arguments contradict each other.
    """
    wanted = [text_column, label_column] + ([text_pair_column] if text_pair_column is not None else [])
    if len(set(wanted)) < len(wanted):
        raise SettingError(f"text, pair and label columns must differ, but {max(wanted, key=wanted.count)!r} is two")
    table = read_source(source, wanted, label_column, split)
    values = table.columns
    if not values[text_column]:
        raise DataError(
            f"{table.name} has a header but no rows" if table.lines is not None else f"{table.name} is empty"
        )
    notes = list(table.notes)
    if regression:
        labels: list[Any] = _targets(table, label_column)
        names, content = None, labels
    else:
        labels, names = _classes(table, label_column)
        content = [names[label] for label in labels]
        if absent := sorted(set(range(len(names))) - set(labels)):
            notes.append(f"{table.name} has no row of {_listed([names[i] for i in absent])}.")
    columns = {column: _texts(table, column) for column in wanted if column != label_column}
    sha256 = table.sha256 or content_hash([*columns.values(), content])
    cut = {column: _truncated(texts, column, notes) for column, texts in columns.items()}
    pairs = None if text_pair_column is None else cut[text_pair_column]
    return Rows(cut[text_column], pairs, labels, names, table.name, sha256, notes)


# ---------------------------------------------------------------------------------------------------------------------
# texts


def _texts(table: Table, column: str) -> list[str]:
    values = table.columns[column]
    for index, value in enumerate(values):
        if isinstance(value, str) and not value.isspace() and value and _encodable(value):
            continue
        where, cure = f"{table.row(index)}, column {column!r}", "remove the row or fill it in"
        if _is_missing(value) or value == "":
            raise DataError(f"{where}: the text is missing; {cure}")
        if not isinstance(value, str):
            raise DataError(f"{where}: {shown(value)} is not text but of type {type(value).__name__}; {cure}")
        if value.isspace():
            raise DataError(f"{where}: the text is only white space; {cure}")
        raise DataError(f"{where}: the text has half a surrogate pair, which is not Unicode text; {cure}")
    return values


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # such as "\ud800" in JSON: tokenizers fail on it
        return False
    return True


def _truncated(texts: list[str], column: str, notes: list[str]) -> list[str]:
    longest = max(map(len, texts))
    if longest <= MAX_CHARACTERS:
        return texts
    count = sum(len(text) > MAX_CHARACTERS for text in texts)
    notes.append(
        f"{count} text{'s' * (count != 1)} longer than {MAX_CHARACTERS:,} characters in column {column!r} "
        f"{'were' if count != 1 else 'was'} truncated (the longest had {longest:,})."
    )
    return [text[:MAX_CHARACTERS] for text in texts]


def content_hash(columns: Sequence[Sequence[Any]]) -> str:
    """The sha256 of rows that come from no one file."""
    digest = hashlib.sha256()
    for row in zip(*columns, strict=True):
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# labels


def _classes(table: Table, column: str) -> tuple[list[int], list[str]]:
    """Class ids and names."""
    if table.class_names is not None:
        labels, names = _class_label_ids(table, column, table.class_names), table.class_names
    else:
        keys = _plain(table, column)
        if any(isinstance(key, str) for key in keys):
            keys = [str(key) for key in keys]  # numbers among words are words
        distinct = sorted(set(keys))
        _check_class_count(table, column, distinct, len(keys))
        ids = {key: i for i, key in enumerate(distinct)}
        labels, names = [ids[key] for key in keys], [str(key) for key in distinct]
    present = set(labels)
    if len(present) == 1:
        raise DataError(
            f"{table.name}: every row has the label {names[labels[0]]!r} in column {column!r}; "
            "at least two classes are needed"
        )
    return labels, names


def _check_class_count(table: Table, column: str, distinct: Sequence[Any], n_rows: int) -> None:
    fractions = any(isinstance(key, float) for key in distinct)
    # Measurements rarely repeat; names and whole numbers that never do are identifiers.
    no_classes = len(distinct) > max(2, n_rows / 2) if fractions else len(distinct) == n_rows > 20
    if len(distinct) > MAX_CLASSES or no_classes:
        found = f"{len(distinct):,} different labels in {n_rows:,} rows"
        examples = ", ".join(shown(str(key), 20) for key in distinct[:3])
        cure = "choose another label column"
        if not isinstance(distinct[0], str):
            cure = f"for regression use --loss squared-error, else {cure}"
        raise DataError(
            f"{table.name}: column {column!r} has {found} ({examples}, ...), which are not classes (at most "
            f"{MAX_CLASSES:,}); {cure}"
        )


def _class_label_ids(table: Table, column: str, names: list[str]) -> list[int]:
    for index, value in enumerate(table.columns[column]):
        if value is None or value == -1:  # -1 is how datasets marks the hidden labels of a test split
            raise DataError(
                f"{table.row(index)}, column {column!r}: the label is missing ({value}); choose a split with labels, "
                "or remove the row"
            )
        if not 0 <= value < len(names):
            raise DataError(f"{table.row(index)}, column {column!r}: class id {value} of {len(names)} named classes")
    return [int(value) for value in table.columns[column]]


def _targets(table: Table, column: str) -> list[float]:
    if table.class_names is not None:
        raise DataError(f"{table.name}: column {column!r} holds classes ({_listed(table.class_names)}), not numbers")
    targets = []
    for index, value in enumerate(_plain(table, column)):
        if isinstance(value, str):
            raise DataError(
                f"{table.row(index)}, column {column!r}: {shown(value)} is not a number, as regression needs; "
                "correct it, or use a classification loss"
            )
        targets.append(float(value))
    if len(set(targets)) == 1:
        raise DataError(f"{table.name}: every row has the target {targets[0]} in column {column!r}; nothing to learn")
    return targets


def _plain(table: Table, column: str) -> list[str | int | float]:
    """Labels as strings, integers, or floats that are not whole; never missing, never infinite."""
    values = table.columns[column]
    keys = [_key(table, column, index, value) for index, value in enumerate(values)]
    strings = {key.lower() for key in keys if isinstance(key, str)}
    if strings <= {"true", "false"}:  # however a CSV spells them, they are the booleans of a Parquet file
        return [key.capitalize() if isinstance(key, str) else key for key in keys]
    if strings <= _MISSING and not all(isinstance(key, str) for key in keys):  # words for "missing" among numbers
        index = next(i for i, key in enumerate(keys) if isinstance(key, str))
        raise _bad_label(table, column, index, values[index], "is missing")
    return keys


def _key(table: Table, column: str, index: int, value: object) -> str | int | float:
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    if isinstance(value, str):
        value = value.strip()
        if not value:
            raise _bad_label(table, column, index, None, "is missing")
        if _NOT_FINITE.fullmatch(value):
            raise _bad_label(table, column, index, value, "is not finite")
        if len(value) > 100 or not _NUMBER.fullmatch(value):
            return value
        value = int(value) if value.lstrip("+-").isdigit() else float(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if _is_missing(value) and not isinstance(value, numbers.Real):
        raise _bad_label(table, column, index, None, "is missing")
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            raise _bad_label(table, column, index, value, "is not finite")
        return int(number) if number.is_integer() else number
    if isinstance(value, (list, tuple, dict, set, np.ndarray)):
        raise _bad_label(table, column, index, value, "is a list: one label per row is needed")
    raise _bad_label(table, column, index, value, f"is of type {type(value).__name__}, not a string or number")


def _bad_label(table: Table, column: str, index: int, value: object, what: str) -> DataError:
    given = "" if value is None else f" {shown(value)}"
    return DataError(f"{table.row(index)}, column {column!r}: the label{given} {what}; remove the row or correct it")


def _is_missing(value: object) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in names[:10]) + (f" and {len(names) - 10} more" * (len(names) > 10))


# ---------------------------------------------------------------------------------------------------------------------
# order


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
