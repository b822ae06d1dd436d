"""``ranksure grow``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ranksure.cli.app import app
from ranksure.cli.options import (
    PLACES,
    ROWS,
    AdapterDir,
    AdapterName,
    Base,
    BaseDtype,
    BaseRevision,
    CompletionColumn,
    Decay,
    Device,
    GradientMemory,
    Json,
    LabelColumn,
    Lambda,
    LossOn,
    MaxLength,
    MessagesColumn,
    NewAdapter,
    PairColumn,
    PromptColumn,
    RunBatchSize,
    RunRows,
    RunTask,
    SplitName,
    TextColumn,
    Tolerance,
    Trust,
    Weighting,
    picked,
)
from ranksure.cli.report import report_beside
from ranksure.cli.runs import check_out, load, provenance, show_notes
from ranksure.cli.terminal import command_line, width

if TYPE_CHECKING:
    from ranksure.runs.resizing.grow import Growth

_EXAMPLES = """
[bold]Examples[/bold]

  ranksure grow out/my-lora --data train.csv --weight-decay 0.01 --out out/grown

  ranksure grow out/my-lora --data chat.jsonl --lambda 1e-3 --most-new 2 --out out/grown

  ranksure grow out/my-lora --data train.csv --force --out out/grown
"""


@app.command("grow", epilog=_EXAMPLES)
def grow_command(
    adapter_dir: AdapterDir,
    data: RunRows,
    out: NewAdapter,
    base: Base = None,
    weight_decay: Decay = None,
    lam: Lambda = None,
    most_new: Annotated[int, typer.Option("--most-new", help="Most new directions for one module.")] = 8,
    force: Annotated[
        bool, typer.Option("--force", help="Grow whatever the verdict is, where any direction lowers the objective.")
    ] = False,
    tolerance: Tolerance = 0.05,
    adapter: AdapterName = None,
    task: RunTask = None,
    weighting: Weighting = "token",
    text_column: TextColumn = "text",
    text_pair_column: PairColumn = None,
    label_column: LabelColumn = "label",
    prompt_column: PromptColumn = "prompt",
    completion_column: CompletionColumn = "completion",
    messages_column: MessagesColumn = "messages",
    loss_on: LossOn = "completion",
    split: SplitName = None,
    max_length: MaxLength = None,
    batch_size: RunBatchSize = None,
    memory: GradientMemory = "8GB",
    device: Device = "auto",
    dtype: BaseDtype = "auto",
    revision: BaseRevision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Add the missing directions to the modules whose rank is the limit; no prediction changes."""
    given = dict(locals())
    check_out(out)
    from ranksure.cli.terminal import RichReporter
    from ranksure.quantities import parse_memory
    from ranksure.runs.resizing.grow import grow

    memory_bytes = parse_memory(memory)
    reporter = RichReporter(Console(stderr=True))
    run, rows = load(adapter_dir, data, picked(given, PLACES), picked(given, ROWS, by_length=True), weighting, reporter)
    assert rows is not None
    count = len(rows.batches)
    with reporter.stage("Certifying the run and finding directions") as advance:
        found = grow(
            run.model,
            rows.batches,
            weight_decay=weight_decay,
            lam=lam,
            weighting=weighting,  # pyright: ignore[reportArgumentType]  (checked in load)
            tolerance=tolerance,
            memory_bytes=memory_bytes,
            most_new=most_new,
            force=force,
            progress=lambda done: advance((done - 1) % count + 1, count),
        )
    with reporter.stage("Writing and checking the adapter"):
        written = found.save(out_dir=out, **run.rewritten, extra=provenance(run, rows))
    console = Console(stderr=json, width=width())
    _show(found, console)
    show_notes([*run.notes, *rows.notes], console)
    console.print(f"written to {written.folder}: train on, with a new optimizer", highlight=False)
    report_beside(out, console, command_line())
    if json:
        import sys

        sys.stdout.write((out / "grow.json").read_text(encoding="utf-8"))


def _show(found: Growth, console: Console) -> None:
    certificate = found.certificate
    console.print(f"[bold]verdict[/bold]  {certificate.verdict}{' (forced)' if found.forced else ''}", highlight=False)
    table = Table("module", "rank", "grown to", "slopes of the new directions", box=None, pad_edge=False)
    for name, (u, _) in found.factors.items():
        after, new = u.shape[1], found.added.get(name, 0)
        if new:
            table.add_row(name, str(after - new), str(after), ", ".join(f"{x:.2g}" for x in found.slopes[name]))
    console.print(table)
    rest = len(found.factors) - len(found.added)
    if rest:
        console.print(f"{rest} other module(s) stay as they are", highlight=False)
    console.print(
        f"objective {certificate.objective:.6g}, the same as before; a slope is its decrease per unit of a direction",
        highlight=False,
    )
