"""What the tables of a plan share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

WIDE = 110
"""Columns of a terminal that the full rank table needs."""

COLOURS = {"optimal": "green", "first-order-optimal": "green", "rank-bound": "yellow", "not-converged": "red"}
"""By verdict."""


def optional(value: Any, form: str) -> str:
    """A number, or a dash."""
    return "-" if value is None else format(value, form)


def module_names(names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """What all names begin with, and what is left of each; cut at a dot."""
    common = os.path.commonprefix(names) if len(names) > 1 else ""  # noqa: RUF071 (cut at a dot below)
    common = common[: common.rfind(".") + 1]
    return common.rstrip("."), {name: name.removeprefix(common) for name in names}


def counted(n: int, noun: str) -> str:
    """``1 pass``, ``12 passes``."""
    return f"{n:,} {noun}{'' if n == 1 else 'es' if noun.endswith('s') else 's'}"


def shown_share(value: float) -> str:
    """A share as people read it: ``0.8%``; 99.996% is not 100%."""
    shown = f"{value:.1%}"
    if value < 0.001 or (shown == "100.0%" and value < 1):
        return f"{100 * value:.{2 if value < 0.5 else 6}g}%"
    return shown
