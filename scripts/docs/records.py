"""The JSON Schema of every record, made from its type."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ranksure.records import KINDS

FILES = {"reproduce": "NAME.json of `ranksure reproduce`", "lab": "NAME.json of `ranksure lab`"}


def schemas() -> Iterator[tuple[str, bytes]]:
    """File name and JSON Schema by kind; ``schema`` is fixed to the number that this version reads."""
    for kind, record in KINDS.items():
        content = msgspec.json.schema(record)
        content["$defs"][record.__name__]["properties"]["schema"] = {"const": record.SCHEMA}
        yield f"{kind}.schema.json", msgspec.json.format(msgspec.json.encode(content), indent=2)


def table() -> str:
    """A line per kind: its file, its schema number, and its JSON Schema."""
    rows = ["| file | schema | JSON Schema |", "|---|---|---|"]
    for kind, record in KINDS.items():
        file = FILES.get(kind, f"`{kind}.json`")
        rows.append(f"| {file} | {record.SCHEMA} | [{kind}.schema.json](records/{kind}.schema.json) |")
    return "\n".join(rows)
