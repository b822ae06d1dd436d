"""How capture and one evaluation grow with the samples: all-layer q,v at a fixed rank.

Times are measured in this process, the sizes one after another in every run. Peak memory is measured in a
fresh process per size, as the rise of the resident set's high-water mark (which Linux lets a process reset)
over what was resident before the capture: ``python -m benchmarks.growth_rows N``.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.evaluation_rows import random_factors
from benchmarks.measure import Row, Size, duration, exponent, seconds_of
from benchmarks.setting import contrasts, problem_of, setting
from ranksure.capture import Captured, capture
from ranksure.operators.factored import FactoredOperator
from ranksure.solvers.burer_monteiro import solve

RANK = 4
SOLVE_TOLERANCE = 1e-3


def growth_rows(size: Size) -> list[Row]:
    sizes = size.growth
    capture_seconds: list[list[float]] = []
    evaluation_seconds: list[list[float]] = []
    solve_seconds: list[float] = []
    for run in range(size.runs):
        captures, evaluations = [], []
        for n in sizes:
            captured, seconds = _timed_capture(n)
            captures.append(seconds)
            chosen = setting(n, fitted=False)
            problem = problem_of(captured.operator, captured.base_logits, chosen.labels)
            factors = random_factors(captured.operator, RANK)
            evaluate = lambda p=problem, f=factors: p.value_and_gradient(f)  # noqa: E731
            evaluate()
            evaluations.append(min(seconds_of(evaluate) for _ in range(3)))
            if run == 0:
                solve_seconds.append(seconds_of(lambda p=problem: solve(p, tolerance=SOLVE_TOLERANCE)))
        capture_seconds.append(captures)
        evaluation_seconds.append(evaluations)
    memory = {n: _memory_in_a_process(n, size.runs) for n in sizes}
    capture_peaks, evaluation_peaks = (
        [[memory[n][kind][run] for n in sizes] for run in range(size.runs)] for kind in ("capture", "evaluation")
    )

    def row(name: str, runs: list[list[float]], unit: str, target: bool = True) -> Row:
        middle = [statistics.median(column) for column in zip(*runs, strict=True)]
        shown = [duration(x) if unit == "s" else f"{x / 2**20:.0f} MiB" for x in middle]
        note = f"N={', '.join(map(str, sizes))}: {', '.join(shown)}"
        values = [exponent(sizes, run) for run in runs]
        return Row(name, "N^", values, "<=" if target else None, 1.1, note=note, details={"runs": runs, "sizes": sizes})

    return [
        row("growth of capture, time (all-layer q,v)", capture_seconds, "s"),
        row("growth of capture, peak memory", capture_peaks, "B"),
        row(f"growth of one evaluation, time (r={RANK})", evaluation_seconds, "s"),
        row("growth of one evaluation, peak memory with the operators", evaluation_peaks, "B"),
        row(f"growth of the whole solve to {SOLVE_TOLERANCE:g}, time (one run)", [solve_seconds], "s", target=False),
    ]


def _timed_capture(n: int) -> tuple[Captured, float]:
    chosen = setting(n, fitted=False)
    targets = chosen.targets("all")
    captured: list[Captured] = []
    seconds = seconds_of(lambda: captured.append(capture(chosen.model, chosen.batches, targets, contrasts())))
    return captured[0], seconds


def _memory_in_a_process(n: int, runs: int) -> dict[str, list[float]]:
    command = [sys.executable, "-m", "benchmarks.growth_rows", str(n), str(runs), str(torch.get_num_threads())]
    # Freed blocks go back to the system, so that one run leaves nothing for the next to reuse.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the memory measurement for {n} samples failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _resident(kind: str) -> int:
    """Bytes of the resident set: ``VmRSS`` now, ``VmHWM`` at its highest."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _measure_memory(n: int, runs: int) -> dict[str, list[float]]:
    chosen = setting(n, fitted=False)
    targets = chosen.targets("all")
    capture(chosen.model, chosen.batches[:1], targets, contrasts())  # libraries and weights are resident now
    out: dict[str, list[float]] = {"capture": [], "evaluation": []}
    reset = Path("/proc/self/clear_refs")
    for _ in range(runs):
        reset.write_text("5")
        before = _resident("VmRSS")
        captured = capture(chosen.model, chosen.batches, targets, contrasts())
        out["capture"].append(_resident("VmHWM") - before)
        operator: FactoredOperator = captured.operator
        problem = problem_of(operator, captured.base_logits, chosen.labels)
        factors = random_factors(operator, RANK)
        reset.write_text("5")
        problem.value_and_gradient(factors)
        out["evaluation"].append(_resident("VmHWM") - before)
        del captured, operator, problem, factors
    return out


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(_measure_memory(int(sys.argv[1]), int(sys.argv[2]))))
