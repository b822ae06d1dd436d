"""``ranksure reproduce``: the paper's experiments on parts that anyone can install."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ranksure.cli.commands import command
from ranksure.options import COMMON, OUTPUT, Option, Settings, whole

_COLOUR = {"agreed": "green", "partly": "yellow", "not agreed": "red"}


@dataclass(frozen=True, kw_only=True)
class ReproduceCommand(Settings):
    """What ``ranksure reproduce`` is asked."""

    names: Annotated[Sequence[str], Option("Which experiments, or all; none lists them.", COMMON, positional=True)] = ()
    out: Annotated[Path, Option("Folder for NAME.json, .csv, .png and .svg, and for finished parts.", COMMON)] = Path(
        "out/reproduce"
    )
    on: Annotated[str | None, Option("Settings to run on, by name, with commas; all by default.", COMMON)] = None
    authors_models: Annotated[bool, Option("The paper's kinds of model, from the Hub (needs the network).", COMMON)] = (
        False
    )
    full: Annotated[bool, Option("More seeds, ranks and steps: hours.", COMMON)] = False
    small: Annotated[bool, Option("A tiny size that only shows that all runs.", COMMON)] = False
    seed: Annotated[int, Option("First seed of rows and starts.", COMMON, check=whole(0, 2**31))] = 0
    json: Annotated[bool, Option("The records on standard output, all else on error.", OUTPUT)] = False


@command(
    ReproduceCommand,
    "ranksure reproduce",
    "ranksure reproduce linearised-curves --on rotten-tomatoes",
    "ranksure reproduce all --out out/reproduce",
    "ranksure reproduce linearised-curves --authors-models     (from the Hub)",
)
def reproduce(asked: ReproduceCommand) -> None:
    """Run the experiments of the paper: what is claimed, what was measured, and whether they agree.

    A run that is stopped goes on where it was: finished parts lie in OUT/parts.
    """
    from rich.markup import escape
    from rich.table import Table

    from ranksure.cli.report import report_beside
    from ranksure.cli.terminal import RichReporter, window
    from ranksure.errors import RanksureError, SettingError
    from ranksure.reproduce.experiment import Run
    from ranksure.reproduce.run import chosen, load, measure, minutes, write
    from ranksure.reproduce.run import names as known
    from ranksure.reproduce.settings import AUTHORS, SETTINGS, setting_named
    from ranksure.reproduce.storage import Parts

    console = window(asked.json)
    if not asked.names:
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
    if asked.full and asked.small:
        raise SettingError("--full and --small exclude each other")
    picked = chosen(asked.names)
    settings = AUTHORS if asked.authors_models else SETTINGS
    if asked.on is not None:
        settings = tuple(setting_named(part.strip()) for part in asked.on.split(",") if part.strip())
        if not settings:
            raise SettingError("--on names no setting: write it like rotten-tomatoes,spam-assassin")
    run = Run(Parts(asked.out / "parts"), asked.full, asked.small, asked.seed, RichReporter(), settings=settings)
    expected = minutes(picked, run)
    console.print(
        f"{len(picked)} experiment{'s' * (len(picked) != 1)}, about {expected:.0f} minutes on two cores with every "
        "setting and nothing finished yet; Ctrl-C keeps the finished parts.",
        highlight=False,
    )
    records: list[dict[str, Any]] = []
    failed: list[str] = []
    for name in picked:
        entry = load(name)
        console.print(
            f"\n[bold]{entry.title}[/bold] ({entry.where})\n[bold]claim[/bold]    {entry.claim}",
            highlight=False,
        )
        try:
            finding, record = measure(name, run, _command(name))
        except RanksureError as error:
            if len(picked) == 1:
                raise
            failed.append(f"{name}: {error}")
            console.print(f"  [red]not run[/red] {escape(str(error))}", highlight=False)
            continue
        written = write(asked.out, finding, record)
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
        report_beside(asked.out, console)
    if asked.json:
        from json import dumps

        sys.stdout.write(dumps(records[0] if len(picked) == 1 else records, indent=1) + "\n")
    if failed:
        raise SettingError(f"{len(failed)} of {len(picked)} experiments could not be run: {'; '.join(failed)}")


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
