"""``ranksure lab``: claims of the literature, measured."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ranksure.cli.commands import command
from ranksure.options import COMMON, OUTPUT, SEED, Option, Settings

_COLOUR = {"reproduced": "green", "partly": "yellow", "not-reproduced": "red"}


@dataclass(frozen=True, kw_only=True)
class LabCommand(Settings):
    """What ``ranksure lab`` is asked."""

    name: Annotated[str | None, Option("Which entry; without one, all are listed.", COMMON, positional=True)] = None
    out: Annotated[Path, Option("Folder for NAME.json and NAME.png.", COMMON)] = Path("out/lab")
    full: Annotated[bool, Option("The large size; the default takes under two minutes.", COMMON)] = False
    seed: Annotated[int, Option("Seed of everything random.", COMMON, check=SEED)] = 0
    json: Annotated[bool, Option("The record on standard output, all else on error.", OUTPUT)] = False


@command(
    LabCommand,
    "ranksure lab",
    "ranksure lab no-spurious-minima --out out/lab",
    "ranksure lab generalization --full --seed 1 --out out/lab",
)
def lab(asked: LabCommand) -> None:
    """Measure a claim of the literature: what is claimed, what was measured, and whether they agree."""
    from rich.table import Table

    from ranksure.cli.report import report_beside
    from ranksure.cli.terminal import RichReporter, window
    from ranksure.lab.entry import Run
    from ranksure.lab.run import load, measure, names, write

    console = window(asked.json)
    if asked.name is None:
        table = Table("entry", "what it measures", "source", box=None, pad_edge=False)
        for known in names():
            entry = load(known)
            table.add_row(f"[bold]{known}[/bold]", entry.claim, entry.source)
        console.print(table)
        console.print("\nRun one: ranksure lab NAME --out DIR", highlight=False)
        return
    entry = load(asked.name)
    console.print(f"[bold]{entry.title}[/bold] ({entry.source})\n[bold]claim[/bold]    {entry.claim}", highlight=False)
    finding, record = measure(asked.name, Run(full=asked.full, seed=asked.seed, reporter=RichReporter()))
    written = write(asked.out, finding, record)
    for check in finding.checks:
        mark = "[green]agrees[/green]" if check.holds else "[red]differs[/red]"
        console.print(f"  {mark}  {check.claim}\n           measured: {check.measured}", highlight=False)
    colour = _COLOUR[finding.verdict]
    console.print(f"[bold]verdict[/bold]  [{colour}]{finding.verdict}[/{colour}]   ({record['seconds']:.0f} s)")
    console.print(f"written to {' and '.join(str(path) for path in written)}", highlight=False)
    report_beside(asked.out, console)
    if asked.json:
        from json import dumps

        sys.stdout.write(dumps(record, indent=1) + "\n")
