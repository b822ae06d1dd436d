"""What each rank reaches on the network itself: the certified point where it fits, else a descent to that rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from peft import LoraConfig

from ranksure.adapters.loaded import Adapter, LoraBlock
from ranksure.factors import Factors, truncated
from ranksure.network.side_path import applied
from ranksure.planner.network.pieces import Reached, reached_at
from ranksure.planner.network.stage import MOST_GRADIENTS, Stage
from ranksure.records.certificate import Verdict
from ranksure.relinearised import Gaps
from ranksure.solvers.network import descend_at_ranks
from ranksure.solvers.network_objective import NetworkPoint
from ranksure.verdict import Network, Point, rank_or_saddle

ROW_GRADIENTS = 40
"""Most gradients of one row of the table."""

_LEAST = 6  # gradients worth beginning a second descent for
_SIZES = (1.0, 0.1, 0.01)  # of a direction that takes an unused column


@dataclass
class NetworkTable:
    """Points by uniform rank, beside the solution at the same lambda.

    Attributes:
        solution: the certified point; it moves where a rank does better.
        rows: points of ranks that the solution does not fit into.
    """

    stage: Stage
    solution: Reached
    rows: dict[int, Reached] = field(default_factory=dict)

    @property
    def zero(self) -> float:
        """The objective without an update."""
        return self.stage.objective.at_zero

    @property
    def largest(self) -> int:
        """The solution's largest rank."""
        return max(self.solution.ranks.values(), default=0)

    @property
    def allowed(self) -> float:
        """A gain that counts as none."""
        return max(self.stage.tolerance * (self.zero - self.solution.objective), self.stage.objective.noise)

    def captured(self, objective: float) -> float:
        """Share of what the best point found gains."""
        best = min([self.solution.objective, *(row.objective for row in self.rows.values())])
        return min(max((self.zero - objective) / (self.zero - best), 0.0), 1.0) if best < self.zero else 1.0

    def clipped(self, rank: int) -> dict[str, int]:
        """A uniform rank, clipped to each module."""
        return {name: min(rank, *shape) for name, shape in self.stage.objective.shapes.items()}

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """Trainable parameters of factors of these ranks."""
        return sum(ranks.get(name, 0) * sum(shape) for name, shape in self.stage.objective.shapes.items())

    def fits(self, ranks: Mapping[str, int]) -> bool:
        """Whether the solution itself has no more than these ranks."""
        return all(self.solution.ranks[name] <= allowed for name, allowed in ranks.items())

    def known(self, rank: int) -> bool:
        """Whether the row of a rank costs nothing more."""
        return rank in self.rows or self.fits(self.clipped(rank))

    def row(self, rank: int) -> Reached:
        """What a uniform rank reaches: the solution, where it fits, else a descent from its truncation."""
        ranks = self.clipped(rank)
        if self.fits(ranks):
            return self.solution
        if rank not in self.rows:
            start = truncated(self.solution.factors, ranks)
            found = self.stage.piece(
                f"rank/{rank}",
                ROW_GRADIENTS,
                lambda most: self._descended(start, ranks, most),
                f"examining rank {rank}",
            )
            self.rows[rank] = found
            self.improve(found)
            if self.fits(ranks):
                return self.solution
        return self.rows[rank]

    def improve(self, found: Reached) -> None:
        """Solve again from a point that is better than the solution."""
        stage = self.stage
        if found.objective < self.solution.objective - max(stage.objective.noise, 1e-3 * self.allowed):
            key = f"solution/{found.objective!r}"
            again = stage.solved(
                key, found.factors, stage.tolerance, MOST_GRADIENTS, "solving again from a better point"
            )
            if again.objective <= found.objective:
                self.solution = again

    def _descended(self, start: Factors, ranks: Mapping[str, int], most: int) -> Reached:
        """At most so many gradients at these ranks; columns that the truncation leaves unused take what is missing."""
        objective, before = self.stage.objective, self.stage.gradients
        point = descend_at_ranks(objective, start, max_gradients=most - 1)  # a line search may end one later
        left = most - 1 - (self.stage.gradients - before)
        if point.gap > self.allowed and left >= _LEAST and (more := self._filled(point, ranks)) is not None:
            again = descend_at_ranks(objective, more, max_gradients=left)
            point = min(point, again, key=lambda each: each.objective)
        verdict = self._verdict(point, ranks)
        status = "converged" if verdict in ("first-order-optimal", "rank-bound") else "not-converged"
        return reached_at(point, objective.penalty, verdict=verdict, status=status, start="the solution, truncated")

    def _filled(self, point: NetworkPoint, ranks: Mapping[str, int]) -> Factors | None:
        """The point with new directions in its unused columns, where that goes down."""
        objective = self.stage.objective
        spare = {name: ranks[name] - u.shape[1] for name, (u, _) in point.factors.items()}
        new = {name: (u[:, : spare[name]], v[:, : spare[name]]) for name, (u, v) in point.pairs.items()}
        slope = sum(float(u.square().sum(0).square().sum()) for u, _ in new.values())
        if not slope:
            return None
        for size in _SIZES:
            root = math.sqrt(0.1 * size * point.loss / slope)
            found: Factors = {
                name: (torch.cat([u, root * new[name][0]], 1), torch.cat([v, root * new[name][1]], 1))
                for name, (u, v) in point.factors.items()
            }
            if objective.loss(found) + objective.penalty_of(found) < point.objective:
                return found
        return None

    def _verdict(self, point: NetworkPoint, ranks: Mapping[str, int]) -> Verdict:
        """What certify says of a run that ended here at these ranks, a gain below the tolerance counting as none."""
        objective = self.stage.objective
        blocks = {
            name: LoraBlock(objective.targets[name], (u.cpu(), v.cpu()), 1.0) for name, (u, v) in point.factors.items()
        }
        adapter = Adapter("", LoraConfig(), blocks, [], [])
        states = {
            name: replace(state, rank=ranks[name], full=state.rank_used >= ranks[name])
            for name, state in point.states.items()
        }
        judged = Point(
            adapter,
            states,
            objective.penalty,
            point.loss,
            Gaps(point.gap, point.tangent, 1.0, None),
            min(self.allowed / max(point.objective, 1e-300), 0.5),
        )
        if point.gap <= self.allowed:
            return "first-order-optimal"
        if not judged.stationary:
            return "not-converged"
        network = Network(objective.model, objective.batches, objective.kind, "token")
        with applied(objective.targets, point.factors):
            verdict, _ = rank_or_saddle(judged, network, True)
        objective.counts.forwards += network.passes
        return verdict
