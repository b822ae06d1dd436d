"""What ``ranksure lab`` and ``ranksure reproduce`` print of claims that are measured."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ranksure.cli.commands import hold
from ranksure.cli.report import report_beside
from ranksure.errors import RanksureError, SettingError
from ranksure.lab.claim import Run
from ranksure.lab.run import Shelf, measure, write
from ranksure.records.claims import ClaimRecord
from ranksure.records.record import encoded


def list_claims(console: Console, shelf: Shelf, columns: Sequence[str]) -> None:
    """A table of a shelf's claims; a fourth column has their minutes."""
    table = Table(*columns, box=None, pad_edge=False)
    for name in shelf.names():
        claim = shelf.load(name)
        minutes = [f"{claim.minutes[0]:g} ({claim.minutes[1]:g})"] if claim.minutes else []
        table.add_row(f"[bold]{name}[/bold]", claim.claim, claim.source, *minutes)
    console.print(table)


def measure_claims(console: Console, shelf: Shelf, names: Sequence[str], run: Run, out: Path, json: bool) -> None:
    """Measure claims, print each and write it into ``out``.

    Raises:
        RanksureError: a claim cannot be measured; of several, after the others.
    """
    hold(out)
    records: list[ClaimRecord] = []
    failed: list[str] = []
    for name in names:
        if name != names[0]:
            console.print()
        claim = shelf.load(name)
        console.print(
            f"[bold]{claim.title}[/bold] ({claim.source})\n[bold]claim[/bold]    {claim.claim}", highlight=False
        )
        try:
            finding, record = measure(shelf, name, run, _command(shelf.command, name))
        except RanksureError as error:
            if len(names) == 1:
                raise
            failed.append(f"{name}: {error}")
            console.print(f"  [red]not run[/red] {escape(str(error))}", highlight=False)
            continue
        written = write(out, finding, record)
        show(console, shelf, record)
        console.print(f"written to {', '.join(str(path) for path in written)}", highlight=False)
        records.append(record)
    if records:
        report_beside(out, console)
    if json:
        sys.stdout.write(encoded(records[0] if len(names) == 1 else records).decode())
    if failed:
        raise SettingError(f"{len(failed)} of {len(names)} experiments could not be run: {'; '.join(failed)}")


def show(console: Console, shelf: Shelf, record: ClaimRecord) -> None:
    """The checks of a record, what is missing, and the verdict."""
    for check in record.checks:
        mark = "[green]agrees[/green]" if check.holds else "[red]differs[/red]"
        console.print(f"  {mark}  {check.claim}\n           measured: {check.measured}", highlight=False)
    for line in record.settings["missing"]:
        console.print(f"  [yellow]missing[/yellow] {escape(line)}", highlight=False)
    colour = dict(zip(shelf.verdicts, ("green", "yellow", "red"), strict=True))[record.verdict]
    found = f", {record.parts['found']} parts were there" if record.parts else ""
    console.print(
        f"[bold]verdict[/bold]  [{colour}]{record.verdict}[/{colour}]   ({record.seconds:.0f} s{found})",
        highlight=False,
    )


def _command(command: str, name: str) -> str:
    """What was typed, for one of its claims."""
    options: list[str] = []
    arguments = iter(sys.argv[2:])
    for argument in arguments:
        if argument in ("--out", "--on", "--seed"):
            options += [argument, next(arguments, "")]
        elif argument.startswith("-") and argument != "--json":
            options.append(argument)
    return shlex.join(["ranksure", command, name, *options])
