"""``ranksure grow``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from ranksure.cli.commands import command
from ranksure.cli.runs import NewAdapter, RunCommand, RunRows, check_out, load, write_changed
from ranksure.options import COMMON, Option

if TYPE_CHECKING:
    from rich.console import Console

    from ranksure.runs.resizing.grow import Growth


@dataclass(frozen=True, kw_only=True)
class GrowCommand(RunCommand):
    """What ``ranksure grow`` is asked."""

    LEFT_OUT: ClassVar = ("packing", "samples", "seed")

    data: RunRows
    out: NewAdapter
    most_new: Annotated[int, Option("Most new directions for one module.", COMMON)] = 8
    force: Annotated[
        bool, Option("Grow whatever the verdict is, where any direction lowers the objective.", COMMON)
    ] = False


@command(
    GrowCommand,
    "ranksure grow out/my-lora --data train.csv --weight-decay 0.01 --out out/grown",
    "ranksure grow out/my-lora --data chat.jsonl --lambda 1e-3 --most-new 2 --out out/grown",
    "ranksure grow out/my-lora --data train.csv --force --out out/grown",
)
def grow(asked: GrowCommand) -> None:
    """Add the missing directions to the modules whose rank is the limit; no prediction changes."""
    check_out(asked.out)
    from ranksure.cli.terminal import RichReporter
    from ranksure.quantities import parse_memory
    from ranksure.runs.resizing.grow import grow

    memory_bytes = parse_memory(asked.memory)
    reporter = RichReporter()
    run, rows = load(asked, asked.data, reporter)
    count = len(rows.batches)
    with reporter.stage("Certifying the run and finding directions") as advance:
        found = grow(
            run.model,
            rows.batches,
            weight_decay=asked.weight_decay,
            lam=asked.lam,
            **rows.objective,
            tolerance=asked.tolerance,
            memory_bytes=memory_bytes,
            most_new=asked.most_new,
            force=asked.force,
            progress=lambda done: advance((done - 1) % count + 1, count),
        )
    then = f": train on, with a new optimizer, or by `ranksure fit --method certified --adapter {asked.out}`"
    write_changed(asked, asked.out, found, run, rows, reporter, _show, notes=found.uneven, then=then)


def _show(found: "Growth", console: "Console") -> None:
    from rich.table import Table

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
