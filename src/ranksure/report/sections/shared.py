"""Blocks that several sections have."""

from __future__ import annotations

import shlex
from typing import Any

from ranksure.records.record import DataSource, RunSource
from ranksure.report.blocks import Code, Facts
from ranksure.report.records import Record
from ranksure.report.wording import NONE


def reproduce(section_id: str, record: Record, command: str | None, facts: list[tuple[str, Any]]) -> list[Any]:
    """How to make the result again: the command, or the record's own, then facts (None for unknown) and versions."""
    data = record.data
    command = command or data.command
    blocks: list[Any] = []
    if command:
        blocks.append(Code(f"{section_id}-command", "Command", command, "The command that made this result."))
    rows = [(name, NONE if value is None else str(value)) for name, value in facts]
    if not command:
        rows.insert(0, ("command", "not recorded"))
    versions = getattr(data, "versions", {})
    if own := getattr(data, "ranksure_version", None):
        versions = {"ranksure": own, **versions}
    rows.append(("versions", ", ".join(f"{name} {value}" for name, value in versions.items()) or NONE))
    rows.append(("record", record.path.name))
    blocks.append(Facts("How to reproduce this", rows))
    return blocks


def of_run(run: RunSource | None) -> list[str | None]:
    """Adapter, its SHA-256, and base model; None where they are not files."""
    return [None] * 3 if run is None else [run.adapter, run.adapter_sha256, run.base]


def of_data(data: DataSource | None) -> list[tuple[str, str | None]]:
    """Facts about the rows."""
    source, sha256 = (None, None) if data is None else (data.source, data.sha256)
    return [("data", source), ("data SHA-256", sha256)]


def settings_text(settings: dict[str, Any]) -> str:
    """Settings as one line, those that are not set left out."""
    shown = {key: value for key, value in settings.items() if value not in (None, False, [], "", "auto")}
    return ", ".join(f"{key}={shlex.quote(str(value))}" for key, value in shown.items())
