"""``ranksure fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ranksure.cli.app import app, on_interrupt
from ranksure.cli.options import (
    AudioColumn,
    Calibrate,
    CompletionColumn,
    Device,
    Dtype,
    EvalData,
    EvalSplit,
    HeldOutRows,
    ImageColumn,
    ImageSize,
    Json,
    LabelColumn,
    LossName,
    LossOn,
    MaxLength,
    MaxSeconds,
    Memory,
    MessagesColumn,
    Packing,
    PairColumn,
    Pooling,
    PromptColumn,
    Revision,
    RunBatchSize,
    SplitName,
    Targets,
    Template,
    TextColumn,
    Tolerance,
    Trust,
    VerbalizerWords,
    Weighting,
)
from ranksure.cli.report import report_beside
from ranksure.cli.terminal import command_line, width

_EXAMPLES = """
[bold]Examples[/bold]

  ranksure fit --plan out/demo --max-steps 300 --gradient-accumulation-steps full --out fit

  ranksure fit --plan plan --data train.csv --num-train-epochs 20 --certify-every 50 --grow --out fit

  ranksure fit --plan plan --data train.csv --mode linear --out linear

  ranksure fit --model ./my-bert --data train.csv --rank 4 --target-modules query,value --lambda 0.01 --out fit

  ranksure fit --task CAUSAL_LM --model ./my-llm --data chat.jsonl --rank 8 --lambda 1e-3 --out fit
