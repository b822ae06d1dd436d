"""``ranksure certify``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ranksure.cli.commands import command, hold
from ranksure.cli.runs import RunCommand, RunRows, load
from ranksure.options import COMMON, Option

if TYPE_CHECKING:
    from rich.console import Console

    from ranksure.records.certificate import RunCertificate
    from ranksure.runs.saved.base import LoadedRun
    from ranksure.runs.saved.data import RunData


@dataclass(frozen=True, kw_only=True)
class CertifyCommand(RunCommand):
    """What ``ranksure certify`` is asked."""

    data: RunRows
    out: Annotated[Path | None, Option("Folder for certificate.json (default: the adapter's).", COMMON)] = None


@command(
    CertifyCommand,
    "ranksure certify out/my-lora --data train.csv",
    "ranksure certify out/my-lora --data train.csv --weight-decay 0.01 --base ./my-bert",
    "ranksure certify out/checkpoint-500 --data chat.jsonl --max-length 512 --batch-size 2 --memory 4GB",
    "ranksure certify out/my-lora --data train.csv --json > certificate.json",
)
def certify(asked: CertifyCommand) -> None:
    """Is this LoRA run done, is its rank the limit, and what comes next? One gradient pass over its data."""
    from ranksure.runs.certificate.record import (
        check_place,
        earlier,
        full_record,
        refuse_other_loss,
        sampled,
        write_record,
    )

    place = asked.adapter_dir if asked.out is None else asked.out
    check_place(place, create=asked.out is not None)
    hold(place)
    from ranksure.cli.report import report_beside
    from ranksure.cli.terminal import RichReporter, command_line, window
    from ranksure.quantities import parse_memory
    from ranksure.records.record import encoded
    from ranksure.runs.certificate.certify import certify
    from ranksure.runs.certificate.render import show_certificate

    memory_bytes = parse_memory(asked.memory)
    console, reporter = window(asked.json), RichReporter()
    run, rows = load(asked, asked.data, reporter)
    is_sample = asked.samples is not None and asked.samples < rows.total_rows
    refuse_other_loss(place, rows.kind)
    with reporter.stage("Passes over the data") as advance:
        found = certify(
            run.model,
            Watched(rows.batches, advance),
            weight_decay=asked.weight_decay,
            lam=asked.lam,
            **rows.objective,
            tolerance=asked.tolerance,
            memory_bytes=memory_bytes,
            probe=not is_sample,
            before=earlier(place),
        )
    found = replace(found, n_samples=rows.n_rows)  # packed sequences hold several
    if is_sample:
        found = sampled(found, rows.n_rows, rows.total_rows)
    found = full_record(found, run, rows, command_line())
    written = write_record(place, found)
    _show_run(run, rows, found, console)
    show_certificate(found, console, parameters=parameters_of(found))
    console.print(f"written to {written} ({found.seconds:.0f} s)", highlight=False)
    report_beside(place, console)
    if asked.json:
        sys.stdout.write(encoded(found.to_json()).decode())


class Watched(Sequence[Any]):
    """Batches that tell how far each pass over them is."""

    def __init__(self, batches: Sequence[Any], advance: Any) -> None:
        self.batches, self.advance = batches, advance

    def __iter__(self) -> Any:
        for done, batch in enumerate(self.batches, start=1):
            yield batch
            self.advance(done, len(self.batches))

    def __getitem__(self, index: Any) -> Any:
        return self.batches[index]

    def __len__(self) -> int:
        return len(self.batches)


def parameters_of(found: "RunCertificate") -> dict[str, int]:
    """The adapter's parameters by module."""
    return {name: state.parameters for name, state in found.modules.items() if state.parameters is not None}


def _show_run(run: "LoadedRun", rows: "RunData", found: "RunCertificate", console: "Console") -> None:
    from ranksure.cli.terminal import show_notes

    used = f"{rows.n_rows:,} of {rows.total_rows:,} rows" if rows.n_rows < rows.total_rows else f"{rows.n_rows:,} rows"
    console.print(
        f"\n[bold]{run.folder}[/bold] on {run.base}, {run.task_type}\n{rows.source}: {used} of {rows.form}"
        + ("" if rows.max_length is None else f", at most {rows.max_length} tokens each"),
        highlight=False,
    )
    decay = (
        "`weight_decay` is taken as an L2 penalty on A and B, lambda = weight decay / scale (SGD's). AdamW's decoupled "
        "decay is not that, nor is one beside a preconditioner (PEFT's Riemannian optimizer and LoRA-FA): for such a "
        "run leave it out, or read this as a what-if."
    )
    show_notes([*run.notes, *rows.notes, *found.notes, *[decay] * bool(found.weight_decay)], console)
