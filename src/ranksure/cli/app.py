"""The group of all commands, and its entry point."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

import click
from click.shell_completion import get_completion_class

from ranksure.cli.commands import CONTEXT, LazyCommands, usage_mistake
from ranksure.errors import RanksureError, exhausted, one_line
from ranksure.openmp import wait_briefly
from ranksure.options import spoken

# In the order of --help.
_COMMANDS = ("plan", "demo", "certify", "fit", "grow", "compress", "lab", "reproduce", "report")


def _version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        click.echo(f"ranksure {version('ranksure')}")
        ctx.exit()


def _completion(ctx: click.Context, _: click.Parameter, shell: str | None) -> None:
    if shell and (kind := get_completion_class(shell)):
        click.echo(kind(ctx.command, {}, "ranksure", "_RANKSURE_COMPLETE").source())
        ctx.exit()


app = LazyCommands(
    "ranksure",
    lazy={name: f"ranksure.cli.{'plan' if name == 'demo' else name}:{name}" for name in _COMMANDS},
    help="Which LoRA rank does this fine-tuning need? Answered with a certificate.",
    no_args_is_help=True,
    context_settings=dict(CONTEXT),
    params=[
        click.Option(["--version"], is_flag=True, is_eager=True, callback=_version, help="Print the version and stop."),
        click.Option(
            ["--completion"],
            type=click.Choice(["bash", "zsh", "fish"]),
            is_eager=True,
            callback=_completion,
            help="Print a script that completes commands and options in this shell, and stop.",
        ),
    ],
)


def main() -> None:
    """Entry point: a user's mistake is one line on standard error and exit code 2; Ctrl-C is 130, a fault here 70."""
    on_interrupt(_nothing)
    wait_briefly()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(_run())


def _run() -> int:
    try:
        code = app.main(prog_name="ranksure", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
    except click.UsageError as error:
        _say_error(usage_mistake(error))
    except click.ClickException as error:
        _say_error(error.format_message())
    except RanksureError as error:
        _say_error(spoken(str(error)))
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"interrupted; {_left()}", err=True)
        return 130
    except BrokenPipeError:  # whoever read standard output has gone; what is buffered can go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("RANKSURE_DEBUG"):
            raise
        return _failed(error)
    return 2


_SOURCES = f"{os.sep}ranksure{os.sep}"


def _failed(error: Exception) -> int:
    """What no code foresaw, in one line: the machine's limits, or else a fault of ranksure."""
    said, ran_out = one_line(error), exhausted(error)
    if ran_out == "memory":
        _say_error(f"not enough memory ({said}): use fewer rows or modules, shorter texts or a smaller batch")
        return 2
    if ran_out == "disk":
        _say_error(f"the disk takes no more ({said}): make room, or name a folder on another one")
        return 2
    if isinstance(error, OSError) and error.filename:
        _say_error(f"{error.filename}: {error.strerror}")
        return 2
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _SOURCES in frame.filename]
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    _say_error(
        f"unexpected {type(error).__name__}: {said}{where}. This is a fault of ranksure, or of a library on this "
        "input: please report it with what RANKSURE_DEBUG=1 in the environment shows"
    )
    return 70


def _say_error(message: str) -> None:
    click.echo(f"{click.style('error', fg='red', bold=True)} {' '.join(message.split())}", err=True)


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
