"""A certificate of a trained run: is it done, and is its rank the limit?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ranksure.records.certificate import RunCertificate
from ranksure.report import charts
from ranksure.report.blocks import Figure, Key, Section, Status, Table, Tile, drawn
from ranksure.report.charts import Level
from ranksure.report.heat_map import Grid, heat_map
from ranksure.report.module_places import by_layer, places
from ranksure.report.records import Record
from ranksure.report.sections.shared import of_data, of_run, reproduce
from ranksure.report.spectrum import spectrum_figure
from ranksure.report.svg import MARKERS
from ranksure.report.wording import NONE, after, counted, number, percent

ANSWERS = {
    "first-order-optimal": ("The run is done.", "good"),
    "rank-bound": ("The rank is the limit.", "warn"),
    "not-converged": ("The run is not finished.", "warn"),
    "failed-loudly": ("The run is stationary, but worse than no update at all.", "bad"),
    "not-checked": ("Nothing was checked.", "warn"),
}


def build(record: Record, section_id: str, command: str | None = None) -> Section:
    """The section of a certificate."""
    data: RunCertificate = record.data
    adapter, sha256, base = of_run(data.run)
    answer, tone = ANSWERS.get(data.verdict, (f"Verdict: {data.verdict}.", "warn"))
    source = data.data.source if data.data else "its data"
    title = f"{adapter or record.where or 'A LoRA run'} on {source}"
    section = Section(section_id, "Certificate", title, answer, tone)
    section.sentences = [after(answer, text) for text in data.advice()]
    section.warnings = [*data.notes, *(data.data.notes if data.data else [])]
    section.tiles = tiles(data)
    section.blocks = figures(data, section_id, record.folder)
    facts = [
        ("adapter", adapter),
        ("adapter SHA-256", sha256),
        ("base model", base),
        *of_data(data.data),
        ("rows", f"{data.n_samples:,}"),
        ("loss", data.loss_kind),
        ("weight decay", data.weight_decay),
        ("λ", data.lam),
        ("dtype", data.run.dtype if data.run else None),
    ]
    section.blocks += reproduce(section_id, record, command, facts)
    return section


def worth(data: RunCertificate) -> Status:
    """Of a certificate's bounds."""
    return Status.NOT_CHECKED if data.verdict == "not-checked" else Status.CERTIFIED


def tiles(data: RunCertificate) -> list[Tile]:
    """The main numbers of a certificate."""
    status, objective = worth(data), data.objective
    used = sum(module.rank_used for module in data.modules.values())
    given = sum(module.rank for module in data.modules.values())
    out = [Tile("Ranks used", f"{used} of {given}", Status.MEASURED, "numerical rank of the updates")]
    if objective is not None:
        out.append(Tile("Objective", number(objective, ".5g"), Status.MEASURED, "loss and penalty, measured"))
    for value, text in ((data.training_gain_bound, "More training"), (data.rank_gain_bound, "More rank")):
        if value is not None and objective:
            note = f"of the objective at most: {value:.3g}"
            if data.says_nothing(value):
                note = "of the objective at most: this bound says nothing"
            out.append(Tile(f"{text} could gain", percent(value / objective), status, note))
    return out


def figures(data: RunCertificate, i: str, folder: Path) -> list[Any]:
    """Gains, ranks, ratios and spectrum of a certificate."""
    found = [_gains(data, i), _heat(data, i), _ratios(data, i)]
    found.append(spectrum_figure(f"{i}-spectrum", folder, Status.MEASURED, "the trained update"))
    return [figure for figure in found if figure is not None]


