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
    if not 0 < value < math.inf:
        raise SettingError(f"`memory` {text!r} is not understood: write 8GB, 512MiB or a number of bytes")
    return int(value)


def parse_share(text: str) -> float | None:
    """``10%`` as 0.1; None for anything that is not a positive percentage."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", text)
    return float(match[1]) / 100 if match and float(match[1]) > 0 else None
