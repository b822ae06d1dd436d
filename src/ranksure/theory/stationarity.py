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

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ranksure.certificate import Certificate, PointState, certify
from ranksure.curvature import Inertia, escape_direction, hessian_vector, inertia
from ranksure.errors import SettingError
from ranksure.operators.base import Factors, cast_factors, ranks_of, zero_factors
from ranksure.problem import Problem
from ranksure.solvers.balancing import truncated
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.descent import gradient_scale
from ranksure.solvers.solution import Solution

Verdict = Literal["not-stationary", "saddle", "spurious-local-minimum", "global", "not-determined"]

_EPS = torch.finfo(torch.float64).eps
_STRICT_SHARES = (0.5, 1e-1, 1e-2, 1e-3)  # curvatures, in units of lambda, at which strictness is tried first


@dataclass(frozen=True)
class Escape:
    """A second-order descent from a saddle.

    Attributes:
        direction: factors of unit norm, of the point's shapes.
        curvature: their Rayleigh quotient with the Hessian of ``Phi``; negative.
        step: the signed step at which the decrease was measured: go to ``x + step * direction``.
        decrease: ``Phi(x) - Phi(x + step * direction)``, positive beyond rounding.
        mean_decrease: ``Phi(x)`` less the mean of ``Phi`` at both signs of the step: the part that no gradient
            explains, positive beyond rounding.
    """

    direction: Factors
    curvature: float
    step: float
    decrease: float
    mean_decrease: float

    def apply(self, factors: Factors) -> Factors:
        """The point after the step."""
        return _moved(factors, self.direction, self.step)


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

    Returns:
        The verdict and what it rests on.

    Raises:
        SettingError: factors that do not fit the problem or are not finite, or a setting that is not positive.
    """
    if not (0 < tolerance < 1 and gradient_tolerance > 0 and 0 < relative_tau < 1 and max_iterations > 0):
        raise SettingError("tolerance, gradient_tolerance, relative_tau and max_iterations must be positive")
    here = _Here(problem, factors, optimum)
    certificate = here.state.certificate
    point = Stationarity(
        "not-determined",
        "",
        here.value,
        _norm(here.gradient) / gradient_scale(here.problem),
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


class _Here:
    """The point with its derivatives, on the problem as stored and on the span of its tokens."""

    def __init__(self, problem: Problem, factors: Factors, optimum: Solution | None) -> None:
        self.problem = problem.to(torch.float64) if hasattr(problem.operator, "to") else problem
        self.factors = _complete(self.problem, factors)
        self.moving = {name: pair for name, pair in self.factors.items() if pair[0].shape[1] > 0}
        known = certify(self.problem, optimum.factors).certificate.dual if optimum is not None else -math.inf
        self.state = certify(self.problem, self.factors, known)
        self.value, self.gradient = self.state.certificate.objective, {}
        if self.moving:
            value, self.gradient = self.problem.value_and_gradient(self.moving)
            self.value = float(value)
        # What the factors have outside the span has curvature lambda, so the span decides the inertia.
        self.working, self.bases = problem.reduced
        self.eps = float(torch.finfo(self.problem.operator.dtype).eps)
        self.inner = self.bases.restrict(self.moving) if self.bases is not None else self.moving

    @cached_property
    def inner_state(self) -> PointState:
        trivial = self.bases is None or self.bases.is_trivial
        return self.state if trivial else certify(self.working, self.inner)

    @cached_property
    def gradient_error(self) -> float:
        """Bound on the rounding of the gradient's norm."""
        own = self.problem.operator.adjoint_error(self.problem.residual(self.problem.dual_variable(self.state.logits)))
        sizes = {n: float(g.norm()) + self.problem.penalty[n] for n, g in self.state.gradients.items()}
        return math.hypot(*((own[n] + 64 * _EPS * sizes[n]) * _norm({n: pair}) for n, pair in self.moving.items()))

    def across(self, direction: Factors) -> tuple[Factors, float] | None:
        """The direction less its rotations, at unit norm, and its curvature where that is negative beyond doubt.

        Doubt is rounding, and the curvature that the residual gradient can feign: ``||gradient|| / ||x||`` at the
        natural size of ``x``, ten times over. (Along a rotation the gradient does: the orbit bends, the line does not.)
        """
        direction = self.bases.lift(direction) if self.bases is not None else direction
        direction = {name: _less_rotations(self.moving[name], pair) for name, pair in direction.items()}
        norm = _norm(direction)
        if norm < 1e-3:
            return None
        direction = {name: (du / norm, dv / norm) for name, (du, dv) in direction.items()}
        image = hessian_vector(self.problem, self.moving, self.state, direction)
        curvature = sum(float((a * b).sum()) for n in image for a, b in zip(direction[n], image[n], strict=True))
        penalty = self.problem.penalty
        size = max(penalty[n] + float(g.norm()) for n, g in self.state.gradients.items())
        feigned = _norm(self.gradient) / gradient_scale(self.problem) * min(penalty.values())
        return (direction, curvature) if curvature < -(64 * self.eps * size + 10 * feigned) else None

    def escape(self, direction: Factors, curvature: float) -> Escape | None:
        """The best of a few steps both ways whose mean lies below the point beyond rounding; None if there is none."""
        rounding = 4 * self.state.certificate.rounding + 64 * self.eps * abs(self.value)
        natural = gradient_scale(self.problem) / min(self.problem.penalty.values())  # the largest norm that can help
        best: Escape | None = None
        for exponent in range(9):
            step = natural * 10 ** (-exponent / 2)
            trials = (_moved(self.moving, direction, sign * step) for sign in (1, -1))
            ahead, back = (float(self.problem.value_and_gradient(trial)[0]) for trial in trials)
            mean, decrease = self.value - 0.5 * (ahead + back), self.value - min(ahead, back)
            if mean > rounding and (best is None or decrease > best.decrease):
                best = Escape(direction, curvature, step if ahead <= back else -step, decrease, mean)
        return best


