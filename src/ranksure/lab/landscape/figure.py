"""The figure of a landscape experiment: a phase diagram, and shares of starts as stacked bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ranksure.lab.figures import COLOURS, INK, panels
from ranksure.lab.landscape.census import VERDICTS, Cell, Verdict
from ranksure.theory.bounds import landscape_rank
from ranksure.theory.capacity import capacity_rank

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOUR: dict[Verdict, str] = {
    "global": COLOURS[4],
    "rank-bound": COLOURS[5],
    "spurious": COLOURS[1],
    "saddle": COLOURS[3],
    "undetermined": "#999999",
}
_LABEL: dict[Verdict, str] = {
    "global": "globally optimal",
    "rank-bound": "best known of its rank",
    "spurious": "spurious minimum, certified",
    "saddle": "saddle",
    "undetermined": "not determined",
}


def draw(gaussian: Sequence[Cell], tight: Sequence[Cell], blocks: Sequence[Cell], bundled: Sequence[Cell]) -> Figure:
    """Four panels: Gaussian measurements, the explicit instance, two blocks, the bundled model and data."""
    figure, axes = panels(2, 2, height=3.9)
    _phase_diagram(axes[0, 0], gaussian)
    plain = [cell for cell in tight if cell.size == 0]
    _bars(axes[0, 1], plain, "(b) Explicit instance, N = r(r + 3)/2", "rank of the factors; r of the instance")
    size = next(cell.size for cell in blocks if cell.size > 0)
    _bars(axes[1, 0], blocks, "(b) Two blocks, N = 2", f"ranks of the blocks; +P: ||P|| = {size:g} λ")
    _bars(axes[1, 1], bundled, "(c) MiniLM-L6, query and value of layer 6", "rank of each block; samples N")
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _phase_diagram(axes: Axes, cells: Sequence[Cell]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    samples = sorted({cell.n for cell in cells})
    ranks = sorted({cell.ranks["w"] for cell in cells})
    share = np.zeros((len(ranks), len(samples)))
    met: list[tuple[int, int]] = []
    for cell in cells:
        rank, column = cell.ranks["w"], samples.index(cell.n)
        share[ranks.index(rank), column] = 100 * cell.counts["global"] / cell.starts
        if cell.counts["spurious"]:
            met.append((column, rank))
    colours = LinearSegmentedColormap.from_list("shares", ["white", COLOURS[4]])
    extent = (-0.5, len(samples) - 0.5, ranks[0] - 0.5, ranks[-1] + 0.5)
    axes.imshow(share, origin="lower", aspect="auto", cmap=colours, vmin=0, vmax=100, extent=extent)
    for (row, column), value in np.ndenumerate(share):
        axes.text(column, ranks[row], f"{value:.0f}", ha="center", va="center", fontsize=8, color=INK)
    _steps(axes, [landscape_rank(n) for n in samples], linestyle="-", label="threshold r(r + 1)/2 > N")
    capacity = [capacity_rank(n, 1, cells[0].shapes) or ranks[-1] + 1 for n in samples]
    _steps(axes, capacity, linestyle=(0, (2.5, 1.2)), label="capacity (no landscape)")
    if met:
        x, y = np.array(met).T
        label = "some at a spurious minimum"
        axes.plot(x + 0.36, y + 0.3, "^", color=COLOURS[1], markersize=5, linestyle="", label=label)
    axes.set_xticks(range(len(samples)), [str(n) for n in samples])
    axes.set_yticks(ranks)
    room = 0.33 * len(ranks)  # above the diagram, for the legend
    axes.set_ylim(ranks[0] - 0.58, ranks[-1] + 0.5 + room)
    axes.grid(visible=False)
    axes.set_xlabel("equations N")
    axes.set_ylabel("rank r")
    shape = next(iter(cells[0].shapes.values()))
    axes.set_title(f"(a) Gaussian {shape[0]} × {shape[1]}: optimal starts (%)")
    axes.legend(loc="upper left", fontsize=8)


def _steps(axes: Axes, first: Sequence[int], **style: object) -> None:
    """A line below the first rank that counts, column by column."""
    x = np.repeat(np.arange(len(first) + 1) - 0.5, 2)[1:-1]
    axes.plot(x, np.repeat(np.asarray(first) - 0.5, 2), color=INK, linewidth=2, **style)  # pyright: ignore[reportArgumentType]


def _bars(axes: Axes, cells: Sequence[Cell], title: str, xlabel: str) -> None:
    bottom = np.zeros(len(cells))
    x = np.arange(len(cells))
    for verdict in VERDICTS:
        height = np.array([100 * cell.counts[verdict] / cell.starts for cell in cells])
        axes.bar(x, height, bottom=bottom, color=_COLOUR[verdict], label=_LABEL[verdict], width=0.75)
        bottom += height
    for index, cell in enumerate(cells):
        missed = cell.starts - cell.counts["global"]
        axes.text(index, 101, str(missed), ha="center", va="bottom", fontsize=8, color=INK)
    note = f"starts of {cells[0].starts} that are not globally optimal:"
    axes.text(0.0, 1.0, note, ha="left", va="top", fontsize=8, color=INK, transform=axes.transAxes)
    axes.set_xticks(x, [cell.label for cell in cells], fontsize=8 if len(cells) <= 8 else 6.5)
    axes.set_ylim(0, 119)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("share of starts (%)")
    axes.set_xlabel(xlabel)
    axes.set_title(title)
    axes.grid(axis="x", visible=False)
