"""``ranksure plan`` and ``ranksure demo``."""

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from ranksure.cli.commands import Json, command, hold
from ranksure.options import COMMON, Option
from ranksure.planner.settings import PlanSettings
from ranksure.tasks.options import TargetModules


@dataclass(frozen=True, kw_only=True)
class _Planned(PlanSettings):
    """What ``plan`` and ``demo`` are asked beside a plan's settings."""

    out: Annotated[Path | None, Option("Folder for plan.json and the solved adapter.", COMMON)] = None
    layers_to_transform: Annotated[str, Option("last, all, 0-5, or 0,2,4.", COMMON, parse=str)] = "all"
    dry_run: Annotated[bool, Option("Print the memory and time estimate and stop.", COMMON)] = False
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class PlanCommand(_Planned):
    """What ``ranksure plan`` is asked."""

    model: Annotated[str, Option("Model folder, Hub id, or one of minilm, smollm2, dinov2, whisper.", COMMON)]
    data: Annotated[
        str,
        Option(
            ".csv, .tsv, .jsonl or .parquet file, save_to_disk folder, or Hub data set; a folder of class folders for "
            "images and speech; or one of rotten-tomatoes, spam-assassin, fashion-mnist, asterisk.",
            COMMON,
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class DemoCommand(_Planned):
    """What ``ranksure demo`` is asked."""

    LEFT_OUT: ClassVar = {each.name for each in fields(PlanSettings)} - {
        *(
            "samples",
            "layers_to_transform",
            "seed",
            "weight_decay",
            "ranks",
            "pooling",
            "memory",
            "linearised",
            "budget",
        )
    }

    layers_to_transform: Annotated[str, Option("last, all, 0-5, or 0,2,4.", COMMON, parse=str)] = "last"
    target_modules: TargetModules = ("query", "value")
    main_only: Annotated[bool, Option("Leave out the second part, a rank that is stuck.", COMMON)] = False


@command(
    PlanCommand,
    "ranksure plan --model ./my-bert --data train.csv --target-modules query,value --layers-to-transform last "
    "--out plan",
    "ranksure plan --model distilbert/distilbert-base-uncased --data train.jsonl --eval-data test.jsonl --samples 256",
    "ranksure plan --model ./my-bert --data train.csv --dry-run",
    "ranksure plan --model ./my-bert --data train.csv --json > plan.json",
    'ranksure plan --task prompt --model ./my-llm --data train.csv --verbalizers "0=bad,1=good" '
    "--layers-to-transform last",
    "ranksure plan --task image --model ./my-vit --data photos/ --image-size 112 --layers-to-transform last",
    "ranksure plan --task speech --model whisper --data asterisk --max-seconds 4 --layers-to-transform last",
)
def plan(asked: PlanCommand) -> None:
    """Find the LoRA rank that a fine-tuning needs, and prove the answer."""
    _plan(asked.model, asked.data, asked)


@command(DemoCommand, "ranksure demo --out out/demo")
def demo(asked: DemoCommand) -> None:
    """The same on the bundled model (all-MiniLM-L6-v2) and data (Rotten Tomatoes).

    A second part solves the same rows under mean pooling at a weight decay of 10% of lambda_max, which is weaker than
    held-out loss advises, to show a rank that training cannot leave (OUT/weak-decay).
    """
    from ranksure.bundled.minilm import minilm_path
    from ranksure.bundled.rotten_tomatoes import rotten_tomatoes
    from ranksure.cli.report import report_beside
    from ranksure.cli.terminal import window

    model, rows = str(minilm_path()), rotten_tomatoes()
    _plan(model, rows, asked)
    if asked.main_only or asked.dry_run or asked.json:
        return
    window().rule("Part two: mean pooling at a weight decay too weak for this data")
    weak = None if asked.out is None else asked.out / "weak-decay"
    _plan(model, rows, replace(asked, pooling="mean", weight_decay="10%", heldout=0, out=weak), brief=True)
    if asked.out is not None:
        report_beside(asked.out, window())  # once more, with both parts


def _plan(model: str, data: Any, asked: _Planned, *, brief: bool = False) -> None:
    out = asked.out
    if out is not None:
        _check_writable(out)
    from ranksure.cli.report import report_beside
    from ranksure.cli.terminal import RichReporter, command_line, show_notes, window
    from ranksure.planner.network.pieces import check_unfinished
    from ranksure.planner.prepare import estimate, prepare
    from ranksure.planner.render import show, show_estimate
    from ranksure.planner.result import PlanResult
    from ranksure.planner.run import run_plan
    from ranksure.planner.solved import read_solved
    from ranksure.progress import Clock

    console = window(asked.json)
    clock = Clock(RichReporter())
    prepared = prepare(model, data, asked, None, clock)
    if asked.dry_run:
        show_estimate(prepared, estimate(prepared), console)
        return
    kept = None if out is None or brief else out.with_name(out.name + ".partial")
    solved = None if out is None else read_solved(out, prepared)
    if solved is not None:
        record, factors, linear = solved
        result = PlanResult(record, factors, prepared, linear)
        show_notes([f"{out} holds the solution of this very question: only writing it is repeated."], console)
    else:
        if kept is not None:
            check_unfinished(kept)
        result = run_plan(prepared, clock, kept)
        result.record.command = command_line()
    if out is not None:
        with clock.stage("export", "Writing and checking the adapter"):
            result.save(out)
    network = result.record.network
    if kept is not None and not (network and network.stopped):  # else a larger budget goes on from there
        kept.unlink(missing_ok=True)
    show(result, console, None if out is None else str(out), brief=brief)
    if out is not None:
        report_beside(out, console)
    if asked.json:
        sys.stdout.write(result.to_json())


def _check_writable(out: Path) -> None:
    """Refuse before the work what could not be written after it."""
    from ranksure.errors import SettingError
    from ranksure.files import try_to_write
    from ranksure.planner.result import check_replaceable

    if not out.is_file():
        hold(out)
    try:
        check_replaceable(out)
        if out.is_mount():
            raise SettingError(f"--out {out} is a mount point, which cannot be replaced; name a folder below it")
        try_to_write(out.resolve().parent)  # beside its place the result is written, and then moved there
    except OSError as error:
        raise SettingError(f"--out {out} cannot be written: {error.strerror or error}") from None
