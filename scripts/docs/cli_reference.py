"""The page of all commands and options, made from the commands' settings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from ranksure.cli.app import app
from ranksure.cli.commands import SettingsCommand, default_of, file_options, placeholder
from ranksure.options import GROUPS, OUTPUT, Stated, options_of, spoken
from ranksure.planner.settings import PlanSettings
from ranksure.runs.fitting.settings import FitSettings

SETTINGS = (PlanSettings, FitSettings)
"""Settings whose options the pages about Python list."""

INTRODUCTION = """# Command line

Every command, from the commands themselves (`ranksure COMMAND --help` prints the same). Answers go to standard output,
everything else to standard error. A mistake in the input is one line and exit code 2; Ctrl-C is exit code 130. In a
file for `--config`, options have the same names.
"""


def page() -> str:
    """The page in Markdown: per command what it does, how it is called, its options with defaults, and examples."""
    return "\n".join([INTRODUCTION, *(part for name, command in commands() for part in _command(name, command))])


def commands() -> Iterator[tuple[str, SettingsCommand]]:
    """Every command with its full name, in the order of `--help`."""
    context = click.Context(app)
    for name in app.list_commands(context):
        command = app.get_command(context, name)
        assert isinstance(command, SettingsCommand)
        yield f"ranksure {name}", command


def arguments(settings: type) -> str:
    """A table of the options of a settings dataclass, as arguments of Python."""
    rows = [f"| `{o.name}` {_cell(o.word)} | {_cell(o.option.help)}{_default(o)} |" for o in options_of(settings)]
    return "\n".join(["| argument | meaning |", "|---|---|", *rows])


def _command(name: str, command: SettingsCommand) -> Iterator[str]:
    stated = options_of(command.settings)
    arguments = [o for o in stated if o.option.positional]
    required = [f"{o.flag} {o.name.upper()}" for o in stated if o.required and not o.option.positional]
    yield f"## `{name}`\n\n{inspect.cleandoc(command.help or '')}\n"
    yield f"```text\n{' '.join([name, *map(placeholder, arguments), *required])} [options]\n```\n"
    if arguments:
        yield "| argument | meaning |\n|---|---|"
        yield from (f"| `{o.flag}` | {_meaning(o)} |" for o in arguments)
        yield ""
    for group in GROUPS:
        rows = [
            f"| {_names(o)} {_cell(o.word)} | {_meaning(o)} |"  # two columns, so that a phone shows both
            for o in stated
            if o.option.group == group and not o.option.positional
        ]
        if group == OUTPUT:
            rows += [f"| `{o.opts[0]}` {o.metavar or ''} | {_cell(o.help or '')} |" for o in file_options()]
        if rows:
            yield f"**{group}**\n\n| option | meaning |\n|---|---|"
            yield from [*rows, ""]
    yield "\n".join(["```sh", *command.examples, "```\n"])


def _names(stated: Stated) -> str:
    return f"`{stated.flag}`" + (f", `--no-{stated.flag[2:]}`" if stated.default is True else "")


def _meaning(stated: Stated) -> str:
    return _cell(spoken(stated.option.help)) + _default(stated)


def _default(stated: Stated) -> str:
    if stated.required:
        return " Required."
    if stated.default is True:
        return " Default: on."
    return "" if stated.default in (None, False, "", ()) else f" Default: `{default_of(stated)}`."


def _cell(text: str) -> str:
    """One cell of a table: bars escaped, asterisks and underscores of names taken literally."""
    return re.sub(r"([|*_<\[])", r"\\\1", text)
