"""A plan: which rank, and how certain that is."""

from __future__ import annotations

from typing import Any

from ranksure.records.plan import Plan
from ranksure.report import charts
from ranksure.report.blocks import Code, Figure, Key, Prose, Section, Status, Table, Tile, drawn
from ranksure.report.heat_map import Grid, heat_map
from ranksure.report.lora_source import pattern, source, written
from ranksure.report.records import Record
from ranksure.report.sections.plan_figures import growth, held_out, linearity, path
from ranksure.report.sections.shared import reproduce
from ranksure.report.spectrum import spectrum_figure
from ranksure.report.wording import NONE, after, counted, listed, number, percent, power, share, short

_FAR = 0.5  # relative difference from the linearisation above which a plan warns
_VERDICTS = {
    "optimal": "certified optimal: at most 10⁻⁴ of the gain is missing",
    "rank-bound": "rank-bound: training cannot leave this point, and more rank would help",
    "not-converged": "not converged: neither was established",
}


def build(record: Record, section_id: str, command: str | None = None) -> Section:
    """The section of a plan."""
    data: Plan = record.data
    i = section_id
    zero = data.optimum.is_zero
    answer = _answer(data, zero)
    optimum = data.optimum
    section = Section(
        i,
        "Plan",
        f"{short(data.model)} on {data.data.source}",
        answer,
        "warn" if data.warnings else "good",
        [after(_enough(data), text) for text in data.sentences],
        [*data.warnings, *data.notes],
        _tiles(data, zero),
    )
    blocks: list[Any] = [_captured(data, i)]
    blocks.append(_heat(data, i))
    spectrum = spectrum_figure(
        f"{i}-spectrum", record.folder / "adapter", _worth(data), "the update that solves the linearised problem"
    )
    blocks += [spectrum] if spectrum else []
    found = (path(data, i), held_out(data, i), linearity(data, i), growth(data, i))
    blocks += [figure for figure in found if figure is not None]
    blocks.append(_theory(data))
    if not zero:
        blocks += _configurations(record, i)
    facts = [
        ("model", data.model),
        ("revision", data.revision),
        ("data", f"{data.data.source}, {data.n_samples:,} of {data.data.rows:,} rows"),
        ("data SHA-256", data.data.sha256),
        ("seed", data.seed),
        ("weight decay λ", f"{data.weight_decay!r} ({data.weight_decay_chosen_by})"),
        ("certified optimum", f"{optimum.objective!r}, dual bound {optimum.dual!r}"),
    ]
    blocks += reproduce(i, record, command, facts)
    section.blocks = blocks
    return section


def _answer(data: Plan, zero: bool) -> str:
    if zero:
        return "No adapter is needed: the certified optimum is no update at all."
    advice, measured = data.recommended, data.linearity
    enough = _enough(data)
    if measured.worst > _FAR:
        return f"{enough} of the linearised network, which is far from the real one here."
    if data.heldout and advice.heldout_r == 0:
        return f"{enough} for the training rows; held-out rows show no gain from it."
    return f"{enough}."


def _enough(data: Plan) -> str:
    """How the plan's own sentence begins: ``Rank 2 is enough in both targets``."""
    start = f"Rank {data.recommended.r} is enough"
    said = next((text for text in data.sentences if text.startswith(start) and ":" in text), None)
    return said.partition(":")[0] if said else f"{start} in every target"


def _worth(data: Plan) -> Status:
    return Status.CERTIFIED if data.optimum.status == "converged" else Status.NOT_CHECKED


def _tiles(data: Plan, zero: bool) -> list[Tile]:
    optimum, advice, held = data.optimum, data.recommended, data.heldout
    rows = {row.rank: row for row in data.ranks}
    out = [Tile("Rank", str(0 if zero else advice.r), _worth(data), "the same for every target")]
    if not zero and advice.r in rows:
        low, high = rows[advice.r].captured
        out.append(Tile("Captured", share(low, high, 1), Status.CERTIFIED, "of what any rank could gain"))
    gap = power(optimum.relative_gap)
    out.append(Tile("Optimality gap", gap, _worth(data), "of the possible gain, at most"))
    if advice.parameters_uniform and not zero:
        out.append(Tile("Parameters", f"{advice.parameters_uniform:,}", None, "in all targets"))
    row = rows.get(advice.r)
    if held and row and row.heldout_loss is not None:
        change = row.heldout_loss - held.loss_without_adapter
        out.append(
            Tile(
                "Change of held-out loss",
                number(change, "+.2g"),
                Status.ESTIMATED,
                f"against {held.loss_without_adapter:.4f}",
            )
        )
    return out


def _captured(data: Plan, i: str) -> Figure:
    target, rows = data.captured_target, data.ranks
    ranks = [0, *(row.rank for row in rows)]
    intervals = [(0.0, 0.0), *((row.captured[0], row.captured[1]) for row in rows)]
    missing = [None, *(max(1 - row.captured[0], 0.0) for row in rows)]
    verdicts = ["", *(row.verdict for row in rows)]
    present: list[str] = list(dict.fromkeys(row.verdict for row in rows))
    legend = [
        Key(_VERDICTS.get(verdict, verdict), charts.VERDICT_MARK.get(verdict, ("o", "muted"))[1], marker)
        for verdict in present
        for marker in [charts.VERDICT_MARK.get(verdict, ("o", "muted"))[0]]
    ]
    legend.append(Key(f"asked for: {percent(target, 2)}", "muted", line="dashed"))
    legend.append(Key("counts as optimal: 10⁻⁴ missing", "good", line="dotted"))
    return drawn(
        f"{i}-captured",
        lambda canvas: charts.captured(canvas, ranks, intervals, missing, verdicts, target),
        "How much of the possible gain does each rank capture?",
        Status.CERTIFIED,
        _reached(data),
        "Two charts over rank: the share captured, and on a logarithmic scale the most that is missing.",
        _rank_table(data),
        legend,
        note="The gain is what any rank could take off the training objective of the linearised network, against no "
        "adapter. The duality gap bounds it: the bar at each mark is the interval that holds its true share. Whether "
        "another point of the same rank is better than one that is rank-bound is not checked.",
    )


