"""What the lab says and writes: hints, plain JSON, and files that are there whole or not at all."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ranksure.errors import SettingError
from ranksure.files import write_file


def near(name: str, known: Iterable[str], *also: str) -> str:
    """A hint for a name that is not known: those like it, or all."""
    close = difflib.get_close_matches(name, [*known, *also], n=2, cutoff=0.4)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are {', '.join(known)}" + "".join(f", or {other}" for other in also)


def plain(value: Any) -> Any:
    """A value as JSON has it: dictionaries, lists and numbers; infinities and NaN become None."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_bytes(value: Any) -> bytes:
    """A plain value as the content of a file."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """An error of the disk, in what is written into a folder, becomes a ``SettingError``."""
    try:
        yield
    except OSError as error:
        raise SettingError(f"`out` {folder} cannot be written: {error.strerror or error}") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name, then rename it: it is there whole or not at all.

    Raises:
        SettingError: it cannot be written.
    """
    with writable(path.parent):
        write_file(path, content)
