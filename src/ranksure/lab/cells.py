"""One setting of a landscape experiment: a problem, its ranks, and where its starts ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ranksure.lab.landscape import Census, Verdict, merged
from ranksure.theory.bounds import meets_landscape
from ranksure.theory.capacity import CAPACITY_CONSTANT, degrees_of_freedom


@dataclass(frozen=True)
class Cell:
    """All starts of one setting at one choice of ranks.

    Attributes:
        label: of the bar, or empty.
        ranks: rank by block.
        n: equations ``K N``, as the loss sees them.
        shapes: block shapes.
        size: ``||P|| / lambda``; 0 for none.
        parts: one census per instance.
    """

    label: str
    ranks: dict[str, int]
    n: int
    shapes: dict[str, tuple[int, int]]
    size: float
    parts: list[Census]

    @property
    def counts(self) -> dict[Verdict, int]:
        """Starts by verdict."""
        return merged(self.parts)

    @property
    def starts(self) -> int:
        """Number of starts."""
        return sum(self.counts.values())

    @property
    def above(self) -> bool:
        """Whether every block has a rank at which Theorem 4.1 holds."""
        return meets_landscape(self.ranks, self.n, self.shapes)

    @property
    def has_capacity(self) -> bool:
        """Whether Park's count says that the ranks can interpolate."""
        return degrees_of_freedom(self.ranks, self.shapes) > CAPACITY_CONSTANT * self.n

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "ranks": self.ranks,
            "n": self.n,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "perturbation": self.size,
            "above": self.above,
            "capacity": self.has_capacity,
            "starts": self.starts,
            "counts": dict(self.counts),
            "parts": [part.to_json() for part in self.parts],
        }