def _against_the_optimum(
    here: _Here, point: Stationarity, optimum: Solution | None, tolerance: float, max_size: int
) -> Stationarity:
    """A second-order stationary point: spurious if a better one is at hand, and how much more is proved."""
    dual = here.state.certificate.dual
    if optimum is None:
        optimum = solve(here.problem, tolerance=0.1 * tolerance)
        dual = max(dual, optimum.certificate.dual)
    better = certify(here.problem, optimum.factors).certificate
    certificate = certify(here.problem, here.factors, max(dual, better.dual)).certificate
    excess = certificate.objective - better.objective
    point = replace(point, certificate=certificate, excess=excess)
    if certificate.relative_gap <= tolerance:
        return replace(point, verdict="global")
    rounding = certificate.rounding + better.rounding
    if not excess > rounding:
        reason = "second-order stationary with an open gap, but no better point was found: tighten the optimum"
        return replace(point, reason=reason)
    fewer = certify(here.problem, truncated(optimum.factors, ranks_of(here.factors))).certificate
    fits = True if fewer.objective < certificate.objective - rounding else None
    point = replace(point, better=replace(optimum, certificate=better), better_fits=fits)
    point = _with_strictness(here, point, point.objective - better.objective - rounding, max_size)
    # Without a proof that a minimum is near, an excess that descent from here might remove is no evidence of one.
    natural = gradient_scale(here.problem) / min(here.problem.penalty.values())
    explained = max(_norm(here.gradient) * natural, tolerance * (certificate.objective_at_zero - certificate.dual))
    if point.radius is None and excess <= explained:
        reason = f"a better point is at hand, but by no more than descent from here may gain ({explained:.1e})"
        return replace(point, reason=f"{reason}: descend further")
    return replace(point, verdict="spurious-local-minimum")


def _with_strictness(here: _Here, point: Stationarity, margin: float, max_size: int) -> Stationarity:
    """Whether only the rotations are flat, at the largest curvature that shows it, and the radius that follows."""
    assert point.curvature is not None
    last = point.curvature.tau / min(here.problem.penalty.values())
    for share in (*(s for s in _STRICT_SHARES if s > last), last):
        below = inertia(here.working, here.inner, here.inner_state, -share, max_size)
        if below.negative is None:
            point = replace(point, strict=None, reason=f"strictness is not determined: {below.reason}")
            continue
        least = -below.tau - below.allowance
        count, most, flatness = _rotations(here, least)
        if below.negative == count:
            radius = _radius(here, least, flatness, margin)
            return replace(point, strict=True, strict_curvature=least, radius=radius, reason="")
        reason = "" if below.negative > most else "strictness is not determined: the gradient is too large for it"
        point = replace(point, strict=False if not reason else None, reason=reason)
    return point


def _rotations(here: _Here, least: float) -> tuple[int, int, float]:
    """Dimension of the rotations' directions, and how flat the Hessian is along them.

    With ``Q_j = [u_j; v_j]`` and ``S`` skew, ``H (Q_j S) = gradient_j S``. In the singular basis of ``Q_j`` the
    directions ``Q_j (e_a e_b^T - e_b e_a^T)`` are orthogonal, of norm ``(s_a^2 + s_b^2)^{1/2}``. Those with
    ``s_a`` at least some ``s`` have ``||H t|| <= sqrt2 ||gradient_j||_op ||t|| / s``; ``s`` is chosen so that this
    is at most a quarter of ``least``.

    Returns:
        How many directions are proved flat, how many rotations move the point at all, and the bound on
        ``||H t|| / ||t||`` over the former.
    """
    count, most, flatness = 0, 0, 0.0
    for name, pair in here.moving.items():
        s = torch.linalg.svdvals(torch.cat(pair))
        s = torch.cat([s, s.new_zeros(pair[0].shape[1] - len(s))])
        slope = float(torch.linalg.matrix_norm(torch.cat(here.gradient[name]), 2)) + here.gradient_error
        sure = s[(s > 0) & (s >= 4 * math.sqrt(2) * slope / least)]
        rank, columns = len(sure), len(s)
        moved = int((s > 1e-14 * s[0]).sum()) if float(s[0]) > 0 else 0
        count += math.comb(columns, 2) - math.comb(columns - rank, 2)
        most += math.comb(columns, 2) - math.comb(columns - moved, 2)
        if rank:
            flatness = max(flatness, math.sqrt(2) * slope / float(sure[-1]))
    return count, most, flatness


