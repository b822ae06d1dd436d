"""Figures of a plan beside its rank table: how lambda was chosen, held-out rows, linearity, more data."""

from __future__ import annotations

from ranksure.records.plan import Plan
from ranksure.report import charts
from ranksure.report.blocks import Figure, Key, Status, Table, drawn
from ranksure.report.wording import NONE, number, percent


def path(data: Plan, i: str) -> Figure | None:
    """How the weight decay was chosen."""
    pairs = [(point, point.selection_loss) for point in data.path if point.selection_loss is not None]
    if len(pairs) < 2:
        return None
    points, losses = [point for point, _ in pairs], [loss for _, loss in pairs]
    lams = [point.weight_decay for point in points]
    largest = [max(p.ranks.values(), default=0) for p in points]
    sums = [sum(p.ranks.values()) for p in points]
    totals = sums if max(sums) <= 6 * max(*largest, 1) else []  # far above, they would flatten the others
    chosen = data.weight_decay
    best = min(range(len(points)), key=lambda index: losses[index])
    summary = (
        f"λ = {chosen:.4g} was used, chosen by {data.weight_decay_chosen_by}. The lowest loss on the rows "
        f"that choose is {losses[best]:.4f}, at λ = {lams[best]:.4g}; from λ = {data.lambda_max:.4g} up the optimum "
        "is no update."
    )
    rows = [
        [f"{lam:.4g}", f"{loss:.4f}", str(top), str(total), number(p.relative_gap, ".1e"), mark]
        for lam, loss, top, total, p in zip(lams, losses, largest, sums, points, strict=True)
        for mark in ["chosen" if lam == chosen else ""]
    ]
    table = Table(
        "The path from the largest weight decay down",
        ["λ", "held-out loss", "largest rank", "sum of ranks", "relative gap", "use"],
        rows,
        frozenset({5}),
    )
    legend = [
        Key("held-out loss; largest rank", "c0", "o", "solid"),
        *([Key("sum of ranks", "c2", "s", "solid")] if totals else []),
        Key("chosen", "c1", "o", "dashed"),
    ]
    return drawn(
        f"{i}-path",
        lambda canvas: charts.decay_path(canvas, lams, losses, largest, totals, chosen),
        "How was the weight decay chosen?",
        Status.ESTIMATED,
        summary,
        "Two charts over the weight decay: held-out loss, and rank.",
        table,
        legend,
        note="These rows choose λ and are used for nothing else; with few of them the choice is uncertain. Each point "
        "is solved to the gap in the table.",
    )


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
        Status.ESTIMATED,
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
        Status.ESTIMATED,
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
        Status.ESTIMATED,
        summary,
        "A chart over the number of rows.",
        table,
        legend,
        note="Each subset is solved to the gap in the table; what holds for more rows is an extrapolation.",
    )
