"""What the tests of other processes rely on: the same number of threads, and Ctrl-C as from a terminal."""

from __future__ import annotations

import signal

import pytest
import torch

from tests.processes import ended_at, script

WAITS = "import os, sys; print(os.environ['OMP_NUM_THREADS'], flush=True); sys.stdin.read()"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_process_has_our_number_of_threads_and_ends_at_ctrl_c(threads: int) -> None:
    torch.set_num_threads(threads)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script's background has it
    try:
        status, _, errors = ended_at(str(threads), signal.SIGINT, script(WAITS))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == -signal.SIGINT and errors.splitlines()[-1] == "KeyboardInterrupt"