def _reached(data: Plan) -> str:
    target, rows = data.captured_target, data.ranks
    enough = [row.rank for row in rows if row.captured[0] >= target]
    bound = [row.rank for row in rows if row.verdict == "rank-bound"]
    optimal = [row.rank for row in rows if row.verdict == "optimal"]
    parts = []
    if enough:
        parts.append(f"Rank {min(enough)} is the smallest examined that surely captures {percent(target, 2)}.")
    else:
        parts.append(f"No rank examined surely captures {percent(target, 2)}.")
    if optimal:
        parts.append(
            f"From rank {min(optimal)} the solution found is certified optimal: no rank can do better by more "
            "than 10⁻⁴ of the gain."
        )
    if bound:
        which = f"Rank {bound[0]} is" if len(bound) == 1 else f"Ranks {listed(bound)} are"
        parts.append(f"{which} stuck below the optimum (rank-bound).")
    return " ".join(parts)


def _rank_table(data: Plan) -> Table:
    optimum = data.optimum
    return Table(
        "What each rank reaches; the certified optimum is "
        f"F = {optimum.objective:.6f}, relative gap {optimum.relative_gap:.1e}",
        ["rank", "objective", "gap, at most", "captured", "parameters", "spectral ratio", "verdict"],
        [
            ["0", f"{optimum.objective_at_zero:.6f}", NONE, "0%", "0", NONE, "no adapter"],
            *(
                [
                    str(row.rank),
                    f"{row.objective:.6f}",
                    number(row.gap, ".1e"),
                    share(*row.captured),
                    f"{row.parameters:,}",
                    number(row.spectral_ratio, ".3f"),
                    row.verdict,
                ]
                for row in data.ranks
            ),
        ],
        frozenset({6}),
    )


def _heat(data: Plan, i: str) -> Figure:
    names, kept = data.target_modules, data.recommended.linear_pattern or data.recommended.rank_pattern
    optimum = {name: data.optimum.ranks.get(name, 0) for name in names}
    small = {name: kept.get(name, 0) for name in names}
    used = [name for name in names if optimum[name]]
    shapes = {name: " × ".join(map(str, data.shapes.get(name, []))) or NONE for name in names}
    if used:
        summary = (
            f"The certified optimum uses {len(used)} of {counted(len(names), 'module')}, with rank "
            f"{max(optimum.values())} at most and {sum(optimum.values())} in all; the smallest pattern found keeps "
            f"{counted(sum(1 for value in small.values() if value), 'module')} and {sum(small.values())} in all."
        )
    else:
        summary = f"The certified optimum leaves all {counted(len(names), 'module')} as they are."
    return heat_map(
        f"{i}-heat",
        "Where does the rank go?",
        _worth(data),
        summary,
        [Grid("Certified optimum", optimum), Grid("Smallest pattern found (minimality not checked)", small)],
        note="Certified is that the first update is optimal for the linearised network, not that its pattern is the "
        "only one. “Smallest” is the smallest found; that there is none smaller is not checked.",
        extra={"shape": shapes},
    )


def _theory(data: Plan) -> Prose:
    bounds = data.bounds
    rows = [
        [text, str(bound.paper), str(bound.effective), number(bound.numerical, "d")]
        for text, bound in (
            ("an optimum exists at rank, at most", bounds.existence),
            ("no spurious minima, if perturbed a little, from rank", bounds.landscape),
        )
    ]
    table = Table(
        "Rank of each module",
        ["claim", "paper, KN (proved)", "outputs that the loss sees (proved)", "operator rank (estimated)"],
        rows,
    )
    return Prose(
        "What does theory promise, whatever the data?",
        paragraphs=[
            "Theorems of Jang, Lee and Ryu (2024), sharpened, from the number of rows N and outputs K; the last column "
            f"counts a numerical rank instead. The optimum that was found has rank {data.optimum.largest_rank} at most."
        ],
        table=table,
    )


def _configurations(record: Record, i: str) -> list[Code]:
    data = record.data
    advice = data.recommended
    found = written(record.folder)
    arguments = found[1] if found else dict(advice.peft or {})
    if not arguments:
        return []
    decay = "Its weight decay is L2 on the factors, as SGD applies it, not AdamW's."
    text = found[0] if found else source(arguments)
    out = [Code(f"{i}-config", f"LoraConfig: rank {advice.r} in every target", text, f"The one to train. {decay}")]
    small = advice.linear_pattern
    if small and (advice.parameters_pattern or 0) < (advice.parameters_uniform or 0):
        why = "The fewest parameters for the linearised network; a trained one often uses what it leaves out."
        out.append(Code(f"{i}-pattern", "LoraConfig: the smallest pattern found", pattern(arguments, small), why))
    return out
