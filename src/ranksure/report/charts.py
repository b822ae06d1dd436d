"""The drawings of a plan and of a run; what they mean is said by the sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ranksure.report.module_places import clean
from ranksure.report.svg import DASHES, INKS, MARKERS, SERIES, Canvas, label, layer_ticks, log_ticks, plain_ticks, ticks
from ranksure.report.wording import percent

VERDICT_MARK = {
    "optimal": ("o", "good"),
    "first-order-optimal": ("o", "good"),
    "rank-bound": ("^", "warn"),
    "not-converged": ("s", "bad"),
}


def captured(
    canvas: Canvas,
    ranks: Sequence[int],
    intervals: Sequence[tuple[float, float]],
    missing: Sequence[float | None],
    verdicts: Sequence[str],
    target: float,
) -> None:
    """Share captured by rank (from 0, no adapter) with its interval, and what may still be missing on a logarithmic
    axis.

    ``missing`` is certified upper bounds on the share that is not captured, None for rank 0; ``verdicts`` are empty
    there.
    """
    left, right = canvas.axes(2, height=290)
    _shares(left, intervals, verdicts, target)
    _missing(right, missing, verdicts, target)
    for axes in (left, right):
        categories(axes, ranks)


def _shares(axes: Any, intervals: Sequence[tuple[float, float]], verdicts: Sequence[str], target: float) -> None:
    axes.plot([50 * (low + high) for low, high in intervals], color=INKS["c0"], linewidth=1.5, alpha=0.55, zorder=2)
    axes.axhline(100 * target, color=INKS["muted"], linewidth=1.2, linestyle=DASHES[1])
    before, lower = "", False
    for x, ((low, high), verdict) in enumerate(zip(intervals, verdicts, strict=True)):
        marker, colour = VERDICT_MARK.get(verdict, ("o", "muted"))
        axes.plot([x, x], [100 * low, 100 * high], color=INKS[colour], linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(x, 50 * (low + high), marker, color=INKS[colour], markersize=9, zorder=4, **EDGE)
        shown = percent(0.5 * (low + high), 1)
        if shown != before:
            above = high < 0.9
            lower = not above and not lower  # labels below the marks take turns at two heights
            last = x == len(intervals) - 1
            axes.annotate(
                shown,
                (x, 100 * (high if above else low)),
                xytext=(0 if last else 7, (9 if last else 4) if above else -8 if lower else -23),
                textcoords="offset points",
                ha="center" if last else "left",
                va="bottom" if above else "top",
                fontsize=12,
            )
        before = shown
    floor = min(0.0, *(100 * low for low, _ in intervals))
    axes.set_ylim(floor - 6 if floor < 0 else -6, 108)
    axes.set_yticks([0, 25, 50, 75, 100])
    plain_ticks(axes.yaxis, lambda value: f"{value:g}%")
    label(axes, "rank", "share of the possible gain")


def _missing(axes: Any, missing: Sequence[float | None], verdicts: Sequence[str], target: float) -> None:
    kept = [(x, value, verdict) for x, (value, verdict) in enumerate(zip(missing, verdicts, strict=True)) if value]
    for x, value, verdict in kept:
        marker, colour = VERDICT_MARK.get(verdict, ("o", "muted"))
        axes.plot(x, value, marker, color=INKS[colour], markersize=9, zorder=4, **EDGE)
    axes.set_yscale("log")
    values = [value for _, value, _ in kept] or [1.0]
    axes.set_ylim(min(*values, 1e-4) / 6, max(*values, 1 - target, 1e-4) * 6)
    axes.axhline(1 - target, color=INKS["muted"], linewidth=1.2, linestyle=DASHES[1])
    axes.axhline(1e-4, color=INKS["good"], linewidth=1.2, linestyle=DASHES[2])
    axes.plot([x for x, _, _ in kept], values[: len(kept)], color=INKS["c0"], linewidth=1.5, alpha=0.55, zorder=2)
    log_ticks(axes.yaxis)
    label(axes, "rank", "certified: at most so much is missing")


EDGE: dict[str, Any] = {"markeredgecolor": INKS["card"], "markeredgewidth": 1.2}


def categories(axes: Any, ranks: Sequence[Any]) -> None:
    """Ranks at even distances."""
    axes.set_xlim(-0.5, len(ranks) - 0.5)
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])


def decay_path(
    canvas: Canvas,
    lams: Sequence[float],
    losses: Sequence[float],
    largest: Sequence[int],
    sums: Sequence[int],
    chosen: float,
    found: str,
) -> None:
    """Loss on the rows that choose lambda, and the ranks ``found`` there, over lambda; ``sums`` may be empty."""
    left, right = canvas.axes(2, height=280)
    left.plot(lams, losses, "-o", color=SERIES[0], **EDGE)
    best = min(range(len(lams)), key=lambda index: abs(lams[index] - chosen))
    left.plot(lams[best], losses[best], "o", color=SERIES[1], markersize=12, zorder=5, **EDGE)
    label(left, "weight decay λ (log scale)", "loss on held-out rows that choose λ")
    if sums:
        right.plot(lams, sums, "-s", color=SERIES[2], **EDGE)
    right.plot(lams, largest, "-o", color=SERIES[0], **EDGE)
    label(right, "weight decay λ (log scale)", f"rank of {found}")
    top = max([*sums, *largest, 1])
    right.set_ylim(-0.05 * top, 1.15 * top)
    ticks(right.yaxis, 5, whole=True)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.axvline(chosen, color=SERIES[1], linewidth=1.3, linestyle=DASHES[1], zorder=1)
        log_ticks(axes.xaxis, 4)
    roomy(left, losses)


def roomy(axes: Any, values: Sequence[float], share: float = 0.16) -> None:
    """Limits of the vertical axis around the values, with so much room, and numbers that tell them apart."""
    low, high = min(values), max(values)
    spread = (high - low) or max(abs(high), 1e-9) * 0.02
    axes.set_ylim(low - share * spread, high + share * spread)
    ticks(axes.yaxis, 5)
    digits = max(0, min(6, 1 - int(f"{spread:e}".split("e")[1])))
    plain_ticks(axes.yaxis, lambda value: f"{value:.{digits}f}")


def by_rank(
    canvas: Canvas, ranks: Sequence[int], losses: Sequence[float], accuracies: Sequence[float | None], best: int | None
) -> None:
    """Held-out loss by rank, and accuracy where there is one."""
    with_accuracy = all(value is not None for value in accuracies)
    axes = canvas.axes(2 if with_accuracy else 1, height=270)
    positions = list(range(len(ranks)))
    axes[0].plot(positions, losses, "-o", color=SERIES[0], **EDGE)
    axes[0].axhline(losses[0], color=INKS["muted"], linewidth=1.2, linestyle=DASHES[1])
    if best is not None and best in ranks:
        axes[0].plot(ranks.index(best), losses[ranks.index(best)], "o", color=SERIES[1], markersize=12, **EDGE)
    label(axes[0], "rank", "held-out loss")
    roomy(axes[0], losses)
    if with_accuracy:
        shares = [100 * float(value or 0) for value in accuracies]
        axes[1].plot(positions, shares, "-s", color=SERIES[2], **EDGE)
        axes[1].axhline(shares[0], color=INKS["muted"], linewidth=1.2, linestyle=DASHES[1])
        label(axes[1], "rank", "held-out accuracy")
        roomy(axes[1], shares)
        plain_ticks(axes[1].yaxis, lambda value: f"{value:g}%")
    for each in axes:
        categories(each, ranks)


@dataclass(frozen=True)
class Level:
    """One line of a dot plot."""

    text: str  # what it is
    value: float  # where its dot is
    low: float | None = None  # end of a bar from the dot, for a bound; None for none
    colour: str = "c0"  # token
    marker: str = "o"  # shape
    shown: str = ""


def levels(canvas: Canvas, rows: Sequence[Level], title: str, mark: float | None = None, zero: bool = False) -> None:
    """Values one below the other, each with its name above it; ``mark`` is a vertical line.

    With ``zero`` the axis starts there, and bars do too.
    """
    step = 46
    (axes,) = canvas.axes(height=step * len(rows) + 34 + 44 + 6, left=16)
    axes.grid(visible=False)
    axes.set_yticks([])
    values = [row.value for row in rows] + [row.low for row in rows if row.low is not None]
    values += [] if mark is None else [mark]
    low, high = (0.0 if zero else min(values)), max(values)
    spread = (high - low) or max(abs(high), 1e-9)
    axes.set_xlim(low if zero else low - 0.06 * spread, high + (0.2 if canvas.narrow else 0.12) * spread)
    axes.set_ylim(len(rows) - 0.45, -0.75)
    if mark is not None:
        axes.axvline(mark, color=INKS["muted"], linewidth=1.2, linestyle=DASHES[1])
    for index, row in enumerate(rows):
        axes.axhline(index, color=INKS["grid"], linewidth=1, zorder=1)
        start = row.low if row.low is not None else (low if zero else None)
        if start is not None:
            axes.plot([start, row.value], [index, index], color=INKS[row.colour], linewidth=7, alpha=0.3, zorder=2)
        axes.plot(row.value, index, row.marker, color=INKS[row.colour], markersize=10, zorder=4, **EDGE)
        text = clean(f"{row.text}: {row.shown}" if row.shown else row.text)
        box = {"facecolor": INKS["card"], "edgecolor": "none", "pad": 1.5}  # over the line of the mark
        where = axes.get_yaxis_transform()
        axes.text(0.0, index - 0.42, text, fontsize=12, va="center", transform=where, bbox=box)
    ticks(axes.xaxis, 4 if canvas.narrow else 7)
    axes.set_title(title, color=INKS["muted"])


def ratios(
    canvas: Canvas, stops: Sequence[str], series: dict[str, list[tuple[int, float]]], verdict_line: float
) -> None:
    """One dot per module over its layer, and the line that it should not pass."""
    (axes,) = canvas.axes(height=260)
    for index, points in enumerate(series.values()):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, MARKERS[index % 8], color=SERIES[index % 8], **EDGE)
    axes.axhline(verdict_line, color=INKS["muted"], linewidth=1.4, linestyle=DASHES[1])
    roomy(axes, [verdict_line, *(y for points in series.values() for _, y in points)])
    layer_ticks(canvas, axes, stops)


def growth(
    canvas: Canvas,
    sizes: Sequence[int],
    needed: Sequence[int],
    largest: Sequence[int],
    ahead: tuple[int, float, float] | None,
) -> None:
    """Ranks over the number of rows, and the power law through them: where it leads, and its exponent."""
    (axes,) = canvas.axes(height=270)
    axes.plot(sizes, largest, "-s", color=SERIES[2], linewidth=5, markersize=12, alpha=0.55)
    axes.plot(sizes, needed, "-o", color=SERIES[0], **EDGE)
    top = max(*needed, *largest, 1)
    if ahead is not None:
        steps = [sizes[0] * (ahead[0] / sizes[0]) ** (k / 40) for k in range(41)]
        law = [ahead[1] * (n / ahead[0]) ** ahead[2] for n in steps]
        axes.plot(steps, law, color=SERIES[1], linestyle=DASHES[1])
        axes.plot(*ahead[:2], "D", color=SERIES[1], markerfacecolor=INKS["card"], markersize=8)
        top = max(top, ahead[1])
    axes.set_xscale("log")
    stops = [*sizes, ahead[0]] if ahead is not None and ahead[0] > 1.3 * sizes[-1] else list(sizes)
    log_ticks(axes.xaxis)
    axes.set_xticks(stops, [f"{n:,}" for n in stops])
    axes.set_ylim(0, 1.25 * top)
    ticks(axes.yaxis, 5, whole=True)
    label(axes, "training rows (log scale)", "rank")


@dataclass(frozen=True)
class Curve:
    """A line of a chart."""

    text: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dash: Any = "-"
    marker: str = ""


def curves(canvas: Canvas, lines: Sequence[Curve], x_name: str, y_name: str, levels_at: Sequence[Curve] = ()) -> None:
    """Lines over steps, and horizontal ones at the first ``y`` of each of ``levels_at``."""
    (axes,) = canvas.axes(height=300 if not canvas.narrow else 280, left=66)
    for line in lines:
        axes.plot(
            line.x,
            line.y,
            linestyle=line.dash,
            marker=line.marker or None,
            color=INKS[line.colour],
            **(EDGE if line.marker else {}),
        )
    for line in levels_at:
        axes.axhline(line.y[0], color=INKS[line.colour], linestyle=line.dash, linewidth=1.6)
    roomy(axes, [y for line in [*lines, *levels_at] for y in line.y])
    label(axes, x_name, y_name)
    ticks(axes.xaxis, 5 if canvas.narrow else 8, whole=True)
