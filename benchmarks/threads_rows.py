"""How threads wait for each other: a few microseconds of spinning, against sleeping at once and spinning long.

OpenMP reads its settings when torch is loaded, so every measurement is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.measure import QUICK, Row, Size, ratios
from ranksure.openmp import SPINS

WORK = """
import sys, time, torch
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
x = torch.randn(384, 384, generator=generator, dtype=torch.float64)
gram, rows, weight = x.T @ x, torch.randn(64, 384), torch.randn(384, 384)
eigh, small = lambda: torch.linalg.eigh(gram), lambda: (rows @ weight).relu_()
for function in (eigh, small):
    function()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < float(sys.argv[1]):
        function()
        calls += 1
    print((time.perf_counter() - began) / calls)
"""
BRIEFLY = {"GOMP_SPINCOUNT": str(SPINS)}
ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}
LONG: dict[str, str] = {}  # what GNU OpenMP does by itself


def threads_rows(size: Size) -> list[Row]:
    seconds = 2.0 if size.runs > QUICK.runs else 0.1
    alone = [(_timed(BRIEFLY, 1, seconds), _timed(ASLEEP, 1, seconds)) for _ in range(size.runs)]
    beside = [(_timed(BRIEFLY, 2, seconds), _timed(LONG, 2, seconds)) for _ in range(size.runs)]
    what = ["eigenvalue decomposition of 384 x 384", "products of 64 x 384 by 384 x 384"]
    rows = []
    for index, name in enumerate(what):
        for how, pairs, other in (
            ("alone", alone, "sleeping at once"),
            ("two processes on the same cores", beside, "spinning long"),
        ):
            ours, theirs = [a[index] for a, _ in pairs], [b[index] for _, b in pairs]
            note = f"ours {1e3 * min(ours):.3g} ms each"
            rows.append(Row(f"{name}, {how}: {other} takes", "x", ratios(theirs, ours), None, 0.0, note=note))
    return rows


def _timed(setting: dict[str, str], processes: int, seconds: float) -> list[float]:
    """Seconds of a decomposition and of a small product, in the slowest of the processes."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_"))}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(seconds)], env={**clean, **setting}, stdout=subprocess.PIPE, text=True
        )
        for _ in range(processes)
    ]
    found = [[float(line) for line in process.communicate()[0].split()] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("a timed process failed")
    return [max(values) for values in zip(*found, strict=True)]
