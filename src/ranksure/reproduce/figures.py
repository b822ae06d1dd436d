"""The figures of the experiments, in the lab's style."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ranksure.lab.figures import COLOURS, INK, panels
from ranksure.reproduce.experiment import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*"


def curve_panels(
    curves: Sequence[Curve],
    *,
    x: str,
    y: str,
    columns: int = 2,
    height: float = 2.7,
    transform: Callable[[Curve], Sequence[float]] | None = None,
    x_scale: str = "log",
    y_scale: str = "linear",
    level: Mapping[str, float] | float | None = None,
    level_label: str = "",
    floor: float | None = None,
    markers: bool = False,
) -> Figure:
    """One panel per group of curves, one colour per label, a shared legend below.

    Args:
        curves: the lines.
        x: name of the axis.
        y: name of the axis.
        columns: panels side by side.
        height: inches of a row.
        transform: what is drawn in place of a curve's values.
        x_scale: ``log`` (symmetric, so that 0 has a place) or ``linear``.
        y_scale: ``log`` or ``linear``.
        level: a horizontal line, one for all panels or by group.
        level_label: its label.
        floor: values below are drawn at it (logarithmic axes).
        markers: draw the points.
    """
    groups = list(dict.fromkeys(curve.group for curve in curves))
    labels = list(dict.fromkeys(curve.label for curve in curves))
    columns = min(columns, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = panels(columns, rows, height=height if rows > 1 else 3.6)
    handles: dict[str, Any] = {}
    for index, axis in enumerate(axes.flat):
        if index >= len(groups):
            axis.set_visible(False)
            continue
        group = groups[index]
        for curve in curves:
            if curve.group != group:
                continue
            place = labels.index(curve.label)
            values = np.asarray(curve.y if transform is None else transform(curve), dtype=float)
            if floor is not None:
                values = values.clip(min=floor)
            style = {"color": COLOURS[place % len(COLOURS)], "linestyle": ("-", "--", ":")[place // len(COLOURS) % 3]}
            if markers:
                style["marker"] = MARKERS[place % len(MARKERS)]
            (handles[curve.label],) = axis.plot(curve.x, values, label=curve.label, **style)
            if curve.spread is not None:
                spread = np.asarray(curve.spread)
                axis.fill_between(curve.x, values - spread, values + spread, color=style["color"], alpha=0.15, lw=0)
        at = level.get(group) if isinstance(level, Mapping) else level
        if at is not None:
            handles[level_label] = axis.axhline(at, color=INK, linestyle=(0, (4, 3)), linewidth=1, zorder=0.9)
        axis.set_title(group)
        if x_scale == "log":
            mine = [value for curve in curves if curve.group == group for value in curve.x]
            if min(mine) > 0:
                axis.set_xscale("log")
                if markers and len(set(mine)) <= 8 and all(value == int(value) for value in mine):
                    axis.set_xticks(sorted(set(mine)), [f"{value:g}" for value in sorted(set(mine))])
                    axis.set_xticks([], minor=True)
            else:  # a start at step 0 has its place, too
                axis.set_xscale("symlog", linthresh=min((v for v in mine if v > 0), default=1), linscale=0.3)
                axis.set_xlim(left=0)
        if y_scale == "log":
            axis.set_yscale("log")
        elif all(float(value).is_integer() for curve in curves if curve.group == group for value in curve.y):
            axis.yaxis.get_major_locator().set_params(integer=True)  # ranks
        if index >= len(groups) - columns:
            axis.set_xlabel(x)
        if index % columns == 0:
            axis.set_ylabel(y)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(handles)))
    return figure


def images(figure: Figure) -> dict[str, bytes]:
    """The figure as PNG (1,600 pixels wide) and SVG, by suffix; the same bytes for the same figure."""
    import matplotlib as mpl

    out: dict[str, bytes] = {}
    for kind, dropped in (("png", "Software"), ("svg", "Date")):
        buffer = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": "ranksure"}):
            figure.savefig(buffer, format=kind, dpi=200, metadata={dropped: None})
        out[kind] = buffer.getvalue()
    return out
