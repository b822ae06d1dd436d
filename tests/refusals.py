"""Calls that are refused, each with one line for the user."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def refusal(
    error: type[Exception], parts: str | Iterable[str], call: Callable[..., object], *args: Any, **more: Any
) -> str:
    """The message that a call is refused with: one line that has every part; those of ``a.*b`` in this order."""
    with pytest.raises(error) as caught:
        call(*args, **more)
    message = str(caught.value)
    assert "\n" not in message
    ordered, at = isinstance(parts, str), 0
    for part in parts.split(".*") if isinstance(parts, str) else parts:
        assert part in message[at:], f"{part!r} is not in {message!r}"
        at = message.index(part, at) + len(part) if ordered else 0
    return message
