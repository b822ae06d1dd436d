"""``ranksure fit``."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ranksure.cli.app import on_interrupt
from ranksure.cli.commands import Json, command
from ranksure.options import COMMON, OUTPUT, Option
from ranksure.runs.fitting.settings import FitSettings
from ranksure.tasks.options import values_of

_COLOUR = {"first-order-optimal": "green", "rank-bound": "yellow", "not-converged": "yellow", "failed-loudly": "red"}


@dataclass(frozen=True, kw_only=True)
class FitCommand(FitSettings):
    """What ``ranksure fit`` is asked."""

    plan: Annotated[
        Path | None,
        Option("Folder of a plan: gives model, head, ranks and lambda, and what to compare with.", COMMON),
    ] = None
    model: Annotated[str | None, Option("Model folder or Hub id (default: the plan's).", COMMON)] = None
    data: Annotated[str | None, Option("The training rows (a plan on the bundled data needs none).", COMMON)] = None
    out: Annotated[Path, Option("Folder to write; an unfinished fit in it is gone on with.", COMMON)]
    restart: Annotated[bool, Option("Throw an unfinished fit in OUT away.", OUTPUT)] = False
    json: Json = False


@command(
    FitCommand,
    "ranksure fit --plan out/demo --max-steps 300 --gradient-accumulation-steps full --out fit",
    "ranksure fit --plan plan --data train.csv --num-train-epochs 20 --certify-every 50 --grow --out fit",
    "ranksure fit --plan plan --data train.csv --mode linear --out linear",
    "ranksure fit --model ./my-bert --data train.csv --rank 4 --target-modules query,value --lambda 0.01 --out fit",
    "ranksure fit --method certified --model ./my-bert --data train.csv --lambda 0.01 --out fit",
    "ranksure fit --method certified --adapter out/my-lora --data train.csv --lambda 0.01 --out fit",
    "ranksure fit --task CAUSAL_LM --model ./my-llm --data chat.jsonl --rank 8 --lambda 1e-3 --out fit",
)
def fit(asked: FitCommand) -> None:
    """Train at the planned rank with the decay of the theory, certify the run, and compare it with the plan.

    With --method certified no rank and no learning rate is chosen: lambda alone says what is solved.

    The adapter appears whole in OUT/adapter, with certificate.json and fit.json. A fit that was killed is gone on
    with by the same command, and ends with the same weights.
    """
    from rich.markup import escape

    import ranksure
    from ranksure.cli.report import report_beside
    from ranksure.cli.terminal import RichReporter, command_line, show_notes, window
    from ranksure.records.record import encoded

    console = window(asked.json)
    on_interrupt(lambda: _left(asked.out, asked.restart))
    result = ranksure.fit(
        asked.model,
        asked.data,
        out=asked.out,
        plan=asked.plan,
        reporter=RichReporter(),
        restart=asked.restart,
        command=command_line(),
        **values_of(asked, FitSettings),
    )
    show_notes(result.record.notes, console)
    verdict = result.certificate.verdict
    console.print(f"[bold]verdict[/bold] [{_COLOUR.get(verdict, 'white')}]{verdict}[/]", highlight=False)
    for sentence in result.sentences():
        console.print(escape(sentence), highlight=False)
    if result.model is None:
        console.print("this fit had been finished before; nothing was done", highlight=False)
    elif result.record.resumed:
        console.print("gone on with from an unfinished fit", highlight=False)
    console.print(f"written to {result.folder} ({result.record.seconds['total']:.0f} s)", highlight=False)
    report_beside(asked.out, console)
    if asked.json:
        sys.stdout.write(encoded(result.record).decode())


def _left(out: Path, restart: bool) -> str:
    """What an interrupted fit leaves in its folder, and what to do with it."""
    if (out / "adapter").is_dir():
        return f"the finished adapter in {out / 'adapter'} is whole"
    again = "the same command without --restart" if restart else "the same command"
    if any(out.glob("stage-*.safetensors")) or any(out.glob("checkpoints/stage-*/checkpoint-*")):
        return f"the checkpoints in {out} stay, and {again} goes on from the last whole one"
    return f"there was no checkpoint yet: {again} starts from the beginning"
