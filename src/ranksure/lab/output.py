"""What the lab says and writes: hints, and files that are there whole or not at all."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from ranksure.errors import SettingError
from ranksure.files import write_file


def near(name: str, known: Iterable[str], *also: str) -> str:
    """A hint for a name that is not known: those like it, or all."""
    close = difflib.get_close_matches(name, [*known, *also], n=2, cutoff=0.4)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are {', '.join(known)}" + "".join(f", or {other}" for other in also)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name, then rename it: it is there whole or not at all.

    Raises:
        SettingError: it cannot be written.
    """
    try:
        write_file(path, content)
    except OSError as error:
        raise SettingError(f"`out` {path.parent} cannot be written: {error.strerror or error}") from None