"""

_COLOUR = {"first-order-optimal": "green", "rank-bound": "yellow", "not-converged": "yellow", "failed-loudly": "red"}


@app.command("fit", epilog=_EXAMPLES)
def fit_command(
    out: Annotated[Path, typer.Option("--out", help="Folder to write; an unfinished fit in it is gone on with.")],
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="Folder of a plan: gives model, head, ranks and lambda, and what to compare with."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Model folder or Hub id (default: the plan's).")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="The training rows (a plan on the bundled data needs none).")
    ] = None,
    task: Annotated[
        str, typer.Option("--task", help="text, prompt, image, speech (the plan's), or CAUSAL_LM (language modelling).")
    ] = "text",
    rank: Annotated[int | None, typer.Option("--rank", help="One rank for every target (default: the plan's).")] = None,
    lora_alpha: Annotated[
        float | None, typer.Option("--lora-alpha", help="Scale times rank (default: the rank, for scale 1).")
    ] = None,
    target_modules: Targets = None,
    layers_to_transform: Annotated[
        str | None, typer.Option("--layers-to-transform", help="last, all, 0-5, or 0,2,4.")
    ] = None,
    lam: Annotated[
        float | None,
        typer.Option("--lambda", help="Penalty on factors of scale 1 (default: the plan's, or 0)."),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", help="In its place, the L2 decay of PEFT's matrices A and B.")
    ] = None,
    mode: Annotated[
        str, typer.Option("--mode", help="train, or linear: the plan's optimum, certified and exported.")
    ] = "train",
    init: Annotated[str, typer.Option("--init", help="default (PEFT's), or linear: the plan's optimum.")] = "default",
    train_head: Annotated[bool, typer.Option("--train-head", help="Train the head too (frozen otherwise).")] = False,
    lora_dropout: Annotated[float, typer.Option("--lora-dropout", help="As PEFT's.")] = 0.0,
    model_dropout: Annotated[
        bool, typer.Option("--model-dropout", help="Leave the network's own dropout on (off otherwise).")
    ] = False,
    optim: Annotated[str, typer.Option("--optim", help="adam or sgd, both with true L2 decay.")] = "adam",
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="The highest learning rate.")] = 2e-3,
    lr_scheduler_type: Annotated[str, typer.Option("--lr-scheduler-type", help="As the Trainer's.")] = "linear",
    warmup_steps: Annotated[int, typer.Option("--warmup-steps", help="As the Trainer's.")] = 0,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Optimizer steps.")] = None,
    num_train_epochs: Annotated[float, typer.Option("--num-train-epochs", help="Passes over the data.")] = 3.0,
    batch_size: RunBatchSize = None,
    gradient_accumulation_steps: Annotated[
        str, typer.Option("--gradient-accumulation-steps", help="Batches per step, or full for all of them.")
    ] = "1",
    max_grad_norm: Annotated[float, typer.Option("--max-grad-norm", help="Clip gradients; 0: no clipping.")] = 0.0,
    weighting: Weighting = "token",
    save_steps: Annotated[int, typer.Option("--save-steps", help="Steps between checkpoints.")] = 100,
    logging_steps: Annotated[int, typer.Option("--logging-steps", help="Steps between logs of the loss.")] = 10,
    report_to: Annotated[str, typer.Option("--report-to", help="none, tensorboard, wandb, ... (comma list).")] = "none",
    certify_every: Annotated[
        int, typer.Option("--certify-every", help="Steps between certificates in the run; 0 for none.")
    ] = 0,
    stop: Annotated[
        str, typer.Option("--stop", help="Verdicts that end the run, such as first-order-optimal,rank-bound.")
    ] = "",
    tolerance: Tolerance = 0.05,
    grow: Annotated[
        bool, typer.Option("--grow", help="While the verdict is rank-bound, raise ranks there and train on.")
    ] = False,
    grow_stages: Annotated[int, typer.Option("--grow-stages", help="Most times to grow.")] = 4,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the checkpoints of the finished run.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an unfinished fit in OUT away.")] = False,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Training rows (default: the plan's, or all).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    text_column: TextColumn = "text",
    text_pair_column: PairColumn = None,
    image_column: ImageColumn = "image",
    audio_column: AudioColumn = "audio",
    label_column: LabelColumn = "label",
    prompt_column: PromptColumn = "prompt",
    completion_column: CompletionColumn = "completion",
    messages_column: MessagesColumn = "messages",
    loss_on: LossOn = "completion",
    packing: Packing = False,
    split: SplitName = None,
    eval_data: EvalData = None,
    eval_split: EvalSplit = None,
    heldout: HeldOutRows = 512,
    loss: LossName = "cross-entropy",
    pooling: Pooling = "model",
    template: Template = None,
    verbalizers: VerbalizerWords = None,
    calibrate: Calibrate = True,
    image_size: ImageSize = None,
    max_seconds: MaxSeconds = None,
    max_length: MaxLength = None,
    memory: Memory = "8GB",
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Train at the planned rank with the decay of the theory, certify the run, and compare it with the plan.

    The adapter appears whole in OUT/adapter, with certificate.json and fit.json. A fit that was killed is gone on
    with by the same command, and ends with the same weights.
    """
    settings: dict[str, Any] = dict(locals())
    for name in ("out", "plan", "model", "data", "json"):
        settings.pop(name)
    from ranksure.cli.terminal import RichReporter
    from ranksure.network.targets import parse_target_modules
    from ranksure.runs.fitting.fit import fit

    settings["target_modules"] = parse_target_modules(target_modules)
    settings["gradient_accumulation_steps"] = _accumulation(gradient_accumulation_steps)
    settings["stop"] = [verdict.strip() for verdict in stop.split(",") if verdict.strip()]
    settings["report_to"] = [name.strip() for name in report_to.split(",") if name.strip()] or "none"
    console = Console(stderr=json, width=width())
    on_interrupt(lambda: _left(out, restart))
    reporter = RichReporter(Console(stderr=True))
    result = fit(model, data, out=out, plan=plan, reporter=reporter, command=command_line(), **settings)
    for note in result.record.notes:
        console.print(f"[yellow]note[/yellow] {_plain(note)}", highlight=False)
    verdict = result.certificate.verdict
    console.print(f"[bold]verdict[/bold] [{_COLOUR.get(verdict, 'white')}]{verdict}[/]", highlight=False)
    for sentence in result.sentences():
        console.print(_plain(sentence), highlight=False)
    if result.model is None:
        console.print("this fit had been finished before; nothing was done", highlight=False)
    elif result.record.resumed:
        console.print("gone on with from an unfinished fit", highlight=False)
    console.print(f"written to {result.folder} ({result.record.seconds['total']:.0f} s)", highlight=False)
    report_beside(out, console)
    if json:
        import sys

        from ranksure.records.record import encoded

        sys.stdout.write(encoded(result.record).decode())


def _left(out: Path, restart: bool) -> str:
    """What an interrupted fit leaves in its folder, and what to do with it."""
    if (out / "adapter").is_dir():
        return f"the finished adapter in {out / 'adapter'} is whole"
    again = "the same command without --restart" if restart else "the same command"
    if any(out.glob("stage-*.safetensors")) or any(out.glob("checkpoints/stage-*/checkpoint-*")):
        return f"the checkpoints in {out} stay, and {again} goes on from the last whole one"
    return f"there was no checkpoint yet: {again} starts from the beginning"


def _accumulation(text: str) -> int | str:
    if text == "full":
        return text
    try:
        return int(text)
    except ValueError:
        from ranksure.errors import SettingError

        raise SettingError(f"--gradient-accumulation-steps {text!r} is neither a whole number nor full") from None


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
