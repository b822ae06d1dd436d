"""What labelled images and recordings share: finding the inputs of a source, and decoding them one by one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ranksure.data.folders import class_folders, is_saved_data_set
from ranksure.data.tables import Table, read_source
from ranksure.data.texts import absent_classes, classes, kept_apart
from ranksure.errors import DataError, MemoryBudgetError, SettingError
from ranksure.progress import Reporter, Silent

if TYPE_CHECKING:
    import datasets
    import pandas as pd

Input = TypeVar("Input", bound=NDArray[Any])


@dataclass(frozen=True)
class Found:
    """Inputs that are not decoded yet.

    Attributes:
        values: paths, encoded bytes, or what a column holds.
        labels: class ids.
        names: of the classes.
        source: where they come from, as messages name it.
        notes: sentences for the user.
        places: what messages call each of them.
        base: the folder that relative paths start from.
    """

    values: Sequence[Any]
    labels: list[int]
    names: list[str]
    source: str
    notes: list[str]
    places: list[str]
    base: Path = field(default_factory=Path)


@dataclass
class Seen:
    """What was met while decoding, for the notes."""

    converted: Counter[str] = field(default_factory=Counter)
    nbytes: int = 0


@dataclass(frozen=True)
class Medium:
    """A kind of inputs.

    Attributes:
        noun: what one is called, such as "recording".
        column: what their column is called, such as "audio".
        smaller: what makes them take less memory.
        is_input: whether a file is one, by its name.
    """

    noun: str
    column: str
    smaller: str
    is_input: Callable[[Path], bool]


def find_inputs(
    source: str | Path | pd.DataFrame | datasets.Dataset | datasets.DatasetDict,
    medium: Medium,
    column: str,
    label_column: str,
    split: str | None,
) -> Found:
    """The inputs of a folder of class folders, a table or a data set.

    The source is a folder with one folder of inputs per class (or, one level up, a folder with such a folder for each
    split); a ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` or ``.parquet`` file with a column of paths (relative to the
    file's folder) or of encoded inputs; a folder that ``datasets.save_to_disk`` wrote; a Hub id (``owner/name``, or
    ``owner/name:configuration``); a data frame; a data set. Of several splits ``train`` is read, or the one asked for;
    labels are as for :func:`ranksure.data.texts.load_rows`.

    Raises:
        DataError: the source cannot be read, or a label cannot be used.
        SettingError: the arguments contradict each other.
    """
    noun = medium.noun
    folder = Path(source).expanduser() if isinstance(source, (str, Path)) else None
    if folder is not None and folder.is_dir() and not is_saved_data_set(folder):
        files, labels, names, notes = class_folders(folder, split, noun, medium.is_input)
        return Found(files, labels, names, str(folder), notes, [str(file) for file in files])
    if column == label_column:
        raise SettingError(f"{medium.column} and label columns must differ, but both are {column!r}")
    table = read_source(source, [column, label_column], label_column, split)
    values = table.columns[column]
    if not values:
        article = "an" if noun[0] in "aeiou" else "a"
        raise DataError(f"{table.name} has no rows: it needs {article} {noun} and a label on each")
    labels, names = classes(table, label_column)
    notes = [*table.notes, *kept_apart(names), *absent_classes(table, labels, names)]
    places = [f"{table.row(index)}, column {column!r}" for index in range(len(values))]
    base = folder.parent if folder is not None and folder.is_file() else Path()
    return Found(values, labels, names, table.name, notes, places, base)


def inputs_in_memory(
    values: Sequence[Any], labels: Sequence[Any], label_names: Sequence[str] | None, source: str, noun: str
) -> Found:
    """Inputs in memory, their labels coded; refused where there are none, or not as many labels."""
    if len(values) != len(labels):
        raise DataError(f"{source}: {len(values)} {noun}s but {len(labels)} labels; give one label per {noun}")
    if not len(values):
        raise DataError(f"{source}: there is no {noun}")
    plain = [label.item() if isinstance(label, np.generic) else label for label in labels]
    table = Table(source, {"label": plain}, class_names=None if label_names is None else list(label_names))
    ids, names = classes(table, "label")
    return Found(
        values, ids, names, source, kept_apart(names), [f"{source}: {noun} {index + 1}" for index in range(len(values))]
    )


def given(value: Any, place: str, base: Path, noun: str) -> Any:
    """Encoded bytes, the path of a file, or whatever else a value is; refused where it or its file is missing."""
    if isinstance(value, dict) and set(value) >= {"bytes", "path"}:  # as datasets keeps an image or a recording
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    if value is None or (isinstance(value, (str, bytes)) and not value):
        raise DataError(f"{place}: the {noun} is missing; remove the row or fill it in")
    if not isinstance(value, (str, Path)):
        return value
    file = base / Path(value).expanduser()
    if not file.is_file():
        relative = "" if Path(value).is_absolute() else f" (paths are relative to {base.resolve()})"
        raise DataError(f"{place}: no such {noun} {file}{relative}")
    return file


def undecodable(place: str, noun: str, reason: str) -> DataError:
    """What a damaged input is told by."""
    return DataError(f"{place}: the {noun} does not decode ({reason}); replace or remove it")


def labelled_sha256(digests: Sequence[bytes], found: Found, start: bytes = b"") -> str:
    """The sha256 of inputs with the names of their classes."""
    digest = hashlib.sha256(start)
    for each, label in zip(digests, found.labels, strict=True):
        digest.update(each + found.names[label].encode() + b"\n")
    return digest.hexdigest()


def decode_inputs(
    found: Found,
    decode: Callable[[Any, str, Path, Seen], Input],
    medium: Medium,
    most: int,
    reporter: Reporter | None,
) -> tuple[list[Input], list[str]]:
    """Every input as an array, and the notes with what was converted; a ``MemoryBudgetError`` beyond ``most`` bytes.

    ``decode`` is called with a value, its place, the base folder and where to count what was converted.
    """
    noun = medium.noun
    seen = Seen()
    out: list[Input] = []
    count = len(found.values)
    with (reporter or Silent()).stage(f"Decoding {count} {noun}s") as advance:
        for index, (value, place) in enumerate(zip(found.values, found.places, strict=True)):
            out.append(decode(value, place, found.base, seen))
            seen.nbytes += out[-1].nbytes
            if seen.nbytes > most:
                raise MemoryBudgetError(
                    f"{found.source}: its {noun}s take more than {most / 2**30:.0f} GiB of memory once decoded "
                    f"(reached at {noun} {index + 1} of {count}); use fewer (such as `split` 'train[:5000]' of a Hub "
                    f"data set) or make them {medium.smaller}"
                )
            advance(index + 1, count)
    told = [f"{found.source}: {times} of {count} {noun}s {what}." for what, times in seen.converted.items()]
    return out, [*found.notes, *told]
