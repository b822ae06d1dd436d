"""``ranksure lab``: claims of the literature, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ranksure.cli.app import app
from ranksure.cli.terminal import width

_EXAMPLES = """
[bold]Examples[/bold]

  ranksure lab

  ranksure lab no-spurious-minima --out out/lab

  ranksure lab generalization --full --seed 1 --out out/lab
"""


@app.command("lab", epilog=_EXAMPLES)
def lab_command(
    name: Annotated[str | None, typer.Argument(help="Which entry; without one, all are listed.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for NAME.json and NAME.png.")] = Path("out/lab"),
    full: Annotated[bool, typer.Option("--full", help="The large size; the default takes under two minutes.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="The record on standard output, all else on error.")] = False,
) -> None:
    """Measure a claim of the literature: what is claimed, what was measured, and whether they agree."""
    from ranksure.cli.claims import list_claims, measure_claims
    from ranksure.cli.terminal import RichReporter
    from ranksure.lab.options import LabOptions
    from ranksure.lab.run import THEORY

    options = LabOptions(out, full, seed, json)
    console = Console(stderr=json, width=width())
    if name is None:
        list_claims(console, THEORY, ("entry", "what it measures", "source"))
        console.print("\nRun one: ranksure lab NAME --out DIR", highlight=False)
        return
    run = options.run(RichReporter(Console(stderr=True)))
    measure_claims(console, THEORY, [name], run, options.out, options.json)
