"""Ranks layer by layer: one cell per module, its number written in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ranksure.report.blocks import Figure, Status, Table, drawn
from ranksure.report.module_places import NO_LAYER, labels, layers, places, shortened
from ranksure.report.svg import INKS, Canvas

_STRIP = {False: 24, True: 6}  # columns of one strip: layers where wide, kinds of modules where narrow
_LEVELS = 6


@dataclass(frozen=True)
class Grid:
    """One heat map."""

    title: str  # above it
    values: Mapping[str, int]  # by module; 0 is drawn empty, a missing module not at all
    texts: Mapping[str, str] | None = None  # what is written in a cell, where that is not the value

    def text(self, name: str) -> str:
        """What the cell of a module says."""
        return str(self.values[name]) if self.texts is None else self.texts[name]


def level(value: int, largest: int) -> int:
    """Step of the colour ramp, 0 for none to 6 for the largest."""
    if value <= 0:
        return 0
    return -(-_LEVELS * value // max(largest, 2))


def heat_map(
    figure_id: str,
    title: str,
    status: Status | None,
    summary: str,
    grids: Sequence[Grid],
    *,
    note: str = "",
    extra: Mapping[str, Mapping[str, str]] | None = None,
) -> Figure:
    """A picture of ranks, one map of the same modules below the other, with a table of the same.

    ``extra`` is further columns of the table, by heading and module.
    """
    names = list(dict.fromkeys(name for grid in grids for name in grid.values))
    found = places(names)
    largest = max((value for grid in grids for value in grid.values.values()), default=0)
    more = extra or {}
    rows = [
        [
            name,
            *(grid.text(name) if name in grid.values else "–" for grid in grids),
            *(column.get(name, "–") for column in more.values()),
        ]
        for name in names
    ]
    kinds, depth = labels(found), layers(found)
    shows = f"Heat map of {len(names)} modules: {len(kinds)} kinds ({', '.join(kinds[:8])}) in {len(depth)} layers."
    table = Table("Rank of every module", ["module", *(grid.title for grid in grids), *more], rows)
    return drawn(
        figure_id,
        lambda canvas: _draw(canvas, grids, found, largest),
        title,
        status,
        summary,
        shows,
        table,
        note=note,
    )


@dataclass(frozen=True)
class _Layout:
    """Sizes of one drawing, in pixels: rows and strips of columns, and where each grid goes."""

    down: list[str]
    strips: list[list[str]]
    room: float
    cell: float
    across: int
    narrow: bool

    TOP, LINE, HIGH, GAP = 26.0, 20.0, 27.0, 16.0

    @classmethod
    def of(cls, canvas: Canvas, depth: list[str], kinds: list[str], grids: int) -> _Layout:
        """Layers across where wide, down where narrow; grids side by side where they fit."""
        across, down = (kinds, depth) if canvas.narrow else (depth, kinds)
        step = -(-len(across) // -(-len(across) // _STRIP[canvas.narrow]))  # strips of like length
        strips = [across[start : start + step] for start in range(0, len(across), step)]
        most = max(len(strip) for strip in strips)
        longest = max(len(side) for side in down)
        room = 44.0 if canvas.narrow else min(max(62.0, 7.2 * longest + 16), 150.0)
        beside = 2 if grids == 2 and not canvas.narrow and room + 44 * most <= canvas.width / 2 - 20 else 1
        space = canvas.width / beside - (20 if beside == 2 else 0)
        return cls(
            down, strips, room, min((space - room - 4) / most, 92.0 if canvas.narrow else 64.0), beside, canvas.narrow
        )

    @property
    def block(self) -> float:
        """Height of one strip."""
        return self.LINE + self.HIGH * len(self.down) + self.GAP

    @property
    def grid(self) -> float:
        """Height of one grid."""
        return self.TOP + self.block * len(self.strips)


def _draw(canvas: Canvas, grids: Sequence[Grid], found: dict[str, tuple[str, str]], largest: int) -> None:
    depth, kinds = layers(found), labels(found)
    layout = _Layout.of(canvas, depth, kinds, len(grids))
    axes = canvas.blank(layout.grid * -(-len(grids) // layout.across))
    by_place = {place: name for name, place in found.items()}
    for index, grid in enumerate(grids):
        row, column = divmod(index, layout.across)
        x, y = column * (canvas.width / layout.across + 10), row * layout.grid
        axes.text(x, y + 12, grid.title, fontsize=12.5, va="center")
        for number, strip in enumerate(layout.strips):
            _strip(axes, layout, strip, grid, by_place, largest, x, y + layout.TOP + number * layout.block)


def _strip(
    axes: Any,
    layout: _Layout,
    strip: Sequence[str],
    grid: Grid,
    by_place: Mapping[tuple[str, str], str],
    largest: int,
    x: float,
    y: float,
) -> None:
    from matplotlib.patches import FancyBboxPatch

    cell, high, left = layout.cell, layout.HIGH, x + layout.room
    muted: dict[str, Any] = {"color": INKS["muted"], "va": "center", "fontsize": 11.5}
    if not layout.narrow:
        axes.text(left - 10, y + 9, "layer", ha="right", **muted)
    for column, head in enumerate(strip):
        axes.text(left + (column + 0.5) * cell, y + 9, shortened(head, max(int(cell / 6.4), 2)), ha="center", **muted)
    size = 12 if cell >= 30 else 11 if cell >= 24 else 9
    for row, side in enumerate(layout.down):
        middle = y + layout.LINE + (row + 0.5) * high
        text = f"L{side}" if layout.narrow and side != NO_LAYER else side
        axes.text(left - 10, middle, shortened(text, 5 if layout.narrow else 20), ha="right", **muted)
        for column, head in enumerate(strip):
            name = by_place.get((side, head) if layout.narrow else (head, side))
            if name is None or name not in grid.values:
                continue
            step = level(grid.values[name], largest)
            corner = (left + column * cell + 1.5, middle - high / 2 + 1.5)
            shape = "round,pad=0,rounding_size=3"
            axes.add_patch(FancyBboxPatch(corner, cell - 3, high - 3, shape, facecolor=INKS[f"h{step}"], linewidth=0))
            axes.text(
                left + (column + 0.5) * cell,
                middle,
                grid.text(name),
                ha="center",
                va="center",
                fontsize=size,
                color=INKS["muted" if step == 0 else "on-light" if step <= 3 else "on-dark"],
            )
