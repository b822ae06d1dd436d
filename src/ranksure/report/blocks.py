"""What a page is made of. Sections build these; the templates show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from markupsafe import Markup

from ranksure.report.svg import Canvas, render


class Status(Enum):
    """How much a number is worth; the three are never mixed in one figure."""

    CERTIFIED = ("certified", "Certified", "Proved for the linearised network, by bounds computed in float64.")
    ESTIMATED = ("estimated", "Estimated", "Measured or fitted on the rows at hand. No proof.")
    NOT_CHECKED = ("not-checked", "Not checked", "Nothing was established either way.")

    @property
    def key(self) -> str:
        """Name in the style sheet."""
        return self.value[0]

    @property
    def text(self) -> str:
        """Name on the page."""
        return self.value[1]

    @property
    def meaning(self) -> str:
        """In a sentence."""
        return self.value[2]


@dataclass(frozen=True)
class Table:
    """A table; cells are text already.

    Attributes:
        caption: what it holds.
        columns: headings; the first column heads its rows.
        rows: cells.
        words: indices of columns that are words, not numbers (the first one is).
        more: a sentence about what was left out.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int] = frozenset()
    more: str = ""

    kind = "table"

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.caption}: a row of {len(row)} cells under {len(self.columns)} headings")


@dataclass(frozen=True)
class Key:
    """One entry of a legend.

    Attributes:
        text: what it stands for.
        colour: a token of the style sheet.
        marker: a shape (``o s D ^ v P X h``), or empty.
        line: ``solid``, ``dashed``, ``dotted``, ``dashdot`` or empty.
        box: a filled box, of a bar or a heat map.
    """

    text: str
    colour: str
    marker: str = ""
    line: str = ""
    box: bool = False


@dataclass(frozen=True)
class Figure:
    """A picture with what it says and what it shows.

    Attributes:
        id: unique on the page.
        title: the question that it answers.
        status: worth of its numbers; None for plain counts.
        summary: the answer, in plain words.
        alt: what a reader who cannot see it is told.
        wide: the drawing for wide windows.
        narrow: the drawing for narrow ones.
        table: its data.
        legend: what its marks stand for.
        note: the small print.
    """

    id: str
    title: str
    status: Status | None
    summary: str
    alt: str
    wide: Markup
    narrow: Markup
    table: Table
    legend: Sequence[Key] = ()
    note: str = ""

    kind = "figure"


def drawn(
    id: str,
    draw: Callable[[Canvas], None],
    title: str,
    status: Status | None,
    summary: str,
    shows: str,
    table: Table,
    legend: Sequence[Key] = (),
    note: str = "",
) -> Figure:
    """A figure, drawn wide and narrow; ``shows`` says to who cannot see it what kind of picture it is."""
    wide, narrow = render(id, draw)
    return Figure(id, title, status, summary, f"{shows} {summary}", wide, narrow, table, legend, note)


@dataclass(frozen=True)
class Picture:
    """A raster that another command drew.

    Attributes:
        source: a ``data:`` address.
        width: in pixels.
        height: in pixels.
    """

    id: str
    title: str
    alt: str
    source: str
    width: int
    height: int
    summary: str = ""

    kind = "picture"


@dataclass(frozen=True)
class Code:
    """Text to copy."""

    id: str
    title: str
    text: str
    summary: str = ""

    kind = "code"


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    title: str
    rows: Sequence[tuple[str, str]]

    kind = "facts"


@dataclass(frozen=True)
class Prose:
    """A titled table or list that stands on its own.

    Attributes:
        checks: ``(agrees, claim, measured)``.
        table: shown open.
    """

    title: str
    status: Status | None = None
    paragraphs: Sequence[str] = ()
    checks: Sequence[tuple[bool, str, str]] = ()
    table: Table | None = None
    details: Sequence[Table] = ()

    kind = "prose"


@dataclass(frozen=True)
class Tile:
    """One number of the answer; without a status it is a plain count."""

    label: str
    value: str
    status: Status | None
    note: str = ""


@dataclass
class Section:
    """One result.

    Attributes:
        id: unique on the page.
        what: the kind of result, such as ``Plan``.
        title: what it is about.
        answer: the answer, in a sentence.
        tone: ``good``, ``warn``, ``bad`` or empty.
        sentences: more of it.
        warnings: what to know before trusting it.
        tiles: its main numbers.
        blocks: figures, tables and text, in order.
    """

    id: str
    what: str
    title: str
    answer: str
    tone: str = ""
    sentences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    blocks: list[Any] = field(default_factory=list)
