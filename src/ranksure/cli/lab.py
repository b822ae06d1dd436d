"""``ranksure lab``: claims of the literature, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ranksure.cli.app import app
from ranksure.cli.report import report_beside
from ranksure.cli.terminal import width

_EXAMPLES = """
[bold]Examples[/bold]

  ranksure lab

  ranksure lab no-spurious-minima --out out/lab

  ranksure lab generalization --full --seed 1 --out out/lab
"""

_COLOUR = {"reproduced": "green", "partly": "yellow", "not-reproduced": "red"}


@app.command("lab", epilog=_EXAMPLES)
def lab_command(
    name: Annotated[str | None, typer.Argument(help="Which entry; without one, all are listed.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for NAME.json and NAME.png.")] = Path("out/lab"),
    full: Annotated[bool, typer.Option("--full", help="The large size; the default takes under two minutes.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="The record on standard output, all else on error.")] = False,
) -> None:
    """Measure a claim of the literature: what is claimed, what was measured, and whether they agree."""
    from ranksure.cli.terminal import RichReporter
    from ranksure.lab.entry import Run
    from ranksure.lab.run import load, measure, names, write

    console = Console(stderr=json, width=width())
    if name is None:
        table = Table("entry", "what it measures", "source", box=None, pad_edge=False)
        for known in names():
            entry = load(known)
            table.add_row(f"[bold]{known}[/bold]", entry.claim, entry.source)
        console.print(table)
        console.print("\nRun one: ranksure lab NAME --out DIR", highlight=False)
        return
    entry = load(name)
    console.print(f"[bold]{entry.title}[/bold] ({entry.source})\n[bold]claim[/bold]    {entry.claim}", highlight=False)
    finding, record = measure(name, Run(full=full, seed=seed, reporter=RichReporter(Console(stderr=True))))
    written = write(out, finding, record)
    for check in finding.checks:
        mark = "[green]agrees[/green]" if check.holds else "[red]differs[/red]"
        console.print(f"  {mark}  {check.claim}\n           measured: {check.measured}", highlight=False)
    colour = _COLOUR[finding.verdict]
    console.print(f"[bold]verdict[/bold]  [{colour}]{finding.verdict}[/{colour}]   ({record['seconds']:.0f} s)")
    console.print(f"written to {' and '.join(str(path) for path in written)}", highlight=False)
    report_beside(out, console)
    if json:
        import sys
        from json import dumps

        sys.stdout.write(dumps(record, indent=1) + "\n")
