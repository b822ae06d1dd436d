"""From a run's numbers to a verdict: stationary? worse than nothing? as good as any rank? or stuck at its rank?

The test of a rank limit is a second difference of the network's own objective: the weakest column of each limited
module turns towards the best new direction, both ways. At a point that training cannot leave, none of this can go
down. What each verdict proves, and what it does not, is in docs/is-my-run-done.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ranksure.adapters.loaded import Adapter
from ranksure.factors import Factors, balanced, nuclear_norms
from ranksure.losses import Kind
from ranksure.network.batch_losses import Weighting
from ranksure.network.gradient import mean_loss
from ranksure.network.logits import Batch
from ranksure.network.side_path import applied
from ranksure.records.certificate import ModuleVerdict, Probe, Verdict
from ranksure.relinearised import Gaps, ModuleState

WORSE = 1e-6
"""Share by which an objective must exceed the one without the adapter to count as worse."""

UNPROBED = (
    "the rank may be the limit, or this is a saddle: only probes of the network tell, and they were left out (`probe`)"
)
"""Why a run that is stationary below its rank's limit was not judged."""

_TURN = 1e-3  # the gain, as a share of the objective, that a turn of the weakest column is to promise
_SHARES = (0.3, 0.03, 0.003)  # sizes of a new direction, as shares of the limited modules' mean nuclear norm


@dataclass(frozen=True)
class Point:
    """The run as the verdict sees it.

    Attributes:
        states: facts of every module.
        penalty: ``lambda_j`` by module; None without a penalty.
        loss: mean loss.
        gaps: bounds on what can be gained.
        tolerance: share of the objective below which a gain counts as none.
    """

    adapter: Adapter
    states: dict[str, ModuleState]
    penalty: dict[str, float] | None
    loss: float
    gaps: Gaps
    tolerance: float

    @property
    def imbalance(self) -> float:
        """What balancing the factors would take off the trained penalty, the update unchanged."""
        if self.penalty is None:
            return 0.0
        total = 0.0
        for name, (u, v) in self.adapter.factors.items():
            half = 0.5 * float(u.square().sum() + v.square().sum())
            total += self.penalty[name] * max(half - self.states[name].nuclear_norm, 0.0)
        return total

    @property
    def penalty_value(self) -> float:
        """``sum_j lambda_j ||delta_j||_*``."""
        if self.penalty is None:
            return 0.0
        return sum(self.penalty[name] * state.nuclear_norm for name, state in self.states.items())

    @property
    def objective(self) -> float:
        """Mean loss and penalty."""
        return self.loss + self.penalty_value

    @property
    def allowed(self) -> float:
        """A gain that counts as none, in units of the loss."""
        return self.tolerance * self.objective

    @property
    def stationary(self) -> bool:
        """Whether training on at this rank can gain no more than is allowed."""
        return self.gaps.tangent + self.imbalance <= self.allowed

    @property
    def limited(self) -> list[str]:
        """Modules in which a new direction can gain more than is allowed."""
        return [name for name, state in self.states.items() if state.outside_norm > self.threshold(name)]

    def threshold(self, name: str) -> float:
        """Gradient norm above which a direction in this module can gain more than is allowed.

        With a penalty, because a stationary point's gap is at most ``(1 - 1 / rho)`` of its objective.
        """
        if self.penalty is not None:
            return self.penalty[name] / (1 - self.tolerance)
        radius = self.gaps.radius or 0.0
        return max(self.allowed - self.gaps.inner, 0.0) / radius if radius > 0 else math.inf

    def module_stationary(self, name: str) -> bool:
        """Whether moving this module's own factors can gain no more than is allowed, the others fixed."""
        state = self.states[name]
        if self.gaps.tangent <= self.allowed:  # all modules together cannot
            return True
        if self.penalty is None:
            return (self.gaps.radius or 0.0) * state.reach <= self.allowed
        price = max(self.penalty[name], state.reach)
        return state.inner + price * state.nuclear_norm <= self.allowed and state.reach <= self.threshold(name)

    def slope(self, name: str) -> float:
        """Decrease of the objective per unit of a new direction in this module; at least zero."""
        price = 0.0 if self.penalty is None else self.penalty[name]
        return max(self.states[name].outside_norm - price, 0.0)

    def module_verdict(self, name: str, verdict: Verdict, seconds: float = 0.0) -> ModuleVerdict:
        """One module's verdict and numbers, beside the whole run's verdict."""
        state = self.states[name]
        limited = state.outside_norm > self.threshold(name)
        if verdict == "first-order-optimal" or (verdict == "rank-bound" and limited):
            own: Verdict = verdict
        elif not self.module_stationary(name):
            own = "not-converged"
        elif state.gradient_norm <= self.threshold(name):
            own = "first-order-optimal"
        elif limited and state.full and not self._turns(verdict):
            own = "not-checked"  # perhaps its rank is the limit, but no turn of its columns was tried
        else:  # a turn leads down, or nothing is certain
            own = "not-converged"
        lam = None if self.penalty is None else self.penalty[name]
        return ModuleVerdict(
            verdict=own,
            rank=state.rank,
            rank_used=state.rank_used,
            spectral_ratio=None if lam is None else state.gradient_norm / lam,
            gradient_norm=state.gradient_norm,
            stationarity=state.stationarity,
            outside=state.outside_norm if lam is None else state.outside_norm / lam,
            slope=self.slope(name),
            followed=state.followed,
            nuclear_norm=state.nuclear_norm,
            lam=lam,
            seconds=seconds,
        )

    def _turns(self, verdict: Verdict) -> bool:
        """Whether the run is stationary but was found to be a saddle."""
        return verdict == "not-converged" and self.stationary


