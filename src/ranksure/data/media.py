"""What labelled images and recordings share: finding the inputs of a source, and decoding them one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ranksure.data.folders import class_folders, is_saved_data_set
from ranksure.data.samples import listed
from ranksure.data.tables import Table, read_source
from ranksure.data.texts import classes
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
        source: where they come from.
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


def find_inputs(
    source: str | Path | pd.DataFrame | datasets.Dataset | datasets.DatasetDict,
    *,
    column: str,
    label_column: str,
    split: str | None,
    noun: str,
    kind: str,
    is_input: Callable[[Path], bool],
) -> Found:
    """The inputs of a folder of class folders, a table or a data set.

    Args:
        source: as :func:`~ranksure.data.images.load_image_rows` takes it.
        column: the column of inputs.
        label_column: the column of labels.
        split: which split, where there are several.
        noun: what an input is called, such as "recording".
        kind: what the column is called, such as "audio".
        is_input: whether a file is one, by its name.

    Raises:
        DataError: the source cannot be read, or a label cannot be used.
        SettingError: the arguments contradict each other.
    """
    folder = Path(source).expanduser() if isinstance(source, (str, Path)) else None
    if folder is not None and folder.is_dir() and not is_saved_data_set(folder):
        files, labels, names, notes = class_folders(folder, split, noun, is_input)
        return Found(files, labels, names, str(folder), notes, [str(file) for file in files])
    if column == label_column:
        raise SettingError(f"{kind} and label columns must differ, but both are {column!r}")
    table = read_source(source, [column, label_column], label_column, split)
    values = table.columns[column]
    if not values:
        article = "an" if noun[0] in "aeiou" else "a"
        raise DataError(f"{table.name} has no rows: it needs {article} {noun} and a label on each")
    labels, names = classes(table, label_column)
    notes = list(table.notes)
    if absent := sorted(set(range(len(names))) - set(labels)):
        notes.append(f"{table.name} has no row of {listed([names[i] for i in absent])}.")
    places = [f"{table.row(index)}, column {column!r}" for index in range(len(values))]
    base = folder.parent if folder is not None and folder.is_file() else Path()
    return Found(values, labels, names, table.name, notes, places, base)


def inputs_in_memory(
    values: Sequence[Any], labels: Sequence[Any], label_names: Sequence[str] | None, source: str, noun: str
) -> Found:
    """Inputs in memory, their labels coded.

    Raises:
        DataError: none, other numbers of inputs and labels, or a label that cannot be used.
    """
    if len(values) != len(labels):
        raise DataError(f"{source}: {len(values)} {noun}s but {len(labels)} labels; give one label per {noun}")
    if not len(values):
        raise DataError(f"{source}: there is no {noun}")
    plain = [label.item() if isinstance(label, np.generic) else label for label in labels]
    table = Table(source, {"label": plain}, class_names=None if label_names is None else list(label_names))
    ids, names = classes(table, "label")
    return Found(values, ids, names, source, [], [f"{source}: {noun} {index + 1}" for index in range(len(values))])


def decode_inputs(
    found: Found,
    decode: Callable[[Any, str, Path, Seen], Input],
    *,
    noun: str,
    smaller: str,
    most: int,
    reporter: Reporter | None,
) -> tuple[list[Input], list[str]]:
    """Every input as an array, and the notes with what was converted.

    Args:
        found: the inputs.
        decode: called with a value, its place, the base folder and where to count what was converted.
        noun: what an input is called.
        smaller: what makes inputs smaller, for the message.
        most: bytes that all may take.
        reporter: shown the decoding; silent by default.

    Raises:
        DataError: an input cannot be decoded.
        MemoryBudgetError: they take more than ``most``.
    """
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
                    f"data set) or make them {smaller}"
                )
            advance(index + 1, count)
    told = [f"{found.source}: {times} of {count} {noun}s {what}." for what, times in seen.converted.items()]
    return out, [*found.notes, *told]
