"""Figures as SVG that a page can hold: drawn by matplotlib, coloured by the page's style sheet.

Every colour is a token of :data:`INKS`, a value that nothing else uses; in the SVG it becomes a CSS custom property,
so one drawing serves light and dark. Text stays text, in the page's own typeface. It is laid out by the
metrics of DejaVu Sans, which is wider than what readers have, so nothing overlaps there that does not here.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ranksure.report.wording import power

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 760, 340
"""Widths of the two drawings of a figure, in CSS pixels."""

_NAMES = ["ink", "muted", "grid", "card", "good", "warn", "bad", "on-light", "on-dark"]
_NAMES += [f"c{index}" for index in range(8)] + [f"h{index}" for index in range(7)]
INKS = {name: f"#0a00{16 + index:02x}" for index, name in enumerate(_NAMES)}
"""Colour tokens: ``c0`` to ``c7`` for series, ``h0`` (none) to ``h6`` (most) for heat maps."""

SERIES = tuple(INKS[f"c{index}"] for index in range(8))
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.6)), (0, (7, 2, 2, 2)))

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_TOKEN = re.compile("|".join(INKS.values()), re.IGNORECASE)
_BY_TOKEN = {value: name for name, value in INKS.items()}
_NUMBER = re.compile(r"-?\d+\.\d+")
_REFERENCE = re.compile(r"#([\w-]+)")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a module may be called $x
    "text.usetex": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlecolor": INKS["ink"],
    "axes.titlepad": 10,
    "axes.edgecolor": INKS["grid"],
    "axes.labelcolor": INKS["muted"],
    "axes.labelsize": 12,
    "axes.linewidth": 1,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INKS["ink"],
    "xtick.color": INKS["grid"],
    "ytick.color": INKS["grid"],
    "xtick.labelcolor": INKS["muted"],
    "ytick.labelcolor": INKS["muted"],
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "grid.color": INKS["grid"],
    "grid.linewidth": 1,
    "lines.linewidth": 2,
    "lines.markersize": 7,
    "lines.markeredgewidth": 1.5,
}

Draw = Callable[["Canvas"], None]


class Canvas:
    """What a figure is drawn on, once wide and once narrow.

    Attributes:
        narrow: whether this is the drawing for a phone.
        width: in pixels; one point of a font is one pixel.
    """

    def __init__(self, narrow: bool) -> None:
        self.narrow, self.width = narrow, NARROW if narrow else WIDE
        self.figure: Figure | None = None

    def axes(self, panels: int = 1, *, height: float = 300, columns: int | None = None, left: float = 58) -> list[Axes]:
        """Panels side by side, at most ``columns``; one below the other where narrow.

        Sizes are in pixels: ``height`` is of one panel, labels included, ``left`` is room for those of the vertical
        axis.
        """
        across = 1 if self.narrow else min(panels, columns or panels)
        down = -(-panels // across)
        total = height * down
        figure = self._new(total)
        top, bottom, right, cell = 34.0, 44.0, 14.0, self.width / across
        out: list[Axes] = []
        for index in range(panels):
            row, column = divmod(index, across)
            box = (
                (column * cell + left) / self.width,
                (total - (row + 1) * height + bottom) / total,
                (cell - left - right) / self.width,
                (height - top - bottom) / total,
            )
            axes = figure.add_axes(box)
            axes.tick_params(length=0, pad=6)
            axes.grid(axis="y")
            axes.spines["left"].set_visible(False)
            out.append(axes)
        return out

    def blank(self, height: float) -> Axes:
        """Axes without any frame over the whole drawing; their units are pixels from the top left."""
        axes = self._new(height).add_axes((0, 0, 1, 1))
        axes.set_xlim(0, self.width)
        axes.set_ylim(height, 0)
        axes.axis("off")
        return axes

    def _new(self, height: float) -> Figure:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(self.width / 72, height / 72), facecolor="none")
        FigureCanvasSVG(self.figure)
        self.figure.patch.set_visible(False)
        return self.figure


def label(axes: Axes, x: str, y: str) -> None:
    """Name the axes: below at the right, and above the vertical one, where it is read without turning the head."""
    axes.set_xlabel(x, loc="right")
    axes.set_title(y, color=INKS["muted"])


def plain_ticks(axis: Any, form: Callable[[float], str]) -> None:
    """Tick labels by a function of the value; no offset, no mathematical markup."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axis.set_minor_formatter(NullFormatter())


