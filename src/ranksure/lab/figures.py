"""One style for every figure: readable at 800 pixels, colours that survive colour blindness and grey print."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.rcsetup import cycler

from ranksure.lab.claim import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito (2008)."""

INK = "#333333"

_MARKERS = "osD^vPX*"
_STYLE: Any = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.dpi": 100,
    "svg.hashsalt": "ranksure",  # the same bytes for the same figure
}


def style() -> AbstractContextManager[None]:
    """The style, for as long as the context lasts; claims are measured inside it."""
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)


def panels(columns: int, rows: int = 1, *, height: float = 3.6) -> tuple[Figure, np.ndarray]:
    """A figure 8 inches (800 pixels) wide with ``rows`` x ``columns`` axes, as an object array ``(rows, columns)``.

    The figure has no window: it is drawn by Agg whatever matplotlib's back end is.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def image(figure: Figure, kind: str) -> bytes:
    """The figure as ``png`` (1,600 pixels wide) or ``svg``."""
    buffer = io.BytesIO()
    dropped = {"png": "Software", "svg": "Date"}[kind]
    figure.savefig(buffer, format=kind, dpi=200, metadata={dropped: None})
    return buffer.getvalue()


def curve_panels(
    curves: Sequence[Curve],
    *,
    x: str,
    y: str,
    height: float = 2.7,
    transform: Callable[[Curve], Sequence[float | None]] = lambda curve: curve.y,
    y_scale: str = "linear",
    level: Mapping[str, float] | float | None = None,
    level_label: str = "",
    markers: bool = False,
) -> Figure:
    """One panel per group of curves, one colour per label, a shared legend below; x is logarithmic.

    Args:
        curves: the lines.
        x: name of the axis.
        y: name of the axis.
        height: inches of a row.
        transform: what is drawn of a curve.
        y_scale: ``log`` or ``linear``.
        level: a horizontal line, one for all panels or by group; ``level_label`` names it.
        level_label: see ``level``.
        markers: draw the points.
    """
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.group, []).append(curve)
    labels = list(dict.fromkeys(curve.label for curve in curves))
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = panels(columns, rows, height=height if rows > 1 else 3.6)
    handles: dict[str, Any] = {}
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for index, (axis, (group, mine)) in enumerate(zip(axes.flat, groups.items(), strict=False)):
        for curve in mine:
            handles[curve.label] = _curve(axis, curve, transform(curve), labels.index(curve.label), markers)
        at = level.get(group) if isinstance(level, Mapping) else level
        if at is not None:
            handles[level_label] = axis.axhline(at, color=INK, linestyle=(0, (4, 3)), linewidth=1, zorder=0.9)
        axis.set_title(group)
        _x_axis(axis, [value for curve in mine for value in curve.x], markers)
        if y_scale == "log":
            axis.set_yscale("log")
        elif all(value is not None and float(value).is_integer() for curve in mine for value in curve.y):
            axis.yaxis.get_major_locator().set_params(integer=True)  # ranks
        if index >= len(groups) - columns:
            axis.set_xlabel(x)
        if index % columns == 0:
            axis.set_ylabel(y)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(handles)))
    return figure


def _curve(axis: Axes, curve: Curve, values: Any, place: int, markers: bool) -> Any:
    """A line in the style of its place among the labels."""
    style: Any = {"color": COLOURS[place % len(COLOURS)], "linestyle": ("-", "--", ":")[place // len(COLOURS) % 3]}
    if markers:
        style["marker"] = _MARKERS[place % len(_MARKERS)]
    (handle,) = axis.plot(curve.x, values, label=curve.label, **style)
    if curve.spread is not None:
        y, spread = np.asarray(values, float), np.asarray(curve.spread, float)
        axis.fill_between(curve.x, y - spread, y + spread, color=style["color"], alpha=0.15, lw=0)
    return handle


def _x_axis(axis: Axes, values: Sequence[float], markers: bool) -> None:
    """Logarithmic, so that a start at step 0 has its place, too; a few whole numbers are ticks of their own."""
    if min(values) > 0:
        axis.set_xscale("log")
        ticks = sorted(set(values))
        if markers and len(ticks) <= 8 and all(value == int(value) for value in ticks):
            axis.set_xticks(ticks, [f"{value:g}" for value in ticks])
            axis.set_xticks([], minor=True)
    else:
        axis.set_xscale("symlog", linthresh=min((v for v in values if v > 0), default=1), linscale=0.3)
        axis.set_xlim(left=0)
