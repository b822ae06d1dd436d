"""The certificate of a trained network's re-linearised model, from one gradient pass.

At the trained weights ``W0 + delta`` the network is linearised again: its logits as a linear function of
the update are ``z_i + A_i(delta' - delta)``, and the fine-tuning objective ``F(delta')`` over all ranks is
convex. Its duality gap at ``delta`` needs only the gradients ``g_j`` of the mean loss, the losses and
``delta_j``, because ``sum_i <R_i, A_i delta> = sum_j <g_j, delta_j>``: no per-sample Jacobian.

What is bounded is ``F`` minus the minimum of the model re-linearised *here*: not the network's own optimum.
Derivations in docs/is-my-run-done.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ranksure.operators.base import Factors
from ranksure.runs.spectral import norm_bound, top_pair
from ranksure.runs.terms import Terms
from ranksure.solvers.balancing import thin_svd

USED = 1e-3
"""Singular values of an update below this share of the adapter's largest do not count as used rank."""


@dataclass(frozen=True)
class ModuleState:
    """One module at the point.

    Attributes:
        rank: rank given.
        rank_used: numerical rank of the update.
        nuclear_norm: ``||delta_j||_*``.
        inner: ``<g_j, delta_j>``.
        gradient_norm: upper bound on ``||g_j||_op``.
        tangent_norm: ``||P_T g_j||_op``, ``T`` the tangent space of updates of the used rank.
        outside_norm: ``||(I - UU^T) g_j (I - VV^T)||_op`` (a lower bound for large modules).
        stationarity: ``||P_T g_j + lambda_j U V^T||_op`` in units of ``lambda_j``; None without a penalty.
        followed: share of ``||g_j||_F^2`` that the current factors can follow (by moving either one).
        direction: unit vectors ``(p, q)`` of the best new direction: adding ``-t p q^T`` lowers the loss by
            ``outside_norm`` per unit of ``t``.
    """

    rank: int
    rank_used: int
    nuclear_norm: float
    inner: float
    gradient_norm: float
    tangent_norm: float
    outside_norm: float
    stationarity: float | None
    followed: float
    direction: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Gaps:
    """Bounds on what the re-linearised model could still gain, in units of the loss.

    Attributes:
        total: any update of any rank (in the ball, without a penalty): at most this (the duality gap).
        tangent: an update along the directions that the current factors can follow (from here by at most the
            radius, without a penalty): at most this.
        dual_step: the scale ``c`` of the dual point; None for the ball.
        radius: radius of the nuclear-norm ball that was searched, None with a penalty (all updates).
    """

    total: float
    tangent: float
    dual_step: float | None
    radius: float | None


def module_states(
    factors: Factors, gradients: Mapping[str, Tensor], penalty: Mapping[str, float] | None
) -> dict[str, ModuleState]:
    """Spectral facts of every module, in float64.

    Args:
        factors: ``u`` (m, r) and ``v`` (n, r) by module.
        gradients: gradient of the mean loss by module, ``(m, n)``.
        penalty: ``lambda_j`` by module; None without a penalty.
    """
    parts = {name: thin_svd(u.double(), v.double()) for name, (u, v) in factors.items()}
    largest = max((float(s[0]) for _, s, _ in parts.values() if len(s)), default=0.0)
    out = {}
    for name, (p, s, q) in parts.items():
        lam = None if penalty is None else penalty[name]
        out[name] = _module_state(factors[name], (p, s, q), gradients[name], lam, USED * largest)
    return out


def _module_state(
    factors: tuple[Tensor, Tensor],
    svd: tuple[Tensor, Tensor, Tensor],
    gradient: Tensor,
    lam: float | None,
    threshold: float,
) -> ModuleState:
    g = gradient.double()
    p, s, q = (part.to(g) for part in svd)
    used = int((s > threshold).sum())
    left, right = p[:, :used], q[:, :used]
    reached, seen = left.T @ g, g @ right  # U^T g and g V
    beyond = seen - left @ (left.T @ seen)  # (I - UU^T) g V
    # P_T g = [U, (I - UU^T) g V] [g^T U, V]^T has rank at most 2 r: its norms come from two thin factors.
    tangent = thin_svd(torch.cat([left, beyond], 1), torch.cat([reached.T, right], 1))[1]
    stationarity = None
    if lam is not None:
        moved = thin_svd(torch.cat([left, beyond], 1), torch.cat([reached.T + lam * right, right], 1))[1]
        stationarity = float(moved[0]) / lam if len(moved) else 0.0
    outside = g - left @ reached - beyond @ right.T
    a, sigma, b = top_pair(outside)
    total = float(g.square().sum())
    return ModuleState(
        rank=factors[0].shape[1],
        rank_used=used,
        nuclear_norm=float(s.sum()),
        inner=float(((p * s).T @ g * q.T).sum()),
        gradient_norm=norm_bound(g),
        tangent_norm=float(tangent[0]) if len(tangent) else 0.0,
        outside_norm=float(sigma),
        stationarity=stationarity,
        followed=_followed(factors, g) / total if total > 0 else 1.0,
        direction=(a, b),
    )


