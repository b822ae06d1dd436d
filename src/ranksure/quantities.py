"""Quantities as people write them: memory and shares."""

from __future__ import annotations

import math
import re

from ranksure.errors import SettingError

_UNITS = {"": 1, "B": 1} | {
    f"{p}{b}": x**i for i, p in enumerate("KMGT", 1) for b, x in (("", 1000), ("B", 1000), ("IB", 1024))
}


def parse_memory(text: float | str) -> int:
    """Bytes from a number or a string such as ``8GB``, ``512MiB`` or ``6.5 GB``.

    Raises:
        SettingError: not understood, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", str(text))
    try:
        value = float(match[1]) * _UNITS[match[2].upper()] if match else 0
    except (KeyError, ValueError):
        value = 0
    if not 1 <= value < math.inf:
        raise SettingError(f"`memory` {text!r} is not understood: write 8GB, 512MiB or a number of bytes")
    return int(value)


def parse_share(text: str) -> float | None:
    """``10%`` as 0.1; None for anything that is not a positive percentage."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", text)
    return float(match[1]) / 100 if match and float(match[1]) > 0 else None


_TIMES = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}


def parse_effort(text: int | str) -> tuple[float, float]:
    """Passes over the data and seconds that work may take, one of them infinite: from ``300``, ``90s`` or ``10min``.

    Raises:
        SettingError: not understood, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", str(text))
    value, unit = (float(match[1]), match[2]) if match else (0.0, "")
    if not 0 < value < math.inf or unit not in {"", *_TIMES} or (not unit and value != int(value)):
        raise SettingError(
            f"`budget` {text!r} is not understood: write a number of passes such as 300, or 90s, 10min, 2h"
        )
    return (math.inf, value * _TIMES[unit]) if unit else (value, math.inf)
