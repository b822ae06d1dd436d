"""``python -m benchmarks.checks --against TREE [--runs 3]``: what a plan of 64 rows costs, in pairs.

TREE is a checkout of another commit, such as one before a check was added; a row is the median of this tree's processor
time over that tree's, of plans that were made one after the other on one thread, loading left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

PLAN = """
import sys, time, torch, ranksure
from ranksure.bundled.minilm import minilm_path
from ranksure.bundled.rotten_tomatoes import rotten_tomatoes
torch.set_num_threads(1)
pooling, heldout = sys.argv[1:]
rows, began = rotten_tomatoes(), time.process_time()
ranksure.plan(str(minilm_path()), rows, samples=64, pooling=pooling, heldout=int(heldout), linearised=True)
print(time.process_time() - began)
"""


def seconds(tree: Path, pooling: str, heldout: int) -> float:
    """Processor time of one plan, in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(tree / "src")}
    asked = [sys.executable, "-c", PLAN, pooling, str(heldout)]
    return float(subprocess.run(asked, env=env, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.checks", description=__doc__)
    parser.add_argument("--against", type=Path, required=True, help="checkout of the other commit")
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs")
    parser.add_argument("--heldout", type=int, default=512, help="held-out rows")
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    print("| plan of 64 rows | there, s | here, s | ratio |\n|---|---|---|---|")
    for pooling in ("model", "mean"):
        pairs = [
            [seconds(tree, pooling, options.heldout) for tree in (options.against, here)] for _ in range(options.runs)
        ]
        there, now = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"| pooling {pooling} | {there:.2f} | {now:.2f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
