"""Curves of a claim of the paper by setting, against the certified optimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ranksure.records.claims import ClaimRecord
from ranksure.report.blocks import Figure, Key, Status, Table, drawn
from ranksure.report.module_places import clean, shortened
from ranksure.report.svg import DASHES, INKS, Canvas, log_ticks, ticks
from ranksure.report.wording import NONE, counted, number, power

_POINTS = 6000  # drawn in one figure, over all curves
_LISTED = 12  # points of a curve in a table
_FEW = 12  # points that get a mark each
_PANELS = 12  # in one figure
_DASH_NAMES = ("solid", "dashed", "dotted", "dashdot")


@dataclass(frozen=True)
class _Line:
    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] = ()


@dataclass(frozen=True)
class _Panel:
    title: str
    lines: list[_Line]
    level: float | None

    def above(self) -> _Panel:
        """Distances to the reference; what is at it, to rounding, cannot be drawn on a logarithmic axis."""
        assert self.level is not None
        lines = []
        for line in self.lines:
            kept = [(x, y - self.level) for x, y in zip(line.x, line.y, strict=True) if y > self.level]
            lines.append(_Line(line.label, [x for x, _ in kept], [y for _, y in kept]))
        return _Panel(self.title, lines, None)


def figures(data: ClaimRecord, i: str, detail: bool) -> list[Figure]:
    """Curves by setting, and their distances to the reference; fewer points without ``detail``."""
    panels, out = _panels(data, _POINTS if detail else _POINTS // 4), []
    for start in range(0, len(panels), _PANELS):
        some = panels[start : start + _PANELS]
        tag = f"-{start // _PANELS}" if start else ""
        out.append(_objective(data, some, f"{i}-curves{tag}", detail))
        if any(y > panel.level for panel in some if panel.level is not None for line in panel.lines for y in line.y):
            out.append(_distance(data, some, f"{i}-distance{tag}"))
    return out


def _panels(data: ClaimRecord, budget: int) -> list[_Panel]:
    curves, reference = data.curves, data.reference
    per_group, level = (reference.per_group, reference.value) if reference else ({}, None)
    most = max(20, budget // max(len(curves), 1))
    groups: dict[str, list[_Line]] = {}
    for curve in curves:
        spreads = curve.spread or [None] * len(curve.x)
        points = [(x, y, s or 0.0) for x, y, s in zip(curve.x, curve.y, spreads, strict=False) if y is not None]
        step = max(1, -(-len(points) // most))
        kept = points[::step] + (points[-1:] if points and (len(points) - 1) % step else [])
        spread = [s for _, _, s in kept] if curve.spread else []
        if kept:
            line = _Line(curve.label, [x for x, _, _ in kept], [y for _, y, _ in kept], spread)
            groups.setdefault(curve.group, []).append(line)
    return [_Panel(name, lines, per_group.get(name, level)) for name, lines in groups.items()]


def _names(panels: Sequence[_Panel]) -> list[str]:
    return list(dict.fromkeys(line.label for panel in panels for line in panel.lines))


def _objective(data: ClaimRecord, panels: Sequence[_Panel], figure_id: str, detail: bool) -> Figure:
    names, reference = _names(panels), data.reference
    summary = f"{counted(len(names), 'curve')} in {counted(len(panels), 'setting')}."
    if reference and any(panel.level is not None for panel in panels):
        summary += f" The level line is the {reference.label} of the linearised network."
    if any(line.spread for panel in panels for line in panel.lines):
        summary += " A bar is one standard deviation over seeds, up and down."
    legend = _legend(names)
    if any(panel.level is not None for panel in panels):
        legend.append(Key(reference.label if reference else "reference", "ink", line="dotted"))
    listed = _LISTED if detail else 5
    rows = []
    for panel in panels:
        for line in panel.lines:
            step = max(1, -(-len(line.x) // listed))
            kept = sorted({*range(0, len(line.x), step), len(line.x) - 1})
            rows += [[panel.title or NONE, line.label, f"{line.x[k]:g}", number(line.y[k], ".6g")] for k in kept]
    columns = ["setting", "curve", _axis(data, "x"), _axis(data, "y")]
    table = Table("Points of the curves", columns, rows, frozenset({1}), "Some are left out.")
    return drawn(
        figure_id,
        lambda canvas: _draw(canvas, panels, names, _axis(data, "x"), log=False),
        f"{_axis(data, 'y')[:1].upper()}{_axis(data, 'y')[1:]}, by {_axis(data, 'x')}",
        Status.MEASURED,
        summary,
        f"Lines over {columns[2]}, a panel for each setting: {', '.join(panel.title for panel in panels)}.",
        table,
        legend,
    )


def _distance(data: ClaimRecord, whole: Sequence[_Panel], figure_id: str) -> Figure:
    panels = [panel.above() for panel in whole if panel.level is not None]
    names, present = _names(whole), _names(panels)  # colours as in the figure before
    legend = [key for name, key in zip(names, _legend(names), strict=True) if name in present]
    shown = data.reference.label if data.reference else "reference"
    ends = [
        (line.y[0] - panel.level, line.y[-1] - panel.level, panel.title, line.label)
        for panel in whole
        for line in panel.lines
        if panel.level is not None
    ]
    rows = [[title or NONE, text, number(first, ".3g"), number(last, ".3g")] for first, last, title, text in ends]
    above = sorted((last, title, text) for _, last, title, text in ends if last > 0)
    summary = f"{len(ends) - len(above)} of {counted(len(ends), 'curve')} end at the {shown} or below it."
    if above:
        low, high = above[0], above[-1]
        summary = (
            f"{len(above)} of {counted(len(ends), 'curve')} end above the {shown}, the nearest by {power(low[0], 1)} "
            f"({low[2]}{_at(low[1])}), the farthest by {power(high[0], 1)} ({high[2]}{_at(high[1])})."
        )
    return drawn(
        figure_id,
        lambda canvas: _draw(canvas, panels, names, _axis(data, "x"), log=True),
        f"How far above the {shown}?",
        Status.MEASURED,
        summary,
        f"The same on a logarithmic scale, less the {shown}.",
        Table(f"Distance to the {shown}", ["setting", "curve", "first", "last"], rows, frozenset({1})),
        legend,
        note="Points at it or below cannot be drawn on this scale; the table has them. The reference is certified, the "
        "distances are measured.",
    )


def _at(group: str) -> str:
    return f", {group}" if group else ""


def _legend(names: Sequence[str]) -> list[Key]:
    return [
        Key(name, f"c{n % 8}", line=_DASH_NAMES[n // 2 % 4 if len(names) > 2 else n]) for n, name in enumerate(names)
    ]


def _title(text: str, most: int) -> str:
    """A panel's title in at most two lines of so many letters."""
    lines = [clean(line) for line in text.split("\n") if line.strip()][:2]
    return "\n".join(line if len(line) <= most else line[: most - 1] + "…" for line in lines)


