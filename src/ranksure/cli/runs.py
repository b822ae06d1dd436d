"""What the commands on trained runs share: options, loading, checks, records."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ranksure.cli.commands import Json, hold
from ranksure.options import COMMON, Option, not_negative
from ranksure.runs.options import CertificateOptions, DataSettings, PlaceOptions
from ranksure.tasks.options import KindOptions, values_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from ranksure.progress import Reporter
    from ranksure.runs.resizing.resized import Resized
    from ranksure.runs.saved.base import LoadedRun
    from ranksure.runs.saved.data import RunData


RunRows = Annotated[
    str,
    Option(
        "The training data: labelled texts, or for a causal language model JSON lines with prompt and completion, or "
        "messages.",
        COMMON,
    ),
]
NewAdapter = Annotated[Path, Option("Folder of the new adapter (ADAPTER_DIR itself is replaced whole).", COMMON)]


@dataclass(frozen=True, kw_only=True)
class RunCommand(CertificateOptions, PlaceOptions, KindOptions, DataSettings):
    """What ``certify``, ``grow`` and ``compress`` are asked about a finished run."""

    adapter_dir: Annotated[
        Path, Option("Folder of the trained LoRA adapter; it stays as it is.", COMMON, positional=True)
    ]
    weight_decay: Annotated[
        float | None,
        Option(
            "L2 decay of PEFT's matrices A and B, as SGD applies it. AdamW's decoupled decay is none: leave it out.",
            COMMON,
            check=not_negative,
        ),
    ] = None
    lam: Annotated[
        float | None,
        Option("In its place, one lambda for the updates of every module.", COMMON, "--lambda", check=not_negative),
    ] = None
    json: Json = False
    by_length: bool = True


def load(asked: RunCommand, data: str, reporter: "Reporter") -> "tuple[LoadedRun, RunData]":
    """The run and its data."""
    from ranksure.runs.saved.open import open_run

    with reporter.stage("Loading the run and reading the data"):
        own = values_of(asked, KindOptions)
        return open_run(asked.adapter_dir, data, asked, task_options=own, **values_of(asked, PlaceOptions))


def check_out(out: Path) -> None:
    """Refuse before the work what could not be written after it."""
    from ranksure.errors import AdapterError
    from ranksure.files import try_to_write

    if out.exists() and not out.is_dir():
        raise AdapterError(f"`out` {out} is a file: name a folder")
    hold(out)
    try:
        if out.is_dir() and any(out.iterdir()) and not (out / "adapter_config.json").is_file():
            raise AdapterError(f"`out` {out} is not empty and holds no adapter: name a new folder, or empty this one")
        try_to_write(out.resolve().parent)
    except OSError as error:
        raise AdapterError(f"`out` {out} cannot be written: {error.strerror or error}") from None


def write_changed(
    asked: RunCommand,
    out: Path,
    found: "Resized",
    run: "LoadedRun",
    rows: "RunData | None",
    reporter: "Reporter",
    show: "Callable[[Any, Console], None]",
    *,
    notes: "Sequence[str]" = (),
    then: str = "",
) -> None:
    """Write a changed adapter with its record, and print what was done to it, notes, and what comes ``then``."""
    from importlib.metadata import version

    from ranksure.cli.report import report_beside
    from ranksure.cli.terminal import command_line, show_notes, window

    data = None if rows is None else rows.described
    about = {"run": run.source, "data": data, "ranksure_version": version("ranksure")}
    with reporter.stage("Writing and checking the adapter"):
        written = found.save(out_dir=out, **run.rewritten, extra=about)
    console = window(asked.json)
    show(found, console)
    show_notes([*run.notes, *([] if rows is None else rows.notes), *notes], console)
    console.print(f"written to {written.folder}{then}", highlight=False)
    report_beside(out, console, command_line())
    if asked.json:
        sys.stdout.write((out / found.record).read_text(encoding="utf-8"))
