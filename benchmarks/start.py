"""``python -m benchmarks.start --against TREE [--runs 9]``: how long the command line takes to start, in pairs.

TREE is a checkout of another commit; a row is the median of its time over this tree's, run one after the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = ("--help", "plan --help", "certify --help", "fit --help", "lab", "reproduce")


def seconds(tree: Path, command: str, cache: str) -> float:
    """Wall-clock time of one call, byte code written before."""
    env = {**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONPYCACHEPREFIX": cache}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ranksure.cli", *command.split()], env=env, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.start", description=__doc__)
    parser.add_argument("--against", type=Path, required=True, help="checkout of the other commit")
    parser.add_argument("--runs", type=int, default=9, help="pairs of runs")
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    print("| command | there, s | here, s | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        compare(options.against, here, options.runs, cache)


def compare(against: Path, here: Path, runs: int, cache: str) -> None:
    """A row for every command; the first pair fills the cache and is not counted."""
    for command in COMMANDS:
        pairs = [[seconds(tree, command, cache) for tree in (against, here)] for _ in range(runs + 1)]
        there, now = (statistics.median(times) for times in zip(*pairs[1:], strict=True))
        ratio = statistics.median(a / b for a, b in pairs[1:])
        print(f"| ranksure {command} | {there:.2f} | {now:.2f} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
