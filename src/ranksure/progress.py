"""How long work reports itself: stages with a count. The command line draws them; the library is silent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Advance = Callable[[int, int], None]


class Reporter(Protocol):
    """Receives the stages of a plan."""

    def stage(self, title: str) -> AbstractContextManager[Advance]:
        """Open a stage; call the result with (done, total)."""
        ...


class Silent:
    """Reports nothing."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Advance]:
        """A stage that nobody sees."""
        yield lambda done, total: None


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


class Clock:
    """Times stages by key, on top of a reporter."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter, self.seconds = reporter, {}

    @contextmanager
    def stage(self, key: str, title: str) -> Iterator[Advance]:
        """Open a stage and add its wall-clock time to ``seconds[key]``."""
        began = time.perf_counter()
        with self.reporter.stage(title) as advance:
            yield advance
        self.seconds[key] = round(self.seconds.get(key, 0.0) + time.perf_counter() - began, 3)
