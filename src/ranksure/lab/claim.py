"""What a claim is, and what its measurement gives; nothing here needs torch or matplotlib.

To add one, write ``lab/theory/some_name.py`` (a result of the literature: ``ranksure lab some-name``) or
``lab/paper/some_name.py`` (an experiment of the paper: ``ranksure reproduce some-name``) with a module-level ``CLAIM``
whose words are written out; nothing else has to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ranksure.progress import Reporter, Silent
from ranksure.records.claims import Check, Curve, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Finding:
    """What a measurement gives.

    Attributes:
        checks: the parts of the claim, at least one.
        figure: what people would rather look at.
        numbers: everything measured, as plain JSON.
        table: written as CSV, too.
        curves: the lines of the figure.
        reference: by panel, the certified optimum.
        axes: names of the axes, ``x`` and ``y``, for whoever draws the curves again.
        missing: settings that could not be run, with the reason.
    """

    checks: Sequence[Check]
    figure: Figure
    numbers: Mapping[str, Any] = field(default_factory=dict)
    table: Table = field(default_factory=Table)
    curves: Sequence[Curve] = ()
    reference: Mapping[str, float] = field(default_factory=dict)
    axes: Mapping[str, str] = field(default_factory=dict)
    missing: Sequence[str] = ()

    def verdict(self, words: tuple[str, str, str]) -> str:
        """The first word when every check holds and nothing is missing, the last when none holds, else the second."""
        held = [check.holds for check in self.checks]
        if not held:
            raise ValueError("a finding needs at least one check")
        return words[2] if not any(held) else words[0] if all(held) and not self.missing else words[1]


@dataclass
class Run:
    """How a claim is measured.

    Attributes:
        full: the large size.
        small: the size of tests; a few seconds.
        seed: seed of everything random; where several are needed, the first.
        reporter: receives stages with a count.
    """

    full: bool = False
    small: bool = False
    seed: int = 0
    reporter: Reporter = field(default_factory=Silent)

    def size(self, small: Any, default: Any, full: Any) -> Any:
        """The one of three values that belongs to this run's size."""
        return small if self.small else full if self.full else default

    def to_json(self) -> dict[str, Any]:
        """What it is run on, as plain JSON."""
        return {"size": self.size("small", "default", "full")}

    def parts_count(self) -> dict[str, int]:
        """How many parts were made and found on disk, for a run that keeps some."""
        return {}


@dataclass(frozen=True)
class Claim:
    """Something that a command measures.

    Attributes:
        title: a few words.
        claim: what is claimed, in a sentence or two.
        source: paper and theorem.
        measure: runs it.
        minutes: about how long it takes on two cores, by default and in full; None for a few.
    """

    title: str
    claim: str
    source: str
    measure: Callable[[Any], Finding]
    minutes: tuple[float, float] | None = None
