"""``ranksure compress``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

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
    Json,
    LabelColumn,
    Lambda,
    LossOn,
    MaxLength,
    MessagesColumn,
    NewAdapter,
    PairColumn,
    PromptColumn,
    RowSeed,
    RunBatchSize,
    RunTask,
    SplitName,
    TextColumn,
    Trust,
    Weighting,
    picked,
)
from ranksure.cli.report import report_beside
from ranksure.cli.runs import check_out, load, provenance, show_notes
from ranksure.cli.terminal import command_line, width

if TYPE_CHECKING:
    from ranksure.runs.resizing.compress_result import Compression

_EXAMPLES = """
[bold]Examples[/bold]

  ranksure compress out/my-lora --out out/small

  ranksure compress out/my-lora --data train.csv --captured 0.99 --out out/small

  ranksure compress out/my-lora --data chat.jsonl --max-loss-increase 0.01 --out out/small

  ranksure compress out/my-lora --data train.csv --level data-exact --out out/small
"""


@app.command("compress", epilog=_EXAMPLES)
def compress_command(
    adapter_dir: AdapterDir,
    out: NewAdapter,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Rows to measure the loss on: the training data, or held-out rows."),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option("--level", help="lossless (default), data-exact, or budget (which the two below imply)."),
    ] = None,
    captured: Annotated[
        float | None, typer.Option("--captured", help="Budget: share of the adapter's gain to keep, such as 0.99.")
    ] = None,
    max_loss_increase: Annotated[
        float | None, typer.Option("--max-loss-increase", help="Budget: most that the mean loss may rise.")
    ] = None,
    base: Base = None,
    weight_decay: Decay = None,
    lam: Lambda = None,
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
    samples: Annotated[int | None, typer.Option("--samples", help="Measure on so many rows only.")] = None,
    seed: RowSeed = 0,
    max_length: MaxLength = None,
    batch_size: RunBatchSize = None,
    memory: Annotated[str, typer.Option("--memory", help="Memory budget of data-exact.")] = "8GB",
    device: Device = "auto",
    dtype: BaseDtype = "auto",
    revision: BaseRevision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Lower the ranks of a trained adapter, with the true loss before and after."""
    given = dict(locals())
    check_out(out)
    from ranksure.cli.terminal import RichReporter
    from ranksure.quantities import parse_memory
    from ranksure.runs.resizing.compress import check_settings, compress

    chosen: Any = level or ("lossless" if captured is None and max_loss_increase is None else "budget")
    check_settings(chosen, captured, max_loss_increase, weight_decay, lam, has_data=data is not None)
    memory_bytes = parse_memory(memory)
    reporter = RichReporter(Console(stderr=True))
    run, rows = load(
        adapter_dir,
        data,
        picked(given, PLACES),
        picked(given, (*ROWS, "samples", "seed"), by_length=True),
        weighting,
        reporter,
    )
    with reporter.stage("Compressing and measuring"):
        found = compress(
            run.model,
            None if rows is None else rows.batches,
            level=chosen,
            captured=captured,
            max_loss_increase=max_loss_increase,
            weight_decay=weight_decay,
            lam=lam,
            weighting=weighting,  # pyright: ignore[reportArgumentType]  (checked in load)
            memory_bytes=memory_bytes,
            source=run.folder,
            seed=seed,
        )
    with reporter.stage("Writing and checking the adapter"):
        written = found.save(out_dir=out, **run.rewritten, extra=provenance(run, rows))
    console = Console(stderr=json, width=width())
    show(found, console)
    show_notes([*run.notes, *([] if rows is None else rows.notes), *found.notes], console)
    console.print(f"written to {written.folder}", highlight=False)
    report_beside(out, console, command_line())
    if json:
        import sys

        sys.stdout.write((out / "compress.json").read_text(encoding="utf-8"))


def show(found: Compression, console: Console) -> None:
    """Print what a compression did."""
    share = found.parameters_after / found.parameters_before
    ranks = f"ranks {sum(found.ranks_before.values())} to {sum(found.ranks_after.values())}"
    console.print(
        f"[bold]{found.level}[/bold]  parameters {found.parameters_before:,} to {found.parameters_after:,} "
        f"({share:.1%}), {ranks}, update changed by {found.update_change:.2g} of its norm",
        highlight=False,
    )
    table = Table("module", "rank", "now", box=None, pad_edge=False)
    for name, rank in found.ranks_before.items():
        if found.ranks_after[name] != rank:
            table.add_row(name, str(rank), str(found.ranks_after[name]))
    if table.row_count:
        console.print(table)
    if found.before is not None and found.after is not None:
        line = f"true loss {found.before.loss:.6g} to {found.after.loss:.6g}"
        if found.before.penalty:
            line += f"; objective {found.before.objective:.6g} to {found.after.objective:.6g}"
        if found.at_zero is not None:
            kept = "no gain" if found.captured is None else f"{found.captured:.2%} of the gain kept"
            line += f"; without the adapter {found.at_zero.objective:.6g}; {kept}"
        console.print(line, highlight=False)
        parts = [f"{name.replace('_', ' ')} {value:.2g}" for name, value in found.logit_changes.items()]
        console.print(
            f"largest change of a logit (largest logit {found.largest_logit:.3g}): {', '.join(parts)}", highlight=False
        )
    if found.exact:
        console.print(
            f"first-order predictions on these rows changed by {found.exact['relative_change']:.1e}, relative; sum of "
            f"r(r+1)/2 {found.exact['count_before']} to {found.exact['count_after']} of {found.exact['equations']} "
            "predictions",
            highlight=False,
        )
