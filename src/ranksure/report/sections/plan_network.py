"""The network's own answer: measured, with a certificate of the model re-linearised at the point found."""

from __future__ import annotations

import math
from typing import Any

from ranksure.records.plan import NetworkPlan, NetworkRank, Plan
from ranksure.report import charts, network_charts
from ranksure.report.blocks import Figure, Key, Status, Table, Tile, drawn
from ranksure.report.heat_map import Grid, heat_map
from ranksure.report.sections.plan_path import path
from ranksure.report.wording import NONE, counted, number, percent

VERDICTS = {
    "first-order-optimal": "first-order optimal: no direction of any rank lowers the objective at once",
    "rank-bound": "rank-bound: training cannot leave this point, and more rank would help",
    "not-converged": "not converged: neither was established",
}


def enough(data: Plan, rank: int) -> str:
    """How the plan's own sentence begins: ``Rank 2 is enough in both targets``."""
    start = f"Rank {rank} is enough"
    said = next((text for text in data.sentences if text.startswith(start) and ":" in text), None)
    return said.partition(":")[0] if said else f"{start} in every target"


def worse(net: NetworkPlan) -> bool:
    """Whether held-out rows speak against the adapter."""
    return net.heldout is not None and net.heldout.loss > net.heldout.loss_without_adapter


def answer(data: Plan, net: NetworkPlan) -> str:
    """The headline."""
    if net.optimum.is_zero:
        return "No adapter is needed: the network's own solution is no update at all."
    if net.captured_uniform < data.captured_target:
        return f"Rank {net.r} captures {percent(net.captured_uniform)}, less than was asked for."
    said = enough(data, net.r)
    if worse(net):
        return f"{said} for the training rows; held-out rows do worse with it."
    if net.heldout is not None and data.recommended.heldout_r == 0:
        return f"{said} for the training rows; held-out rows show no gain from it."
    return f"{said}."


def worth(net: NetworkPlan) -> Status:
    """Of the gap."""
    return Status.CERTIFIED if net.optimum.certified else Status.NOT_CHECKED


def tiles(data: Plan, net: NetworkPlan) -> list[Tile]:
    """The main numbers, each with what it is worth."""
    optimum, held = net.optimum, net.heldout
    out = [Tile("Rank", str(net.r), Status.MEASURED, "the same for every target, the smallest found")]
    if not optimum.is_zero:
        note = "of what the best point found gains"
        out.append(Tile("Captured", percent(net.captured_uniform), Status.MEASURED, note))
    gap = number(optimum.gap, ".1e") if optimum.relative_gap is None else percent(optimum.relative_gap)
    out.append(Tile("Gap", gap, worth(net), "of the gain, at most, in the model re-linearised at the point found"))
    if not optimum.is_zero:
        shapes = data.shapes.values()
        size = sum(min(net.r, m, n) * (m + n) for m, n in shapes)
        out.append(Tile("Parameters", f"{size:,}", None, "in all targets"))
    if held is not None and not optimum.is_zero:
        change = number(held.loss - held.loss_without_adapter, "+.2g")
        out.append(Tile("Change of held-out loss", change, Status.MEASURED, f"against {held.loss_without_adapter:.4f}"))
    return out


def facts(net: NetworkPlan) -> list[tuple[str, Any]]:
    """What it took, and where it ended."""
    optimum = net.optimum
    work = f"{optimum.gradients:,} gradients for the point found, {net.gradients:,} in all"
    return [
        ("point found", f"objective {optimum.objective!r}, loss {optimum.loss!r}, gap {optimum.gap!r}"),
        ("noise of an evaluation", f"{optimum.noise:.1e}"),
        ("work", f"{work}; frozen layers that ran once: {len(net.skipped)}"),
    ]


def blocks(data: Plan, net: NetworkPlan, i: str) -> list[Figure]:
    """All of them; ranks and their places first."""
    found = [_shares(data, net, i), _places(data, net, i), _descent(net, i), path(net, f"{i}-own")]
    found += [_held_out(data, net, i), _growth(net, i)]
    return [figure for figure in found if figure is not None]