def _less_rotations(factor: tuple[Tensor, Tensor], direction: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A direction of one block less its projection on ``{Q S, S skew}``.

    The least-squares ``S`` solves ``Q^T Q S + S Q^T Q = Q^T D - D^T Q``.
    """
    q, d = torch.cat(factor), torch.cat(direction)
    values, basis = torch.linalg.eigh(q.T @ q)
    inner = basis.T @ (q.T @ d) @ basis
    sums = values[:, None] + values
    skew = torch.where(sums > 1e-14 * values[-1], (inner - inner.T) / sums.clamp(min=1e-300), 0)
    rest = d - q @ (basis @ skew @ basis.T)
    return rest[: len(factor[0])], rest[len(factor[0]) :]


def _radius(here: _Here, least: float, flatness: float, margin: float) -> float | None:
    """A radius within which, modulo rotations, a local minimum is proved to lie above ``Phi - margin``.

    On the sphere of radius ``rho`` across the rotations, ``Phi`` exceeds its value at the centre by at least
    ``-e rho + (a mu - (1 - a) m) rho^2 / 2 - a L rho^4 / (8 theta)`` (derived, with the symbols, in
    docs/theory/stationarity.md); where that is positive, the ball holds a local minimum in its interior.
    """
    problem, loss = here.working, here.problem.loss
    if loss.name not in ("squared-error", "logistic", "cross-entropy"):
        return None  # the lower bound below is proved for these
    error = _norm(here.gradient) + here.gradient_error
    sine = flatness / least
    mu = least * (1 - sine**2) - flatness * sine**2
    excess = max(float(torch.linalg.matrix_norm(g, 2)) - problem.penalty[n] for n, g in here.state.gradients.items())
    m = max(excess, 0.0) + 1e-9 * max(problem.penalty.values())
    gram = problem.operator.gram()
    root = problem.weights.sqrt().repeat_interleave(problem.operator.n_outputs)
    smooth = (
        (1 + 1e-9) * loss.smoothness(problem.n_logits) * float(torch.linalg.eigvalsh(gram * root[:, None] * root)[-1])
    )
    steepest = math.sqrt(float(gram.diagonal().view(problem.operator.n_samples, -1).sum(1).max()))
    spectral = [[float(torch.linalg.matrix_norm(part, 2)) for part in pair] for pair in here.moving.values()]
    widest = max((math.hypot(*pair) for pair in spectral), default=0.0)
    rho = 2.1 * error / mu
    for _ in range(60):
        theta = rho * math.sqrt(smooth / (4 * (mu + m)))
        change = 0.0 if loss.name == "squared-error" else math.sqrt(2) * steepest * (widest * rho + rho**2 / 2)
        if theta >= 1 or change > 1 or error * rho >= margin:
            return None
        # 2 (exp(-s) + s - 1) / s^2 >= 1 - s / 3
        a = (1 - change / 3) * (1 - theta)
        quartic = a * smooth * rho**4 / (8 * theta) if theta > 0 else 0.0
        if (a * mu - (1 - a) * m) * rho**2 / 2 - quartic > error * rho:
            return rho
        rho *= 1.3
    return None


def _complete(problem: Problem, factors: Factors) -> Factors:
    """All blocks, checked, in the operator's dtype."""
    for name, (u, v) in factors.items():
        m, n = problem.operator.shapes.get(name, (-1, -1))
        if u.dim() != 2 or v.dim() != 2 or (u.shape[0], v.shape[0]) != (m, n) or u.shape[1] != v.shape[1]:
            shapes = f"{tuple(u.shape)} and {tuple(v.shape)}"
            raise SettingError(f"factors of {name} of shapes {shapes} do not fit the problem's blocks")
        if not (bool(torch.isfinite(u).all()) and bool(torch.isfinite(v).all())):
            raise SettingError(f"factors of {name} are not finite")
    return {**zero_factors(problem.operator), **cast_factors(factors, problem.operator)}


def _moved(factors: Factors, direction: Factors, step: float) -> Factors:
    """``x + step * direction``; blocks that the direction lacks stay."""
    out = dict(factors)
    for name, (du, dv) in direction.items():
        u, v = factors[name]
        out[name] = (u + step * du.to(u), v + step * dv.to(v))
    return out


def _norm(factors: Factors) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for pair in factors.values() for part in pair))


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
