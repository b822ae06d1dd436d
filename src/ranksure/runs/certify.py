"""``ranksure.certify()``: is this LoRA run done, is its rank the limit, and what comes next?

One gradient pass at the trained weights; a forward pass without the adapter and a few probes only where
the verdict needs them. What each verdict proves, and what it does not, is in docs/is-my-run-done.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ranksure.adapters.low_rank_hooks import applied
from ranksure.certificate import nuclear_norms
from ranksure.errors import SettingError
from ranksure.network import Batch
from ranksure.operators.base import Factors
from ranksure.runs.gradient import Progress, Weighting, gradient_pass, mean_loss
from ranksure.runs.lora import Adapter, read_adapter
from ranksure.runs.relinearised import Gaps, ModuleState, ball_gaps, module_states, penalised_gaps
from ranksure.runs.result import ModuleVerdict, Probe, RunCertificate, Verdict
from ranksure.runs.terms import Kind
from ranksure.solvers.balancing import balanced

TOLERANCE = 0.05
"""A possible gain below this share of the objective counts as none."""


@dataclass(frozen=True)
class _Point:
    """The run as the verdict sees it."""

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
    def objective(self) -> float:
        """Mean loss and penalty."""
        return self.loss + self.penalty_value

    @property
    def penalty_value(self) -> float:
        if self.penalty is None:
            return 0.0
        return sum(self.penalty[name] * state.nuclear_norm for name, state in self.states.items())

    @property
    def allowed(self) -> float:
        """A gain that counts as none, in units of the loss."""
        return self.tolerance * self.objective

    def threshold(self, name: str) -> float:
        """Gradient norm above which a new direction in this module can gain more than is allowed."""
        if self.penalty is not None:
            return self.penalty[name] / (1 - self.tolerance)
        radius = self.gaps.radius or 0.0
        inner = sum(state.inner for state in self.states.values())
        return max(self.allowed - inner, 0.0) / radius if radius > 0 else math.inf

    def stationary(self, name: str) -> bool:
        """Whether moving this module's own factors can gain no more than is allowed."""
        state = self.states[name]
        if self.penalty is not None:
            price = max(self.penalty[name], state.tangent_norm)
            return state.inner + price * state.nuclear_norm <= self.allowed and (
                state.tangent_norm <= self.threshold(name)
            )
        return state.tangent_norm <= self.threshold(name)

    def slope(self, name: str) -> float:
        """Decrease of the objective per unit of a new direction in this module; at least zero."""
        price = 0.0 if self.penalty is None else self.penalty[name]
        return max(self.states[name].outside_norm - price, 0.0)

    def limited(self, name: str) -> bool:
        """Whether a new direction can gain more than is allowed."""
        return self.states[name].outside_norm > self.threshold(name)


