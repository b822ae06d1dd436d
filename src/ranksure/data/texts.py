"""Labelled texts: read, checked and coded; every check is on the whole table, before any is sampled."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from ranksure.data.samples import Samples, listed, number_of, value_of
from ranksure.data.tables import Table, read_source
from ranksure.errors import DataError, SettingError, shown

if TYPE_CHECKING:
    import datasets

MAX_CHARACTERS = 100_000
MAX_CLASSES = 1000
LARGEST_TARGET = 1e15
"""Of regression: its square, summed over a billion rows, is a float32 yet."""

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d{1,4})?", re.ASCII | re.IGNORECASE)
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_MISSING = {"na", "n/a", "#n/a", "<na>", "null", "none"}


@dataclass(frozen=True, kw_only=True)
class Rows(Samples):
    """Labelled texts, ready for a tokenizer and a loss.

    Attributes:
        texts: one text per row.
        pairs: the second text of each row, or None where rows are single texts.
    """

    columns: ClassVar[tuple[str, ...]] = ("texts", "pairs")
    noun: ClassVar[str] = "text"

    texts: list[str]
    pairs: list[str] | None = None


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
        source: a ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` (lines, or one array) or ``.parquet`` file; a folder that
            ``datasets.save_to_disk`` wrote; a Hub id (``owner/name``, or ``owner/name:configuration``); a data frame; a
            data set.
        text_column: the column of texts.
        label_column: the column of labels: strings, integers or booleans, or floats for regression. Strings stay as
            they are (``02116`` is not ``2116``, ``1.0`` not ``1``), and a class is called by them.
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
        raise DataError(f"{table.name} {'has a header but no rows' if table.lines is not None else 'is empty'}")
    notes = list(table.notes)
    if regression:
        labels: list[Any] = _targets(table, label_column)
        names, content = None, labels
    else:
        labels, names = classes(table, label_column)
        content = [names[label] for label in labels]
        notes += [*kept_apart(names), *absent_classes(table, labels, names)]
    columns = {column: _texts(table, column) for column in wanted if column != label_column}
    sha256 = table.sha256 or content_hash([*columns.values(), content])
    cut = {column: _truncated(texts, column, notes) for column, texts in columns.items()}
    return Rows(
        texts=cut[text_column],
        pairs=None if text_pair_column is None else cut[text_pair_column],
        labels=labels,
        label_names=names,
        source=table.name,
        sha256=sha256,
        notes=notes,
    )


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


def classes(table: Table, column: str) -> tuple[list[int], list[str]]:
    """Class ids and names of a label column.

    Raises:
        DataError: a label is missing, there is one class only, or the labels are not classes.
    """
    if table.class_names is not None:
        labels, names = _class_label_ids(table, column, table.class_names), table.class_names
    else:
        values = _label_values(table, column)
        _check_missing_words(table, column, values)
        _check_types(table, column, values)
        keys = [str(value) for value in values]
        as_numbers = {key: number_of(key) for key in keys}
        if any(number is None for number in as_numbers.values()):
            distinct = sorted(as_numbers)
        else:
            distinct = sorted(as_numbers, key=lambda key: (as_numbers[key], key))
        _check_class_count(table, column, distinct, len(keys))
        ids = {key: i for i, key in enumerate(distinct)}
        labels, names = [ids[key] for key in keys], distinct
    present = set(labels)
    if len(present) == 1:
        raise DataError(
            f"{table.name}: every row has the label {names[labels[0]]!r} in column {column!r}; "
            "at least two classes are needed"
        )
    return labels, names


def kept_apart(names: Sequence[str]) -> list[str]:
    """A sentence on classes whose names differ in spelling only, if any: they may be one."""
    spelt: dict[Any, list[str]] = {}
    for name in names:
        spelt.setdefault(value_of(unicodedata.normalize("NFKC", name).casefold()), []).append(name)
    alike = next((group for group in spelt.values() if len(group) > 1), None)
    if alike is None:
        return []
    return [f"{listed(alike)} are {len(alike)} classes, as the data has them: write them alike if they are one."]


def absent_classes(table: Table, labels: Sequence[int], names: Sequence[str]) -> list[str]:
    """A sentence on named classes that have no row, if any."""
    absent = sorted(set(range(len(names))) - set(labels))
    return [f"{table.name} has no row of {listed([names[i] for i in absent])}."] if absent else []


def _check_class_count(table: Table, column: str, distinct: Sequence[Any], n_rows: int) -> None:
    measured = all(_NUMBER.fullmatch(key) for key in distinct)
    fractions = measured and not all(float(key).is_integer() for key in distinct)
    # Measurements rarely repeat; names and whole numbers that never do are identifiers.
    no_classes = len(distinct) > max(2, n_rows / 2) if fractions else len(distinct) == n_rows > 20
    if len(distinct) > MAX_CLASSES or no_classes:
        found = f"{len(distinct):,} different labels in {n_rows:,} rows"
        examples = ", ".join(shown(str(key), 20) for key in distinct[:3])
        cure = "choose another label column"
        if measured:
            cure = f"for regression use `loss` squared-error, else {cure}"
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
        raise DataError(f"{table.name}: column {column!r} holds classes ({listed(table.class_names)}), not numbers")
    values = _label_values(table, column)
    _check_missing_words(table, column, values)
    targets = []
    for index, value in enumerate(values):
        if isinstance(value, bool) or (isinstance(value, str) and not _NUMBER.fullmatch(value.strip())):
            raise DataError(
                f"{table.row(index)}, column {column!r}: {shown(value)} is not a number, as regression needs; "
                "correct it, or use a classification loss"
            )
        targets.append(float(value))
        if abs(targets[-1]) > LARGEST_TARGET:
            raise _bad_label(
                table, column, index, value, f"is beyond {LARGEST_TARGET:g}, where its squared error overflows"
            )
    if len(set(targets)) == 1:
        raise DataError(f"{table.name}: every row has the target {targets[0]} in column {column!r}; nothing to learn")
    return targets


def _label_values(table: Table, column: str) -> list[str | bool | int | float]:
    """Labels as they are: strings, booleans, integers, and floats that are not whole; none missing or infinite."""
    return [_label_value(table, column, index, value) for index, value in enumerate(table.columns[column])]


def _label_value(table: Table, column: str, index: int, value: object) -> str | bool | int | float:
    if isinstance(value, str):
        if not value or value.isspace():
            raise _bad_label(table, column, index, None, "is missing")
        return value
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
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


def _check_missing_words(table: Table, column: str, values: Sequence[object]) -> None:
    """Among numbers, words such as ``NA`` and ``nan`` mark what is missing; among words they are names."""
    words = {index: value.strip() for index, value in enumerate(values) if isinstance(value, str)}
    odd: dict[int, tuple[object, str]] = {}
    for index, word in words.items():
        if _NUMBER.fullmatch(word):
            if not math.isfinite(float(word)):
                odd[index] = float(word), "is not finite"
        elif _NOT_FINITE.fullmatch(word):
            odd[index] = word, "is not finite"
        elif word.lower() in _MISSING:
            odd[index] = word, "is missing"
        else:
            return
    if odd and len(odd) < len(values) and not any(isinstance(value, bool) for value in values):
        index = min(odd)
        raise _bad_label(table, column, index, *odd[index])


def _check_types(table: Table, column: str, values: Sequence[object]) -> None:
    """No class name may stand for both a text and a number."""
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        other = first.setdefault(str(value), index)
        if isinstance(value, str) is not isinstance(values[other], str):
            kinds = ["text" if isinstance(values[i], str) else type(values[i]).__name__ for i in (other, index)]
            raise DataError(
                f"{table.row(index)}, column {column!r}: the label {shown(str(value))} is of type {kinds[1]} here and "
                f"of type {kinds[0]} in row {other + 1}; write one class in one way"
            )


def _bad_label(table: Table, column: str, index: int, value: object, what: str) -> DataError:
    given = "" if value is None else f" {shown(value)}"
    return DataError(f"{table.row(index)}, column {column!r}: the label{given} {what}; remove the row or correct it")


def _is_missing(value: object) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))
