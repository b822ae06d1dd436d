"""How a record is written, checked and read: one type each, by msgspec."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import msgspec
from msgspec import Meta, inspect

from ranksure.errors import DataError


class _Stated(Protocol):
    SCHEMA: ClassVar[int]


T = TypeVar("T", bound=_Stated)
Count = Annotated[int, Meta(ge=0)]
Ranks = dict[str, Count]
"""Rank by module name."""

SCHEMA = 2
"""Of records about plans and runs. Since 2, squared error and logistic loss are means over outputs too, as in
transformers; records of 1 with another loss mean the same, and are read. What a later schema of one kind adds may be
left out: it reads those of 2."""

_RESCALED = ("squared-error", "logistic")

LARGEST = 64 * 2**20
"""Bytes of a record, at most."""


class Record(msgspec.Struct, kw_only=True):
    """What every result on disk holds.

    Attributes:
        schema: number of the layout, with the meaning of its numbers; files of another one are refused.
        command: the command line that made it.
        notes: sentences for the reader.
        versions: of the packages that it was made with.
    """

    schema: int
    command: str | None = None
    notes: list[str] = []
    versions: dict[str, str] = {}


class RunSource(msgspec.Struct, kw_only=True, frozen=True):
    """The adapter and the base model that a record is about."""

    adapter: str
    base: str
    adapter_sha256: str | None = None
    task_type: str | None = None
    dtype: str | None = None


class DataSource(msgspec.Struct, kw_only=True, frozen=True):
    """The rows that a record is about."""

    source: str
    sha256: str | None = None
    form: str | None = None
    rows: int | None = None
    rows_in_source: int | None = None
    max_length: int | None = None
    notes: list[str] = []


def plain(record: Any) -> Any:
    """The content as JSON has it: dicts, lists, numbers, and null for what is not finite."""
    return msgspec.json.decode(msgspec.json.encode(record, enc_hook=_number))


def encoded(record: Any, indent: int = 1) -> bytes:
    """JSON text with a newline at its end; what is not finite becomes null, and is read again as NaN."""
    return msgspec.json.format(msgspec.json.encode(record, enc_hook=_number), indent=indent) + b"\n"


def _number(value: Any) -> Any:
    """A scalar of NumPy or torch as Python's."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    raise NotImplementedError(f"a record cannot hold a {type(value).__name__}")


def parsed(path: Path) -> Any:
    """The JSON of a file.

    Raises:
        DataError: it cannot be read, is no JSON, or is too large for a record.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise DataError(f"{path} is larger than {LARGEST >> 20} MiB, too large for a result")
        return msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged, no JSON ({_one_line(error)}): make it again, or move it away") from None


def checked(content: Any, kind: type[T], path: Path) -> T:
    """Parsed JSON as a record.

    Args:
        content: from :func:`parsed`.
        kind: the record's type, whose ``SCHEMA`` is the number that this version reads.
        path: its file, for messages.

    Raises:
        DataError: another schema, or a value that is missing or not what it should be, with its place.
    """
    stated, schema = content.get("schema") if isinstance(content, dict) else None, kind.SCHEMA
    if (
        type(stated) is int
        and (stated == 2 or (stated == 1 and _loss_of(content) not in _RESCALED))
        and stated < schema
    ):
        stated, content = schema, {**content, "schema": schema}
    if stated != schema or isinstance(stated, bool):
        found = "no schema" if stated is None else f"schema {stated!r}"
        raise DataError(
            f"{path} has {found}; this version of ranksure reads schema {schema}: make it again, or update ranksure"
        )
    try:
        return msgspec.convert(_with_nan(content, inspect.type_info(kind)), kind)
    except msgspec.ValidationError as error:
        raise DataError(f"{path} is damaged: {_fault(str(error))}; make it again, or move it away") from None


def _with_nan(content: Any, kind: inspect.Type) -> Any:
    """NaN for null wherever a number must be: so a number that is not finite is written."""
    match kind:
        case inspect.Metadata():
            return _with_nan(content, kind.type)
        case inspect.FloatType(gt=None, ge=None, lt=None, le=None):
            return math.nan if content is None else content
        case inspect.StructType() | inspect.DataclassType() if isinstance(content, dict):
            fields = {field.encode_name: field.type for field in kind.fields}
            return {key: _with_nan(value, fields[key]) if key in fields else value for key, value in content.items()}
        case inspect.DictType() if isinstance(content, dict):
            return {key: _with_nan(value, kind.value_type) for key, value in content.items()}
        case inspect.ListType() if isinstance(content, list):
            return [_with_nan(value, kind.item_type) for value in content]
        case inspect.TupleType() if isinstance(content, list) and len(content) == len(kind.item_types):
            return [_with_nan(value, item) for value, item in zip(content, kind.item_types, strict=True)]
        case inspect.UnionType() if content is not None:
            for part in kind.types:
                content = _with_nan(content, part)
        case _:
            pass
    return content


def _loss_of(content: dict[str, Any]) -> str | None:
    """Which loss a record of schema 1 is about."""
    certificate = content.get("certificate")
    places = [content, certificate if isinstance(certificate, dict) else {}]
    found = [place.get(key) for place in places for key in ("loss_kind", "loss")]
    return next((name for name in found if isinstance(name, str)), None)


def read(path: Path, kind: type[T]) -> T:
    """A record from its file.

    Raises:
        DataError: as :func:`parsed` and :func:`checked`.
    """
    return checked(parsed(path), kind, path)


def _fault(message: str) -> str:
    """Msgspec's words, the place first: ``optimum.dual is missing``."""
    said, _, where = message.partition(" - at `$")
    place = where.rstrip("`").removeprefix(".") or "its content"
    missing = re.fullmatch(r"Object missing required field `(.+)`", said)
    if missing:
        return f"{place}.{missing[1]} is missing" if where else f"{missing[1]} is missing"
    return f"{place}: {said[:1].lower()}{said[1:]}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
