"""``ranksure report``, and the page that other commands write beside their results."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ranksure.cli.commands import command
from ranksure.errors import RanksureError
from ranksure.options import COMMON, Option, Settings

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class ReportCommand(Settings):
    """What ``ranksure report`` is asked."""

    dir: Annotated[
        Path,
        Option(
            "`out` of plan, certify, fit, grow, compress, lab or reproduce, or a folder of several.",
            COMMON,
            positional=True,
        ),
    ]
    out: Annotated[Path | None, Option("The file to write (default: DIR/report.html).", COMMON)] = None
    open: Annotated[bool, Option("Open it in the browser.", COMMON)] = False


@command(ReportCommand, "ranksure report out/demo --open", "ranksure report out --out report.html")
def report(asked: ReportCommand) -> None:
    """One page about the results in a folder: self-contained, for any screen, without a network."""
    from ranksure.cli.terminal import window
    from ranksure.report import write_report

    path, console = write_report(asked.dir, asked.out), window()
    console.print(f"written to {path} ({path.stat().st_size / 1000:.0f} kB)", highlight=False, markup=False)
    if asked.open:
        open_page(path, console)


def open_page(path: Path, console: "Console") -> None:
    """Show a page in the browser; say where it is if there is none."""
    import webbrowser

    try:
        opened = webbrowser.open(path.resolve().as_uri())
    except webbrowser.Error:
        opened = False
    if not opened:
        console.print(f"no browser could be opened: open {path.resolve()} in one", highlight=False, markup=False)


def report_beside(folder: Path, console: "Console", command: str | None = None) -> None:
    """Write ``report.html`` into a result folder; where it cannot be written, the result still stands."""
    from ranksure.report import write_report

    try:
        path = write_report(folder, command=command)
    except RanksureError as error:
        console.print(f"no report was written: {error}", highlight=False, markup=False)
        return
    console.print(f"to look at: {path}", highlight=False, markup=False)