def certify(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    weight_decay: float | None = None,
    lam: float | None = None,
    adapter: str | None = None,
    loss: Kind | None = None,
    weighting: Weighting = "token",
    tolerance: float = TOLERANCE,
    memory_bytes: float = math.inf,
    probe: bool = True,
    progress: Progress | None = None,
) -> RunCertificate:
    """Certify a trained LoRA run.

    Args:
        model: the trained network with its LoRA adapter active (a ``PeftModel``, as a rule).
        batches: all the training data, as batches with ``labels`` (a DataLoader or a list); a sample of it gives
            no verdict that means anything.
        weight_decay: L2 decay of PEFT's matrices A and B (SGD's ``weight_decay``, or Adam's with an L2 penalty):
            ``lambda_j = weight_decay / s_j``. AdamW's decoupled decay is none: leave it out.
        lam: one ``lambda`` for every module, in place of ``weight_decay``. With neither, the gaps are over the
            nuclear-norm ball of the update's own size.
        adapter: name of the adapter, where several are active.
        loss: ``cross-entropy``, ``logistic`` or ``squared-error``; by the model's own rules by default.
        weighting: of a causal language model's tokens: every ``token`` or every ``sample`` alike.
        tolerance: share of the objective below which a possible gain counts as none.
        memory_bytes: most bytes of gradients held at a time; more passes are made instead.
        probe: measure on the network itself whether a new direction helps, where the verdict needs it.
        progress: called after every batch of the gradient pass.

    Returns:
        The certificate; ``not-checked``, with reasons, for configurations that no test covers.

    Raises:
        AdapterError: no adapter, or one that is unusable.
        SettingError: both or negative penalties, or a tolerance outside (0, 1).
        DataError: labels or logits that cannot be used.
        CaptureError: an adapted module that the loss does not reach.
    """
    began = time.perf_counter()
    _check_settings(weight_decay, lam, tolerance)
    read = read_adapter(model, adapter)
    if read.untested:
        return RunCertificate.not_checked(read, read.untested, tolerance)
    found = gradient_pass(
        model,
        batches,
        read.modules,
        kind=loss,
        weighting=weighting,
        memory_bytes=memory_bytes,
        progress=progress,
    )
    penalty = _penalty(read, weight_decay, lam)
    states = module_states(read.factors, found.gradients, penalty)
    gaps = penalised_gaps(states, found.terms, penalty) if penalty is not None else ball_gaps(states)
    point = _Point(read, states, penalty, found.terms.mean, gaps, tolerance)
    at_zero: float | None = None
    probes: list[Probe] = []
    if penalty is None and not any(state.nuclear_norm for state in states.values()):
        reason = "the adapter's update is zero (untrained?), and without a penalty its ball is a point: train first"
        return RunCertificate.not_checked(read, [reason], tolerance)
    verdict: Verdict
    if gaps.tangent + point.imbalance > point.allowed:
        verdict = "not-converged"
    else:
        enough = (point.objective * (1 + 1e-6), found.weight)
        at_zero = _without_adapter(model, read, batches, loss, weighting, enough)
        if point.objective > at_zero * (1 + 1e-6):
            verdict = "failed-loudly"
        elif gaps.total <= point.allowed:
            verdict = "first-order-optimal"
        else:
            verdict, probes = _rank_or_saddle(model, batches, point, loss, weighting, probe)
    return RunCertificate(
        verdict=verdict,
        modules={name: _module_verdict(point, name) for name in states},
        loss=point.loss,
        penalty=point.penalty_value,
        imbalance=point.imbalance,
        objective_at_zero=at_zero,
        rank_gain_bound=gaps.total,
        training_gain_bound=gaps.tangent,
        radius=gaps.radius,
        tolerance=tolerance,
        adapter=read.name,
        weight_decay=weight_decay,
        lam=lam,
        loss_kind=found.terms.kind,
        weighting=weighting,
        n_samples=found.n_samples,
        n_terms=len(found.terms.losses),
        passes=found.passes,
        probes=probes,
        outside=read.outside,
        reasons=[],
        seconds=time.perf_counter() - began,
    )


def _rank_or_saddle(
    model: nn.Module,
    batches: Iterable[Batch],
    point: _Point,
    loss: Kind | None,
    weighting: Weighting,
    probe: bool,
) -> tuple[Verdict, list[Probe]]:
    """Stationary with a gap: a limit of the rank, or a saddle that training at this rank can leave."""
    limited = [name for name in point.states if point.limited(name)]
    if any(point.states[name].rank_used < point.states[name].rank for name in limited):
        return "not-converged", []  # unused columns can take up a new direction: a saddle, not a limit
    if not probe or not limited:
        return "not-converged" if not limited else "rank-bound", []
    new, weakest = _probes(model, batches, point, limited, loss, weighting)
    probes = [new, weakest]
    if weakest.decrease > max(new.decrease, 0.0):
        return "not-converged", probes  # the present columns can turn towards it by themselves
    return "rank-bound", probes


def _probes(
    model: nn.Module,
    batches: Iterable[Batch],
    point: _Point,
    limited: list[str],
    loss: Kind | None,
    weighting: Weighting,
) -> tuple[Probe, Probe]:
    """Measure the objective of the network itself along a new direction, and along one of the weakest column.

    The new direction ``-t p q^T`` comes beside the factors. On the weakest column ``(u_c, v_c)`` the same pair is
    put by ``u_c - e p``, ``v_c + e q``: all that this rank allows.
    """
    size = max(sum(point.states[name].nuclear_norm for name in limited) / len(limited), 1e-12)
    new: list[tuple[float, float]] = []
    old: list[tuple[float, float]] = []
    for share in (0.3, 0.03, 0.003):
        step = share * size
        new.append(
            (step, _objective_with(model, batches, point, _new_direction(point, limited, step), loss, weighting))
        )
        moved = _weakest_column(point, limited, math.sqrt(step))
        old.append((step, _objective_with(model, batches, point, moved, loss, weighting)))
    return _best_probe("new direction", new, point), _best_probe("weakest column", old, point)


