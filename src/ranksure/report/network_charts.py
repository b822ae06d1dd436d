"""The drawings of the network's own answer: filled marks are the network's, hollow ones its linearisation's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ranksure.report.charts import EDGE, VERDICT_MARK, categories, roomy
from ranksure.report.svg import DASHES, INKS, SERIES, Canvas, label, log_ticks, plain_ticks, ticks
from ranksure.report.wording import percent

Values = Mapping[int, float]
"""By rank."""

_HOLLOW: dict[str, Any] = {"markerfacecolor": INKS["card"], "markersize": 8, "markeredgewidth": 1.8}


def shares(canvas: Canvas, network: Values, verdicts: Mapping[int, str], linear: Values, target: float) -> None:
    """Share captured by rank, and on a logarithmic axis what is missing."""
    ranks = sorted({*network, *linear})
    left, right = canvas.axes(2, height=290)
    for axes, missing in ((left, False), (right, True)):
        for values, hollow in ((linear, True), (network, False)):
            seen = {r: 1 - v if missing else 100 * v for r, v in values.items() if not missing or 1 - v > 1e-9}
            seen = {r: v for r, v in seen.items() if not missing or r > 0}
            _by_rank(axes, ranks, seen, hollow, {} if hollow else verdicts)
        axes.axhline(1 - target if missing else 100 * target, color=INKS["muted"], linewidth=1.2, linestyle=DASHES[1])
        categories(axes, ranks)
    box = {"facecolor": INKS["card"], "edgecolor": "none", "pad": 0.8}
    for rank, value in network.items():
        where = (ranks.index(rank), 100 * value)
        if rank:
            left.annotate(
                percent(value, 1), where, xytext=(0, 11), textcoords="offset points", ha="center", fontsize=12, bbox=box
            )
    low = min(0.0, *(100 * value for value in (*network.values(), *linear.values())))
    left.set_ylim(low - 6, 120)
    left.set_yticks([0, 25, 50, 75, 100])
    plain_ticks(left.yaxis, lambda value: f"{value:g}%")
    label(left, "rank", "share of its own gain")
    right.set_yscale("log")
    drawn = [1 - v for values in (network, linear) for r, v in values.items() if r and 1 - v > 1e-9]
    right.set_ylim(min(*drawn, 1 - target) / 6, max(*drawn, 1 - target) * 6) if drawn else right.set_ylim(1e-4, 1)
    log_ticks(right.yaxis)
    label(right, "rank", "share that is missing (log scale)")


def _by_rank(axes: Any, ranks: Sequence[int], values: Values, hollow: bool, verdicts: Mapping[int, str]) -> None:
    places = [ranks.index(rank) for rank in values]
    colour = SERIES[3] if hollow else SERIES[0]
    axes.plot(places, list(values.values()), color=colour, linewidth=1.5, linestyle=DASHES[2] if hollow else "-")
    for place, (rank, value) in zip(places, values.items(), strict=True):
        marker, mark = VERDICT_MARK.get(verdicts.get(rank, ""), ("o", "c3" if hollow else "muted"))
        look = {**_HOLLOW, "markeredgecolor": INKS[mark]} if hollow else {**EDGE, "markersize": 10}
        axes.plot(place, value, marker, color=INKS[mark], zorder=3 if hollow else 4, **look)


def heldout(canvas: Canvas, panels: Sequence[tuple[str, Values, Values, bool]]) -> None:
    """Panels over rank: what it is, the network's values, its linearisation's, and whether they are shares."""
    ranks = sorted({rank for _, network, linear, _ in panels for rank in (*network, *linear)})
    for axes, (name, network, linear, is_share) in zip(canvas.axes(len(panels), height=270), panels, strict=True):
        scale = 100 if is_share else 1
        for values, hollow in ((linear, True), (network, False)):
            places = [ranks.index(rank) for rank in values]
            look: dict[str, Any] = {**_HOLLOW, "linestyle": DASHES[2], "linewidth": 1.5} if hollow else EDGE
            marker, colour = ("s", SERIES[3]) if hollow else ("o", SERIES[0])
            axes.plot(places, [scale * v for v in values.values()], marker=marker, color=colour, **look)
        if 0 in network:
            axes.axhline(scale * network[0], color=INKS["muted"], linewidth=1.2, linestyle=DASHES[1])
        roomy(axes, [scale * v for v in (*network.values(), *linear.values())])
        if is_share:
            plain_ticks(axes.yaxis, lambda value: f"{value:g}%")
        categories(axes, ranks)
        label(axes, "rank", name)


def descent(canvas: Canvas, history: Sequence[tuple[int, float, float]], zero: float) -> None:
    """The objective over gradients with a band down to what the gap allows, and the gap as a share of the gain."""
    left, right = canvas.axes(2, height=290, left=66)
    x, f, gaps = zip(*history, strict=True)
    low, high = min(f), max(*f, zero)
    spread = (high - low) or max(abs(high), 1e-9)
    floor = low - 0.3 * spread
    left.fill_between(
        x, [max(value - gap, floor) for value, gap in zip(f, gaps, strict=True)], f,
        facecolor=INKS["c0"], alpha=0.18, linewidth=0,
    )  # fmt: skip
    left.plot(x, f, "-o", color=SERIES[0], **EDGE)
    left.axhline(zero, color=INKS["muted"], linewidth=1.2, linestyle=DASHES[2])
    roomy(left, [floor, high], 0.08)
    left.set_ylim(floor, high + 0.1 * spread)
    label(left, "gradients", "objective of the network")
    kept = [(n, gap / (zero - value)) for n, value, gap in history if value < zero and gap > 0]
    right.plot([n for n, _ in kept], [share for _, share in kept], "-o", color=SERIES[1], **EDGE)
    right.set_yscale("log")
    values = [share for _, share in kept] or [1.0]
    right.set_ylim(min(*values, 0.01) / 2, max(*values, 0.01) * 2)
    right.axhline(0.01, color=INKS["muted"], linewidth=1.2, linestyle=DASHES[1])
    log_ticks(right.yaxis)
    label(right, "gradients", "gap / gain (log scale)")
    for axes in (left, right):
        axes.set_xlim(0, 1.06 * max(x))
        ticks(axes.xaxis, 5, whole=True)


def growth(canvas: Canvas, sizes: Sequence[int], needed: Values, largest: Sequence[int], losses: Values) -> None:
    """Over the number of rows: the rank needed and the largest found, and the loss on held-out rows."""
    axes = canvas.axes(2 if losses else 1, height=270)
    axes[0].plot(sizes, largest, "-s", color=SERIES[2], linewidth=5, markersize=12, alpha=0.55)
    axes[0].plot(list(needed), list(needed.values()), "-o", color=SERIES[0], **EDGE)
    axes[0].set_ylim(0, 1.25 * max(*largest, *needed.values(), 1))
    ticks(axes[0].yaxis, 5, whole=True)
    label(axes[0], "training rows (log scale)", "rank")
    if losses:
        axes[1].plot(list(losses), list(losses.values()), "-o", color=SERIES[0], **EDGE)
        roomy(axes[1], list(losses.values()))
        label(axes[1], "training rows (log scale)", "held-out loss of the network")
    for each in axes:
        each.set_xscale("log")
        log_ticks(each.xaxis)
        each.set_xticks(sizes, [f"{n:,}" for n in sizes])
        each.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
