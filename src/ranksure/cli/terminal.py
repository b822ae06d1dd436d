"""What the commands share about the reader's window."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ranksure.options import spoken
from ranksure.progress import Advance


class Window(Console):
    """Where results are shown; arguments that a sentence of the library names become options."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(spoken(text), **how)


def window(json: bool = False) -> Window:
    """Standard output, or standard error where that is for JSON; wide tables where no width is known."""
    return Window(stderr=json, width=None if sys.stdout.isatty() else 140)


def command_line() -> str:
    """The command as it was given, to be recorded beside its result."""
    return shlex.join(["ranksure", *sys.argv[1:]])


def show_notes(notes: Iterable[str], console: Console) -> None:
    """Print notes of what was read."""
    for note in notes:
        console.print(f"[yellow]note[/yellow] {escape(note)}", highlight=False)


class RichReporter:
    """Progress bars on a console, by default standard error."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[Advance]:
        """A bar that disappears when its stage is done."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        # Where nobody watches, a bar that disappears would leave an empty line behind.
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        self.console.print(f"[dim]done[/dim] {title}", highlight=False)
