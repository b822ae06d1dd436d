"""The rounds of the network's solver: certificate, new directions, descent; what stops them; where they can go on.

New directions are added only outside the tangent space of the factors, and only when descent at the present ranks is
done: a spectral ratio above one in the middle of a descent is no missing rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace

from torch import Tensor

from ranksure.errors import MemoryBudgetError
from ranksure.factors import FactorLayout, Factors, balanced, ranks_of
from ranksure.solvers.growth import combined, pruned
from ranksure.solvers.lbfgs import minimize
from ranksure.solvers.network_objective import Counts, NetworkObjective, NetworkPoint
from ranksure.solvers.solution import Status

Progress = Callable[[int, NetworkPoint], None]
"""Called with the gradients so far and the last point that was examined, after every gradient."""

_SHARES = (3e-2, 1e-2, 1e-3, 1e-4)  # of the largest singular value, below which directions may go
_MOST = 200  # evaluations of one descent
_STORED = 2**25  # numbers that L-BFGS may keep, twice
_WORTH_A_CAPTURE = 20  # how loose the cheap dual can be, as seen


@dataclass(frozen=True)
class Checkpoint:
    """What a solve needs to go on after a round, to the same bits; plain values but for the tensors of ``factors``.

    Attributes:
        factors: balanced factors by module, float64.
        inner: relative gradient norm to which the next descent goes.
        stalled: rounds in a row without a fall beyond the noise.
        slow: whether the last round hardly gained.
        counts: gradients, forward passes and captures so far.
        history: gradients, objective and gap of every round.
        seconds: so far.
    """

    factors: Factors
    inner: float
    stalled: int
    slow: bool
    counts: tuple[int, int, int]
    history: list[tuple[int, float, float]]
    seconds: float


@dataclass(frozen=True)
class End:
    """Where the rounds ended, and why; ``remedy`` is empty where they converged."""

    point: NetworkPoint
    gap: float
    status: Status
    remedy: str = ""


@dataclass
class Rounds:
    """The rounds of one solve.

    Attributes:
        tolerance: the gap to reach, as a share of what was gained.
        of_objective: and as a share of the objective reached, of which what was gained may be a multiple.
        history: gradients, objective and gap of every round.
        inner: relative gradient norm to which the next descent goes.
        stalled, slow: as :class:`Checkpoint`'s.
    """

    objective: NetworkObjective
    tolerance: float
    max_gradients: int
    max_seconds: float = math.inf
    progress: Progress = lambda gradients, point: None
    checkpoint: Callable[[Checkpoint], None] | None = None
    of_objective: float = math.inf
    inner: float = 3e-2
    stalled: int = 0
    slow: bool = False
    history: list[tuple[int, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began, self.earlier = time.perf_counter(), 0.0
        self.before = replace(self.objective.counts)
        self.at_zero, self.noise = self.objective.at_zero, self.objective.noise
        self.point: NetworkPoint | None = None

    @property
    def counts(self) -> Counts:
        """Work of this solve."""
        return self.objective.counts.since(self.before)

    @property
    def seconds(self) -> float:
        """Of this solve."""
        return time.perf_counter() - self.began + self.earlier

    def out_of_time(self) -> bool:
        """Whether ``max_seconds`` have passed in this call."""
        return time.perf_counter() - self.began >= self.max_seconds

    def run(self, start: Factors | None, resume: Checkpoint | None) -> End:
        """From a start to a certified point, or the best one with what to do."""
        if resume is None:
            self.point = self.objective.examine_start(start or {})
            self.record()
        else:
            self.point = self.objective.examine(resume.factors)
            self.inner, self.stalled, self.slow = resume.inner, resume.stalled, resume.slow
            self.history, self.earlier = list(resume.history), resume.seconds
            self.before = self.objective.counts.since(Counts(*resume.counts))  # that pass was counted
        while (end := self.end(self.point)) is None:
            self.point = self.better(self.point)
            self.record()
        return end

    def record(self) -> None:
        """After a round."""
        assert self.point is not None
        counts = self.counts
        self.history.append((counts.gradients, self.point.objective, self.point.gap))
        self.progress(counts.gradients, self.point)
        if self.checkpoint is not None:
            state = (self.inner, self.stalled, self.slow, astuple(counts), list(self.history), self.seconds)
            self.checkpoint(Checkpoint(self.point.factors, *state))

    def end(self, point: NetworkPoint) -> End | None:
        """Whether this point is the last one."""
        if self.enough(point, point.gap):
            point = pruned(
                point.factors, point, self.objective.examine, lambda found: self.enough(found, found.gap), _SHARES
            )
            return End(point, point.gap, "converged")
        gap, spent = point.gap, ""
        if self.counts.gradients >= self.max_gradients:
            spent = f"the limit of {self.max_gradients} gradients was reached; raise it, or the tolerance"
        elif self.out_of_time():
            spent = f"the limit of {self.max_seconds:g} seconds was reached; raise it, or the tolerance"
        if (self.slow or spent) and not self.out_of_time():  # all that is left may be a loose dual
            gap = self.sharper(point)
            if self.enough(point, gap):
                return End(point, gap, "converged")
        if gap <= self.noise:
            dtype = str(self.objective.precision).removeprefix("torch.")
            spent = (
                f"what could still be gained, {gap:.2g} at most, is within the noise of an evaluation in {dtype} "
                f"({self.noise:.2g}); load the model in a wider dtype, or raise the tolerance"
            )
        if self.stalled >= 2:
            spent = "no step lowers the objective beyond the noise of an evaluation; raise the tolerance"
        return End(point, gap, "not-converged", spent) if spent else None

    def enough(self, point: NetworkPoint, gap: float) -> bool:
        """Whether what could still be gained is a small share of what was, or of what an evaluation resolves."""
        resolved = self.noise if self.noise <= self.tolerance * self.at_zero else 0.0
        return gap <= max(self.allowed(point), resolved, 1e-9 * self.at_zero)

    def allowed(self, point: NetworkPoint) -> float:
        """The gap that is asked for."""
        return min(self.tolerance * (self.at_zero - point.objective), self.of_objective * point.objective)

    def better(self, point: NetworkPoint) -> NetworkPoint:
        """The point after a round, which is the old one where the round gained nothing."""
        found = self.improved(point)
        fell = point.objective - found.objective
        self.slow = fell < 0.5 * self.allowed(found)
        self.stalled = 0 if fell > self.noise else self.stalled + 1
        if self.stalled:
            self.inner = max(self.floor, 0.1 * self.inner)
        return found if fell >= 0 else point

    @property
    def floor(self) -> float:
        """Relative gradient norm below which the network's own precision decides."""
        return 1e-9 if self.objective.precision.itemsize == 8 else 3e-5

    @staticmethod
    def unfinished(point: NetworkPoint) -> bool:
        """Whether the present factors' own directions make up most of the gap: no time for new ones."""
        return any(ranks_of(point.factors).values()) and point.tangent > 0.5 * point.gap

    def improved(self, point: NetworkPoint) -> NetworkPoint:
        """New directions if it is time for them, then descent; the point that it ends at, with its certificate."""
        factors = point.factors
        lacks = any(ranks_of(point.pairs).values())  # a direction outside the factors lowers the objective
        if lacks and (not self.unfinished(point) or self.inner <= self.floor):
            factors = self.grown(point)
        factors, reached = self.descended(factors)
        found = self.objective.examine(self.lean(factors))
        if self.unfinished(found):  # the tangent part of the gap is about proportional to the gradient
            wanted = 0.5 * self.allowed(found) / found.tangent
            self.inner = max(self.floor, min(self.inner, reached * min(max(wanted, 0.1), 0.5)))
        return found

    def descended(self, factors: Factors) -> tuple[Factors, float]:
        """L-BFGS on the factors, in the network's precision, at their ranks; and the relative gradient norm reached."""
        objective, factors = self.objective, balanced(factors)
        layout = FactorLayout(objective.shapes, ranks_of(factors))
        if not layout.size:
            return factors, 0.0
        weights = layout.flatten(_weights(factors)).to(objective.dtype)

        def function(y: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = objective.value_and_gradient(layout.unflatten(weights * y))
            if self.point is not None:
                self.progress(self.counts.gradients, self.point)
            return y.new_tensor([value]), weights * layout.flatten(gradient)

        y = layout.flatten(factors).to(objective.dtype) / weights
        scale = math.sqrt(2 * max(self.at_zero, 1e-300) * min(objective.penalty.values()))
        most = min(_MOST, max(1, self.max_gradients - self.counts.gradients))
        result = minimize(
            function,
            y,
            tolerance=self.inner * scale,
            max_evaluations=most,
            history=max(20, min(60, _STORED // layout.size)),
            stop=self.out_of_time,
        )
        x = (weights * result.x).double()
        return balanced({**objective.zero(), **layout.unflatten(x)}), float(result.gradient_norm) / scale

    def grown(self, point: NetworkPoint) -> Factors:
        """Conditional-gradient step: ``a delta + b P``, ``b`` along the new directions, ``a`` where shrinking pays."""
        objective = self.objective
        # of P, whose pairs weigh sigma - lambda each
        price = sum(objective.penalty[name] * float(u.square().sum()) for name, (u, _) in point.pairs.items())

        def value(a: float, b: float) -> float:
            loss = objective.loss(combined(point.factors, a, point.pairs, b))
            return loss + a * (point.objective - point.loss) + b * price

        slope = -sum(float(u.square().sum(0).square().sum()) for u, _ in point.pairs.values())
        b, reached = _line_minimum(lambda t: value(1.0, t), point.objective, slope, 0.1 * point.loss / -slope)
        a = 1.0
        if point.slope > 0.1 * -slope * b:  # the update is too long: shrink it along with the step
            shrink, _ = _line_minimum(lambda t: value(max(1 - t, 0.0), b), reached, -point.slope, 0.1)
            a = max(1 - shrink, 0.0)
        return combined(point.factors, a, point.pairs, b)

    def lean(self, factors: Factors) -> Factors:
        """The factors without directions that do nothing."""
        fewer = balanced(factors, drop=_SHARES[-1])
        if ranks_of(fewer) == ranks_of(factors):
            return factors
        values = [self.objective.loss(x) + self.objective.penalty_of(x) for x in (fewer, factors)]
        return fewer if values[0] <= values[1] + self.noise else factors

    def sharper(self, point: NetworkPoint) -> float:
        """The gap by the dual of the re-linearised model's own solution, where that may decide and can be captured."""
        gained, wanted = self.at_zero - point.objective, self.allowed(point)
        if not self.objective.by_row or point.gap > _WORTH_A_CAPTURE * wanted:
            return point.gap
        try:
            share = wanted / gained if gained > 0 else self.tolerance
            dual = self.objective.relinearised_dual(point, 0.1 * share)
        except MemoryBudgetError:
            return point.gap
        return min(point.gap, max(point.objective - dual, 0.0) + self.noise)


def _weights(factors: Factors) -> Factors:
    """Units in which all columns of balanced factors are of like size: curvature along one goes with its square."""
    squares = {name: u.square().sum(0) for name, (u, _) in factors.items()}
    top = max(float(s.max()) for s in squares.values() if len(s))
    roots = {name: (top / s.clamp(min=1e-3 * top)).sqrt() for name, s in squares.items()}
    return {name: (roots[name].expand_as(u), roots[name].expand_as(v)) for name, (u, v) in factors.items()}


def _line_minimum(value: Callable[[float], float], start: float, slope: float, first: float) -> tuple[float, float]:
    """A step ``t > 0`` that lowers a function with a negative slope at zero, near its minimum, and the value there.

    Zero and the start's value where no step down to ``1e-6 first`` does.
    """
    t, best = first, (0.0, start)
    for _ in range(12):
        found = value(t)
        if math.isfinite(found) and found <= start + 1e-4 * t * slope and found < best[1]:
            gained = best[1] - found
            best = (t, found)
            if gained < 0.1 * (start - found):
                break
        elif best[0] > 0:
            break
        curvature = 2 * (found - start - slope * t) / t**2 if math.isfinite(found) else math.inf
        guess = -slope / curvature if curvature > 0 else math.inf
        t = min(max(guess, 0.1 * t), 4 * t)
        if t < 1e-6 * first or abs(t - best[0]) < 0.1 * best[0]:
            break
    return best
