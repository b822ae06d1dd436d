"""What the pieces of a network's plan share: the objective, what may still be spent, and what is finished."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace

from ranksure.factors import Factors
from ranksure.planner.network.pieces import Pieces, Reached, modules_of
from ranksure.solvers.network import solve_objective
from ranksure.solvers.network_objective import NetworkObjective

MOST_GRADIENTS = 700
"""Of one solve; a gap that is open then is reported as it is."""


class Budget:
    """Passes forward and back over the data that may still be spent.

    Args:
        passes, seconds: the limits; infinite where there is none.
        per_pass: seconds that one pass was seen to take.
    """

    def __init__(self, passes: float, seconds: float, per_pass: float) -> None:
        self.passes, self.per_pass = passes, max(per_pass, 1e-9)
        self.ends = time.perf_counter() + seconds
        self.stopped = ""
        """What was being done when nothing was left."""

    def left(self, spent: int) -> float:
        """Passes left after so many."""
        return min(self.passes - spent, (self.ends - time.perf_counter()) / self.per_pass)


@dataclass
class Stage:
    """The network's plan in work, at one lambda.

    Attributes:
        objective: at this lambda; its counts are of the whole plan.
        tolerance: a gain below this share of what was gained counts as none.
        advance: called as the gradients go on.
    """

    objective: NetworkObjective
    budget: Budget
    pieces: Pieces
    tolerance: float
    advance: Callable[[], None] = lambda: None

    @property
    def gradients(self) -> int:
        """Passes forward and back so far."""
        return self.objective.counts.gradients

    def at(self, lam: float) -> Stage:
        """The same work at another lambda."""
        return replace(self, objective=self.objective.with_penalty(lam))

    def piece(self, key: str, most: int, make: Callable[[int], Reached], doing: str) -> Reached:
        """A point made with at most so many gradients, or taken from an earlier run that was interrupted.

        One that the budget cut short is not kept.
        """
        counts = self.objective.counts
        found = self.pieces.get(key)
        if found is not None:
            counts.gradients += found.gradients
            counts.forwards += found.forwards
            counts.captures += found.captures
            device = self.objective.device
            return replace(
                found, factors={name: (u.to(device), v.to(device)) for name, (u, v) in found.factors.items()}
            )
        left = self.budget.left(self.gradients)
        before = copy(counts)
        found = make(max(2, int(min(most, left))))
        spent = counts.since(before)
        found = replace(found, gradients=spent.gradients, forwards=spent.forwards, captures=spent.captures)
        if spent.gradients >= left and found.status != "converged":
            self.budget.stopped = self.budget.stopped or f"the budget was used up while {doing}"
        else:
            self.pieces.put(key, found)
        self.advance()
        return found

    def spent(self, doing: str) -> bool:
        """Whether no pass is left, which ends the work there."""
        if not self.budget.stopped and self.budget.left(self.gradients) < 1:
            self.budget.stopped = f"the budget was used up before {doing}"
        return bool(self.budget.stopped)

    def solved(self, key: str, start: Factors | None, tolerance: float, most: int, doing: str) -> Reached:
        """A solve at this lambda."""
        objective = self.objective

        def make(allowed: int) -> Reached:
            found = solve_objective(
                objective,
                start=start,
                tolerance=tolerance,
                max_gradients=allowed,
                progress=lambda *_: self.advance(),
            )
            return Reached(
                found.factors,
                found.objective,
                found.loss,
                found.gap,
                modules=modules_of(found.states, objective.penalty),
                status=found.status,
                remedy=found.remedy,
                verdict="first-order-optimal" if found.status == "converged" else "not-converged",
                history=found.history,
            )

        return self.piece(key, most, make, doing)
