"""Figures of a plan for the linearised network: ranks, their places, held-out rows, linearity, more data, theory."""

from __future__ import annotations

from ranksure.records.plan import Plan
from ranksure.report import charts
from ranksure.report.blocks import Figure, Key, Prose, Status, Table, drawn
from ranksure.report.heat_map import Grid, heat_map
from ranksure.report.sections.plan_path import path
from ranksure.report.wording import NONE, counted, listed, number, percent, share

_VERDICTS = {
    "optimal": "certified optimal: at most 10⁻⁴ of the gain is missing",
    "rank-bound": "rank-bound: training cannot leave this point, and more rank would help",
    "not-converged": "not converged: neither was established",
}


def blocks(data: Plan, i: str) -> list[Figure | Prose]:
    """All of them, the spectrum of its adapter left to the caller."""
    found = (path(data, i), held_out(data, i), linearity(data, i), growth(data, i))
    return [_captured(data, i), _heat(data, i), *(figure for figure in found if figure is not None), _theory(data)]


def worth(data: Plan) -> Status:
    """Of the optimum."""
    return Status.CERTIFIED if data.optimum.status == "converged" else Status.NOT_CHECKED


def held_out(data: Plan, i: str) -> Figure | None:
    """Held-out loss by rank."""
    held = data.heldout
    rows = [row for row in data.ranks if row.heldout_loss is not None]
    if not held or not rows:
        return None
    ranks = [0, *(row.rank for row in rows)]
    losses = [held.loss_without_adapter, *(row.heldout_loss for row in rows)]
    accuracies = [held.accuracy_without_adapter, *(row.heldout_accuracy for row in rows)]
    best = held.best_rank
    lowest = min(range(len(ranks)), key=lambda index: losses[index])
    gain = losses[0] - losses[lowest]
    summary = (
        f"On {held.rows:,} held-out rows that chose nothing, the loss is lowest at rank {ranks[lowest]}: "
        f"{losses[lowest]:.4f} against {losses[0]:.4f} without an adapter."
        if gain > 0
        else f"On {held.rows:,} held-out rows that chose nothing, no rank has a lower loss than no adapter."
    )
    table = Table(
        "Held-out figures of the linearised network",
        ["rank", "loss", "accuracy"],
        [[str(r), f"{v:.4f}", percent(a)] for r, v, a in zip(ranks, losses, accuracies, strict=True)],
    )
    legend = [
        Key("held-out loss", "c0", "o", "solid"),
        Key("accuracy", "c2", "s", "solid"),
        Key("without an adapter", "muted", line="dashed"),
        Key("lowest loss", "c1", "o"),
    ]
    keep = [key for key in legend if key.text != "accuracy" or all(a is not None for a in accuracies)]
    return drawn(
        f"{i}-heldout",
        lambda canvas: charts.by_rank(canvas, ranks, losses, accuracies, best),
        "Does it hold on rows that it has not seen?",
        Status.MEASURED,
        summary,
        "Charts over rank.",
        table,
        keep if best in ranks else [key for key in keep if key.text != "lowest loss"],
        note="Of the linearised network, with the solution of each rank.",
    )


