"""Is a LoRA point stationary, a saddle, a spurious local minimum, or global? With the proof of each.

For factors ``x = (u_j, v_j)`` write ``Phi(x)`` for the factored objective (``Problem.value_and_gradient``)
and ``F`` for the convex one, ``F(u v^T) <= Phi(x)``. :func:`classify` says one of five things:

``global``
    The duality gap of the update ``u v^T`` is at most the tolerance: no update of any rank has a lower ``F``
    by more than it. Eigenvalues play no part.
``not-stationary``
    The gradient of ``Phi`` is above its tolerance.
``saddle``
    Stationary to the tolerance, with negative curvature: a converged direction whose Rayleigh quotient is
    negative beyond rounding and along which the *mean* of ``Phi`` over both ways is measured to fall (the
    residual gradient cancels in the mean), or an inertia with ``n_-(H + tau I) >= 1``.
``spurious-local-minimum``
    Stationary to the tolerance, ``n_-(H + tau I) = 0`` by a factorisation, and an update is at hand that is better
    by more than the residual gradient explains (or ``radius`` proves a minimum). What more is proved is in
    ``strict`` and ``radius``.
``not-determined``
    None of these was proved; the reason says why. An unconverged eigenvalue proves nothing here.

The mathematics is in docs/theory/stationarity.md (after Theorem 4.1 of Jang, Lee and Ryu, ICML 2024, whose
second-order stationary points these are).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ranksure.certificate import Certificate, certify_point
from ranksure.curvature import Inertia, escape_direction, inertia
from ranksure.errors import SettingError
from ranksure.factors import Factors, ranks_of, truncated
from ranksure.problem import Problem
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.descent import gradient_scale
from ranksure.solvers.solution import Solution
from ranksure.theory.stationary_point import Escape, Point, norm_of
from ranksure.theory.strict_minimum import radius_of, rotations

Verdict = Literal["not-stationary", "saddle", "spurious-local-minimum", "global", "not-determined"]

_EPS = torch.finfo(torch.float64).eps
_STRICT_SHARES = (0.5, 1e-1, 1e-2, 1e-3)  # curvatures, in units of lambda, at which strictness is tried first


@dataclass(frozen=True)
class Stationarity:
    """What is proved about a point of the factored objective.

    Attributes:
        verdict: see the module's docstring.
        reason: why nothing was determined, or what a verdict lacks; empty otherwise.
        objective: ``Phi`` at the point, in units of the loss.
        gradient_norm: norm of its gradient, in units of :func:`ranksure.solvers.descent.gradient_scale`.
        gradient_tolerance: the norm up to which the point counts as stationary, in the same units.
        imbalance: ``||u^T u - v^T v||_F / max(||u^T u||_F, ||v^T v||_F)`` by block; 0 where both are zero.
        certificate: gap of the update ``u v^T``, against every rank.
        lowest_found: lowest converged Rayleigh quotient of the Hessian (an upper bound on its lowest eigenvalue),
            or None.
        curvature: inertia of ``H + tau I``, or None where it was not needed.
        strict: True: apart from the directions of the rotations ``(u O, v O)``, the curvature is at least
            ``strict_curvature``; False: more directions are flat to ``tau`` than rotations explain; None: not
            determined.
        strict_curvature: see ``strict``.
        radius: a distance from the point, modulo rotations, within which a local minimum of ``Phi`` is proved to
            lie that is worse than the better point; None where this was not proved.
        excess: ``F`` at the point less ``F`` at the better point; None where no better point was needed.
        better: the better point, certified; its ranks may exceed the factors'.
        better_fits: True where an update of no higher ranks is also better, so that the point is spurious at its
            own ranks, not merely worse than a higher rank; None where none was found.
        escape: how to leave a saddle.
    """

    verdict: Verdict
    reason: str
    objective: float
    gradient_norm: float
    gradient_tolerance: float
    imbalance: dict[str, float]
    certificate: Certificate
    lowest_found: float | None = None
    curvature: Inertia | None = None
    strict: bool | None = None
    strict_curvature: float | None = None
    radius: float | None = None
    excess: float | None = None
    better: Solution | None = None
    better_fits: bool | None = None
    escape: Escape | None = None

    @property
    def unbalanced(self) -> bool:
        """Whether balancing the factors would lower ``Phi`` by more than a millionth of it."""
        return self.objective - self.certificate.objective > 1e-6 * abs(self.objective)

    @property
    def sentence(self) -> str:
        """The verdict and what it rests on, in plain words."""
        return " ".join(part for part in (_sentence(self), self.reason and f"({self.reason}.)") if part)

    def __str__(self) -> str:
        return self.sentence

    def to_json(self) -> dict[str, object]:
        """Plain numbers and words; factors are left out."""
        out: dict[str, object] = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("certificate", "curvature", "better", "escape")
        }
        c, e, b = self.curvature, self.escape, self.better
        out["certificate"] = self.certificate.to_json()
        out["curvature"] = c and {name: v for name, v in asdict(replace(c, direction=None)).items() if v is not None}
        out["escape"] = e and {n: getattr(e, n) for n in ("curvature", "step", "decrease", "mean_decrease")}
        out["better"] = b and {"objective": b.certificate.objective, "ranks": b.ranks}
        return {**out, "sentence": self.sentence}


def classify(
    problem: Problem,
    factors: Factors,
    *,
    tolerance: float = 1e-6,
    gradient_tolerance: float = 1e-6,
    relative_tau: float = 1e-4,
    optimum: Solution | None = None,
    max_iterations: int = 6000,
    max_size: int = 6000,
    seed: int = 0,
) -> Stationarity:
    """Say what a point of the factored objective is, and prove it.

    Args:
        problem: the problem; everything is evaluated in float64 (but a matrix-free operator, in its own dtype).
        factors: ``(u, v)`` of shapes ``(m, r)`` and ``(n, r)`` by block; blocks left out have rank 0.
        tolerance: relative gap up to which the update is global.
        gradient_tolerance: norm of the gradient, relative to its natural size, up to which the point is stationary.
        relative_tau: curvature that counts as zero, in units of the smallest ``lambda_j``.
        optimum: a solution of this problem, if known. It is certified again; solved for if needed and not given.
        max_iterations: most Lanczos vectors in the search for a direction.
        max_size: largest matrix that is factorised.
        seed: seed of the Lanczos start.

    Raises:
        SettingError: factors that do not fit the problem or are not finite, or a setting that is not positive.
    """
    if not (0 < tolerance < 1 and gradient_tolerance > 0 and 0 < relative_tau < 1 and max_iterations > 0):
        raise SettingError("tolerance, gradient_tolerance, relative_tau and max_iterations must be positive")
    here = Point(problem, factors, optimum)
    certificate = here.state.certificate
    point = Stationarity(
        "not-determined",
        "",
        here.value,
        norm_of(here.gradient) / gradient_scale(here.problem),
        gradient_tolerance,
        {name: _imbalance(u, v) for name, (u, v) in here.factors.items()},
        certificate,
    )
    if certificate.relative_gap <= tolerance:
        return replace(point, verdict="global")
    if not point.gradient_norm <= gradient_tolerance:
        return replace(point, verdict="not-stationary")
    if here.moving:
        found = escape_direction(here.working, here.inner, here.inner_state, seed, max_iterations)
        if found.converged:
            point = replace(point, lowest_found=found.value)
            across = here.across(found.direction)
            escape = across and here.escape(*across)
            if escape:
                return replace(point, verdict="saddle", escape=escape)
    return _by_inertia(here, point, optimum, relative_tau, tolerance, max_size)


def _by_inertia(
    here: Point, point: Stationarity, optimum: Solution | None, relative_tau: float, tolerance: float, max_size: int
) -> Stationarity:
    """A stationary point where no escape was found: what the factorisation of its Hessian says."""
    curvature = inertia(here.working, here.inner, here.inner_state, relative_tau, max_size, direction=True)
    point = replace(point, curvature=curvature)
    if curvature.negative is None:
        return replace(point, reason=f"stationary, but {curvature.reason}")
    if curvature.negative > 0:
        across = here.across(curvature.direction) if curvature.direction is not None else None
        if across is None:
            reason = "the negative curvature is no more than the residual gradient explains: descend further"
            return replace(point, reason=reason)
        escape = here.escape(*across)
        reason = "" if escape else "shown by the inertia; no decrease could be measured above rounding"
        return replace(point, verdict="saddle", escape=escape, reason=reason)
    return _against_the_optimum(here, point, optimum, tolerance, max_size)


def _against_the_optimum(
    here: Point, point: Stationarity, optimum: Solution | None, tolerance: float, max_size: int
) -> Stationarity:
    """A second-order stationary point: spurious if a better one is at hand, and how much more is proved."""
    dual = here.state.certificate.dual
    if optimum is None:
        optimum = solve(here.problem, tolerance=0.1 * tolerance)
        dual = max(dual, optimum.certificate.dual)
    better = certify_point(here.problem, optimum.factors).certificate
    certificate = certify_point(here.problem, here.factors, max(dual, better.dual)).certificate
    excess = certificate.objective - better.objective
    point = replace(point, certificate=certificate, excess=excess)
    if certificate.relative_gap <= tolerance:
        return replace(point, verdict="global")
    rounding = certificate.rounding + better.rounding
    if not excess > rounding:
        reason = "second-order stationary with an open gap, but no better point was found: tighten the optimum"
        return replace(point, reason=reason)
    fewer = certify_point(here.problem, truncated(optimum.factors, ranks_of(here.factors))).certificate
    fits = True if fewer.objective < certificate.objective - rounding else None
    point = replace(point, better=replace(optimum, certificate=better), better_fits=fits)
    point = _with_strictness(here, point, point.objective - better.objective - rounding, max_size)
    # Without a proof that a minimum is near, an excess that descent from here might remove is no evidence of one.
    natural = gradient_scale(here.problem) / min(here.problem.penalty.values())
    explained = max(norm_of(here.gradient) * natural, tolerance * (certificate.objective_at_zero - certificate.dual))
    if point.radius is None and excess <= explained:
        reason = f"a better point is at hand, but by no more than descent from here may gain ({explained:.1e})"
        return replace(point, reason=f"{reason}: descend further")
    return replace(point, verdict="spurious-local-minimum")


def _with_strictness(here: Point, point: Stationarity, margin: float, max_size: int) -> Stationarity:
    """Whether only the rotations are flat, at the largest curvature that shows it, and the radius that follows."""
    assert point.curvature is not None
    last = point.curvature.tau / min(here.problem.penalty.values())
    for share in (*(s for s in _STRICT_SHARES if s > last), last):
        below = inertia(here.working, here.inner, here.inner_state, -share, max_size)
        if below.negative is None:
            point = replace(point, strict=None, reason=f"strictness is not determined: {below.reason}")
            continue
        least = -below.tau - below.allowance
        count, most, flatness = rotations(here, least)
        if below.negative == count:
            radius = radius_of(here, least, flatness, margin)
            return replace(point, strict=True, strict_curvature=least, radius=radius, reason="")
        reason = "" if below.negative > most else "strictness is not determined: the gradient is too large for it"
        point = replace(point, strict=False if not reason else None, reason=reason)
    return point


def _imbalance(u: Tensor, v: Tensor) -> float:
    left, right = u.double().T @ u.double(), v.double().T @ v.double()
    largest = max(float(left.norm()), float(right.norm()))
    return float((left - right).norm()) / largest if largest > 0 else 0.0


def _sentence(s: Stationarity) -> str:
    c = s.certificate
    gap = f"a relative gap of {c.relative_gap:.1e}"
    if s.verdict == "global":
        surplus = s.objective - c.objective  # 0 where the factors are balanced
        off = f" Its factors pay {surplus:.3g} more penalty than it needs: balance them." if s.unbalanced else ""
        return f"Global: {gap} bounds the distance of this update to the best of every rank.{off}"
    if s.verdict == "not-stationary":
        return (
            f"Not stationary: the gradient is {s.gradient_norm:.1e} of its natural size, above the tolerance of "
            f"{s.gradient_tolerance:.0e}; go on descending."
        )
    if s.verdict == "saddle":
        if s.escape is None:
            return "Saddle: the Hessian has negative curvature."
        return (
            f"Saddle: along a direction of curvature {s.escape.curvature:.3g} the objective falls by "
            f"{s.escape.decrease:.3g} from {s.objective:.6g}."
        )
    if s.verdict == "not-determined":
        return f"Not determined: {gap}, a gradient of {s.gradient_norm:.1e} of its natural size."
    assert s.curvature is not None and s.excess is not None and s.better is not None
    where = "of no higher ranks" if s.better_fits else f"of ranks {', '.join(map(str, s.better.ranks.values()))}"
    strict = {
        True: f"; apart from rotations the curvature is at least {s.strict_curvature or 0:.3g}",
        False: "; not strict: more directions than the rotations are flat",
        None: "",
    }[s.strict]
    proved = f" A local minimum is proved to lie within {s.radius:.1e}." if s.radius is not None else ""
    return (
        f"Spurious local minimum: the gradient is {s.gradient_norm:.1e} of its natural size and no curvature is below "
        f"-{s.curvature.tau + s.curvature.allowance:.1e}{strict}.{proved} An update {where} is better by "
        f"{s.excess:.4g}; the gap to every rank is {c.gap:.4g}."
    )
