"""The application that commands register with, and its entry point."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from ranksure.errors import RanksureError
from ranksure.openmp import wait_briefly

app = typer.Typer(
    name="ranksure",
    help="Which LoRA rank does this fine-tuning need? Answered with a certificate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Which LoRA rank does this fine-tuning need? Answered with a certificate."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"ranksure {installed('ranksure')}")
        raise typer.Exit


def main() -> None:
    """Entry point: a user's mistake is one line on standard error and exit code 2; Ctrl-C is 130."""
    on_interrupt(_nothing)
    wait_briefly()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except RanksureError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"[bold red]error[/bold red] {_escaped(str(error))}", highlight=False
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        _say_interrupted()
        raise SystemExit(130) from None
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Ctrl-C
            _say_interrupted()
        raise


def _nothing() -> str:
    return "no half-written output is left"


_left: Callable[[], str] = _nothing


def on_interrupt(left: Callable[[], str]) -> None:
    """Have Ctrl-C say what it leaves behind, where a command keeps unfinished work on purpose.

    Args:
        left: called when Ctrl-C has ended the command; gives the rest of the line after "interrupted; ".
    """
    global _left
    _left = left


def _say_interrupted() -> None:
    Console(stderr=True, soft_wrap=True).print(f"interrupted; {_escaped(_left())}", highlight=False)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
