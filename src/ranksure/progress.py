"""How long work reports itself: stages with a count. The command line draws them; the library is silent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

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
