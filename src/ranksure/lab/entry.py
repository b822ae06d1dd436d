"""What a lab entry is: a claim of the literature that a command measures.

To add one, write ``ranksure/lab/entries/some_name.py`` with a module-level ``ENTRY``; nothing else has
to know of it. Its command is ``ranksure lab some-name``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ranksure.progress import Reporter, Silent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Verdict = Literal["reproduced", "partly", "not-reproduced"]


@dataclass(frozen=True)
class Check:
    """One part of a claim, and whether the measurement agrees with it.

    Attributes:
        claim: what the source says, in a sentence.
        measured: what was measured, in a sentence with its numbers.
        holds: whether the two agree, decided by the numbers.
    """

    claim: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Finding:
    """What a run of an entry gives.

    Attributes:
        checks: the parts of the claim, at least one.
        figure: what people would rather look at; written as ``NAME.png``.
        numbers: everything measured, as plain JSON.
    """

    checks: Sequence[Check]
    figure: Figure
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """``reproduced`` when every check holds, ``not-reproduced`` when none does, else ``partly``."""
        held = [check.holds for check in self.checks]
        if not held:
            raise ValueError("a finding needs at least one check")
        return "reproduced" if all(held) else "partly" if any(held) else "not-reproduced"


@dataclass(frozen=True)
class Run:
    """How an entry is run.

    Attributes:
        full: the large size; the default one takes less than two minutes on two cores.
        small: the size of tests; a few seconds.
        seed: seed of everything random.
        reporter: receives stages with a count.
    """

    full: bool = False
    small: bool = False
    seed: int = 0
    reporter: Reporter = field(default_factory=Silent)

    def size(self, small: Any, default: Any, full: Any) -> Any:
        """The one of three values that belongs to this run's size."""
        return small if self.small else full if self.full else default


@dataclass(frozen=True)
class Entry:
    """A runnable result of the literature.

    Attributes:
        title: a few words.
        claim: what is claimed, in a sentence or two.
        source: paper and theorem.
        measure: runs it.
    """

    title: str
    claim: str
    source: str
    measure: Callable[[Run], Finding]
