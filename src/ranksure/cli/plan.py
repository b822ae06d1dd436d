"""``ranksure plan`` and ``ranksure demo``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ranksure.cli.app import app
from ranksure.cli.options import (
    AudioColumn,
    BatchSize,
    Calibrate,
    Captured,
    CaptureDtype,
    Data,
    Device,
    DryRun,
    Dtype,
    EvalData,
    EvalSplit,
    HeldOutRows,
    ImageColumn,
    ImageSize,
    Json,
    LabelColumn,
    Layers,
    LossName,
    MaxLength,
    MaxSeconds,
    Memory,
    Merged,
    Model,
    Out,
    PairColumn,
    Pooling,
    Ranks,
    Revision,
    Samples,
    Seed,
    SplitName,
    Starts,
    Targets,
    TaskName,
    Template,
    TextColumn,
    Trust,
    Uniform,
    VerbalizerWords,
    WeightDecay,
)
from ranksure.cli.report import report_beside
from ranksure.cli.terminal import command_line, width

_PLAN_EXAMPLES = """
[bold]Examples[/bold]

  ranksure plan --model ./my-bert --data train.csv --target-modules query,value --layers-to-transform last --out plan

  ranksure plan --model distilbert/distilbert-base-uncased --data train.jsonl --eval-data test.jsonl --samples 256

  ranksure plan --model ./my-bert --data train.csv --dry-run

  ranksure plan --model ./my-bert --data train.csv --json > plan.json

  ranksure plan --task prompt --model ./my-llm --data train.csv --verbalizers "0=bad,1=good" --layers-to-transform last

  ranksure plan --task image --model ./my-vit --data photos/ --image-size 112 --layers-to-transform last

  ranksure plan --task speech --model whisper --data asterisk --max-seconds 4 --layers-to-transform last
"""


@app.command("plan", epilog=_PLAN_EXAMPLES)
def plan_command(
    model: Model,
    data: Data,
    out: Out = None,
    task: TaskName = "text",
    text_column: TextColumn = "text",
    text_pair_column: PairColumn = None,
    image_column: ImageColumn = "image",
    audio_column: AudioColumn = "audio",
    label_column: LabelColumn = "label",
    eval_data: EvalData = None,
    split: SplitName = None,
    eval_split: EvalSplit = None,
    target_modules: Targets = None,
    layers_to_transform: Layers = "all",
    samples: Samples = 64,
    heldout: HeldOutRows = 512,
    seed: Seed = 0,
    weight_decay: WeightDecay = "auto",
    ranks: Ranks = "1,2,4,8,16",
    captured: Captured = 0.99,
    memory: Memory = "8GB",
    loss: LossName = "cross-entropy",
    pooling: Pooling = "model",
    template: Template = None,
    verbalizers: VerbalizerWords = None,
    calibrate: Calibrate = True,
    image_size: ImageSize = None,
    max_seconds: MaxSeconds = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    capture_dtype: CaptureDtype = "float32",
    revision: Revision = None,
    random_starts: Starts = None,
    uniform: Uniform = False,
    merged: Merged = False,
    trust_remote_code: Trust = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Find the LoRA rank that a fine-tuning needs, and prove the answer."""
    from ranksure.network.targets import parse_target_modules
    from ranksure.planner.settings import parse_ranks

    settings: dict[str, Any] = {
        "task": task,
        "text_column": text_column,
        "text_pair_column": text_pair_column,
        "image_column": image_column,
        "audio_column": audio_column,
        "template": template,
        "verbalizers": verbalizers,
        "calibrate": calibrate,
        "image_size": image_size,
        "max_seconds": max_seconds,
        "label_column": label_column,
        "eval_data": eval_data,
        "split": split,
        "eval_split": eval_split,
        "target_modules": parse_target_modules(target_modules),
        "layers_to_transform": layers_to_transform,
        "samples": samples,
        "heldout": heldout,
        "seed": seed,
        "weight_decay": _weight_decay(weight_decay),
        "ranks": parse_ranks(ranks),
        "captured": captured,
        "memory": memory,
        "loss": loss,
        "pooling": pooling,
        "max_length": max_length,
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
        "capture_dtype": capture_dtype,
        "revision": revision,
        "random_starts": random_starts,
        "uniform": uniform,
        "merged": merged,
        "trust_remote_code": trust_remote_code,
    }
    _plan(model, data, settings, out, dry_run=dry_run, json=json)


