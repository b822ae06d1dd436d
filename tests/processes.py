"""Other processes of the tests: as many threads as here, Ctrl-C as from a terminal, and a guard against hanging."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
# Seconds. Nothing is expected to take that long, on a busy machine either; pytest's own limit is above it.
PATIENCE = 300


def environment() -> dict[str, str]:
    """This process's, with its sources and its number of threads: another number changes the order of sums."""
    threads = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(torch.get_num_threads())
    )
    return {**os.environ, **threads, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ranksure.cli", *arguments]


def script(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


@contextmanager
def _interruptible() -> Iterator[None]:
    """A process started in here ends at SIGINT.

    Where the tests themselves ignore it (in the background of a script), a child would inherit that; a handler of
    Python's is not inherited.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def ended_at(
    said: str, number: signal.Signals, arguments: Sequence[str], *, stream: str = "stdout", **settings: Any
) -> tuple[int, str, str]:
    """Send a process a signal as soon as it says something.

    A process that then reads its standard input waits there, and cannot end before the signal comes.

    Args:
        said: how the line begins.
        number: the signal.
        arguments: of the process.
        stream: ``stdout`` or ``stderr``.
        **settings: for ``Popen``.

    Returns:
        Exit status, and what was still to read of standard output and standard error.
    """
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with _interruptible():
        process = subprocess.Popen(arguments, text=True, env=environment(), **pipes, **settings)
    try:
        heard = any(line.startswith(said) for line in getattr(process, stream))
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert heard, f"the process ended without saying {said!r}: {err}"
    return process.returncode, out, err


def run(arguments: Sequence[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """A process from beginning to end, with what it said."""
    return subprocess.run(
        arguments, capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=False, **settings
    )
