"""An adapter that was grown or compressed."""

from __future__ import annotations

from ranksure.records.change import CompressRecord, GrowRecord
from ranksure.report import charts
from ranksure.report.blocks import Figure, Section, Status, Table, Tile, drawn
from ranksure.report.charts import Level
from ranksure.report.heat_map import Grid, heat_map
from ranksure.report.records import Record
from ranksure.report.sections.certify import figures
from ranksure.report.sections.shared import of_data, of_run, reproduce
from ranksure.report.spectrum import spectrum_figure
from ranksure.report.wording import counted, number, percent

_LEVELS = {
    "lossless": "ranks that do nothing were removed; the update is the same",
    "data-exact": "ranks were removed without changing a first-order prediction on these rows",
    "budget": "ranks were removed at a measured cost",
}


def build_grow(record: Record, section_id: str, command: str | None = None) -> Section:
    """The section of a grown adapter."""
    data: GrowRecord = record.data
    i = section_id
    before = {name: module.rank_before for name, module in data.modules.items()}
    after = {name: module.rank_after for name, module in data.modules.items()}
    grown = [name for name in after if after[name] > before[name]]
    answer = (
        f"Rank was added in {len(grown)} of {counted(len(after), 'module')}: {data.rank_before} became "
        f"{data.rank_after}."
    )
    section = Section(i, "Growth", _source(record), answer, "good")
    section.sentences = [
        f"The verdict before was {data.verdict}{' (grown by force)' if data.forced else ''}. The new columns do "
        "not change a prediction: train on to use them, with a new optimizer."
    ]
    section.tiles = [Tile("Ranks", f"{data.rank_before} → {data.rank_after}", None, "in all modules")]
    slopes = {name: ", ".join(number(x, ".2g") for x in data.modules[name].slopes) or "–" for name in after}
    heat = heat_map(
        f"{i}-grown",
        "Where was rank added?",
        None,
        answer,
        [Grid("Rank before", before), Grid("Rank now", after)],
        note="A slope is the decrease of the objective per unit of a new direction, at the start of it.",
        extra={"slopes": slopes},
    )
    section.blocks = [heat, *figures(data.certificate, i, record.folder / "-")]
    section.blocks += reproduce(i, record, command, _facts(record))
    return section


def build_compress(record: Record, section_id: str, command: str | None = None) -> Section:
    """The section of a compressed adapter."""
    data: CompressRecord = record.data
    i = section_id
    before, after = data.ranks_before, data.ranks_after
    share = data.parameters_after / max(data.parameters_before, 1)
    answer = f"The adapter now has {percent(share)} of its parameters: {data.parameters_after:,} numbers."
    section = Section(i, "Compression", _source(record), answer, "good")
    section.sentences = [f"Level {data.level}: {_LEVELS.get(data.level, 'see the record')}."]
    section.warnings = list(data.notes)
    section.tiles = [Tile("Parameters", f"{data.parameters_after:,}", None, f"of {data.parameters_before:,}")]
    if data.captured is not None:
        section.tiles.append(Tile("Gain kept", percent(data.captured, 2), Status.MEASURED, "on the rows given"))
    if data.update_change is not None:
        section.tiles.append(
            Tile("Update changed", percent(data.update_change, 2), Status.MEASURED, "of its Frobenius norm")
        )
    summary = f"The sum of ranks went from {sum(before.values())} to {sum(after.values())}."
    heat = heat_map(
        f"{i}-ranks",
        "Which ranks were kept?",
        Status.MEASURED,
        summary,
        [Grid("Rank before", before), Grid("Rank now", {name: after.get(name, 0) for name in before})],
    )
    section.blocks = [heat]
    if points := _points(record, i):
        section.blocks.append(points)
    spectrum = spectrum_figure(f"{i}-spectrum", record.folder, Status.MEASURED, "the compressed update")
    section.blocks += [spectrum] if spectrum else []
    section.blocks += reproduce(i, record, command, _facts(record))
    return section


def _points(record: Record, i: str) -> Figure | None:
    data: CompressRecord = record.data
    rows = [
        Level(text, point.objective, None, colour, marker, number(point.objective, ".6g"))
        for point, text, colour, marker in (
            (data.at_zero, "without the adapter", "muted", "s"),
            (data.before, "before", "c0", "o"),
            (data.after, "compressed", "c1", "D"),
        )
        if point is not None
    ]
    if len(rows) < 2:
        return None
    summary = f"From top to bottom: {'; '.join(f'{row.text}, {row.shown}' for row in rows)}."
    table = Table("Objective on the rows given", ["what", "objective"], [[row.text, row.shown] for row in rows])
    return drawn(
        f"{i}-points",
        lambda canvas: charts.levels(canvas, rows, "objective (lower is better)"),
        "What did it cost?",
        Status.MEASURED,
        summary,
        "A dot for each on one scale.",
        table,
    )


def _source(record: Record) -> str:
    """What was changed: the adapter that the record names."""
    return str(getattr(record.data.run, "adapter", None) or record.where or record.folder.name)


def _facts(record: Record) -> list[tuple[str, object]]:
    run, data = of_run(record.data.run), of_data(record.data.data)
    return [("from adapter", run[0]), ("its SHA-256", run[1]), ("base model", run[2]), *data]