def _shares(data: Plan, net: NetworkPlan, i: str) -> Figure:
    target, own = data.captured_target, {0: 0.0, **{row.rank: row.captured for row in net.ranks}}
    linear = {0: 0.0, **{row.rank: row.captured[0] for row in data.ranks}}
    verdicts = {row.rank: row.verdict for row in net.ranks}
    legend = [
        Key(VERDICTS.get(verdict, verdict), mark[1], mark[0])
        for verdict in dict.fromkeys(verdicts.values())
        for mark in [charts.VERDICT_MARK.get(verdict, ("o", "muted"))]
    ]
    legend += [
        Key("linearised network, certified", "c3", "o", "dotted", hollow=True),
        Key(f"asked for: {percent(target, 2)}", "muted", line="dashed"),
    ]
    reaching = [rank for rank, share in own.items() if share >= target and rank]
    summary = (
        f"On the network itself rank {min(reaching)} is the smallest examined that captures {percent(target, 2)} of "
        "what the best point found gains."
        if reaching
        else f"On the network itself no rank examined captures {percent(target, 2)} of what the best point found gains."
    )
    if not data.optimum.is_zero:
        summary += f" For its linearisation at the pretrained weights rank {data.recommended.linear_r or NONE} does."
    return drawn(
        f"{i}-own-captured",
        lambda canvas: network_charts.shares(canvas, own, verdicts, linear, target),
        "How much does each rank capture on the network itself?",
        Status.MEASURED,
        summary,
        "Two charts over rank: the share captured, and on a logarithmic scale what is missing.",
        _rank_table(net),
        legend,
        note="Filled marks are measured: the best that was found at a rank; another start may end better. Hollow ones "
        "are the certified shares of the linearised network, of its own gain. A share that is not below 100% has no "
        "mark at the right.",
    )


def _rank_table(net: NetworkPlan) -> Table:
    optimum, starts = net.optimum, list(dict.fromkeys(row.start for row in net.ranks if row.start))
    several = len(starts) > 1  # else it need not be told in every row

    def cells(row: NetworkRank) -> list[str]:
        return [
            str(row.rank),
            f"{row.objective:.6f}",
            percent(row.captured, 2),
            number(row.gap, ".1e"),
            number(row.spectral_ratio, ".3f"),
            f"{row.parameters:,}",
            row.verdict,
            *([row.start or NONE] if several else []),
        ]

    nothing = [
        "0",
        f"{optimum.objective_at_zero:.6f}",
        "0%",
        NONE,
        NONE,
        "0",
        "no adapter",
        *([NONE] if several else []),
    ]
    caption = f"What each rank reaches on the network; the solver's own point has F = {optimum.objective:.6f}"
    if len(starts) == 1:
        caption += f"; start of every rank: {starts[0]}"
    heads = ["rank", "objective", "captured", "gap, at most", "rho", "parameters", "verdict"]
    return Table(
        caption, [*heads, *(["start"] if several else [])], [nothing, *map(cells, net.ranks)], frozenset({6, 7})
    )


def _places(data: Plan, net: NetworkPlan, i: str) -> Figure:
    modules, names = net.optimum.modules, data.target_modules
    ranks = {name: modules[name].rank if name in modules else 0 for name in names}
    small = {name: net.pattern.get(name, 0) for name in names}
    used = sum(1 for rank in ranks.values() if rank)
    summary = (
        f"The point found uses {used} of {counted(len(names), 'module')}, with rank {max(ranks.values())} at most and "
        f"{sum(ranks.values())} in all; the smallest pattern found keeps "
        f"{counted(sum(1 for rank in small.values() if rank), 'module')} and {sum(small.values())} in all, and "
        f"captures {percent(net.captured_pattern, 2)}."
        if used
        else f"The point found leaves all {counted(len(names), 'module')} as they are."
    )
    e, w = net.first_order
    states = {name: modules[name] for name in names if name in modules}
    return heat_map(
        f"{i}-own-heat",
        "Where does the rank go?",
        Status.MEASURED,
        summary,
        [Grid("Point found", ranks), Grid("Smallest pattern found", small)],
        note=f"How near to first-order optimal it is, per module, is in the table: e (the present directions, 0 is "
        f"optimal) is at most {e:.3f}, w (new directions, up to 1 is optimal) at most {w:.3f}. “Smallest” is the "
        "smallest found.",
        extra={
            "rho": {name: f"{state.spectral_ratio:.3f}" for name, state in states.items()},
            "e": {name: f"{state.stationarity:.3f}" for name, state in states.items()},
            "w": {name: f"{state.outside_norm / net.weight_decay:.3f}" for name, state in states.items()},
        },
    )


def _descent(net: NetworkPlan, i: str) -> Figure | None:
    optimum = net.optimum
    history, zero = optimum.history, optimum.objective_at_zero
    if len(history) < 2:
        return None
    share = "" if optimum.relative_gap is None else f", {percent(optimum.relative_gap, 2)} of what was gained"
    summary = (
        f"{counted(optimum.gradients, 'gradient')} took the objective from {zero:.4f} to {optimum.objective:.4f}. "
        f"There the model re-linearised at the point could gain at most {number(optimum.gap, '.2g')} more at any "
        f"rank{share}."
    )
    rows = [
        [str(n), f"{value:.6f}", number(gap, ".2e"), percent(gap / (zero - value), 2) if value < zero else NONE]
        for n, value, gap in history
    ]
    return drawn(
        f"{i}-own-descent",
        lambda canvas: network_charts.descent(canvas, history, zero),
        "How did the solver get there, and what is left?",
        worth(net),
        summary,
        "Two charts over gradients: the objective with a band below it, and the gap on a logarithmic scale.",
        Table("Rounds", ["gradients", "objective", "gap", "gap / gain"], rows),
        [
            Key("objective, measured", "c0", "o", "solid"),
            Key("down to what the gap allows", "c0", box=True),
            Key("gap / gain", "c1", "o", "solid"),
            Key("without an adapter", "muted", line="dotted"),
            Key("1% of the gain", "muted", line="dashed"),
        ],
        note="Each round's gap is of the model re-linearised at that round's point. It bounds no optimum of the "
        "network, and later points may lie below the band.",
    )


