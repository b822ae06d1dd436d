"""Calls that are refused, each with one line for the user."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def refusal(error: type[Exception], parts: Iterable[str], call: Callable[..., object], *args: Any, **more: Any) -> str:
    """The message that a call is refused with: one line that has every part."""
    with pytest.raises(error) as caught:
        call(*args, **more)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    return message
