"""Errors that a user can act on.

Every subclass of :class:`RanksureError` carries one line that names what is wrong (the file,
column, module or value) and what to do. The command line prints that line and exits with code 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class RanksureError(Exception):
    """A mistake in the input or the request, told in one line that says what to do."""


class DataError(RanksureError):
    """A data file, column, row or label that cannot be used."""


class ModelError(RanksureError):
    """A model that cannot be found, loaded, or used for this question."""


class TargetError(RanksureError):
    """A request for target modules that no module, or the wrong kind of module, answers."""


class CaptureError(RanksureError):
    """A network whose per-sample gradients could not be captured exactly."""


class MemoryBudgetError(RanksureError):
    """Work that would not fit the memory budget; says what would make it fit."""


class SettingError(RanksureError):
    """An option or argument with a value that has no meaning here."""


class AdapterError(RanksureError):
    """A PEFT adapter that cannot be written or does not load back as written."""


def shown(value: object, limit: int = 40) -> str:
    """A value as errors show it: quoted, and cut to ``limit`` characters."""
    text = repr(value[:limit]) if isinstance(value, str) else repr(value)[:limit]
    return text + "..." if len(value if isinstance(value, str) else repr(value)) > limit else text


def one_line(error: BaseException) -> str:
    """The first line of a dependency's error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


_EXHAUSTED = {  # compiled here: later there may be no memory for it
    "memory": re.compile(
        r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|failed to map segment|"
        r"can't start new thread|os error 12\b|bad_alloc",
        re.IGNORECASE,
    ),
    "disk": re.compile(
        r"no space left|disk quota|file too large|os error (28|27|122)\b|PytorchStreamWriter failed|"
        r"enforce fail at inline_container",
        re.IGNORECASE,
    ),
}


def exhausted(error: BaseException) -> str | None:
    """Whether it was ``memory`` or ``disk`` that ran out, by the words of any library; None where it was neither."""
    if isinstance(error, MemoryError):
        return "memory"
    if not isinstance(error, Exception):
        return None
    return next((what for what, words in _EXHAUSTED.items() if words.search(str(error))), None)


def settings_of(kind: Callable[..., T], what: str, given: Mapping[str, Any]) -> T:
    """The settings ``kind(**given)`` of ``what``.

    Raises:
        SettingError: one that ``kind`` does not have.
    """
    try:
        return kind(**given)
    except TypeError as error:
        raise SettingError(f"{what} has no such setting: {str(error).rpartition('argument ')[2]}") from None
