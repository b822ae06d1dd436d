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

from ranksure.factors import Factors, thin_svd
from ranksure.loss_terms import Terms
from ranksure.spectral import norms, power_of_two

USED = 1e-3
"""Singular values of an update below this share of the adapter's largest do not count as used rank."""

_EPS, _TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny  # below _TINY, digits are lost
_LARGEST_STEP = 1e6  # of the dual, where neither the gradients nor the loss limit it


@dataclass(frozen=True)
class ModuleState:
    """One module at the point.

    ``U`` and ``V`` are the singular vectors of the used rank, ``P_T`` the projection onto the tangent space
    ``{U X^T + Y V^T}`` of the updates of that rank.

    Attributes:
        rank: rank given.
        rank_used: numerical rank of the update.
        full: no more rank can be used: ``rank_used = min(rank, m, n)``.
        nuclear_norm: ``||delta_j||_*``.
        inner: ``<g_j, delta_j>``.
        inner_error: bound on its rounding error.
        gradient_norm: upper bound on ``||g_j||_op``.
        tangent_norm: upper bound on ``||P_T g_j||_op``.
        outside_norm: ``||(I - UU^T) g_j (I - VV^T)||_op``, a lower bound (attained by ``direction``).
        stationarity: ``||P_T g_j + lambda_j U V^T||_op`` in units of ``lambda_j``; None without a penalty.
        followed: share of ``||g_j||_F^2`` that the current factors can follow (by moving either one).
        direction: unit vectors ``(p, q)`` of the best new direction: adding ``-t p q^T`` lowers the loss by
            ``outside_norm`` per unit of ``t``.
    """

    rank: int
    rank_used: int
    full: bool
    nuclear_norm: float
    inner: float
    inner_error: float
    gradient_norm: float
    tangent_norm: float
    outside_norm: float
    stationarity: float | None
    followed: float
    direction: tuple[Tensor, Tensor]

    @property
    def reach(self) -> float:
        """Bound on ``<g_j, x> / ||x||_*`` over the updates ``x`` that training at this rank can follow.

        They are those of the tangent space where the rank is used up. An unused column can take up any direction.
        (``P_T`` can raise an operator norm, so both are looked at.)
        """
        return min(self.tangent_norm, self.gradient_norm) if self.full else self.gradient_norm


@dataclass(frozen=True)
class Gaps:
    """Bounds on what the re-linearised model could still gain, in units of the loss; at most the objective itself.

    Attributes:
        total: any update of any rank (in the ball, without a penalty): at most this (the duality gap).
        tangent: an update that training at this rank can follow (from here by at most the radius, without a
            penalty): at most this.
        dual_step: the scale ``c`` of the dual point.
        radius: radius of the nuclear-norm ball that was searched, None with a penalty (all updates).
        inner: upper bound on ``sum_j <g_j, delta_j>``.
    """

    total: float
    tangent: float
    dual_step: float
    radius: float | None
    inner: float = 0.0


class Examiner:
    """Spectral facts of one module at a time, in float64: a gradient can be dropped once it was examined.

    Args:
        factors: ``u`` (m, r) and ``v`` (n, r) by module; of all modules, because the largest singular value of all
            decides what counts as used.
        penalty: ``lambda_j`` by module; None without a penalty.
    """

    def __init__(self, factors: Factors, penalty: Mapping[str, float] | None) -> None:
        self.factors, self.penalty = factors, penalty
        self.parts = {name: thin_svd(u.double(), v.double()) for name, (u, v) in factors.items()}
        self.threshold = USED * max((float(s[0]) for _, s, _ in self.parts.values() if len(s)), default=0.0)

    def __call__(self, name: str, gradient: Tensor) -> ModuleState:
        """Examine one module's gradient of the mean loss, ``(m, n)``.

        Beside the gradient itself, two copies in float64 and two square matrices of the smaller side are held.
        """
        if gradient.device.type == "mps":  # has no float64
            gradient = gradient.cpu()
        g = gradient.double()
        unit = power_of_two(g)  # the work is done in units of it, so that squares neither overflow nor vanish
        g = g / unit
        m, n = g.shape
        p, s, q = (part.to(g) for part in self.parts[name])
        rank = self.factors[name][0].shape[1]
        used = int((s > self.threshold).sum())
        left, right = p[:, :used], q[:, :used]
        reached, seen = left.T @ g, g @ right  # U^T g and g V
        beyond = seen - left @ (left.T @ seen)  # (I - UU^T) g V
        frobenius = float(g.norm())
        rounding = 16 * (m + n) * _EPS * frobenius
        # P_T g = [U, (I - UU^T) g V] [g^T U, V]^T has rank at most 2 r: its norms come from two thin factors.
        tangent = _largest(torch.cat([left, beyond], 1), torch.cat([reached.T, right], 1))
        stationarity = None
        if self.penalty is not None:
            lam = self.penalty[name]
            most = max(lam, unit)
            moved = reached.T * (unit / most) + (lam / most) * right
            stationarity = _largest(torch.cat([left, beyond * (unit / most)], 1), torch.cat([moved, right], 1))
            stationarity *= most / lam
        nuclear = float(s.sum())
        inner = float(((p * s).T @ g * q.T).sum())
        followed = self._followed(name, g) / frobenius**2 if frobenius > 0 else 1.0
        gradient_norm, (a, sigma, b) = norms(g, left, right)
        return ModuleState(
            rank=rank,
            rank_used=used,
            full=used == min(rank, m, n),
            nuclear_norm=nuclear,
            inner=unit * inner,
            inner_error=unit * (rounding * nuclear),
            gradient_norm=unit * gradient_norm,
            tangent_norm=unit * (tangent + rounding) if used else 0.0,
            outside_norm=unit * float(sigma),
            stationarity=stationarity,
            followed=min(followed, 1.0),
            direction=(a.cpu(), b.cpu()),
        )

    def _followed(self, name: str, g: Tensor) -> float:
        """``||g||_F^2`` less what lies outside both the range of ``u`` and the range of ``v``, all columns of them.

        Unlike the used rank: at LoRA's start ``u = 0``, but ``u`` can move along the range of ``v``.
        """
        left, right = (_range(x.to(g)) for x in self.factors[name])
        reached, seen = left.T @ g, g @ right
        return float(reached.square().sum() + seen.square().sum() - (left.T @ seen).square().sum())