def _followed(factors: tuple[Tensor, Tensor], g: Tensor) -> float:
    """``||g||_F^2`` less what lies outside both the range of ``u`` and the range of ``v``."""
    bases = []
    for x in factors:
        vectors, values, _ = torch.linalg.svd(x.to(g), full_matrices=False)
        bases.append(
            vectors[:, values > 1e-10 * values.max()] if values.numel() and values.max() > 0 else x[:, :0].to(g)
        )
    left, right = bases
    reached = left.T @ g
    seen = g @ right
    both = left.T @ seen
    return float(reached.square().sum() + seen.square().sum() - both.square().sum())


def penalised_gaps(states: Mapping[str, ModuleState], terms: Terms, penalty: Mapping[str, float]) -> Gaps:
    """Duality gaps of ``mean loss + sum_j lambda_j ||delta_j||_*``, re-linearised.

    The dual is ``D(c) = sum_t w_t psi_t(c) - c sum_j <g_j, delta_j>`` for ``c max_j ||g_j||/lambda_j <= 1``. On
    the tangent space only ``||P_T g_j||`` counts, because ``<g_j, x> = <P_T g_j, x>`` there.
    """
    objective = terms.mean + sum(penalty[name] * state.nuclear_norm for name, state in states.items())
    inner = sum(state.inner for state in states.values())
    ratio = max(state.gradient_norm / penalty[name] for name, state in states.items())
    reach = max(min(state.tangent_norm, state.gradient_norm) / penalty[name] for name, state in states.items())
    rounding = (len(terms.losses) + 64) * torch.finfo(torch.float64).eps * (abs(objective) + abs(inner))
    step, best = _best_step(terms, inner, ratio)
    _, along = _best_step(terms, inner, reach)
    total = max(objective - best, 0.0) + rounding
    return Gaps(total, min(total, max(objective - max(best, along), 0.0) + rounding), step, None)


def ball_gaps(states: Mapping[str, ModuleState]) -> Gaps:
    """Gaps of the mean loss without a penalty, over nuclear-norm balls of the update's own size, re-linearised.

    ``total`` is the Frank-Wolfe gap over ``sum_j ||x_j||_* <= tau = sum_j ||delta_j||_*``:
    ``<g, delta - x> <= <g, delta> + tau max_j ||g_j||_op``. It is blind to the update's length (a run that only has
    to grow its update is optimal in this ball), so ``tangent`` bounds moves *from* ``delta`` by at most ``tau``
    along the tangent space: ``tau max_j ||P_T g_j||_op``. It vanishes exactly at stationary points.
    """
    radius = sum(state.nuclear_norm for state in states.values())
    inner = sum(state.inner for state in states.values())
    total = inner + radius * max(state.gradient_norm for state in states.values())
    return Gaps(max(total, 0.0), radius * max(state.tangent_norm for state in states.values()), None, radius)


def _best_step(terms: Terms, inner: float, ratio: float) -> tuple[float, float]:
    """Maximise the concave ``D(c)`` over the feasible range; any ``c`` in range gives a valid bound."""
    limit = min(1 / max(ratio, 1e-300), terms.largest_step) * (1 - 1e-15)
    # The derivative at 1 is -(sum of the penalty's slack), so the maximum is near 1 unless the run has just begun.
    low, high = 0.0, min(limit, 1e6)

    def values(steps: Tensor) -> Tensor:
        line = terms.dual_line(steps) - steps * inner
        return torch.where(torch.isfinite(line), line, -math.inf)

    fixed = torch.tensor([0.0, high] + ([1.0] if high >= 1 else []), dtype=torch.float64)
    found = values(fixed)
    index = int(found.argmax())
    best_step, best = float(fixed[index]), float(found[index])
    if high > 4:  # a wide range is narrowed by doubling first
        doubling = torch.cat([torch.zeros(1), 2.0 ** torch.arange(-2, math.log2(high))]).double().clamp(max=high)
        at = int(values(doubling).argmax())
        low, high = float(doubling[max(at - 1, 0)]), float(doubling[min(at + 1, len(doubling) - 1)])
    for _ in range(12):
        steps = torch.linspace(low, high, 9, dtype=torch.float64)
        found = values(steps)
        index = int(found.argmax())
        if float(found[index]) > best:
            best_step, best = float(steps[index]), float(found[index])
        low, high = float(steps[max(index - 1, 0)]), float(steps[min(index + 1, 8)])
    return best_step, best
