"""How the weight decay of a plan was chosen."""

from __future__ import annotations

from ranksure.records.plan import NetworkPlan, Plan
from ranksure.report import charts
from ranksure.report.blocks import Figure, Key, Status, Table, drawn
from ranksure.report.wording import number


def path(data: Plan | NetworkPlan, i: str) -> Figure | None:
    """How the weight decay was chosen, on the network or on its linearisation."""
    network = isinstance(data, NetworkPlan)
    pairs = [(point, point.selection_loss) for point in data.path if point.selection_loss is not None]
    if len(pairs) < 2:
        return None
    points, losses = [point for point, _ in pairs], [loss for _, loss in pairs]
    lams = [point.weight_decay for point in points]
    largest = [max(p.ranks.values(), default=0) for p in points]
    sums = [sum(p.ranks.values()) for p in points]
    totals = sums if max(sums) <= 6 * max(*largest, 1) else []  # far above, they would flatten the others
    chosen, found = data.weight_decay, "the point found" if network else "the certified optimum"
    best = min(range(len(points)), key=lambda index: losses[index])
    summary = (
        f"λ = {chosen:.4g} was used, chosen by {data.weight_decay_chosen_by}. The lowest loss on the rows "
        f"that choose is {losses[best]:.4f}, at λ = {lams[best]:.4g}; from λ = {data.lambda_max:.4g} up "
        f"{'the start, no update at all, is stationary' if network else 'the optimum is no update'}."
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
        lambda canvas: charts.decay_path(canvas, lams, losses, largest, totals, chosen, found),
        "How was the weight decay chosen?",
        Status.MEASURED,
        summary,
        "Two charts over the weight decay: held-out loss, and rank.",
        table,
        legend,
        note="These rows choose λ and are used for nothing else; with few of them the choice is uncertain. Each point "
        "is solved to the gap in the table.",
    )
