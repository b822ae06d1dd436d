"""``ranksure compress``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ranksure.cli.commands import command
from ranksure.cli.runs import NewAdapter, RunCommand, check_out, load, write_changed
from ranksure.errors import SettingError
from ranksure.options import COMMON, DATA, Option, whole
from ranksure.runs.options import PlaceOptions
from ranksure.tasks.options import values_of

if TYPE_CHECKING:
    from rich.console import Console

    from ranksure.progress import Reporter
    from ranksure.runs.resizing.compress_result import Compression
    from ranksure.runs.saved.base import LoadedRun
    from ranksure.runs.saved.data import RunData


@dataclass(frozen=True, kw_only=True)
class CompressCommand(RunCommand):
    """What ``ranksure compress`` is asked."""

    LEFT_OUT: ClassVar = ("packing", "tolerance")

    out: NewAdapter
    data: Annotated[str | None, Option("Rows to measure the loss on: the training data, or held-out rows.", COMMON)] = (
        None
    )
    level: Annotated[
        Literal["lossless", "data-exact", "budget"] | None,
        Option("lossless (default), data-exact, or budget (which the two below imply).", COMMON),
    ] = None
    captured: Annotated[float | None, Option("Budget: share of the adapter's gain to keep, such as 0.99.", COMMON)] = (
        None
    )
    max_loss_increase: Annotated[float | None, Option("Budget: most that the mean loss may rise.", COMMON)] = None
    samples: Annotated[int | None, Option("Measure on so many rows only.", DATA, check=whole(1))] = None


@command(
    CompressCommand,
    "ranksure compress out/my-lora --out out/small",
    "ranksure compress out/my-lora --data train.csv --captured 0.99 --out out/small",
    "ranksure compress out/my-lora --data chat.jsonl --max-loss-increase 0.01 --out out/small",
    "ranksure compress out/my-lora --data train.csv --level data-exact --out out/small",
)
def compress(asked: CompressCommand) -> None:
    """Lower the ranks of a trained adapter, with the true loss before and after."""
    check_out(asked.out)
    from ranksure.cli.terminal import RichReporter
    from ranksure.quantities import parse_memory
    from ranksure.runs.resizing.compress import check_settings, compress

    budget = (asked.captured, asked.max_loss_increase)
    level = asked.level or ("lossless" if budget == (None, None) else "budget")
    check_settings(level, *budget, asked.weight_decay, asked.lam, has_data=asked.data is not None)
    memory_bytes = parse_memory(asked.memory)
    reporter = RichReporter()
    run, rows = _load(asked, reporter)
    with reporter.stage("Compressing and measuring"):
        found = compress(
            run.model,
            None if rows is None else rows.batches,
            level=level,
            captured=asked.captured,
            max_loss_increase=asked.max_loss_increase,
            weight_decay=asked.weight_decay,
            lam=asked.lam,
            **({"loss": asked.loss} if rows is None else rows.objective),
            memory_bytes=memory_bytes,
            source=run.folder,
            seed=asked.seed,
        )
    notes = [*found.notes, *found.uneven]
    write_changed(asked, asked.out, found, run, rows, reporter, show, notes=notes)


def _load(asked: CompressCommand, reporter: "Reporter") -> "tuple[LoadedRun, RunData | None]":
    """The run and its data, if any was named."""
    if asked.data is not None:
        return load(asked, asked.data, reporter)
    from ranksure.runs.saved.data import as_trained
    from ranksure.runs.saved.open import load_run, task_of

    if (kind := task_of(asked.adapter_dir)) is not None:
        raise SettingError(
            f"the adapter in {asked.adapter_dir} is for the task {kind}, which is opened with data: give `data`"
        )
    with reporter.stage("Loading the run"):
        run = load_run(asked.adapter_dir, **values_of(asked, PlaceOptions))
    as_trained(run.trained, asked)
    return run, None


def show(found: "Compression", console: "Console") -> None:
    """Print what a compression did."""
    from rich.table import Table

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
