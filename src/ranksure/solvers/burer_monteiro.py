"""The certified global solver: low-rank factors, a certificate, new directions, repeat.

1. At the current factors, compute the certificate. Stop when the relative gap is small.
2. Where a block's spectral ratio exceeds one, its top singular pairs are descent directions that the
   factors cannot reach. Add them by a generalised conditional gradient step: minimise the convex
   ``loss(a z + b z_P) + a pen + b pen_P`` over ``a, b >= 0``, which cannot go up and by itself
   converges as ``O(1/t)`` for every lambda > 0 (Harchaoui, Juditsky, Nemirovski 2015).
3. Minimise over the factors by L-BFGS, rebalance them by a singular value decomposition (which never
   raises the objective), drop zero columns, and go on.

The reference for this family is BM-Global (Lee, Liang, Tang, Toh, JMLR 2024).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ranksure.certificate import Certificate, PointState, certify
from ranksure.curvature import Inertia, escape_direction, inertia
from ranksure.operators.base import Factors, cast_factors, ranks_of, zero_factors
from ranksure.operators.span import SpanBases
from ranksure.problem import Problem
from ranksure.solvers.lbfgs import FactorLayout, Minimum, minimize

Status = Literal["converged", "not-converged"]


@dataclass(frozen=True)
class Solution:
    """A point with its certificate.

    Attributes:
        factors: balanced factors by block; rank-0 blocks have no columns.
        certificate: what is proved about the point.
        status: whether the requested relative gap was reached.
        remedy: what to do when it was not; empty otherwise.
        evaluations: objective-and-gradient evaluations.
        seconds: wall-clock time.
        history: relative gap after each round, with the seconds at which it was known.
    """

    factors: Factors
    certificate: Certificate
    status: Status
    remedy: str
    evaluations: int
    seconds: float
    history: list[tuple[float, float]] = field(default_factory=list)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every block."""
        return ranks_of(self.factors)


def solve(
    problem: Problem,
    *,
    tolerance: float = 1e-6,
    start: Factors | None = None,
    best_dual: float = -math.inf,
    max_rounds: int = 60,
    max_evaluations: int = 20_000,
    progress: Callable[[int, Certificate], None] | None = None,
) -> Solution:
    """Solve the linearised problem to a certified relative gap.

    Args:
        problem: the problem.
        tolerance: relative gap ``(F - D) / (F(0) - D)`` to reach.
        start: factors to start from (a neighbouring solution), or None for zero.
        best_dual: a dual value known to be feasible for this problem.
        max_rounds: most rounds of certificate and new directions.
        max_evaluations: most objective evaluations.
        progress: called with the round and its certificate.

    Returns:
        The solution; ``status`` says whether the gap was reached, and the certificate holds either way.
    """
    began = time.perf_counter()
    working, bases = problem.reduced
    factors = _restricted(working, bases, start)
    evaluations = 0
    history: list[tuple[float, float]] = []
    inner = 1e-2
    remedy = f"the limit of {max_rounds} rounds was reached; raise max_rounds or the tolerance"
    status: Status = "not-converged"
    state = certify(working, factors, best_dual)
    best: tuple[Factors, PointState] = (factors, state)
    stalled = 0
    for index in range(max_rounds):
        certificate = state.certificate
        best_dual = max(best_dual, certificate.dual)
        history.append((time.perf_counter() - began, certificate.relative_gap))
        if progress is not None:
            progress(index, certificate)
        if certificate.relative_gap <= tolerance:
            status, remedy = "converged", ""
            break
        if evaluations >= max_evaluations:
            remedy = f"the limit of {max_evaluations} evaluations was reached; raise it or the tolerance"
            break
        before = certificate.gap
        factors = _add_directions(working, factors, state)
        # Inner accuracy follows the gap: a gradient of relative size e costs about e of the gap.
        inner = min(inner, max(1e-10, 0.1 * certificate.relative_gap))
        factors, used = _descend(working, factors, inner, max_evaluations - evaluations)
        evaluations += used
        factors = balanced(factors)
        state = certify(working, factors, best_dual)
        if state.certificate.gap < best[1].certificate.gap:
            best = (factors, state)
        stalled = stalled + 1 if state.certificate.gap > 0.9 * before else 0
        if stalled:
            inner = max(1e-12, 0.1 * inner)
        if stalled >= 8:
            remedy = "the gap stopped shrinking at rounding; raise the tolerance, or check the data for extreme values"
            break
    if status != "converged":
        factors, state = best
    factors, state = _pruned(working, factors, state, tolerance, max(best_dual, state.certificate.dual))
    lifted = bases.lift(factors) if bases is not None else factors
    if bases is not None:  # certified on the stored operator, not on its reduction
        state = certify(problem, lifted, max(best_dual, state.certificate.dual))
        if state.certificate.relative_gap > tolerance and status == "converged":
            status, remedy = "not-converged", "the gap on the full operator is above the tolerance; lower the tolerance"
    return Solution(lifted, state.certificate, status, remedy, evaluations, time.perf_counter() - began, history)