def _held_out(data: Plan, net: NetworkPlan, i: str) -> Figure | None:
    held, linear = net.heldout, data.heldout
    losses = {row.rank: row.heldout_loss for row in net.ranks if row.heldout_loss is not None}
    if held is None or not losses or not math.isfinite(held.loss + held.loss_without_adapter):
        return None
    accuracies = {row.rank: row.heldout_accuracy for row in net.ranks if row.heldout_accuracy is not None}
    theirs = {row.rank: row.heldout_loss for row in data.ranks if row.heldout_loss is not None}
    losses[0] = held.loss_without_adapter
    losses = dict(sorted(losses.items()))
    panels: list[tuple[str, network_charts.Values, network_charts.Values, bool]]
    panels = [("held-out loss", losses, {0: linear.loss_without_adapter, **theirs} if linear else theirs, False)]
    if accuracies and held.accuracy_without_adapter is not None:
        shares = {row.rank: row.heldout_accuracy for row in data.ranks if row.heldout_accuracy is not None}
        panels.append(("held-out accuracy", {0: held.accuracy_without_adapter, **accuracies}, shares, True))
    best = min(losses, key=lambda rank: losses[rank])
    summary = f"On {held.rows:,} held-out rows that chose nothing, the network with the point found has loss "
    summary += f"{held.loss:.4f}, without an adapter {held.loss_without_adapter:.4f}"
    if held.accuracy is not None and held.accuracy_without_adapter is not None:
        summary += f" (accuracy {percent(held.accuracy)} and {percent(held.accuracy_without_adapter)})"
    summary += f". By rank the loss is lowest at {'no adapter' if best == 0 else f'rank {best}'}."
    rows = [
        [str(rank), f"{loss:.4f}", percent(panels[1][1].get(rank) if panels[1:] else None), number(theirs.get(rank))]
        for rank, loss in losses.items()
    ]
    return drawn(
        f"{i}-own-heldout",
        lambda canvas: network_charts.heldout(canvas, panels),
        "Does it hold on rows that it has not seen?",
        Status.MEASURED,
        summary,
        "Charts over rank.",
        Table("Held-out figures by rank", ["rank", "loss", "accuracy", "loss, linearised"], rows),
        [
            Key("the network itself", "c0", "o", "solid"),
            Key("its linearisation", "c3", "s", "dotted", hollow=True),
            Key("without an adapter", "muted", line="dashed"),
        ],
        note="The linearised figures are at its own weight decay.",
    )


def _growth(net: NetworkPlan, i: str) -> Figure | None:
    subsets = net.subsets
    if len(subsets) < 2:
        return None
    sizes = [part.n_samples for part in subsets]
    largest = [max(part.ranks.values(), default=0) for part in subsets]
    needed = {part.n_samples: part.rank_needed for part in subsets if part.rank_needed is not None}
    losses = {part.n_samples: part.heldout_loss for part in subsets if part.heldout_loss is not None}
    ends = {True: "The answer has settled.", False: "It has not settled: more rows may move it.", None: ""}
    shown = " to ".join(str(needed.get(n, NONE)) for n in (sizes[0], sizes[-1]))
    summary = f"From {sizes[0]:,} to {sizes[-1]:,} rows the rank needed goes from {shown}"
    if {sizes[0], sizes[-1]} <= losses.keys():
        summary += f", the held-out loss from {losses[sizes[0]]:.4f} to {losses[sizes[-1]]:.4f}"
    rows = [
        [
            f"{part.n_samples:,}",
            f"{part.weight_decay:.4g}",
            number(part.rank_needed, "d"),
            str(top),
            f"{part.loss:.4f}",
            number(part.heldout_loss, ".4f"),
            percent(part.heldout_accuracy),
            percent(part.relative_gap),
            f"{part.gradients:,}",
        ]
        for part, top in zip(subsets, largest, strict=True)
    ]
    heads = ["rows", "λ", "rank needed", "largest rank", "loss", "held-out loss", "accuracy", "gap / gain", "gradients"]
    return drawn(
        f"{i}-own-growth",
        lambda canvas: network_charts.growth(canvas, sizes, needed, largest, losses),
        "How does the answer move with more data?",
        Status.MEASURED,
        f"{summary}. {ends[net.settled]}".strip(),
        "Charts over the number of rows.",
        Table("Nested subsets of the rows", heads, rows),
        [Key("rank needed; held-out loss", "c0", "o", "solid"), Key("largest rank found", "c2", "s", "solid")],
        note="Each subset started from the solution of the one before it; the largest is the one that is certified.",
    )
