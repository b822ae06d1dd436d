"""``python -m benchmarks.advice``: does a planned rank transfer to the real, nonlinear network?

Each case plans on the linearised network, lets the network's own solver answer, then trains real PEFT adapters at
every rank of the sweep, at the planned ranks, at the paper's bound, by EVA and AdaLoRA, by the common recipe, and at 16
with a compression after it. Every finished method is kept in ``out/advice/CASE.json``; a second call goes on where the
first stopped. ``--table`` prints the tables, with targets met and not met, from what is there; ``--list`` prints the
cases and what each is expected to take.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.advice_cases import CASES, Case
from benchmarks.advice_network import network_answer
from benchmarks.advice_network_table import network_tables
from benchmarks.advice_recipe import common_recipe
from benchmarks.advice_rivals import adalora, eva, train_then_compress
from benchmarks.advice_table import tables
from benchmarks.advice_training import Bench, Outcome, Rule
from ranksure.errors import RanksureError
from ranksure.planner.prepare import Prepared, prepare
from ranksure.planner.run import run_plan
from ranksure.planner.settings import PlanSettings
from ranksure.progress import Clock, Silent

RANKS = (1, 2, 4, 8, 16)
SCHEMA = 1
_KEPT = (
    *("weight_decay", "lambda_max", "shapes", "optimum", "ranks", "recommended", "linearity", "seconds", "bounds"),
    *("processor_seconds", "heldout"),
)
_SIZES = {"smollm2": (3.5e6, 30), "minilm": (1.8e6, 6), "dinov2": (1.8e6, 12), "whisper": (1.8e6, 4)}
"""Weights of a layer, and layers."""
_STEPS_GUESS = 350  # full-batch gradients of one method: two learning rates and the polish


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.advice", description=__doc__)
    parser.add_argument("--only", action="append", metavar="CASE", help="this case (may be given several times)")
    parser.add_argument("--table", action="store_true", help="print the tables from the finished parts and stop")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/advice"))
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="peft")
    torch.set_num_threads(options.threads)
    names = [case.name for case in CASES]
    if unknown := [name for name in options.only or [] if name not in names]:
        print(f"no case {unknown[0]}; python -m benchmarks.advice --list prints them", file=sys.stderr)
        return 2
    cases = [case for case in CASES if not options.only or case.name in options.only]
    if options.table:
        parts = [part for case in cases if (part := read(options.out, case)) is not None]
        print(tables(parts), network_tables(parts, len(CASES)), sep="\n\n")
        return 0
    guesses = {case.name: guess_seconds(case) for case in cases}
    left = sum(guesses[case.name] for case in cases if not done(read(options.out, case)))
    for case in cases:
        state = "done" if done(read(options.out, case)) else f"about {guesses[case.name] / 60:.1f} minutes"
        print(f"{case.name}: {state}")
    print(f"about {left / 3600:.2f} hours in all on {options.threads} thread(s) of an idle machine", flush=True)
    if options.list:
        return 0
    failed = 0
    for case in cases:
        try:
            run_case(case, options.out)
        except RanksureError as error:  # a data set or model that is not installed: the others can still run
            failed += 1
            print(f"{case.name}: {error}", file=sys.stderr, flush=True)
    return 2 if failed else 0


def guess_seconds(case: Case) -> float:
    """A rough guess from operation counts and a timed product."""
    a = torch.randn(256, 384)
    b = torch.randn(384, 1536)
    torch.mm(a, b)
    began = time.perf_counter()
    for _ in range(20):
        torch.mm(a, b)
    rate = 20 * 2 * 256 * 384 * 1536 / (time.perf_counter() - began)
    layer, layers = _SIZES[case.model]
    length = {"image": 17, "speech": 100}.get(case.task, case.max_length * 0.6)  # tokens of a row
    tokens = case.samples * length
    every = case.pooling == "mean" or not case.has_tail
    read = tokens if every else case.samples
    step = 6 * (read * layer * (layers if case.layers == "all" else 1) + tokens * 16 * 1500) + 2e8
    methods = len(RANKS) + 5 + 2 * case.has_rivals
    plan = 2 * 6 * layer * layers * (case.samples + case.heldout) * length
    return (methods * _STEPS_GUESS * step + plan) / rate


def read(folder: Path, case: Case) -> dict[str, Any] | None:
    """What is known of a case; None if nothing is, or it was another case's or an older form."""
    try:
        part = json.loads((folder / f"{case.name}.json").read_text())
    except (OSError, ValueError):
        return None
    same = part.get("schema") == SCHEMA and part.get("case") == case.to_json() and part.get("rule") == rule_json()
    return part if same else None


def rule_json() -> dict[str, Any]:
    return json.loads(json.dumps(asdict(Rule())))


def done(part: dict[str, Any] | None) -> bool:
    return part is not None and part.get("finished", False) and "network" in part


