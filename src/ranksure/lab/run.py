"""Finding, running and writing lab entries."""

from __future__ import annotations

import difflib
import json
import pkgutil
import platform
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ranksure.errors import SettingError
from ranksure.files import write_file
from ranksure.lab import entries
from ranksure.lab.entry import Entry, Finding, Run
from ranksure.lab.figures import png, style


def names() -> list[str]:
    """Names of all entries; one per file of ``ranksure/lab/entries``."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(entries.__path__))


def load(name: str) -> Entry:
    """An entry by its name.

    Raises:
        SettingError: there is none of that name.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise SettingError(f"there is no lab entry {name!r}: {hint}")
    return import_module(f"{entries.__name__}.{name.replace('-', '_')}").ENTRY


def measure(name: str, run: Run) -> tuple[Finding, dict[str, Any]]:
    """Run an entry.

    Returns:
        The finding, and its record as plain JSON: what ``NAME.json`` holds.
    """
    entry = load(name)
    began = time.perf_counter()
    with style():
        finding = entry.measure(run)
    record = {
        "schema": 1,
        "name": name,
        "title": entry.title,
        "claim": entry.claim,
        "measured": {"summary": [check.measured for check in finding.checks], **finding.numbers},
        "verdict": finding.verdict,
        "checks": [{"claim": c.claim, "measured": c.measured, "holds": bool(c.holds)} for c in finding.checks],
        "source": entry.source,
        "size": run.size("small", "default", "full"),
        "seed": run.seed,
        "seconds": round(time.perf_counter() - began, 2),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("ranksure", "torch", "numpy", "scipy")},
        },
    }
    return finding, record


def write(out: Path, finding: Finding, record: dict[str, Any]) -> tuple[Path, Path]:
    """Write ``NAME.json`` and ``NAME.png`` into ``out``, each whole or not at all.

    Raises:
        SettingError: the folder cannot be written.
    """
    paths = out / f"{record['name']}.json", out / f"{record['name']}.png"
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    try:
        with style():
            image = png(finding.figure)
        for path, content in zip(paths, (text.encode(), image), strict=True):
            write_file(path, content)
    except OSError as error:
        raise SettingError(f"`out` {out} cannot be written: {error.strerror or error}") from None
    return paths
