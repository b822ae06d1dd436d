"""Running the command line in a test."""

from __future__ import annotations

import sys

import pytest

from ranksure.cli import main


def call(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of ``ranksure ARGUMENTS``, in this process."""
    monkeypatch.setattr(sys, "argv", ["ranksure", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
