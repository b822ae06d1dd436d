"""``ranksure certify``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ranksure.cli.app import app
from ranksure.cli.options import (
    PLACES,
    ROWS,
    AdapterName,
    AudioColumn,
    Base,
    BaseDtype,
    BaseRevision,
    CompletionColumn,
    Device,
    GradientMemory,
    ImageColumn,
    ImageSize,
    Json,
    LabelColumn,
    Lambda,
    LossOn,
    MaxLength,
    MaxSeconds,
    MessagesColumn,
    Packing,
    PairColumn,
    PromptColumn,
    RowSeed,
    RunBatchSize,
    RunTask,
    SplitName,
    Template,
    TextColumn,
    Tolerance,
    Trust,
    VerbalizerWords,
    Weighting,
    picked,
)
from ranksure.cli.report import report_beside
from ranksure.cli.terminal import command_line, width

if TYPE_CHECKING:
    from ranksure.records.certificate import RunCertificate
    from ranksure.runs.saved.data import RunData
    from ranksure.runs.saved.open import LoadedRun

_EXAMPLES = """
[bold]Examples[/bold]

  ranksure certify out/my-lora --data train.csv

  ranksure certify out/my-lora --data train.csv --weight-decay 0.01 --base ./my-bert

  ranksure certify out/checkpoint-500 --data chat.jsonl --max-length 512 --batch-size 2 --memory 4GB

  ranksure certify out/my-lora --data train.csv --json > certificate.json
"""


@app.command("certify", epilog=_EXAMPLES)
def certify_command(
    adapter_dir: Annotated[Path, typer.Argument(metavar="ADAPTER_DIR", help="Folder of the trained LoRA adapter.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="All of the training data: labelled texts, or for a causal language model JSON lines with prompt and "
            "completion, or messages.",
        ),
    ],
    base: Base = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            "--weight-decay",
            help="L2 decay of PEFT's matrices A and B, as SGD applies it. AdamW's decoupled decay is none: leave it "
            "out.",
        ),
    ] = None,
    lam: Lambda = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for certificate.json (default: the adapter's).")
    ] = None,
    adapter: AdapterName = None,
    task: RunTask = None,
    tolerance: Tolerance = 0.05,
    weighting: Weighting = "token",
    text_column: TextColumn = "text",
    text_pair_column: PairColumn = None,
    image_column: ImageColumn = "image",
    audio_column: AudioColumn = "audio",
    template: Template = None,
    verbalizers: VerbalizerWords = None,
    image_size: ImageSize = None,
    max_seconds: MaxSeconds = None,
    label_column: LabelColumn = "label",
    prompt_column: PromptColumn = "prompt",
    completion_column: CompletionColumn = "completion",
    messages_column: MessagesColumn = "messages",
    loss_on: LossOn = "completion",
    packing: Packing = False,
    split: SplitName = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Look at so many rows only: figures without a verdict.")
    ] = None,
    seed: RowSeed = 0,
    max_length: MaxLength = None,
    batch_size: RunBatchSize = None,
    memory: GradientMemory = "8GB",
    device: Device = "auto",
    dtype: BaseDtype = "auto",
    revision: BaseRevision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Is this LoRA run done, is its rank the limit, and what comes next? One gradient pass over its data."""
    given = dict(locals())
    from ranksure.runs.certificate.record import check_place, full_record, sampled, write_record

    place = adapter_dir if out is None else out
    check_place(place, create=out is not None)
    from ranksure.cli.terminal import RichReporter
    from ranksure.errors import SettingError
    from ranksure.quantities import parse_memory
    from ranksure.runs.certificate.certify import certify
    from ranksure.runs.certificate.render import show_certificate
    from ranksure.runs.saved.data import DataSettings
    from ranksure.runs.saved.open import open_run

    memory_bytes = parse_memory(memory)
    own = ("image_column", "audio_column", "samples", "seed", "packing")
    chosen = DataSettings(**picked(given, (*ROWS, *own), by_length=True))
    if weighting not in ("token", "sample"):
        raise SettingError(f"unknown weighting {weighting!r}: use token or sample")
    if packing and weighting == "sample":
        raise SettingError("--packing joins rows, which --weighting sample counts: leave one out")
    console = Console(stderr=json, width=width())
    reporter = RichReporter(Console(stderr=True))
    with reporter.stage("Loading the run and reading the data"):
        run, rows = open_run(
            adapter_dir,
            data,
            chosen,
            task_options=picked(given, ("template", "verbalizers", "image_size", "max_seconds")),
            **picked(given, PLACES),
        )
    is_sample = samples is not None and samples < rows.total_rows
    with reporter.stage("Passes over the data") as advance:
        found = certify(
            run.model,
            Watched(rows.batches, advance),
            weight_decay=weight_decay,
            lam=lam,
            loss=rows.kind if packing or rows.kind_is_known else None,  # by default the model's own, which is checked
            weighting=weighting,
            tolerance=tolerance,
            memory_bytes=memory_bytes,
            probe=not is_sample,
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
    if json:
        import sys

        from ranksure.records.record import encoded

        sys.stdout.write(encoded(found.to_json()).decode())


class Watched:
    """Batches that tell how far each pass over them is."""

    def __init__(self, batches: list[Any], advance: Any) -> None:
        self.batches, self.advance = batches, advance

    def __iter__(self) -> Any:
        for done, batch in enumerate(self.batches, start=1):
            yield batch
            self.advance(done, len(self.batches))

    def __len__(self) -> int:
        return len(self.batches)


def parameters_of(found: RunCertificate) -> dict[str, int]:
    """The adapter's parameters by module."""
    return {name: state.parameters for name, state in found.modules.items() if state.parameters is not None}


def _show_run(run: LoadedRun, rows: RunData, found: RunCertificate, console: Console) -> None:
    used = f"{rows.n_rows:,} of {rows.total_rows:,} rows" if rows.n_rows < rows.total_rows else f"{rows.n_rows:,} rows"
    console.print(
        f"\n[bold]{run.folder}[/bold] on {run.base}, {run.task_type}\n{rows.source}: {used} of {rows.form}"
        + ("" if rows.max_length is None else f", at most {rows.max_length} tokens each"),
        highlight=False,
    )
    for note in [*run.notes, *rows.notes]:
        console.print(f"[yellow]note[/yellow] {_plain(note)}", highlight=False)
    if found.weight_decay:
        console.print(
            "[yellow]note[/yellow] --weight-decay is taken as an L2 penalty on A and B, lambda = weight decay / scale "
            "(SGD's). AdamW's decoupled decay is not that: for such a run leave it out, or read this as a what-if.",
            highlight=False,
        )


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
