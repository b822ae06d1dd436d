"""Where labelled rows come from: text files, Parquet, data frames, saved data sets, the Hub.

Nothing is checked but the form: what the values must be is :mod:`ranksure.data.texts`'s business.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ranksure.data.folders import is_saved_data_set
from ranksure.errors import DataError, SettingError, one_line, shown

if TYPE_CHECKING:  # datasets takes a second to import: only sources that need it pay
    import datasets

_BOM = b"\xef\xbb\xbf"  # a byte order mark, as Excel writes it
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_OTHER_SUFFIXES = {".txt", ".xls", ".xlsx", ".gz", ".zip", ".bz2", ".xz", ".arrow", ".pkl", ".feather"}


class MissingColumnError(DataError):
    """A source without a wanted column; ``columns`` are those that it has."""

    def __init__(self, message: str, columns: Sequence[str]) -> None:
        super().__init__(message)
        self.columns = list(columns)


@dataclass
class Table:
    """The wanted columns of a source.

    Attributes:
        name: the source as errors name it.
        columns: values by column name, all of one length.
        sha256: of the file's bytes; None where the source is not one file.
        class_names: the names of a ``datasets.ClassLabel`` label column, whose values are then ids.
        unread: names of the columns that were not read.
        lines: the line of the file on which each row starts, where the file has lines.
        notes: what the user should know about how the source was read.
    """

    name: str
    columns: dict[str, list[Any]]
    sha256: str | None = None
    class_names: list[str] | None = None
    lines: list[int] | None = None
    unread: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self, index: int) -> str:
        """Row ``index`` as errors name it: counted from 1, with its line where there is one."""
        line = f" (line {self.lines[index]})" if self.lines is not None else ""
        return f"{self.name}: row {index + 1}{line}"


@dataclass(frozen=True)
class _Wanted:
    """Which columns to read; ``optional`` ones where they are there."""

    names: Sequence[str]
    label: str
    optional: Sequence[str]

    def table(self, name: str, present: Sequence[Any], values: Callable[[str], list[Any]], **more: Any) -> Table:
        """The columns of a source, of which ``values`` gives one; raises as :func:`check_columns`."""
        also = [column for column in self.optional if column in present and column not in self.names]
        check_columns(name, present, [*self.names, *also])
        columns = {column: values(column) for column in (*self.names, *also)}
        return Table(name, columns, unread=[str(other) for other in present if other not in columns], **more)


def read_source(
    source: Any, names: Sequence[str], label_column: str, split: str | None, optional: Sequence[str] = ()
) -> Table:
    """Read the columns ``names`` of a source (see :func:`ranksure.data.texts.load_rows`), ``optional`` ones if any.

    Raises:
        DataError: the source is missing, unreadable, malformed or has no such column.
        SettingError: the source is of a type that is not read here, or ``split`` does not apply to it.
    """
    wanted = _Wanted(names, label_column, optional)
    if isinstance(source, pd.DataFrame):
        _no_split(split, "a data frame")
        return wanted.table("data frame", list(source.columns), lambda name: source[name].tolist())
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        try:
            is_dir, exists = path.is_dir(), path.exists()
        except OSError as error:  # a name too long to be one
            raise DataError(f"{shown(str(source))} cannot be read: {one_line(error)}") from None
        if is_dir:
            return _saved(path, wanted, split)
        if exists or isinstance(source, Path) or _looks_like_a_path(source):
            return _file(path, wanted, split)
        return _hub(source, wanted, split)
    import datasets

    if isinstance(source, (datasets.Dataset, datasets.DatasetDict)):
        return _dataset(source, "data set", wanted, split)
    raise SettingError(
        f"data of type {type(source).__name__} is not read: give a file name, a folder of save_to_disk, a Hub id, "
        "a pandas.DataFrame or a datasets.Dataset (not a streaming one)"
    )


def check_columns(name: str, present: Sequence[Any], wanted: Sequence[str]) -> None:
    """Every wanted column is there exactly once.

    Raises:
        MissingColumnError: one is missing (the columns that there are get listed).
        DataError: one is there twice.
    """
    counts = Counter(present)
    for column in wanted:
        if counts[column] > 1:
            raise DataError(f"{name} has {counts[column]} columns named {column!r}: rename all but one")
        if column not in counts:
            listed = ", ".join(shown(other) for other in present[:20]) + (", ..." if len(present) > 20 else "")
            near = difflib.get_close_matches(column, [str(other) for other in present], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            message = f"{name} has no column {column!r}; its columns are {listed or '(none)'}{hint}"
            raise MissingColumnError(message, [str(other) for other in present])


# ---------------------------------------------------------------------------------------------------------------------
# files


def _file(path: Path, wanted: _Wanted, split: str | None) -> Table:
    if not path.exists():
        raise DataError(_no_such_file(path))
    readers: dict[str, Callable[[Path, bytes, _Wanted], Table]] = {
        ".csv": _csv,
        ".tsv": _csv,
        ".jsonl": _json,
        ".json": _json,
        ".parquet": _parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: files ending in {path.suffix or '(nothing)'} are not read; convert it to "
            f"{', '.join(readers)} (a compressed file must be unpacked)"
        )
    _no_split(split, f"{path}, a single file")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not raw.removeprefix(_BOM).strip():
        raise DataError(
            f"{path} is empty: it needs the columns {', '.join(map(repr, wanted.names))} and one row per sample"
        )
    table = reader(path, raw, wanted)
    table.sha256 = hashlib.sha256(raw).hexdigest()
    return table


def _decode(path: Path, raw: bytes) -> str:
    start = len(_BOM) if raw.startswith(_BOM) else 0
    try:
        return str(memoryview(raw)[start:], "utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + start
        utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        encoding = "UTF-16" if utf16 else "WINDOWS-1252"
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[offset]:02x} at offset {offset} (line {raw.count(10, 0, offset) + 1}); "
            f"convert it first, for example: iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}"
            + ("" if utf16 else " (if that is its encoding)")
        ) from None


def _csv(path: Path, raw: bytes, wanted: _Wanted) -> Table:
    text = _decode(path, raw)
    if path.suffix.lower() != ".tsv":
        return _delimited(path, text, wanted, ",", csv.QUOTE_MINIMAL)
    try:
        return _delimited(path, text, wanted, "\t", csv.QUOTE_MINIMAL)
    except _MalformedError as quoted:
        # Many published .tsv files use quotation marks as plain characters.
        try:
            table = _delimited(path, text, wanted, "\t", csv.QUOTE_NONE)
        except _MalformedError:
            raise quoted from None
        table.notes.append(f"{path}: quotation marks were read as plain characters, as they do not pair up.")
        return table


class _MalformedError(DataError):
    """A delimited file whose records do not parse."""


def _delimited(path: Path, text: str, wanted: _Wanted, delimiter: str, quoting: Any) -> Table:
    """Read CSV or TSV with the standard library: it knows line numbers and rejects ragged records."""
    records = _records(path, text, delimiter, quoting)
    _, header = next(records)
    rows: list[list[str]] = []
    lines: list[int] = []
    table = wanted.table(str(path), header, lambda _: [], lines=lines)
    for line, record in records:
        if len(record) != len(header):
            raise _MalformedError(
                f"{path}: line {line} has {len(record)} field{'s' * (len(record) != 1)}, but the header has "
                f"{len(header)}; quote fields that hold a delimiter, a quotation mark or a line break"
            )
        lines.append(line)
        rows.append(record)
    for column, values in table.columns.items():
        place = header.index(column)
        values += [row[place] for row in rows]
    return table


def _records(path: Path, text: str, delimiter: str, quoting: Any) -> Iterator[tuple[int, list[str]]]:
    """Records with the line on which each starts, blank lines left out."""
    before = csv.field_size_limit(sys.maxsize)  # a module-wide setting, put back below
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        start = 1
        try:
            for record in reader:
                if record:
                    yield start, record
                start = reader.line_num + 1
        except csv.Error as error:
            raise _MalformedError(
                f"{path}: the record that starts on line {start} is malformed ({error}); check its quotation marks "
                '(inside a quoted field, write "" for one)'
            ) from None
    finally:
        csv.field_size_limit(before)


def _json(path: Path, raw: bytes, wanted: _Wanted) -> Table:
    """Read JSON lines, or one JSON array of objects."""
    text = _decode(path, raw)
    lines: list[int] | None = []
    if text.lstrip().startswith("["):
        rows, lines = _loads(path, text, None), None
        name_row = "array element {}".format
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may be in a string
            if line.strip():
                rows.append(_loads(path, line, number))
                lines.append(number)
        name_row = "row {}".format
    present: dict[str, None] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: {name_row(number)} is {shown(row)}, not an object; write one object per line, "
                f"such as {json.dumps(dict.fromkeys(wanted.names, '...'))}"
            )
        present.update(dict.fromkeys(row))
    there = list(present) if rows else wanted.names
    return wanted.table(str(path), there, lambda column: [row.get(column) for row in rows], lines=lines)


def _loads(path: Path, text: str, line: int | None) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            where = f"line {line}" if line else "an object"
            raise DataError(f"{path}: {where} has {twice!r} more than once: keep one")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {line or error.lineno} is not valid JSON ({error.msg} at column {error.colno}); "
            "write one JSON object per line"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise DataError(f"{path}: line {line or 1} cannot be read as JSON: {one_line(error)}") from None


def _parquet(path: Path, raw: bytes, wanted: _Wanted) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(raw))
        schema = file.schema_arrow
        table = wanted.table(
            str(path), schema.names, lambda column: file.read(columns=[column]).column(column).to_pylist()
        )
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {one_line(error)}") from None
    if b"huggingface" in (schema.metadata or {}):  # written by datasets: its features are kept there
        import datasets

        table.class_names = _class_names(datasets.Features.from_arrow_schema(schema), wanted.label)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# datasets


def _saved(path: Path, wanted: _Wanted, split: str | None) -> Table:
    if not is_saved_data_set(path):
        files = sorted(p.name for p in path.iterdir() if p.suffix.lower() in {".csv", ".tsv", ".jsonl", ".parquet"})
        hint = f"name one of its files ({', '.join(files[:5])})" if files else "name a file"
        raise DataError(f"{path} is a folder, but not one that datasets.save_to_disk wrote; {hint}")
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever datasets raises for a damaged folder
        raise DataError(f"{path} is a damaged data set, save it again: {one_line(error)}") from None
    return _dataset(loaded, str(path), wanted, split)


def _hub(source: str, wanted: _Wanted, split: str | None) -> Table:
    if not _HUB_ID.fullmatch(source):
        raise DataError(f"{shown(source)} is neither a file or folder that exists nor a Hub id (owner/name)")
    import datasets

    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, split=split)
        if as_text := _as_text(loaded, wanted.label):
            loaded = datasets.load_dataset(name, config or None, split=split, **as_text)
    except Exception as error:  # connection, authorisation, unknown name, unknown configuration or split
        raise DataError(
            f"{source}: no such file or folder here{_near(Path(source))}, and the Hub data set of that name "
            f"could not be loaded ({one_line(error)}); check the name (owner/name, or owner/name:configuration), "
            "the split and the connection"
        ) from None
    if not isinstance(loaded, (datasets.Dataset, datasets.DatasetDict)):
        raise DataError(f"{source} is a streaming data set, which is not read: save it with save_to_disk first")
    return _dataset(loaded, source, wanted, split if isinstance(loaded, datasets.DatasetDict) else None)


def _as_text(loaded: Any, label_column: str) -> dict[str, Any]:
    """How to load a data set of CSV files again, its fields as they stand there: by default ``02116`` becomes 2116."""
    import datasets

    first = next(iter(loaded.values()), None) if isinstance(loaded, datasets.DatasetDict) else loaded
    if not isinstance(first, datasets.Dataset) or first.builder_name != "csv" or label_column not in first.features:
        return {}
    if isinstance(first.features[label_column], datasets.ClassLabel):
        return {}
    text = datasets.Features({column: datasets.Value("string") for column in first.column_names})
    return {"features": text, "keep_default_na": False}


def _dataset(loaded: datasets.Dataset | datasets.DatasetDict, name: str, wanted: _Wanted, split: str | None) -> Table:
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        splits = [str(key) for key in loaded]
        chosen = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
        if chosen not in splits:
            raise DataError(f"{name} has no split {chosen!r}; its splits are {', '.join(splits) or '(none)'}")
        loaded, name = loaded[chosen], f"{name} [{chosen}]"
    elif split is not None and split != str(loaded.split):
        raise SettingError(f"split {split!r} was asked of {name}, which is one split already: leave it out")
    there = [column for column in (*wanted.names, *wanted.optional) if column in loaded.column_names]
    for column in there:  # images and recordings stay encoded: their own tasks decode them and name one that fails
        if getattr(feature := loaded.features[column], "decode", False):
            loaded = loaded.cast_column(column, replace(feature, decode=False))
    plain = loaded.with_format(None)  # not tensors
    names = _class_names(loaded.features, wanted.label)
    return wanted.table(name, loaded.column_names, lambda column: list(plain[column]), class_names=names)


def _class_names(features: Any, label_column: str) -> list[str] | None:
    import datasets

    feature = features.get(label_column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


# ---------------------------------------------------------------------------------------------------------------------
# names that lead nowhere


def _no_split(split: str | None, what: str) -> None:
    if split is not None:
        raise SettingError(
            f"split {split!r} was asked of {what}: only data sets of the Hub or of save_to_disk have splits"
        )


def _looks_like_a_path(source: str) -> bool:
    """Whether a name that does not exist was meant as a file, not as a Hub id."""
    suffixes = {".csv", ".tsv", ".jsonl", ".json", ".parquet"} | _OTHER_SUFFIXES
    return (
        Path(source).suffix.lower() in suffixes
        or source.startswith((".", "~", "/"))
        or source.count("/") > 1
        or "\\" in source
        or ("/" in source and Path(source).parent.is_dir())
    )


def _no_such_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such file, and no folder {path.parent} either: check the path"
    return f"{path}: no such file{_near(path) or f'; check the name ({path.parent.resolve()} has nothing like it)'}"


def _near(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f" (near matches: {', '.join(near)})" if near else ""
