"""One style for every figure: readable at 800 pixels, colours that survive colour blindness and grey print."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
from cycler import cycler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito (2008)."""

INK = "#333333"

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
}


def style() -> AbstractContextManager[None]:
    """The style, for as long as the context lasts; entries are run inside it."""
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


def png(figure: Figure, scale: int = 2) -> bytes:
    """The figure as PNG, ``scale`` times 800 pixels wide."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100 * scale, metadata={"Software": None})
    return buffer.getvalue()


def lines(axes: Any, x: Sequence[float], series: dict[str, Sequence[float]], **style: Any) -> None:
    """Lines with markers and a legend, one colour each."""
    markers = "osD^vP"
    for index, (label, y) in enumerate(series.items()):
        axes.plot(x, y, marker=markers[index % 6], color=COLOURS[index % 6], label=label, **style)
    axes.legend()
