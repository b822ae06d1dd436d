"""What the commands on trained runs share: loading, checks, records, notes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from ranksure.runs.saved.data import RunData
    from ranksure.runs.saved.open import LoadedRun


def load(
    adapter_dir: Path, data: str | None, places: dict[str, Any], options: dict[str, Any], weighting: str, reporter: Any
) -> tuple[LoadedRun, RunData | None]:
    """The run and its data, if any was named."""
    from ranksure.errors import SettingError
    from ranksure.runs.saved.data import DataSettings
    from ranksure.runs.saved.open import load_run, open_run, task_of

    if weighting not in ("token", "sample"):
        raise SettingError(f"unknown weighting {weighting!r}: use token or sample")
    chosen = DataSettings(**options)
    if data is None:
        if (kind := task_of(adapter_dir)) is not None:
            raise SettingError(
                f"the adapter in {adapter_dir} is for the task {kind}, which is opened with data: give --data"
            )
        with reporter.stage("Loading the run"):
            return load_run(adapter_dir, **places), None
    with reporter.stage("Loading the run and reading the data"):
        return open_run(adapter_dir, data, chosen, **places)


def check_out(out: Path) -> None:
    """Refuse before the work what could not be written after it."""
    from ranksure.errors import AdapterError

    try:
        if out.exists() and not out.is_dir():
            raise AdapterError(f"--out {out} is a file: name a folder")
        if out.is_dir() and any(out.iterdir()) and not (out / "adapter_config.json").is_file():
            raise AdapterError(f"--out {out} is not empty and holds no adapter: name a new folder, or empty this one")
        parent = next((folder for folder in out.resolve().parents if folder.exists()), out.resolve())
        with tempfile.TemporaryDirectory(prefix=".ranksure-", dir=parent):
            pass
    except OSError as error:
        raise AdapterError(f"--out {out} cannot be written: {error.strerror or error}") from None


def provenance(run: LoadedRun, rows: RunData | None) -> dict[str, Any]:
    """Which adapter, base and data a record is about: further fields of it."""
    from importlib.metadata import version

    data = None if rows is None else rows.described
    return {"run": run.source, "data": data, "ranksure_version": version("ranksure")}


def show_notes(notes: list[str], console: Console) -> None:
    """Print notes of what was read."""
    for note in notes:
        console.print(f"[yellow]note[/yellow] {escape(note)}", highlight=False)