@dataclass
class Network:
    """The run's network and data, for objectives at changed updates.

    Attributes:
        passes: forward passes over the data so far.
    """

    model: nn.Module
    batches: Iterable[Batch]
    kind: Kind | None
    weighting: Weighting
    passes: int = 0

    def without_adapter(self, point: Point, weight: float) -> float:
        """Mean loss without the adapter's update, or the part of it that proves it above the objective."""
        self.passes += 1
        enough = (point.objective * (1 + WORSE), weight)
        with point.adapter.without():
            return mean_loss(self.model, self.batches, kind=self.kind, weighting=self.weighting, enough=enough)

    def objective(self, point: Point, change: Mapping[str, tuple[Tensor, Tensor]]) -> float:
        """Objective with low-rank changes of some modules' updates."""
        self.passes += 1
        with applied(point.adapter.modules, dict(change)):
            value = mean_loss(self.model, self.batches, kind=self.kind, weighting=self.weighting)
        if point.penalty is None:
            return value
        moved: Factors = {}
        for name, (u, v) in point.adapter.factors.items():
            du, dv = change.get(name, (u[:, :0], v[:, :0]))
            moved[name] = (torch.cat([u, du], 1), torch.cat([v, dv], 1))
        return value + sum(point.penalty[name] * norm for name, norm in nuclear_norms(moved).items())


def judged(point: Point, network: Network, weight: float, probe: bool) -> tuple[Verdict, float | None, list[Probe]]:
    """The verdict, the mean loss without the adapter where it was needed, and what was measured.

    ``weight`` is the total weight of the data's terms.
    """
    if not point.stationary:
        return "not-converged", None, []
    at_zero = network.without_adapter(point, weight)
    if point.objective > at_zero * (1 + WORSE):
        return "failed-loudly", at_zero, []
    if point.gaps.total <= point.allowed:
        return "first-order-optimal", at_zero, []
    verdict, probes = rank_or_saddle(point, network, probe)
    return verdict, at_zero, probes


def rank_or_saddle(point: Point, network: Network, probe: bool) -> tuple[Verdict, list[Probe]]:
    """The verdict on a stationary point with a gap that beats no update: a limit of its rank, or a saddle."""
    limited = point.limited
    if not limited or not all(point.states[name].full for name in limited):
        return "not-converged", []
    if not probe:
        return "not-checked", []
    steepest = max(limited, key=point.slope)
    turned = [_turn(point, network, limited)]
    if not turned[0][1] and len(limited) > 1:  # together they may go up where one alone goes down
        turned.append(_turn(point, network, [steepest]))
    probes = [max((found for found, _ in turned), key=lambda found: found.decrease)]
    if any(down for _, down in turned):
        return "not-converged", probes
    return "rank-bound", [_new_direction(point, network, limited), *probes]


def _turn(point: Point, network: Network, names: Sequence[str]) -> tuple[Probe, bool]:
    """Turn the weakest column of each module towards its new direction, by ``+e`` and by ``-e``.

    The mean of the two changes of the objective is its curvature: what is odd in ``e`` (the slope that a tolerance
    leaves) drops out. Returns what was found, and whether it goes down.
    """
    weights = _weights(point, names)
    promised = sum(weights[name] * point.slope(name) for name in names)
    noise = _noise(point, network)
    size = max(_TURN * point.objective, 4 * noise) / promised
    values = [
        network.objective(point, {name: _turned(point, name, sign * math.sqrt(size * weights[name])) for name in names})
        for sign in (1.0, -1.0)
    ]
    decrease = point.objective - sum(values) / 2
    return Probe("weakest column", size, decrease), decrease > max(noise, 0.02 * size * promised)


def _turned(point: Point, name: str, step: float) -> tuple[Tensor, Tensor]:
    """The change of the update, of rank two, when its smallest singular column moves by ``(-e p, e q)``."""
    p, q = point.states[name].direction
    u, v = balanced({name: point.adapter.blocks[name].factors}, drop=0.0)[name]
    column = point.states[name].rank_used - 1
    old_u, old_v = u[:, column : column + 1], v[:, column : column + 1]
    new_u, new_v = old_u - step * p[:, None], old_v + step * q[:, None]
    return torch.cat([new_u, -old_u], 1), torch.cat([new_v, old_v], 1)


def _new_direction(point: Point, network: Network, names: Sequence[str]) -> Probe:
    """The objective with new directions beside the factors, at sizes that get smaller until half the slope shows."""
    weights = _weights(point, names)
    promised = sum(weights[name] * point.slope(name) for name in names)
    mean = sum(point.states[name].nuclear_norm for name in names) / len(names)
    tried: list[Probe] = []
    for share in _SHARES:
        step = share * mean
        change: dict[str, tuple[Tensor, Tensor]] = {}
        for name in names:
            p, q = point.states[name].direction
            root = math.sqrt(step * weights[name])
            change[name] = (-root * p[:, None], root * q[:, None])
        tried.append(Probe("new direction", step, point.objective - network.objective(point, change)))
        if tried[-1].decrease >= 0.5 * step * promised:
            break
    return max(tried, key=lambda found: found.decrease)


def _weights(point: Point, names: Sequence[str]) -> dict[str, float]:
    """Sizes of the modules' new directions relative to the steepest one's: by their slopes."""
    steepest = max(point.slope(name) for name in names)
    return {name: point.slope(name) / steepest for name in names}


def _noise(point: Point, network: Network) -> float:
    """Differences of the objective that rounding in the network's dtype may make."""
    dtypes = [p.dtype for p in network.model.parameters() if p.is_floating_point()]
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=1e-7) * point.objective
