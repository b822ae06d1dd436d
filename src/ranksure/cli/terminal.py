"""What the commands share about the reader's window."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ranksure.progress import Advance


def width() -> int | None:
    """Wide tables where nothing says how wide the reader's window is."""
    return None if sys.stdout.isatty() else 140


def command_line() -> str:
    """The command as it was given, to be recorded beside its result."""
    return shlex.join(["ranksure", *sys.argv[1:]])


class RichReporter:
    """Progress bars on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def stage(self, title: str) -> Iterator[Advance]:
        """A bar that disappears when its stage is done."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        # Where nobody watches, a bar that disappears would leave an empty line behind.
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        self.console.print(f"[dim]done[/dim] {title}", highlight=False)
