"""A lab entry: what is claimed, and what was measured."""

from __future__ import annotations

import base64
import struct
from typing import Any

from ranksure.records.claims import LabRecord
from ranksure.report.blocks import Picture, Prose, Section, Status, Table
from ranksure.report.records import Record
from ranksure.report.sections.shared import reproduce
from ranksure.report.wording import NONE, number

LARGEST_PICTURE = 400 * 1024
_MOST = 60  # rows of one table
_TONES = {"reproduced": "good", "agreed": "good", "partly": "warn"}
_PNG = b"\x89PNG\r\n\x1a\n"


def build(record: Record, section_id: str, command: str | None = None, pictures: bool = True) -> Section:
    """The section of a lab entry."""
    data: LabRecord = record.data
    held = sum(check.holds for check in data.checks)
    answer = {
        "reproduced": "Reproduced: every part of the claim agrees with what was measured.",
        "partly": f"Partly: {held} of {len(data.checks)} parts of the claim agree with what was measured.",
        "not-reproduced": "Not reproduced: no part of the claim agrees with what was measured.",
    }.get(data.verdict, f"Verdict: {data.verdict}.")
    section = Section(section_id, "Lab", data.title, answer, _TONES.get(data.verdict, "bad"))
    section.sentences = [f"The claim: {data.claim}", f"Source: {data.source}."]
    checks = [(check.holds, check.claim, check.measured) for check in data.checks]
    blocks: list[Any] = [Prose("What was checked", Status.ESTIMATED, checks=checks)]
    if pictures and (image := picture(record, section_id)):
        blocks.append(image)
    if tables := _tables(data.measured, record.path.name):
        blocks.append(Prose("All numbers", Status.ESTIMATED, details=tables))
    command = command or f"ranksure lab {data.name}" + (" --full" if data.size == "full" else "") + (
        f" --seed {data.seed}" if data.seed else ""
    )
    facts = [("seed", data.seed), ("size", data.size), ("seconds", data.seconds)]
    section.blocks = blocks + reproduce(section_id, record, command, facts)
    return section


def picture(record: Record, i: str) -> Picture | None:
    """The PNG beside a record, where it is one and not too large."""
    path = record.path.with_suffix(".png")
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_PICTURE:
            return None
        content = path.read_bytes()
    except OSError:
        return None
    if not content.startswith(_PNG) or content[12:16] != b"IHDR" or len(content) < 33:
        return None
    width, height = struct.unpack(">II", content[16:24])
    if not 0 < width <= 8000 or not 0 < height <= 8000:
        return None
    data = record.data
    alt = f"Figure of {data.title}. " + " ".join(f"{c.claim} Measured: {c.measured}." for c in data.checks)
    source = "data:image/png;base64," + base64.b64encode(content).decode()
    return Picture(f"{i}-picture", "The measurement", alt, source, width, height)


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


def _cell(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, ".4g")
    if isinstance(value, list):
        return ", ".join(_cell(entry) for entry in value)
    return str(value)