def linearity(data: Plan, i: str) -> Figure | None:
    """How far the real network is from its linearisation."""
    found = data.linearity
    rows = [
        charts.Level(text, 100 * value, None, colour, marker, percent(value))
        for value, text, colour, marker in (
            (found.train, "training rows", "c0", "o"),
            (found.heldout, "held-out rows", "c2", "s"),
        )
        if value is not None
    ]
    if not rows:
        return None
    worst = max(row.value for row in rows)
    summary = (
        f"With the solved update in place, the real network's outputs differ from what its linearisation predicts by "
        f"{rows[-1].shown} of the change on {rows[-1].text}. "
        + (
            "A plan warns from 50%: treat the ranks as a guide and check the trained run."
            if worst > 50
            else "That is below the 50% from which a plan warns."
        )
    )
    real, linear = found.heldout_real_loss, found.heldout_linear_loss
    if real is not None and linear is not None:
        summary += f" Held-out loss: {real:.4f} of the real network, {linear:.4f} of the linearised one."
    pairs = [
        ("difference of the change", found.train, found.heldout, percent),
        ("loss, real network", found.train_real_loss, real, lambda v: number(v, ".4f")),
        ("loss, linearised", found.train_linear_loss, linear, lambda v: number(v, ".4f")),
        ("accuracy, real network", found.train_real_accuracy, found.heldout_real_accuracy, percent),
    ]
    table = Table(
        "The real network against its linearisation",
        ["what", "training rows", "held-out rows"],
        [[name, form(train), form(held)] for name, train, held, form in pairs],
    )
    return drawn(
        f"{i}-linearity",
        lambda canvas: charts.levels(canvas, rows, "difference, in % of the change of the outputs", 50, zero=True),
        "How far is the real network from the linearised one?",
        Status.MEASURED,
        summary,
        "A bar for each set of rows, with a mark at 50%.",
        table,
        [Key("a plan warns from here: 50%", "muted", line="dashed")],
        note="All that is certified is about the linearised network; this is how far it is from the one you train.",
    )


def growth(data: Plan, i: str) -> Figure | None:
    """Ranks over the number of rows."""
    pairs = [(row, row.rank_needed) for row in data.subsets if row.rank_needed is not None]
    if len(pairs) < 2:
        return None
    subsets, needed = [row for row, _ in pairs], [rank for _, rank in pairs]
    sizes = [row.n_samples for row in subsets]
    largest, fit = [row.largest_rank for row in subsets], data.extrapolation
    ahead = None if not fit else (fit.n_samples, fit.rank_needed, fit.exponent)
    summary = (
        f"From {sizes[0]:,} to {sizes[-1]:,} rows the rank needed for {percent(data.captured_target, 2)} goes from "
        f"{needed[0]} to {needed[-1]}."
    )
    rows = [
        [f"{n:,}", str(a), str(b), number(row.relative_gap, ".1e"), "solved"]
        for n, a, b, row in zip(sizes, needed, largest, subsets, strict=True)
    ]
    legend = [Key("rank needed", "c0", "o", "solid"), Key("largest rank of the optimum", "c2", "s", "solid")]
    if ahead:
        summary += f" Extrapolated, about rank {ahead[1]:.1f} at {ahead[0]:,} rows, which is a guess."
        rows.append([f"{ahead[0]:,}", f"{ahead[1]:.1f}", NONE, NONE, "extrapolated"])
        legend.append(Key("extrapolation", "c1", "D", "dashed"))
    table = Table(
        "Nested subsets, λ scaled as N^-1/2",
        ["rows", "rank needed", "largest rank", "relative gap", "how"],
        rows,
        frozenset({4}),
    )
    return drawn(
        f"{i}-growth",
        lambda canvas: charts.growth(canvas, sizes, needed, largest, ahead),
        "How does the answer move with more data?",
        Status.MEASURED,
        summary,
        "A chart over the number of rows.",
        table,
        legend,
        note="Each subset is solved to the gap in the table; what holds for more rows is an extrapolation.",
    )


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
        reached(data),
        "Two charts over rank: the share captured, and on a logarithmic scale the most that is missing.",
        _rank_table(data),
        legend,
        note="The gain is what any rank could take off the training objective of the linearised network, against no "
        "adapter. The duality gap bounds it: the bar at each mark is the interval that holds its true share. Whether "
        "another point of the same rank is better than one that is rank-bound is not checked.",
    )


def reached(data: Plan) -> str:
    """Which ranks capture the share asked for, are optimal, are stuck."""
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
        worth(data),
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
        ["claim", "paper, KN (proved)", "outputs that the loss sees (proved)", "operator rank (measured)"],
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
