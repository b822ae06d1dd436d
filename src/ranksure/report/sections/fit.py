"""A fit: the run that was trained, against what the plan predicted."""

from __future__ import annotations

from typing import Any

from ranksure.records.fit import Fit
from ranksure.report import charts
from ranksure.report.blocks import Figure, Key, Prose, Section, Status, Table, Tile, drawn
from ranksure.report.charts import Curve, Level
from ranksure.report.records import Record, certificate_beside
from ranksure.report.sections.certify import ANSWERS, figures, tiles
from ranksure.report.sections.shared import reproduce, settings_text
from ranksure.report.svg import DASHES
from ranksure.report.wording import NONE, after, counted, number, percent, short

_MOST = 60  # rows of the table of a training curve


def build(record: Record, section_id: str, command: str | None = None) -> Section:
    """The section of a fit and of its certificate."""
    data: Fit = record.data
    i = section_id
    certificate = certificate_beside(record)
    answer, tone = ANSWERS.get(data.verdict, (f"Verdict: {data.verdict}.", "warn"))
    section = Section(i, "Fit", f"{short(data.model)} on {data.data.source}", answer, tone)
    advice = [after(answer, text) for text in certificate.advice()]
    section.sentences = [*advice[:1], _what(data), *_prediction(data), *advice[1:]]
    section.warnings = list(data.notes)
    section.tiles = [*_tiles(data), *tiles(certificate)]
    blocks: list[Any] = [figure for figure in (_curve(data, i), _objective(data, i), _held_out(data, i)) if figure]
    blocks += figures(certificate, i, record.folder)
    if data.stages:
        blocks.append(_stages(data))
    settings = data.settings
    facts = [
        ("model", data.model),
        ("revision", data.revision),
        ("data", f"{data.data.source}, {data.n_samples:,} rows"),
        ("data SHA-256", data.data.sha256),
        ("seed", settings.get("seed")),
        ("loss", data.loss),
        ("λ", repr(data.lam)),
        ("settings", settings_text(settings)),
    ]
    section.blocks = blocks + reproduce(i, record, command, facts)
    return section


def _what(data: Fit) -> str:
    ranks = sorted(set(data.ranks.values()))
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank"
    where = f"{counted(len(data.ranks), 'module')} at {shown}, on {data.n_samples:,} rows"
    if data.mode != "train":
        return f"The linear optimum was taken without any training: {where}."
    return f"Trained {where}: {counted(data.steps, 'step')} of {data.optimizer}, λ = {data.lam:.4g}."


def _prediction(data: Fit) -> list[str]:
    found, objective, zero = data.prediction, data.final.objective, data.objective_at_zero
    if found is None or objective is None:
        return []
    gain = found.objective_at_zero - found.objective
    share = ""
    if gain > 0 and zero is not None:
        happened = (zero - objective) / gain
        share = f", {percent(happened)} of the predicted gain"
    return [
        f"The linearised problem predicted an objective of {found.objective:.5g} for {found.of}; the network "
        f"reached {objective:.5g}{share}."
    ]


def _tiles(data: Fit) -> list[Tile]:
    held = data.heldout
    out = [Tile("Parameters", f"{data.parameters:,}", None, "in the adapter")]
    if held:
        change = held.loss - held.loss_without_adapter
        note = f"{held.loss:.4f} against {held.loss_without_adapter:.4f}"
        out.append(Tile("Change of held-out loss", number(change, "+.2g"), Status.MEASURED, note))
    return out


def _curve(data: Fit, i: str) -> Figure | None:
    logs, points = _logged(data, "loss"), _logged(data, "ranksure/objective")
    if len(logs) + len(points) < 2:
        return None
    final, zero = data.final.objective, data.objective_at_zero
    optimum = data.prediction.optimum if data.prediction else None
    if final is not None and (not points or points[-1][0] != data.steps):
        points.append((data.steps, final))
    if zero is not None:
        points.insert(0, (0, zero))
    lines, across, legend = [], [], []
    if logs:
        lines.append(Curve("loss", *_thinned(logs), "c0"))
        legend.append(Key("training loss as logged, without the penalty", "c0", line="solid"))
    if points:
        lines.append(Curve("objective", *_split(points), "c1", DASHES[2], "D"))
        legend.append(Key("objective (loss and penalty), on all rows", "c1", "D", "dotted"))
    if optimum is not None:
        across.append(Curve("optimum", [], [optimum], "good", DASHES[1]))
        legend.append(Key("certified optimum, linearised network", "good", line="dashed"))
    if zero is not None:
        across.append(Curve("zero", [], [zero], "muted", DASHES[2]))
        legend.append(Key("without an adapter", "muted", line="dotted"))
    summary = f"The loss went from {logs[0][1]:.5g} to {logs[-1][1]:.5g} in {data.steps:,} steps." if logs else ""
    if optimum is not None and final is not None:
        summary += (
            f" The objective, loss and penalty, ended at {final:.5g}, {abs(final - optimum):.3g} "
            f"{'above' if final >= optimum else 'below'} the certified optimum of the linearised network."
        )
    return drawn(
        f"{i}-curve",
        lambda canvas: charts.curves(canvas, lines, "optimizer step", "loss and objective", across),
        "How did training go, against the certified optimum?",
        Status.MEASURED,
        summary.strip(),
        "A line over steps.",
        _steps(logs, points),
        legend,
        note="The optimum is certified for the linearised network only: the real one may end above it or below.",
    )


