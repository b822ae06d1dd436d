"""The JSON Schema of every record, made from its type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from ranksure.records import KINDS

FILES = {"reproduce": "NAME.json of `ranksure reproduce`", "lab": "NAME.json of `ranksure lab`"}


def schemas() -> Iterator[tuple[str, bytes]]:
    """File name and JSON Schema by kind; ``schema`` is fixed to the number that this version reads."""
    for kind, record in KINDS.items():
        content = _with_null(msgspec.json.schema(record))
        content["$defs"][record.__name__]["properties"]["schema"] = {"const": record.SCHEMA}
        yield f"{kind}.schema.json", msgspec.json.format(msgspec.json.encode(content), indent=2)


def _with_null(schema: Any) -> Any:
    """Null beside every number without a bound: so one that is not finite is written."""
    if isinstance(schema, list):
        return schema if {"type": "null"} in schema else [_with_null(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "number" and not schema.keys() & {"minimum", "exclusiveMinimum", "maximum"}:
        return {**schema, "type": ["number", "null"]}
    return {key: _with_null(value) for key, value in schema.items()}


def table() -> str:
    """A line per kind: its file, its schema number, and its JSON Schema."""
    rows = ["| file | schema | JSON Schema |", "|---|---|---|"]
    for kind, record in KINDS.items():
        file = FILES.get(kind, f"`{kind}.json`")
        rows.append(f"| {file} | {record.SCHEMA} | [{kind}.schema.json](records/{kind}.schema.json) |")
    return "\n".join(rows)
