"""The results that a folder holds: found, parsed and checked before anything is drawn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ranksure.errors import SettingError
from ranksure.records import KINDS, RunCertificate, checked, parsed, read

_DEPTH = 3  # folders below the one given that are looked into
_MOST = 60  # records of one page
_SKIPPED = {"checkpoints", "parts", "__pycache__", "node_modules"}

_KNOWN = {f"{kind}.json": kind for kind in ("plan", "certificate", "fit", "grow", "compress")}


@dataclass(frozen=True)
class Record:
    """One result."""

    kind: str  # a key of :data:`KINDS`
    path: Path  # its file
    where: str  # the file's folder, relative to the folder of the report; empty for that folder itself
    data: Any  # its content, of the kind's type

    @property
    def folder(self) -> Path:
        return self.path.parent


@dataclass
class Found:
    """What a folder holds."""

    records: list[Record] = field(default_factory=list)  # the results, in the order of the page
    skipped: list[str] = field(default_factory=list)  # JSON files that are no result of this program


def find(folder: Path) -> Found:
    """All results in a folder (the ``--out`` of a command, or of several) and up to three levels below it.

    Raises:
        SettingError: no such folder, no result in it, or more than fit one page.
        DataError: a result that is damaged, or of a schema that this version does not read.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise SettingError(f"{folder} {what}; give a folder that ranksure wrote")
    found = Found()
    for place in _folders(folder, _DEPTH):
        _read_folder(place, folder, found)
    order = list(KINDS)
    found.records.sort(key=lambda record: order.index(record.kind))  # else as found, from the folder down
    if not found.records:
        seen = f" ({found.skipped[0]} is no result of ranksure)" if found.skipped else ""
        raise SettingError(
            f"{folder} holds no result{seen}: give the --out folder of plan, certify, fit, grow, compress, lab or "
            "reproduce"
        )
    if len(found.records) > _MOST:
        raise SettingError(
            f"{folder} holds {len(found.records)} results, more than the {_MOST} of one page: give a folder below it"
        )
    return found


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    if depth == 0:
        return
    try:
        inner = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink())
    except OSError as error:
        raise SettingError(f"{folder} cannot be read: {error.strerror or error}") from None
    for entry in inner:
        if not entry.name.startswith(".") and entry.name not in _SKIPPED:
            yield from _folders(entry, depth - 1)


def _read_folder(place: Path, root: Path, found: Found) -> None:
    where = "" if place == root else place.relative_to(root).as_posix()
    files = sorted(path for path in place.glob("*.json") if path.is_file() and not path.name.startswith("."))
    known = [path for path in files if path.name in _KNOWN]
    # Beside a result of fixed name lie files of others (adapter_config.json, tokenizer.json): not looked into.
    if known:
        order = list(_KNOWN)
        names = {path.name for path in known}
        for path in sorted(known, key=lambda entry: order.index(entry.name)):
            kind = _KNOWN[path.name]
            content = parsed(path)
            if kind == "certificate" and "fit.json" in names:
                continue  # shown by the fit, which it belongs to
            found.records.append(Record(kind, path, where, checked(content, KINDS[kind], path)))
        return
    if (place / "adapter_config.json").is_file() or (place / "config.json").is_file():
        return
    for path in files:
        content = parsed(path)
        kind = _kind(content)
        if kind is None:
            found.skipped.append(os.path.relpath(path, root))
        else:
            found.records.append(Record(kind, path, where, checked(content, KINDS[kind], path)))


def _kind(content: Any) -> str | None:
    if not isinstance(content, dict):
        return None
    if content.get("kind") == "reproduce":
        return "reproduce"
    return "lab" if {"name", "claim", "checks", "verdict"} <= set(content) else None


def certificate_beside(record: Record) -> RunCertificate:
    """The certificate of a fit, from the file beside ``fit.json``.

    Raises:
        DataError: it is missing or damaged.
    """
    return read(record.folder / "certificate.json", RunCertificate)