def _steps(logs: list[tuple[float, float]], points: list[tuple[float, float]]) -> Table:
    thin = logs[:: max(1, -(-len(logs) // _MOST))]
    rows = [[f"{step:g}", number(loss, ".6g"), NONE] for step, loss in thin]
    rows += [[f"{step:g}", NONE, number(value, ".6g")] for step, value in points]
    rows.sort(key=lambda row: float(row[0]))
    more = "Some steps are left out." if thin != logs else ""
    return Table("Training", ["step", "training loss", "objective"], rows, more=more)


def _logged(data: Fit, key: str) -> list[tuple[float, float]]:
    """Steps and values of what the Trainer logged under a name."""
    found = [(entry.get("step"), entry.get(key)) for entry in data.history]
    return [(x, y) for x, y in found if isinstance(x, int | float) and isinstance(y, int | float)]


def _split(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _thinned(points: list[tuple[float, float]], most: int = 400) -> tuple[list[float], list[float]]:
    step = max(1, -(-len(points) // most))
    kept = points[::step]
    return _split(kept if kept[-1] == points[-1] else [*kept, points[-1]])


def _objective(data: Fit, i: str) -> Figure | None:
    final, found, zero = data.final, data.prediction, data.objective_at_zero
    if found is None or final.objective is None or zero is None:
        return None
    rows = [
        Level("without an adapter", zero, None, "muted", "s", f"{zero:.5g}"),
        Level("trained, the real network", final.objective, None, "c1", "D", f"{final.objective:.5g}"),
        Level(f"predicted for {found.of}", found.objective, None, "c0", "o", f"{found.objective:.5g}"),
    ]
    if found.optimum is not None:
        rows.append(Level("certified optimum, any rank", found.optimum, None, "good", "^", f"{found.optimum:.5g}"))
    summary = _prediction(data)[0]
    return drawn(
        f"{i}-objective",
        lambda canvas: charts.levels(canvas, rows, "training objective (lower is better)"),
        "Did it reach what was predicted?",
        Status.MEASURED,
        summary,
        "A dot for each on one scale.",
        Table("Objectives", ["what", "objective"], [[row.text, row.shown] for row in rows]),
        note="The first two are measured on the real network; the others are of its linearisation.",
    )


def _held_out(data: Fit, i: str) -> Figure | None:
    held, found = data.heldout, data.prediction
    if not held:
        return None
    triples = [("without an adapter", held.loss_without_adapter, held.accuracy_without_adapter, "muted", "s")]
    if found is not None and found.heldout_loss is not None:
        triples.append(("predicted, linearised", found.heldout_loss, found.heldout_accuracy, "c0", "o"))
    triples.append(("trained, the real network", held.loss, held.accuracy, "c1", "D"))
    rows = [Level(t, loss, None, colour, marker, f"{loss:.4f}") for t, loss, _, colour, marker in triples]
    accuracy = "" if held.accuracy is None else f" and accuracy {percent(held.accuracy)}"
    before = "" if held.accuracy_without_adapter is None else f" and {percent(held.accuracy_without_adapter)}"
    summary = (
        f"On {held.rows:,} held-out rows the trained network has loss {held.loss:.4f}{accuracy}, against "
        f"{held.loss_without_adapter:.4f}{before} without the adapter."
    )
    table = Table(
        "Held-out figures",
        ["what", "loss", "accuracy"],
        [[t, f"{loss:.4f}", percent(a)] for t, loss, a, _, _ in triples],
    )
    return drawn(
        f"{i}-heldout",
        lambda canvas: charts.levels(canvas, rows, "held-out loss (lower is better)"),
        "Does it hold on rows that it has not seen?",
        Status.MEASURED,
        summary,
        "A dot for each on one scale.",
        table,
    )


def _stages(data: Fit) -> Prose:
    rows = [
        [str(n + 1), str(sum(stage.ranks.values())), number(stage.objective, ".6g"), stage.verdict]
        for n, stage in enumerate(data.stages)
    ]
    last = [str(len(rows) + 1), str(sum(data.ranks.values())), number(data.final.objective, ".6g")]
    table = Table(
        "Stages", ["stage", "sum of ranks", "objective", "verdict"], [*rows, [*last, data.verdict]], frozenset({3})
    )
    return Prose(
        "How did it grow?", Status.MEASURED, ["After each stage the missing directions were added."], table=table
    )