def _best_probe(kind: str, tried: list[tuple[float, float]], point: _Point) -> Probe:
    step, lowest = min(tried, key=lambda pair: pair[1])
    return Probe(kind, step, point.objective - lowest)


def _new_direction(point: _Point, limited: list[str], step: float) -> dict[str, tuple[Tensor, Tensor]]:
    steepest = max(point.slope(name) for name in limited)
    out = {}
    for name in limited:
        p, q = point.states[name].direction
        size = step * point.slope(name) / steepest
        out[name] = (-math.sqrt(size) * p[:, None], math.sqrt(size) * q[:, None])
    return out


def _weakest_column(point: _Point, limited: list[str], step: float) -> dict[str, tuple[Tensor, Tensor]]:
    """The change of the update when its smallest singular column turns towards the new direction."""
    out = {}
    for name in limited:
        p, q = (part.cpu() for part in point.states[name].direction)
        u, v = balanced({name: point.adapter.blocks[name].factors}, drop=0.0)[name]
        old_u, old_v = u[:, -1:], v[:, -1:]
        new_u, new_v = old_u - step * p[:, None], old_v + step * q[:, None]
        # new - old, of rank two: the hooks add it on top of the adapter
        out[name] = (torch.cat([new_u, -old_u], 1), torch.cat([new_v, old_v], 1))
    return out


def _objective_with(
    model: nn.Module,
    batches: Iterable[Batch],
    point: _Point,
    change: Mapping[str, tuple[Tensor, Tensor]],
    loss: Kind | None,
    weighting: Weighting,
) -> float:
    """Objective of the network itself with the update changed."""
    modules = point.adapter.modules
    with applied(modules, dict(change)):
        value = mean_loss(model, batches, kind=loss, weighting=weighting)
    if point.penalty is None:
        return value
    moved: Factors = {}
    for name, (u, v) in point.adapter.factors.items():
        du, dv = change.get(name, (u[:, :0], v[:, :0]))
        moved[name] = (torch.cat([u, du.cpu()], 1), torch.cat([v, dv.cpu()], 1))
    return value + sum(point.penalty[name] * norm for name, norm in nuclear_norms(moved).items())


def _without_adapter(
    model: nn.Module,
    read: Adapter,
    batches: Iterable[Batch],
    loss: Kind | None,
    weighting: Weighting,
    enough: tuple[float, float],
) -> float:
    """Mean loss of the network without this adapter's updates (taken away by hooks), as far as it is needed.

    What else was trained (a head, biases) stays, so that the two objectives differ by the update only.
    """
    removed = {name: (-u, v) for name, (u, v) in read.factors.items()}
    with applied(read.modules, removed):
        return mean_loss(model, batches, kind=loss, weighting=weighting, enough=enough)


def _module_verdict(point: _Point, name: str) -> ModuleVerdict:
    state = point.states[name]
    if not point.stationary(name):
        verdict: Verdict = "not-converged"
    elif not point.limited(name) and state.gradient_norm <= point.threshold(name):
        verdict = "first-order-optimal"
    elif state.rank_used < state.rank:
        verdict = "not-converged"
    else:
        verdict = "rank-bound"
    lam = None if point.penalty is None else point.penalty[name]
    return ModuleVerdict(
        verdict=verdict,
        rank=state.rank,
        rank_used=state.rank_used,
        spectral_ratio=None if lam is None else state.gradient_norm / lam,
        gradient_norm=state.gradient_norm,
        stationarity=state.stationarity,
        outside=state.outside_norm if lam is None else state.outside_norm / lam,
        slope=point.slope(name),
        followed=state.followed,
        nuclear_norm=state.nuclear_norm,
        lam=lam,
    )


def _penalty(read: Adapter, weight_decay: float | None, lam: float | None) -> dict[str, float] | None:
    if weight_decay:
        return read.penalties(weight_decay)
    return dict.fromkeys(read.blocks, lam) if lam else None


def _check_settings(weight_decay: float | None, lam: float | None, tolerance: float) -> None:
    if weight_decay is not None and lam is not None:
        raise SettingError("give the weight decay of PEFT's matrices or lambda, not both")
    for name, value in (("weight decay", weight_decay), ("lambda", lam)):
        if value is not None and not 0 <= value < math.inf:
            raise SettingError(f"the {name} must be at least 0 and finite, not {value}")
    if not 0 < tolerance < 1:
        raise SettingError(f"the tolerance is a share of the objective in (0, 1), not {tolerance}")
