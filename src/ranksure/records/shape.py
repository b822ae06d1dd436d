"""Whether a JSON record has the shape that a section reads, told by the first place where it has not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Spec = Any
"""A predicate, a list of one spec (every entry), a dict of specs by key, or a :class:`Maybe`."""


class Maybe:
    """A value that may be null or missing."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec


class Values:
    """A dict whose keys are free (module names) and whose values follow one spec."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec


def number(value: Any) -> bool:
    """A finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def count(value: Any) -> bool:
    """A whole number of at least zero."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def scalar(value: Any) -> bool:
    """Anything that is one cell of a table."""
    return value is None or isinstance(value, (str, int, float, bool))


def interval(value: Any) -> bool:
    """Two finite numbers."""
    return isinstance(value, list) and len(value) == 2 and all(number(entry) for entry in value)


_CALLED: dict[Callable[[Any], bool], str] = {
    number: "a finite number",
    count: "a whole number of at least zero",
    text: "text",
    flag: "true or false",
    scalar: "a single value",
    interval: "two numbers",
}


def fault(value: Any, spec: Spec, where: str = "") -> str | None:
    """What is wrong with ``value``, or None.

    Args:
        value: parsed JSON.
        spec: the shape wanted; see :data:`Spec`.
        where: the place so far, such as ``optimum.ranks``.

    Returns:
        A phrase such as ``optimum.objective is missing``.
    """
    place = where or "its content"
    if isinstance(spec, Maybe):
        return None if value is None else fault(value, spec.spec, where)
    if isinstance(spec, Values):
        if not isinstance(value, dict):
            return f"{place} is not an object"
        return _first(fault(entry, spec.spec, _below(where, key)) for key, entry in value.items())
    if isinstance(spec, dict):
        if not isinstance(value, dict):
            return f"{place} is not an object"
        for key, inner in spec.items():
            if key not in value and not isinstance(inner, Maybe):
                return f"{_below(where, key)} is missing"
            if found := fault(value.get(key), inner, _below(where, key)):
                return found
        return None
    if isinstance(spec, list):
        if not isinstance(value, list):
            return f"{place} is not a list"
        return _first(fault(entry, spec[0], f"{where}[{index}]") for index, entry in enumerate(value))
    return None if spec(value) else f"{place} is not {_CALLED[spec]}"


def _below(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _first(found: Any) -> str | None:
    return next((entry for entry in found if entry), None)
