"""``ranksure reproduce``: the paper's experiments on parts that anyone can install."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ranksure.cli.app import app
from ranksure.cli.terminal import width

_EXAMPLES = """
[bold]Examples[/bold]

  ranksure reproduce

  ranksure reproduce linearised-curves --on rotten-tomatoes

  ranksure reproduce all --out out/reproduce

  ranksure reproduce linearised-curves --authors-models     (from the Hub)

A run that is stopped goes on where it was: finished parts lie in OUT/parts.
"""


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
    from ranksure.cli.claims import list_claims, measure_claims
    from ranksure.cli.terminal import RichReporter
    from ranksure.lab.options import ReproduceOptions
    from ranksure.lab.run import PAPER

    options = ReproduceOptions(out, on, authors_models, full, small, seed, json)
    console = Console(stderr=json, width=width())
    if not names:
        list_claims(console, PAPER, ("experiment", "what is claimed", "where", "minutes (--full)"))
        console.print(f"\nOn: {', '.join(setting.name for setting in options.settings())}", highlight=False)
        console.print("Run one: ranksure reproduce NAME --out DIR; every one: ranksure reproduce all", highlight=False)
        console.print("Random starts at low rank: ranksure lab no-spurious-minima", highlight=False)
        return
    asked = PAPER.chosen(names)
    run = options.run(RichReporter(Console(stderr=True)))
    console.print(
        f"{len(asked)} experiment{'s' * (len(asked) != 1)}, about {PAPER.minutes(asked, run):.0f} minutes on two cores "
        "with every setting and nothing finished yet; Ctrl-C keeps the finished parts.\n",
        highlight=False,
    )
    measure_claims(console, PAPER, asked, run, options.out, options.json)
