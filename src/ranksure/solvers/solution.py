"""What every solver returns: a point, its certificate, a status and a remedy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ranksure.certificate import Certificate
from ranksure.factors import Factors, ranks_of

Status = Literal["converged", "not-converged"]


@dataclass(frozen=True)
class Solution:
    """A point with its certificate.

    Attributes:
        factors: balanced factors by block; rank-0 blocks have no columns.
        certificate: what is proved about the point.
        status: whether the requested relative gap was reached.
        remedy: what to do when it was not; empty otherwise.
        evaluations: objective-and-gradient evaluations.
        seconds: wall-clock time.
        history: relative gap after each round, with the seconds at which it was known.
    """

    factors: Factors
    certificate: Certificate
    status: Status
    remedy: str
    evaluations: int
    seconds: float
    history: list[tuple[float, float]] = field(default_factory=list)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every block."""
        return ranks_of(self.factors)