def ticks(axis: Any, most: int, whole: bool = False) -> None:
    """About so many ticks, at whole numbers only where asked."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=whole, steps=[1, 2, 2.5, 5, 10]))


def log_ticks(axis: Any, most: int = 6) -> None:
    """Few tick labels on a logarithmic axis."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_view_interval()
    tight = high / max(low, 1e-300) < 20
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if tight else (1,), numticks=most))
    axis.set_minor_locator(LogLocator(10, subs=(), numticks=most))
    plain_ticks(axis, power)


def layer_ticks(canvas: Canvas, axes: Axes, stops: Sequence[str]) -> None:
    """One place for each layer (or module), named where there is room."""
    axes.set_xlim(-0.6, len(stops) - 0.4)
    step = max(1, -(-len(stops) // (12 if canvas.narrow else 28)))
    axes.set_xticks(range(0, len(stops), step), stops[::step])


def render(name: str, draw: Draw) -> tuple[Markup, Markup]:
    """Both drawings of a figure, ``<svg>`` for wide and for narrow windows, without attributes that the page sets.

    The name is unique on the page; it is part of every identifier.
    """
    return _one(f"{name}-w", draw, False), _one(f"{name}-n", draw, True)


def _one(name: str, draw: Draw, narrow: bool) -> Markup:
    canvas = Canvas(narrow)
    buffer = io.BytesIO()
    with _style(name):
        draw(canvas)
        assert canvas.figure is not None
        canvas.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Markup(_cleaned(buffer.getvalue(), name))


@contextmanager
def _style(name: str) -> Iterator[None]:
    import matplotlib as mpl

    settings: Any = {**_STYLE, "svg.hashsalt": name}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's typeface has it
        yield


def _cleaned(source: bytes, name: str) -> str:
    """The drawing alone: no prologue, style sheet or unused identifier; colours as custom properties."""
    root = ElementTree.fromstring(source)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    used = {found for element in root.iter() for found in _references(element)}
    for element in root.iter():
        element.text = (element.text or "").strip("\n") if element.tag == f"{_SVG}text" else None
        element.tail = None
        _attributes(element, name, used)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{_SVG}defs" and not len(child):
                parent.remove(child)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "aria-hidden": "true", "focusable": "false"})
    ElementTree.register_namespace("", _SVG.strip("{}"))
    return ElementTree.tostring(root, encoding="unicode").replace(' xmlns="http://www.w3.org/2000/svg"', "")


def _references(element: ElementTree.Element) -> list[str]:
    shown = (element.get(f"{_XLINK}href", ""), element.get("clip-path", ""))
    return [found for value in shown for found in _REFERENCE.findall(value)]


def _attributes(element: ElementTree.Element, name: str, used: set[str]) -> None:
    identifier = element.attrib.pop("id", None)
    if identifier in used:
        element.set("id", f"{name}-{identifier}")
    if target := element.attrib.pop(f"{_XLINK}href", None):
        element.set("href", target.replace("#", f"#{name}-"))
    if clip := element.get("clip-path"):
        element.set("clip-path", clip.replace("#", f"#{name}-"))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    for key in ("d", "x", "y", "transform", "width", "height"):
        if key in element.attrib:
            value = " ".join(element.attrib[key].split())
            element.set(key, _NUMBER.sub(lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), value))
    if style := element.attrib.pop("style", None):
        parts = [part for part in style.split("; ") if not part.startswith(("font-family", "stroke-dashoffset: 0"))]
        shown = _TOKEN.sub(lambda found: f"var(--{_BY_TOKEN[found[0].lower()]})", ";".join(parts))
        element.set("style", shown.replace(": ", ":"))
