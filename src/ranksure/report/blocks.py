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

    CERTIFIED = (
        "certified",
        "Certified",
        "Proved in float64, of a linearised network: at its pretrained weights, or at the point found.",
    )
    MEASURED = ("measured", "Measured", "Computed or fitted on the rows at hand. It proves nothing beyond them.")
    NOT_CHECKED = ("not-checked", "Not checked", "Nothing was established either way.")

    def __init__(self, key: str, text: str, meaning: str) -> None:
        self.key, self.text, self.meaning = key, text, meaning  # in the style sheet, on the page, in a sentence


@dataclass(frozen=True)
class Table:
    """A table; cells are text already."""

    caption: str  # what it holds
    columns: Sequence[str]  # headings; the first column heads its rows
    rows: Sequence[Sequence[str]]  # cells
    words: frozenset[int] = frozenset()  # indices of columns that are words, not numbers (the first one is)
    more: str = ""  # a sentence about what was left out

    kind = "table"

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.caption}: a row of {len(row)} cells under {len(self.columns)} headings")


@dataclass(frozen=True)
class Key:
    """One entry of a legend."""

    text: str  # what it stands for
    colour: str  # a token of the style sheet
    marker: str = ""  # a shape (`o s D ^ v P X h`), or empty
    line: str = ""  # `solid`, `dashed`, `dotted`, `dashdot` or empty
    box: bool = False  # a pale area, of a band
    hollow: bool = False  # an outlined marker


@dataclass(frozen=True)
class Figure:
    """A picture with what it says and what it shows."""

    id: str  # unique on the page
    title: str  # the question that it answers
    status: Status | None  # worth of its numbers; None for plain counts
    summary: str  # the answer, in plain words
    alt: str  # what a reader who cannot see it is told
    wide: Markup  # the drawing for wide windows
    narrow: Markup  # the drawing for narrow ones
    table: Table  # its data
    legend: Sequence[Key] = ()  # what its marks stand for
    note: str = ""  # the small print

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
    """A raster that another command drew."""

    id: str
    title: str
    alt: str
    source: str  # a `data:` address
    width: int  # in pixels
    height: int  # in pixels
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
    """A titled table or list that stands on its own."""

    title: str
    status: Status | None = None
    paragraphs: Sequence[str] = ()
    checks: Sequence[tuple[bool, str, str]] = ()  # `(agrees, claim, measured)`
    table: Table | None = None  # shown open
    details: Sequence[Table] = ()

    kind = "prose"


@dataclass(frozen=True)
class Fold:
    """Blocks that are folded away until a reader opens them."""

    title: str
    summary: str  # what is inside, in a sentence
    blocks: Sequence[Any]

    kind = "fold"


@dataclass(frozen=True)
class Tile:
    """One number of the answer; without a status it is a plain count."""

    label: str
    value: str
    status: Status | None
    note: str = ""


@dataclass
class Section:
    """One result."""

    id: str  # unique on the page
    what: str  # the kind of result, such as `Plan`
    title: str  # what it is about
    answer: str  # the answer, in a sentence
    tone: str = ""  # `good`, `warn`, `bad` or empty
    sentences: list[str] = field(default_factory=list)  # more of it
    warnings: list[str] = field(default_factory=list)  # what to know before trusting it
    tiles: list[Tile] = field(default_factory=list)  # its main numbers
    blocks: list[Any] = field(default_factory=list)  # figures, tables and text, in order
