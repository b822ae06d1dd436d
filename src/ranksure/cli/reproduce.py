"""``ranksure reproduce``: the paper's experiments on parts that anyone can install."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ranksure.cli.app import app
from ranksure.cli.report import report_beside
from ranksure.cli.terminal import width

_EXAMPLES = """
[bold]Examples[/bold]

  ranksure reproduce

  ranksure reproduce linearised-curves --on rotten-tomatoes

  ranksure reproduce all --out out/reproduce

  ranksure reproduce linearised-curves --authors-models     (from the Hub)

A run that is stopped goes on where it was: finished parts lie in OUT/parts.
"""

_COLOUR = {"agreed": "green", "partly": "yellow", "not agreed": "red"}


@app.command("reproduce", epilog=_EXAMPLES)
def reproduce_command(
    names: Annotated[list[str] | None, typer.Argument(help="Which experiments, or all; none lists them.")] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for NAME.json, .csv, .png and .svg, and for finished parts.")
    ] = Path("out/reproduce"),
    on: Annotated[
        str | None, typer.Option("--on", help="Settings to run on, by name, with commas; all by default.")
    ] = None,
    authors_models: Annotated[
        bool, typer.Option("--authors-models", help="The paper's kinds of model, from the Hub (needs the network).")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="More seeds, ranks and steps: hours.")] = False,
    small: Annotated[bool, typer.Option("--small", help="A tiny size that only shows that all runs.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="First seed of rows and starts.", min=0, max=2**31)] = 0,
    json: Annotated[bool, typer.Option("--json", help="The records on standard output, all else on error.")] = False,
) -> None:
    """Run the experiments of the paper: what is claimed, what was measured, and whether they agree."""
    from ranksure.cli.terminal import RichReporter
    from ranksure.errors import RanksureError, SettingError
    from ranksure.reproduce.experiment import Run
    from ranksure.reproduce.run import chosen, load, measure, minutes, write
    from ranksure.reproduce.run import names as known
    from ranksure.reproduce.settings import AUTHORS, SETTINGS, setting_named
    from ranksure.reproduce.storage import Parts

    console = Console(stderr=json, width=width())
    if not names:
        table = Table("experiment", "what is claimed", "where", "minutes (--full)", box=None, pad_edge=False)
        for name in known():
            entry = load(name)
            table.add_row(
                f"[bold]{name}[/bold]", entry.claim, entry.where, f"{entry.minutes[0]:g} ({entry.minutes[1]:g})"
            )
        console.print(table)
        console.print(f"\nOn: {', '.join(setting.name for setting in SETTINGS)}", highlight=False)
        console.print("Run one: ranksure reproduce NAME --out DIR; every one: ranksure reproduce all", highlight=False)
        console.print("Random starts at low rank: ranksure lab no-spurious-minima", highlight=False)
        return
    if full and small:
        raise SettingError("--full and --small exclude each other")
    asked = chosen(names)
    settings = AUTHORS if authors_models else SETTINGS
    if on is not None:
        settings = tuple(setting_named(part.strip()) for part in on.split(",") if part.strip())
        if not settings:
            raise SettingError("--on names no setting: write it like rotten-tomatoes,spam-assassin")
    run = Run(Parts(out / "parts"), full, small, seed, RichReporter(Console(stderr=True)), settings=settings)
    expected = minutes(asked, run)
    console.print(
        f"{len(asked)} experiment{'s' * (len(asked) != 1)}, about {expected:.0f} minutes on two cores with every "
        "setting and nothing finished yet; Ctrl-C keeps the finished parts.",
        highlight=False,
    )
    records: list[dict[str, Any]] = []
    failed: list[str] = []
    for name in asked:
        entry = load(name)
        console.print(
            f"\n[bold]{entry.title}[/bold] ({entry.where})\n[bold]claim[/bold]    {entry.claim}",
            highlight=False,
        )
        try:
            finding, record = measure(name, run, _command(name))
        except RanksureError as error:
            if len(asked) == 1:
                raise
            failed.append(f"{name}: {error}")
            console.print(f"  [red]not run[/red] {escape(str(error))}", highlight=False)
            continue
        written = write(out, finding, record)
        for check in finding.checks:
            mark = "[green]agrees[/green]" if check.holds else "[red]differs[/red]"
            console.print(f"  {mark}  {check.claim}\n           measured: {check.measured}", highlight=False)
        for line in finding.missing:
            console.print(f"  [yellow]missing[/yellow] {escape(line)}", highlight=False)
        colour = _COLOUR[finding.verdict]
        console.print(
            f"[bold]verdict[/bold]  [{colour}]{finding.verdict}[/{colour}]   ({record['seconds']:.0f} s, "
            f"{record['parts']['found']} parts were there)",
            highlight=False,
        )
        console.print(f"written to {', '.join(str(path) for path in written)}", highlight=False)
        records.append(record)
    if records:
        report_beside(out, console)
    if json:
        from json import dumps

        sys.stdout.write(dumps(records[0] if len(asked) == 1 else records, indent=1) + "\n")
    if failed:
        raise SettingError(f"{len(failed)} of {len(asked)} experiments could not be run: {'; '.join(failed)}")


def _command(name: str) -> str:
    """What was typed, for one of its experiments."""
    options: list[str] = []
    arguments = iter(sys.argv[2:])
    for argument in arguments:
        if argument in ("--out", "--on", "--seed"):
            options += [argument, next(arguments, "")]
        elif argument.startswith("-") and argument != "--json":
            options.append(argument)
    return shlex.join(["ranksure", "reproduce", name, *options])
