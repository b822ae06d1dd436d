"""``python -m benchmarks.run [--quick] [--only NAME] [--threads 2] [--out FILE]``: one table, and the same as JSON.

Every ratio is measured in pairs in this process, one after the other; a row is the median of the runs. Two
threads by default, for all sides: the targets are for two cores. On a busy machine ask for one: with as many
threads as cores, every product waits for its slowest thread, and ratios measure the neighbours.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from benchmarks.capture_rows import capture_rows
from benchmarks.certify_rows import certify_rows
from benchmarks.evaluation_rows import evaluation_rows, network_rows
from benchmarks.growth_rows import growth_rows
from benchmarks.measure import FULL, QUICK, Row, Size, show
from benchmarks.reduction_rows import reduction_rows
from benchmarks.solver_rows import solver_rows
from benchmarks.threads_rows import threads_rows

PARTS: dict[str, Callable[[Size], list[Row]]] = {
    "solver": solver_rows,
    "capture": capture_rows,
    "evaluation": evaluation_rows,
    "network": network_rows,
    "growth": growth_rows,
    "reduction": reduction_rows,
    "certify": certify_rows,
    "threads": threads_rows,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes and few runs: a check that every row works")
    parser.add_argument("--only", choices=sorted(PARTS), help="one part of the table")
    parser.add_argument("--threads", type=int, default=2, help="threads of every side (default 2)")
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"))
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("cvxpy").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="cvxpy")
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else FULL
    console, progress = Console(width=180 if not sys.stdout.isatty() else None), Console(stderr=True)
    began = time.perf_counter()
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    for name, part in PARTS.items():
        if options.only in (None, name):
            progress.print(f"{name} ...", style="dim")
            start = time.perf_counter()
            rows += part(size)
            seconds[name] = time.perf_counter() - start
            write(options, size, rows, {**seconds, "total": time.perf_counter() - began})
    setup = f"{platform.processor() or platform.machine()}, {options.threads} thread(s), torch {torch.__version__}"
    title = f"ranksure benchmarks{' (quick: sizes too small to judge)' if options.quick else ''}: {setup}"
    show(rows, console, title)
    console.print(f"{time.perf_counter() - began:.0f} s; written to {options.out}")
    return 0


def write(options: argparse.Namespace, size: Size, rows: list[Row], seconds: dict[str, float]) -> None:
    """Write what is known so far, whole or not at all."""
    record = {
        "schema": 1,
        "quick": options.quick,
        "threads": options.threads,
        "torch": torch.__version__,
        "runs": size.runs,
        "seconds": seconds,
        "rows": [row.to_json() for row in rows],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(options.out)


if __name__ == "__main__":
    sys.exit(main())