@app.command("demo", epilog="[bold]Example[/bold]\n\n  ranksure demo --out out/demo\n")
def demo_command(
    out: Out = None,
    samples: Samples = 64,
    layers_to_transform: Layers = "last",
    seed: Seed = 0,
    weight_decay: WeightDecay = "auto",
    ranks: Ranks = "1,2,4,8,16",
    pooling: Pooling = "model",
    memory: Memory = "8GB",
    main_only: Annotated[
        bool, typer.Option("--main-only", help="Leave out the second part, a rank that is stuck.")
    ] = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """The same on the bundled model (all-MiniLM-L6-v2) and data (Rotten Tomatoes).

    A second part solves the same rows under mean pooling at a weight decay of 10% of lambda_max, which is
    weaker than held-out loss advises, to show a rank that training cannot leave (OUT/weak-decay).
    """
    from ranksure.bundled.minilm import minilm_path
    from ranksure.bundled.rotten_tomatoes import rotten_tomatoes
    from ranksure.planner.settings import parse_ranks

    settings: dict[str, Any] = {
        "target_modules": ["query", "value"],
        "layers_to_transform": layers_to_transform,
        "samples": samples,
        "seed": seed,
        "weight_decay": _weight_decay(weight_decay),
        "ranks": parse_ranks(ranks),
        "pooling": pooling,
        "memory": memory,
    }
    model, rows = str(minilm_path()), rotten_tomatoes()
    _plan(model, rows, settings, out, dry_run=dry_run, json=json)
    if main_only or dry_run or json:
        return
    Console(width=width()).rule("Part two: mean pooling at a weight decay too weak for this data")
    weaker = settings | {"pooling": "mean", "weight_decay": "10%", "heldout": 0}
    _plan(model, rows, weaker, None if out is None else out / "weak-decay", dry_run=False, json=False, brief=True)
    if out is not None:
        report_beside(out, Console(width=width()))  # once more, with both parts


def _weight_decay(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # auto, or a share of lambda_max; anything else is refused with the other settings


def _plan(
    model: str,
    data: Any,
    settings: dict[str, Any],
    out: Path | None,
    *,
    dry_run: bool,
    json: bool,
    brief: bool = False,
) -> None:
    if out is not None:
        _check_writable(out)
    from ranksure.cli.terminal import RichReporter
    from ranksure.planner.prepare import estimate, prepare
    from ranksure.planner.render import show, show_estimate
    from ranksure.planner.run import run_plan
    from ranksure.planner.settings import PlanSettings
    from ranksure.progress import Clock

    console = Console(stderr=json, width=width())
    clock = Clock(RichReporter(Console(stderr=True)))
    prepared = prepare(model, data, PlanSettings(**settings), None, clock)
    if dry_run:
        show_estimate(prepared, estimate(prepared), console)
        return
    result = run_plan(prepared, clock)
    result.record.command = command_line()
    if out is not None:
        with clock.stage("export", "Writing and checking the adapter"):
            result.save(out)
    show(result, console, None if out is None else str(out), brief=brief)
    if out is not None:
        report_beside(out, console)
    if json:
        sys.stdout.write(result.to_json())


def _check_writable(out: Path) -> None:
    """Refuse before the work what could not be written after it."""
    from ranksure.errors import SettingError
    from ranksure.planner.result import check_replaceable

    try:
        check_replaceable(out)
        if out.is_mount():
            raise SettingError(f"--out {out} is a mount point, which cannot be replaced; name a folder below it")
        # The result is written beside its place and moved there, so the folder around it is what matters.
        parent = next((folder for folder in out.resolve().parents if folder.exists()), out.resolve())
        with tempfile.TemporaryDirectory(prefix=".ranksure-", dir=parent):
            pass
    except OSError as error:
        raise SettingError(f"--out {out} cannot be written: {error.strerror or error}") from None