def _restricted(working: Problem, bases: SpanBases | None, start: Factors | None) -> Factors:
    if start is None:
        return zero_factors(working.operator)
    full = bases.restrict(start) if bases is not None else start
    return {**zero_factors(working.operator), **balanced(cast_factors(full, working.operator))}


def _scale(problem: Problem) -> float:
    """Natural size of the factored gradient: ``lambda ||x||`` at the largest ``x`` that can help."""
    return math.sqrt(2 * max(problem.objective_at_zero, 1e-300) * min(problem.penalty.values()))


def _descend(problem: Problem, factors: Factors, tolerance: float, budget: int) -> tuple[Factors, int]:
    layout = FactorLayout(dict(problem.operator.shapes), ranks_of(factors))
    if layout.size == 0:
        return factors, 0
    result = minimize(
        layout.function(problem),
        layout.flatten(factors),
        tolerance=tolerance * _scale(problem),
        max_evaluations=max(1, min(budget, 3000)),
    )
    return {**zero_factors(problem.operator), **layout.unflatten(result.x)}, result.evaluations


def _add_directions(problem: Problem, factors: Factors, state: PointState, most: int = 4) -> Factors:
    """Generalised conditional gradient step along the top singular pairs of every violating block."""
    pairs: Factors = {}
    for name, g in state.gradients.items():
        lam = problem.penalty[name]
        p, s, qt = torch.linalg.svd(g, full_matrices=False)
        count = min(most, int((s > lam * (1 + 1e-12)).sum()))
        weight = (s[:count] - lam).clamp(min=0).sqrt()
        pairs[name] = (-p[:, :count] * weight, qt[:count].T * weight)
    if all(u.shape[1] == 0 for u, _ in pairs.values()):
        return factors
    if any(ranks_of(factors).values()):
        z = problem.operator.apply_factors(factors).double()
    else:
        z = torch.zeros_like(state.logits @ problem.contrasts)
    dz = problem.operator.apply_factors(pairs).double()
    a, b = _convex_step(problem, z, float(problem.penalty_of(factors)), dz, float(problem.penalty_of(pairs)))
    return {
        name: (
            torch.cat([math.sqrt(a) * factors[name][0], math.sqrt(b) * u], 1),
            torch.cat([math.sqrt(a) * factors[name][1], math.sqrt(b) * v], 1),
        )
        for name, (u, v) in pairs.items()
    }


def _convex_step(problem: Problem, z: Tensor, pen: float, dz: Tensor, dpen: float) -> tuple[float, float]:
    """Minimise ``loss(a z + b dz) + a pen + b dpen`` over ``a, b >= 0``; never worse than ``(1, 0)``.

    Projected Newton in two variables (Bertsekas 1982): a variable at zero whose slope is positive rests.
    """
    paths = torch.stack([z, dz]).to(problem.contrasts) @ problem.contrasts.T
    prices = torch.tensor([pen, dpen], dtype=paths.dtype, device=paths.device)

    def logits_at(x: Tensor) -> Tensor:
        return problem.base_logits + x[0] * paths[0] + x[1] * paths[1]

    def value_at(x: Tensor) -> float:
        return float(problem.data_loss(logits_at(x)) + (x * prices).sum())

    def gradient_at(x: Tensor) -> Tensor:
        return (paths * problem.dual_variable(logits_at(x))).sum((1, 2)) + prices

    x = torch.tensor([1.0, 0.0]).to(paths)
    curvature = problem.loss.smoothness(problem.n_logits) * float((problem.weights[:, None] * dz.square()).sum())
    first = max(-float(gradient_at(x)[1]), 0.0) / max(curvature, 1e-300)
    x[1] = first  # descends: the step of the quadratic bound
    value = value_at(x)
    for _ in range(50):
        gradient = gradient_at(x)
        curved = problem.loss.hessian_vector(logits_at(x), problem.labels, paths) * problem.weights[:, None]
        hessian = torch.einsum("ank,bnk->ab", paths, curved)
        move = _newton_step(x, gradient, hessian)
        step, previous = 1.0, value
        while step > 1e-10:
            trial = (x - step * move).clamp(min=0)
            value = value_at(trial)
            if value <= previous - 1e-4 * float((gradient * (x - trial)).sum()) and math.isfinite(value):
                break
            step /= 2
        else:
            value = previous
            break
        x = trial
        if previous - value <= 1e-15 * abs(previous):
            break
    a, b = float(x[0]), float(x[1])
    # A zero column is a saddle of the factors: keep a trace of the new direction for the descent.
    return a, max(b, 1e-6 * first)