def write(folder: Path, part: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{part['case']['name']}.json"
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(part, indent=1) + "\n")
    partial.replace(path)


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """Plan and train everything that is missing of a case."""
    part = read(folder, case)
    if part is not None and done(part):
        return part
    prepared, plan = plan_case(case)
    part = part or {"schema": SCHEMA, "case": case.to_json(), "rule": rule_json(), "plan": plan, "methods": {}}
    plan = part["plan"]  # of the first call; rows and head are the same in every call
    assert prepared.split.report is not None
    shapes = {name: (int(m), int(n)) for name, (m, n) in plan["shapes"].items()}
    bench = Bench(
        prepared.task,
        prepared.split.train,
        prepared.split.report,
        shapes,
        plan["weight_decay"],
        Rule(),
        case.seed,
        tail=case.has_tail,
    )
    part |= {
        "base_loss": bench.base_loss,
        "base_heldout": rounded(bench.base_heldout),
        "prefix_seconds": bench.prefix_seconds,
        "full_step_seconds": part.get("full_step_seconds") or bench.full_step_seconds(),
    }
    if "network" not in part:
        part["network"] = network_answer(bench, prepared.split.select, plan["lambda_max"])
        said = part["network"]
        print(f"  {case.name} network: {said['objective']:.5f}, {said['gradients']} gradients, {said['status']}")
        write(folder, part)
    train_missing(case, part, bench, folder)
    if "recipe" not in part and prepared.split.select is not None:
        part["recipe"] = common_recipe(bench, prepared.split.select)
    part["finished"] = True
    write(folder, part)
    return part


def train_missing(case: Case, part: dict[str, Any], bench: Bench, folder: Path) -> None:
    """Every method that the part does not have yet, written as soon as it is there."""
    for name, train in methods(case, part, bench).items():
        if name in part["methods"]:
            continue
        try:
            outcome = train()
        except (RuntimeError, ValueError, RanksureError) as error:  # a rival that does not run here is a finding
            if name not in ("EVA", "AdaLoRA", "compressed"):
                raise
            part["methods"][name] = {"name": name, "failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        else:
            part["methods"][name] = {**asdict(outcome), "heldout": rounded(outcome.heldout)}
            print(f"  {case.name} {name}: objective {outcome.objective:.5f}, {outcome.seconds:.0f} s", flush=True)
        write(folder, part)


def plan_case(case: Case) -> tuple[Prepared, dict[str, Any]]:
    """The plan, and the network with its head fitted."""
    began = time.process_time()  # the machine may be shared
    clock = Clock(Silent())
    settings = PlanSettings(
        target_modules=case.module_names,
        layers_to_transform=case.layers,
        samples=case.samples,
        heldout=case.heldout,
        seed=case.seed,
        weight_decay=case.weight_decay,
        ranks=RANKS,
        task=case.task,
        linearised=True,
        **case.options,
    )
    prepared = prepare(str(case.model_path()), case.rows(), settings, None, clock)
    data = run_plan(prepared, clock).data
    data["processor_seconds"] = time.process_time() - began
    return prepared, json.loads(json.dumps({key: data[key] for key in _KEPT}))


def methods(case: Case, part: dict[str, Any], bench: Bench) -> dict[str, Callable[[], Outcome]]:
    """What to train, by name; ranks that the sweep has are left out."""
    plan = part["plan"]
    every = list(plan["shapes"])
    pattern = plan["recommended"].get("linear_pattern", plan["recommended"]["rank_pattern"])  # older parts lack it
    planned, paper = plan["recommended"]["r"], plan["bounds"]["landscape"]["paper"]
    out: dict[str, Callable[[], Outcome]] = {}

    def add(name: str, wanted: dict[str, int], check: bool = False) -> None:
        out[name] = lambda: bench.lora(name, wanted, check)

    for rank in RANKS:
        add(f"r={rank}", dict.fromkeys(every, rank), check=rank == 1)
    if case.has_bounds and pattern and pattern != dict.fromkeys(every, planned):
        add("planned pattern", pattern)
    once = max(part["network"]["one_gradient"].values(), default=0)
    advised = {planned, part["network"]["table"]["recommended"], once if once < max(RANKS) else 0}
    for rank in sorted(advised - {0, *RANKS}):
        add(f"r={rank}", dict.fromkeys(every, rank))
    if case.has_bounds and case.scored and case.samples <= 64 and paper not in RANKS:  # larger ones are slow
        add(f"r={paper}", dict.fromkeys(every, paper))
    if case.has_rivals:
        out["EVA"], out["AdaLoRA"] = (lambda: eva(bench)), (lambda: adalora(bench))
    if part["network"]["parameters"]:
        out["compressed"] = lambda: train_then_compress(bench, part["methods"]["r=16"]["learning_rate"])
    return out


def rounded(values: list[float]) -> list[float]:
    return [round(value, 6) for value in values]


if __name__ == "__main__":
    sys.exit(main())