def _gains(data: RunCertificate, i: str) -> Figure | None:
    objective, zero = data.objective, data.objective_at_zero
    training, rank = data.training_gain_bound, data.rank_gain_bound
    if objective is None or training is None or rank is None:
        return None
    where = "any rank" if data.radius is None else "any rank, in a ball of this size"
    rows = [Level("now", objective, None, "c0", "o", number(objective, ".5g"))]
    if zero is not None:
        rows.insert(0, Level("without the adapter, at least", zero, None, "muted", "s", number(zero, ".5g")))
    low = [("more training at this rank", training, "c2", "^"), (f"{where}", rank, "c1", "D")]
    for text, gain, colour, marker in low:
        value = objective - gain
        rows.append(Level(f"{text}, at best", value, objective, colour, marker, number(value, ".5g")))
    shares = [percent(gain / objective) if objective else NONE for gain in (training, rank)]
    summary = (
        f"Training on at this rank can lower the objective by at most {training:.3g} to first order "
        f"({shares[0]} of it), any update of any rank by at most "
        f"{rank:.3g} ({shares[1]}). Below {percent(data.tolerance)} a gain counts as none."
    )
    table = Table(
        "The objective, and bounds on what it could become", ["point", "objective"], [[r.text, r.shown] for r in rows]
    )
    return drawn(
        f"{i}-gains",
        lambda canvas: charts.levels(canvas, rows, "objective", objective),
        "What could still be gained?",
        worth(data),
        summary,
        "A dot for each point on one scale, a bar down to each bound.",
        table,
        note="Bounds on the network re-linearised at the trained weights: no more than this. The true gain may be "
        "smaller, and far from here the network may differ.",
    )


def _heat(data: RunCertificate, i: str) -> Figure | None:
    modules = data.modules
    if not modules:
        return None
    used = {name: state.rank_used for name, state in modules.items()}
    texts = {name: f"{state.rank_used}/{state.rank}" for name, state in modules.items()}
    given = sum(state.rank for state in modules.values())
    full = sum(1 for state in modules.values() if state.rank_used == state.rank)
    summary = (
        f"The run uses {sum(used.values())} of {counted(given, 'rank')} in {counted(len(modules), 'module')}; "
        f"{full} of {len(modules)} at full rank."
    )
    extra = {
        "verdict": {name: state.verdict for name, state in modules.items()},
        "nuclear norm": {name: number(state.nuclear_norm, ".3g") for name, state in modules.items()},
        "spectral ratio": {name: number(state.spectral_ratio, ".4f") for name, state in modules.items()},
        "slope": {name: number(state.slope, ".2g") for name, state in modules.items()},
    }
    return heat_map(
        f"{i}-heat",
        "Which ranks does the run use?",
        Status.MEASURED,
        summary,
        [Grid("Rank used / given", used, texts)],
        note="A rank is used where its singular value is not rounding. A slope is the decrease of the objective per "
        "unit of a new direction there.",
        extra=extra,
    )


def _ratios(data: RunCertificate, i: str) -> Figure | None:
    found = {n: s.spectral_ratio for n, s in data.modules.items() if s.spectral_ratio is not None}
    if len(found) < 2:
        return None
    one, stops, series = by_layer(places(found), {name: [value] for name, value in found.items()})
    worst = max(found, key=lambda name: found[name])
    above = sum(1 for value in found.values() if value > 1 + 1e-6)
    summary = (
        f"{above} of {counted(len(found), 'module')} above 1; the largest is {found[worst]:.3f}, in {worst}."
        if above
        else f"No module is above 1: no direction outside the present ones would help. Largest: {found[worst]:.3f}."
    )
    rows = [[name, number(value, ".4f"), data.modules[name].verdict] for name, value in found.items()]
    legend = [Key(kind, f"c{n % 8}", MARKERS[n % 8]) for n, kind in enumerate(series)]
    return drawn(
        f"{i}-ratios",
        lambda canvas: charts.ratios(canvas, stops, series, 1.0),
        "In which layer would a new direction help?",
        worth(data),
        summary,
        "A dot per module, and a line at 1.",
        Table("Spectral ratio of every module", ["module", "largest gradient / λ", "verdict"], rows, frozenset({2})),
        [*([] if one else legend), Key("1: as steep as the penalty", "muted", line="dashed")],
        note="The ratio is ‖gradient‖ / λ, an upper bound. At a stationary point, above 1 means that a direction "
        "outside the factors lowers the objective; before that it says only that training is not over.",
    )
