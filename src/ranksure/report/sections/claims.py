"""A claim of the lab: what is claimed, and what was measured."""

from __future__ import annotations

import base64
import struct
from typing import Any

from ranksure.records.claims import LabRecord, ReproductionRecord
from ranksure.report.blocks import Picture, Prose, Section, Status, Table
from ranksure.report.records import Record
from ranksure.report.sections.curves import figures
from ranksure.report.sections.shared import reproduce, settings_text
from ranksure.report.wording import number

LARGEST_PICTURE = 400 * 1024
_MOST = 60  # rows of one table
_PNG = b"\x89PNG\r\n\x1a\n"
_ANSWERS = {
    "reproduced": ("Reproduced: every part of the claim agrees with what was measured.", "good"),
    "not-reproduced": ("Not reproduced: no part of the claim agrees with what was measured.", "bad"),
    "agreed": ("Agreed: what was measured agrees with the paper's claim.", "good"),
    "partly": ("Partly: what was measured agrees with a part of the paper's claim.", "warn"),
    "not agreed": ("Not agreed: what was measured does not agree with the paper's claim.", "bad"),
}


def build_lab(record: Record, section_id: str, command: str | None = None, detail: bool = True) -> Section:
    """The section of a result of the theory; without ``detail`` its picture is left out."""
    data: LabRecord = record.data
    section = _section(record, section_id, "Lab", "bad")
    if data.verdict == "partly":
        held = sum(check.holds for check in data.checks)
        section.answer = f"Partly: {held} of {len(data.checks)} parts of the claim agree with what was measured."
    section.sentences = [f"The claim: {data.claim}", f"Source: {data.source}."]
    section.blocks += _picture(record, section_id) if detail else []
    if tables := _tables(data.measured, record.path.name):
        section.blocks.append(Prose("All numbers", Status.MEASURED, details=tables))
    command = command or f"ranksure lab {data.name}" + (" --full" if data.size == "full" else "") + (
        f" --seed {data.seed}" if data.seed else ""
    )
    facts = [("seed", data.seed), ("size", data.size), ("seconds", data.seconds)]
    section.blocks += reproduce(section_id, record, command, facts)
    return section


def build_reproduction(record: Record, section_id: str, command: str | None = None, detail: bool = True) -> Section:
    """The section of an experiment of the paper; without ``detail`` curves are drawn and listed with fewer points."""
    data: ReproductionRecord = record.data
    section = _section(record, section_id, "Reproduction", "warn")
    section.sentences = [f"The claim ({data.where}): {data.claim}", *([] if data.checks else data.summary)]
    missing = data.settings.get("missing")
    section.warnings = [*data.notes, *map(str, missing if isinstance(missing, list) else [])]
    drawn = figures(data, section_id, detail)
    section.blocks += drawn or (_picture(record, section_id) if detail else [])
    if (table := data.table) and (width := len(table.columns)):
        rows = [[_cell(value, ".6g") for value in [*row, *[None] * width][:width]] for row in table.rows]
        words = frozenset(n for n in range(width) if any(isinstance(row[n], str) for row in table.rows if n < len(row)))
        measured = Table("Measured", table.columns, rows, words)
        section.blocks.append(Prose("The numbers", Status.MEASURED, table=measured))
    # Of lists of objects only their names.
    settings = {
        key: ", ".join(str(entry.get("name", "?")) if isinstance(entry, dict) else str(entry) for entry in value)
        if isinstance(value, list)
        else value
        for key, value in data.settings.items()
    }
    facts = [("seed", data.seed), ("settings", settings_text(settings) or None)]
    section.blocks += reproduce(section_id, record, command, facts)
    return section


def _section(record: Record, section_id: str, what: str, tone: str) -> Section:
    data = record.data
    answer, tone = _ANSWERS.get(data.verdict, (f"Verdict: {data.verdict}.", tone))
    checks = [(check.holds, check.claim, check.measured) for check in data.checks]
    blocks: list[Any] = [Prose("What was checked", Status.MEASURED, checks=checks)] if checks else []
    return Section(section_id, what, data.title, answer, tone, blocks=blocks)


def _picture(record: Record, i: str) -> list[Picture]:
    """The PNG beside a record, where it is one and not too large."""
    path = record.path.with_suffix(".png")
    try:
        content = path.read_bytes() if path.is_file() and path.stat().st_size <= LARGEST_PICTURE else b""
    except OSError:
        return []
    if not content.startswith(_PNG) or content[12:16] != b"IHDR" or len(content) < 33:
        return []
    width, height = struct.unpack(">II", content[16:24])
    if not 0 < width <= 8000 or not 0 < height <= 8000:
        return []
    data = record.data
    alt = f"Figure of {data.title}. " + " ".join(f"{c.claim} Measured: {c.measured}." for c in data.checks)
    source = "data:image/png;base64," + base64.b64encode(content).decode()
    return [Picture(f"{i}-picture", "The measurement", alt, source, width, height)]


def _tables(measured: dict[str, Any], file: str) -> list[Table]:
    """Lists of alike objects as tables, single values as one."""
    out: list[Table] = []
    singles = [[key, _cell(value)] for key, value in measured.items() if not isinstance(value, (dict, list))]
    for key, value in measured.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            columns = [name for name in value[0] if all(_plain(entry.get(name)) for entry in value)]
            if columns:
                rows = [[_cell(entry.get(name)) for name in columns] for entry in value[:_MOST]]
                more = f"{len(value) - _MOST} more are in {file}." if len(value) > _MOST else ""
                words = frozenset(n for n, name in enumerate(columns) if isinstance(value[0].get(name), str))
                out.append(Table(key.replace("_", " "), [c.replace("_", " ") for c in columns], rows, words, more))
        elif isinstance(value, dict):
            singles += [[f"{key}: {name}", _cell(entry)] for name, entry in value.items() if _plain(entry)]
    if singles:
        out.insert(0, Table("Single values", ["what", "value"], singles[:_MOST]))
    return out


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 8 and all(not isinstance(entry, (dict, list)) for entry in value)
    return not isinstance(value, dict)


def _cell(value: Any, form: str = ".4g") -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, float):
        return number(value, form)
    if isinstance(value, list):
        return ", ".join(_cell(entry) for entry in value)
    return str(value)