def _axis(data: ClaimRecord, which: str) -> str:
    """Name of an axis, on one line."""
    return clean(data.axes.get(which) or {"x": "step", "y": "objective"}[which])


def _draw(canvas: Canvas, panels: Sequence[_Panel], names: Sequence[str], x_name: str, log: bool) -> None:
    columns = 1 if len(panels) == 1 else 2 if len(panels) in (2, 4) else 3
    height = 250 if columns == 1 or canvas.narrow else 215
    for axes, panel in zip(canvas.axes(len(panels), height=height, columns=columns, left=62), panels, strict=True):
        if log:
            axes.set_yscale("log")
        for line in panel.lines:
            n = names.index(line.label)
            dash = DASHES[n // 2 % 4 if len(names) > 2 else n]
            colour = INKS[f"c{n % 8}"]
            few = len(line.x) <= _FEW
            mark = "o" if few else "none"
            axes.plot(line.x, line.y, marker=mark, color=colour, linestyle=dash, linewidth=1.8, markersize=5)
            for x, y, spread in zip(line.x, line.y, line.spread, strict=False):
                axes.plot([x, x], [y - spread, y + spread], color=colour, linewidth=4, alpha=0.3, solid_capstyle="butt")
        if panel.level is not None:
            axes.axhline(panel.level, color=INKS["ink"], linestyle=DASHES[2], linewidth=1.5)
        if log:
            log_ticks(axes.yaxis)
        else:
            ticks(axes.yaxis, 4)
        stops = sorted({x for line in panel.lines for x in line.x})
        if len(stops) <= 2 * _FEW and stops and stops[0] > 0 and stops[-1] > 20 * stops[0]:
            axes.set_xscale("log")  # few values over a wide range: sizes, or weight decays
            log_ticks(axes.xaxis, 4)
        else:
            ticks(axes.xaxis, 4)
        axes.set_title(_title(panel.title, int((canvas.width / (1 if canvas.narrow else columns) - 76) / 6.6)))
        axes.set_xlabel(shortened(x_name, 30), loc="right")
