"""The smallest uniform rank and the smallest pattern of ranks that capture a share, searched on the network itself."""

from __future__ import annotations

from ranksure.factors import singular_values, truncated
from ranksure.planner.network.pieces import Reached
from ranksure.planner.network.ranks import ROW_GRADIENTS, NetworkTable
from ranksure.solvers.network import descend_at_ranks

PATTERN_GRADIENTS = 80
"""Most gradients of the search for a pattern."""

_FIRST = 12  # gradients after which a pattern is looked at for the first time


def smallest_uniform(table: NetworkTable, share: float) -> int:
    """Smallest uniform rank found to capture ``share``; between known rows by bisection, which adds rows."""
    if not table.largest:
        return 0
    low, high = 0, table.largest

    def passes(rank: int) -> bool:
        return table.captured(table.row(rank).objective) >= share

    for rank in sorted(table.rows):
        if rank < high and passes(rank):
            high = rank
        elif rank < high:
            low = rank
    while high - low > 1:
        middle = (low + high) // 2
        if table.stage.spent(f"examining rank {middle}"):
            break
        low, high = (low, middle) if passes(middle) else (middle, high)
    return min(high, table.largest)


def smallest_pattern(table: NetworkTable, share: float, uniform: int) -> tuple[dict[str, int], Reached]:
    """Smallest ranks by module found to capture ``share``, counted in parameters, and the point that reaches it.

    Directions are ordered by their penalty: bisection finds how many of the largest suffice after descending again,
    and then each module in turn gives up its last one where the rest make up for it. A uniform rank with fewer
    parameters is taken instead.
    """
    search = _Search(table, share)
    ranks, point = search.largest_first()
    ranks, point = search.given_up(ranks, point)
    same = table.clipped(uniform)
    if table.parameters(same) < table.parameters(ranks):
        return same, table.row(uniform)
    return ranks, point


class _Search:
    """Patterns tried, within the gradients that a search may take."""

    def __init__(self, table: NetworkTable, share: float) -> None:
        self.table, self.share = table, share
        self.ends = table.stage.gradients + PATTERN_GRADIENTS
        self.penalty = table.stage.objective.penalty
        self.count = 0

    @property
    def over(self) -> bool:
        """Whether the search ends with what was found."""
        stage = self.table.stage
        return stage.gradients >= self.ends or stage.spent("searching the smallest pattern")

    def enough(self, objective: float) -> bool:
        """Whether a point captures the share."""
        return self.table.captured(objective) >= self.share

    def tried(self, ranks: dict[str, int], start: Reached) -> Reached | None:
        """A point of these ranks that captures the share, from a truncation; None if not found."""
        stage = self.table.stage
        objective, factors = stage.objective, truncated(start.factors, ranks)

        def make(most: int) -> Reached:
            loss = objective.loss(factors)
            found = Reached(factors, loss + objective.penalty_of(factors), loss)
            before = stage.gradients
            for allowed in (min(_FIRST, most), most):
                if self.enough(found.objective) or allowed <= stage.gradients - before:
                    break
                point = descend_at_ranks(objective, found.factors, max_gradients=allowed - (stage.gradients - before))
                found = Reached(point.factors, point.objective, point.loss, point.gap)
            return found

        self.count += 1
        key = f"pattern/{self.count}"
        found = stage.piece(key, ROW_GRADIENTS, make, "searching the smallest pattern")
        self.table.improve(found)
        return found if self.enough(found.objective) else None

    def largest_first(self) -> tuple[dict[str, int], Reached]:
        """How many of the largest directions suffice."""
        solution = self.table.solution
        values = singular_values(solution.factors)
        order = sorted(((self.penalty[name] * float(s), name) for name in values for s in values[name]), reverse=True)

        def first(count: int) -> dict[str, int]:
            kept = dict.fromkeys(values, 0)
            for _, name in order[:count]:
                kept[name] += 1
            return kept

        low, high, best = 0, len(order), solution
        while high - low > 1 and not self.over:
            middle = (low + high) // 2
            found = self.tried(first(middle), solution)
            low, high, best = (low, middle, found) if found is not None else (middle, high, best)
        return first(high), best

    def given_up(self, ranks: dict[str, int], point: Reached) -> tuple[dict[str, int], Reached]:
        """Without the directions that the others make up for."""
        stuck: set[str] = set()
        while not self.over and sum(ranks.values()) > 1:
            left = [name for name, rank in ranks.items() if rank > 0 and name not in stuck]
            if not left:
                break
            weakest = min(left, key=lambda name: self._last(point, name))
            fewer = {**ranks, weakest: ranks[weakest] - 1}
            found = self.tried(fewer, point)
            if found is None:
                stuck.add(weakest)
            else:
                ranks, point = fewer, found
        return ranks, point

    def _last(self, point: Reached, name: str) -> float:
        values = singular_values({name: point.factors[name]})[name]
        return self.penalty[name] * float(values[-1]) if len(values) else 0.0