def _newton_step(x: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """Newton's step on the variables that are free to move, zero on the rest."""
    free = (x > 0) | (gradient < 0)
    diagonal = torch.diagonal(hessian).clamp(min=1e-300)
    scaled = hessian / diagonal.sqrt()[:, None] / diagonal.sqrt() + 1e-10 * torch.eye(2).to(hessian)
    scaled[~free] = scaled[:, ~free] = 0
    scaled[~free, ~free] = 1
    slope = torch.where(free, gradient, 0) / diagonal.sqrt()
    return torch.linalg.solve(scaled, slope) / diagonal.sqrt()


def balanced(factors: Factors, drop: float = 1e-10) -> Factors:
    """The same updates with ``u^T u = v^T v`` diagonal, columns by size; columns below ``drop`` go.

    Args:
        factors: unbatched factors.
        drop: singular values below this share of the largest of all blocks are dropped.
    """
    parts = {name: _thin_svd(u, v) for name, (u, v) in factors.items()}
    largest = max((float(s[0]) for _, s, _ in parts.values() if len(s)), default=0.0)
    out: Factors = {}
    for name, (p, s, q) in parts.items():
        keep = s > drop * largest if largest > 0 else torch.zeros_like(s, dtype=torch.bool)
        root = s[keep].sqrt()
        out[name] = (p[:, keep] * root, q[:, keep] * root)
    return out


def singular_values(factors: Factors) -> dict[str, Tensor]:
    """Singular values of each update, largest first."""
    return {name: _thin_svd(u, v)[1] for name, (u, v) in factors.items()}


def truncated(factors: Factors, ranks: dict[str, int]) -> Factors:
    """Best approximation of each update by one of the given rank (blocks not named keep theirs)."""
    parts = balanced(factors, drop=0.0)
    kept = {name: ranks.get(name, u.shape[1]) for name, (u, _) in parts.items()}
    return {name: (u[:, : kept[name]], v[:, : kept[name]]) for name, (u, v) in parts.items()}


def _thin_svd(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if u.shape[1] == 0:
        return u, u.new_zeros(0), v
    qu, ru = torch.linalg.qr(u)
    qv, rv = torch.linalg.qr(v)
    p, s, qt = torch.linalg.svd(ru @ rv.T, full_matrices=False)
    return qu @ p, s, qv @ qt.T


def _pruned(
    problem: Problem, factors: Factors, state: PointState, tolerance: float, best_dual: float
) -> tuple[Factors, PointState]:
    """Drop the smallest directions as long as the relative gap stays within the tolerance."""
    target = max(tolerance, state.certificate.relative_gap)
    for share in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
        fewer = balanced(factors, drop=share)
        if ranks_of(fewer) == ranks_of(factors):
            break
        candidate = certify(problem, fewer, best_dual)
        if candidate.certificate.relative_gap <= target:
            return fewer, candidate
    return factors, state


@dataclass(frozen=True)
class FixedRank:
    """Best point found at fixed ranks.

    Attributes:
        solution: the best start's end point and its certificate (against every rank).
        starts: number of starts made.
        objectives: objective reached by every start (unfinished where one start was already good enough).
        stationary: whether the gradient reached its tolerance.
        curvature: inertia of the Hessian at the point; undetermined where the gap made it needless.
    """

    solution: Solution
    starts: int
    objectives: list[float]
    stationary: bool
    curvature: Inertia


def solve_fixed_rank(
    problem: Problem,
    ranks: dict[str, int],
    *,
    reference: Factors | None = None,
    random_starts: int = 0,
    seed: int = 0,
    tolerance: float = 1e-8,
    best_dual: float = -math.inf,
    max_evaluations: int = 3000,
    enough: float = 1e-7,
    check_curvature: bool = True,
) -> FixedRank:
    """Minimise over factors of the given ranks from several starts, all in one batch.

    Args:
        problem: the problem.
        ranks: rank by block, clipped to the block's size; zero leaves a block out.
        reference: factors whose truncation is one start (the optimum, as a rule).
        random_starts: further starts, Gaussian at three scales.
        seed: seed of the random starts.
        tolerance: relative gradient norm that counts as stationary.
        best_dual: a dual value known to be feasible for this problem.
        max_evaluations: most evaluations of the batch.
        enough: relative gap at which no further search is made.
        check_curvature: prove the absence of negative curvature, and leave saddles by it.

    Returns:
        The best end point, with what was checked about it.
    """
    began = time.perf_counter()
    working, bases = problem.reduced
    shapes = dict(working.operator.shapes)
    full_ranks = {name: min(ranks.get(name, 0), *problem.operator.shapes[name], *shapes[name]) for name in shapes}
    layout = FactorLayout(shapes, full_ranks)
    if layout.size == 0:
        zero = zero_factors(working.operator)
        state = certify(working, zero, best_dual)
        lifted = bases.lift(zero) if bases is not None else zero
        solution = Solution(lifted, state.certificate, "converged", "", 0, time.perf_counter() - began)
        return FixedRank(solution, 1, [state.certificate.objective], True, Inertia(0, 0.0))
    generator = torch.Generator().manual_seed(seed)
    starts: list[Tensor] = []
    if reference is not None:
        full = _restricted(working, bases, reference)
        starts.append(layout.flatten(_padded(truncated(full, full_ranks), shapes, full_ranks)))
    if not starts:
        random_starts = max(1, random_starts)
    for index in range(random_starts):
        starts.append(_random_start(working, layout, full_ranks, generator, (0.1, 1.0, 0.3)[index % 3]))
    function = layout.function(working)
    goal = tolerance * _scale(working)
    gain = working.objective_at_zero - best_dual
    enough_value = best_dual + enough * gain if math.isfinite(best_dual) else None
    result = minimize(
        function, torch.cat(starts), tolerance=goal, max_evaluations=max_evaluations, stop_below=enough_value
    )
    evaluations = result.evaluations
    objectives = [float(value) for value in result.value]
    best = int(torch.argmin(result.value))
    x, norm = result.x[best : best + 1], float(result.gradient_norm[best])
    curvature = Inertia(None, 0.0, "not asked for")
    for _ in range(4):
        factors = {**zero_factors(working.operator), **layout.unflatten(x)}
        state = certify(working, factors, best_dual)
        if not check_curvature or state.certificate.relative_gap <= max(enough, 1e-12) or norm > goal:
            break
        curvature = inertia(working, factors, state)
        if curvature.negative in (0, None):
            break
        lower = _leave_saddle(working, layout, function, x, factors, state, goal, max_evaluations)
        evaluations += lower.evaluations
        best = int(torch.argmin(lower.value))
        if not float(lower.value[best]) < float(function(x)[0]):
            break
        x, norm = lower.x[best : best + 1], float(lower.gradient_norm[best])
        curvature = Inertia(None, curvature.tau, "not determined after a saddle was left")
    factors = balanced({**zero_factors(working.operator), **layout.unflatten(x)})
    state = certify(working, factors, best_dual)
    lifted = bases.lift(factors) if bases is not None else factors
    stationary = norm <= goal
    done = stationary or state.certificate.relative_gap <= enough
    solution = Solution(
        lifted,
        state.certificate,
        "converged" if done else "not-converged",
        "" if done else "the limit of evaluations was reached before a stationary point; raise max_evaluations",
        evaluations,
        time.perf_counter() - began,
    )
    return FixedRank(solution, len(starts), objectives, stationary, curvature)


def _leave_saddle(
    problem: Problem,
    layout: FactorLayout,
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    factors: Factors,
    state: PointState,
    goal: float,
    max_evaluations: int,
) -> Minimum:
    """Step both ways along the direction of negative curvature and descend from there."""
    kept = {name: factors[name] for name in layout.parts}
    _, direction = escape_direction(problem, kept, state)
    flat = layout.flatten(direction)
    size = max(float(x.norm()), 1e-6)
    trials = torch.cat([x + sign * share * size * flat for share in (0.01, 0.1) for sign in (1, -1)])
    return minimize(function, trials, tolerance=goal, max_evaluations=max_evaluations)


def _padded(factors: Factors, shapes: dict[str, tuple[int, int]], ranks: dict[str, int]) -> Factors:
    """Fill missing columns with small deterministic ones, so that every column can move."""
    out: Factors = {}
    generator = torch.Generator().manual_seed(0)
    for name, rank in ranks.items():
        u, v = factors[name]
        missing = rank - u.shape[1]
        if missing > 0:
            scale = 1e-3 * max(float(u.norm()), 1e-3) / math.sqrt(u.shape[0] * rank)
            m, n = shapes[name]
            extra = (torch.randn(m, missing, generator=generator), torch.randn(n, missing, generator=generator))
            u, v = torch.cat([u, scale * extra[0].to(u)], 1), torch.cat([v, scale * extra[1].to(v)], 1)
        out[name] = (u, v)
    return out


def _random_start(
    problem: Problem, layout: FactorLayout, ranks: dict[str, int], generator: torch.Generator, scale: float
) -> Tensor:
    """Gaussian factors whose penalty is ``scale`` times the loss at zero."""
    x = torch.randn(1, layout.size, generator=generator, dtype=torch.float64).to(problem.operator.device)
    x = x.to(problem.operator.dtype)
    penalty = float(problem.penalty_of(layout.unflatten(x)))
    return x * math.sqrt(scale * max(problem.objective_at_zero, 1e-300) / penalty)