def module_states(
    factors: Factors, gradients: Mapping[str, Tensor], penalty: Mapping[str, float] | None
) -> dict[str, ModuleState]:
    """Spectral facts of every module (see :class:`Examiner`), from all gradients at once."""
    examine = Examiner(factors, penalty)
    return {name: examine(name, gradients[name]) for name in factors}


def penalised_gaps(states: Mapping[str, ModuleState], terms: Terms, penalty: Mapping[str, float]) -> Gaps:
    """Duality gaps of ``mean loss + sum_j lambda_j ||delta_j||_*``, re-linearised.

    The dual is ``D(c) = sum_t w_t psi_t(c) - c sum_j <g_j, delta_j>`` for ``c max_j ||g_j||/lambda_j <= 1``. Over
    updates that training at this rank can follow, ``reach_j`` takes the place of ``||g_j||``: more ``c`` are allowed.
    """
    cost = sum(penalty[name] * state.nuclear_norm for name, state in states.items())
    objective = terms.mean + cost
    inner = sum(state.inner for state in states.values())
    error = sum(state.inner_error for state in states.values())
    ratio = max(state.gradient_norm / penalty[name] for name, state in states.items())
    reach = max(state.reach / penalty[name] for name, state in states.items())
    rounding = (len(terms.losses) + 64) * (_EPS * terms.mean + _TINY) + 1e-12 * cost
    step, best = _best_step(terms, inner, error, ratio)
    _, along = _best_step(terms, inner, error, reach)
    total, tangent = (_gain(objective, value, rounding) for value in (best, max(best, along)))
    return Gaps(total, tangent, step, None, inner + error)


def ball_gaps(states: Mapping[str, ModuleState], terms: Terms, first_length: float = 0.0) -> Gaps:
    """Gaps of the mean loss without a penalty, over nuclear-norm balls, re-linearised.

    The radius is ``max(tau, first_length)``, ``tau = sum_j ||delta_j||_*`` the update's own size: a ball of that size
    alone is tiny where training has only begun, and says that nothing can be gained. ``first_length`` is the length at
    which the slope at the base weights would use up the loss.

    ``total`` is over ``sum_j ||x_j||_* <= radius``, ``tangent`` over moves *from* ``delta`` by at most the radius that
    training can follow. For every ``c``, with ``psi`` of the terms' dual lines,
    ``loss(x) >= sum_t w_t psi_t(c) - c (sum_j <g_j, delta_j> + radius max_j ||g_j||)``, and
    ``loss(delta + x) >= sum_t w_t psi_t(c) - c radius max_j reach_j``: ``c = 1`` is the Frank-Wolfe gap, ``c = 0``
    says that the loss cannot fall by more than itself.
    """
    radius = max(sum(state.nuclear_norm for state in states.values()), first_length)
    inner = sum(state.inner + state.inner_error for state in states.values())
    steepest = inner + radius * max(state.gradient_norm for state in states.values())
    rounding = (len(terms.losses) + 64) * (_EPS * terms.mean + _TINY)
    step, best = _best_step(terms, steepest, 0.0, 0.0)
    _, along = _best_step(terms, radius * max(state.reach for state in states.values()), 0.0, 0.0)
    return Gaps(_gain(terms.mean, best, rounding), _gain(terms.mean, along, rounding), step, radius, inner)


def _gain(objective: float, dual: float, rounding: float) -> float:
    """What can still be gained at most; losses and penalties are not negative, so never more than the objective."""
    return min(max(objective - dual, 0.0) + rounding, objective)


def _best_step(terms: Terms, inner: float, error: float, ratio: float) -> tuple[float, float]:
    """Maximise the concave ``D(c)`` over ``0 <= c <= 1/ratio``: ``c``, and a lower bound on ``D(c)``.

    Any ``c`` of the range gives a valid bound, so the search may be coarse. ``D(0) = 0`` for these losses.
    """
    limit = min(1 / ratio if ratio > 0 else math.inf, terms.largest_step, _LARGEST_STEP) * (1 - 8 * _EPS)
    # D'(1) = -<g, delta>, which is the penalty at a stationary point: near one, the limit is the best as a rule.
    low, high = 0.0, limit
    if terms.dual_slope(high) < inner:
        for _ in range(48):
            middle = 0.5 * (low + high)
            if terms.dual_slope(middle) < inner:
                high = middle
            else:
                low = middle
    best = (0.0, 0.0)
    for c in {low, high, min(limit, 1.0)}:
        value, rounding = terms.dual_line(c)
        best = max(best, (c, value - c * inner - rounding - c * (error + 4 * _EPS * abs(inner))), key=lambda x: x[1])
    return best


def _largest(left: Tensor, right: Tensor) -> float:
    """``||left right^T||_op``."""
    values = thin_svd(left, right)[1]
    return float(values[0]) if len(values) else 0.0


def _range(x: Tensor) -> Tensor:
    """An orthonormal basis of a factor's columns."""
    vectors, values, _ = torch.linalg.svd(x, full_matrices=False)
    return vectors[:, values > 1e-10 * values.max()] if values.numel() else vectors
