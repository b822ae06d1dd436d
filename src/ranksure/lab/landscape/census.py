"""Where batches of random starts end on the factored objective, and what is proved about the ends.

All starts of all instances run in one L-BFGS batch. An end is *global* when its objective is within a tolerance of
the certified dual bound: that is a proof for each end by itself. The other ends are grouped (equal objective and equal
penalty: symmetric copies of one point agree in both), and one end of every group is examined by second-order checks.
A certified local minimum that is not global is *spurious* when a better update of no higher rank is known, and
*rank-bound* when none is: then it may be the best of its rank, and the optimum out of that rank's reach. An end that is
not stationary, or on which the checks do not decide, is *undetermined* and nothing else.

What is measured is end points of one algorithm from finitely many starts; the theorem is about stationary points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ranksure.factors import FactorLayout, Factors
from ranksure.problem import Problem
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.descent import gradient_scale
from ranksure.solvers.lbfgs import Function, minimize, objective_on
from ranksure.solvers.solution import Solution
from ranksure.theory.bounds import meets_landscape
from ranksure.theory.capacity import CAPACITY_CONSTANT, degrees_of_freedom
from ranksure.theory.stationarity import Stationarity, classify

GLOBAL_TOLERANCE = 1e-8
"""An end is global when ``(F - D) / (F(0) - D)`` is at most this."""

_CONVERGED = 1e-9  # gradient norm asked of L-BFGS, in units of gradient_scale
_STATIONARY = 1e-6  # gradient norm up to which an end counts as stationary, in the same units
_SAME = 1e-8  # ends are of one group when their objectives differ by less, as shares of F(0) - D,
_SAME_PENALTY = 1e-4  # and their penalties by less, as shares of F(0)

Verdict = Literal["global", "rank-bound", "spurious", "saddle", "undetermined"]
VERDICTS: tuple[Verdict, ...] = ("global", "rank-bound", "spurious", "saddle", "undetermined")


@dataclass(frozen=True)
class Group:
    """Ends that agree in objective and penalty, none of them global.

    Attributes:
        count: how many starts ended there.
        verdict: of the one that was examined.
        excess: ``F - F(optimum found)``, in units of the objective.
        relative_gap: ``(F - D) / (F(0) - D)``.
        lowest: whether no start of this problem and these ranks ended lower.
        factors: the one that was examined, or the first where none was.
        examined: what is proved about it; None where it was not stationary enough to be examined.
    """

    count: int
    verdict: Verdict
    excess: float
    relative_gap: float
    lowest: bool
    factors: Factors
    examined: Stationarity | None


@dataclass(frozen=True)
class Census:
    """Where the starts of one problem at given ranks ended.

    Attributes:
        counts: starts by verdict.
        worst_global: largest relative gap of the ends that count as global (0 where there are none).
        lowest: smallest relative gap of all ends.
        groups: the ends that are not global, by objective.
        optimum: the certified solution over all ranks.
        evaluations: objective evaluations; one serves all starts.
    """

    counts: dict[Verdict, int]
    worst_global: float
    lowest: float
    groups: tuple[Group, ...]
    optimum: Solution
    evaluations: int

    @property
    def starts(self) -> int:
        """Number of starts."""
        return sum(self.counts.values())

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        certificate = self.optimum.certificate
        return {
            "starts": self.starts,
            "counts": dict(self.counts),
            "worst_global_gap": self.worst_global,
            "lowest_gap": self.lowest,
            "optimum": {
                "ranks": self.optimum.ranks,
                "objective": certificate.objective,
                "relative_gap": certificate.relative_gap,
            },
            "groups": [
                {
                    "count": g.count,
                    "verdict": g.verdict,
                    "excess": g.excess,
                    "relative_gap": g.relative_gap,
                    "lowest": g.lowest,
                    "strict": g.examined.strict if g.examined else None,
                    "radius": g.examined.radius if g.examined else None,
                    "spectral_ratio": g.examined.certificate.spectral_ratio if g.examined else None,
                }
                for g in self.groups
            ],
        }


@dataclass(frozen=True)
class Cell:
    """All starts of one setting at one choice of ranks.

    Attributes:
        label: of the bar, or empty.
        ranks: rank by block.
        n: equations ``K N``, as the loss sees them.
        shapes: block shapes.
        size: ``||P|| / lambda``; 0 for none.
        parts: one census per instance.
    """

    label: str
    ranks: dict[str, int]
    n: int
    shapes: dict[str, tuple[int, int]]
    size: float
    parts: list[Census]

    @property
    def counts(self) -> dict[Verdict, int]:
        """Starts by verdict."""
        return merged(self.parts)

    @property
    def starts(self) -> int:
        """Number of starts."""
        return sum(self.counts.values())

    @property
    def above(self) -> bool:
        """Whether every block has a rank at which Theorem 4.1 holds."""
        return meets_landscape(self.ranks, self.n, self.shapes)

    @property
    def has_capacity(self) -> bool:
        """Whether Park's count says that the ranks can interpolate."""
        return degrees_of_freedom(self.ranks, self.shapes) > CAPACITY_CONSTANT * self.n

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "ranks": self.ranks,
            "n": self.n,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "perturbation": self.size,
            "above": self.above,
            "capacity": self.has_capacity,
            "starts": self.starts,
            "counts": dict(self.counts),
            "parts": [part.to_json() for part in self.parts],
        }


def draw_starts(problem: Problem, ranks: Mapping[str, int], count: int, seed: int = 0) -> Tensor:
    """Random starts: a quarter as LoRA starts, the others Gaussian on scales over five decades.

    LoRA's start has ``u = 0`` and ``v`` uniform in ``+- 1 / sqrt(n)`` (PEFT's default). The Gaussian ones are scaled so
    that their penalty runs geometrically from 1e-4 to 10 times ``F(0)``. A perturbed problem is given in its own
    coordinates. Numbers are drawn on the CPU in float64.

    Returns:
        ``(count, D)`` rows of :class:`~ranksure.factors.FactorLayout`, float64.
    """
    layout = FactorLayout(dict(problem.operator.shapes), dict(ranks))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, layout.size, generator=generator, dtype=torch.float64)
    lora = count // 4
    for low, m, n, rank in layout.parts.values():
        mid, high = low + m * rank, low + (m + n) * rank
        x[:lora, low:mid] = 0
        x[:lora, mid:high] = 2 * torch.rand(lora, n * rank, generator=generator, dtype=torch.float64) - 1
        x[:lora, mid:high] /= math.sqrt(n)
    decades = torch.linspace(-4, 1, count - lora, dtype=torch.float64)
    scale = 10**decades * problem.objective_at_zero / _penalties(problem, layout, x[lora:])
    x[lora:] *= scale.sqrt()[:, None]
    return x.to(problem.operator.device)


def census(
    problems: Sequence[Problem],
    ranks: Mapping[str, int],
    starts: int,
    *,
    seed: int = 0,
    optima: Sequence[Solution] | None = None,
    max_evaluations: int = 3000,
) -> list[Census]:
    """Where random starts end, one census a problem, for several problems of equal shapes in one batch.

    Args:
        problems: float64 problems whose blocks have equal shapes (perturbed ones: ``Perturbation.problem``).
        ranks: rank by block.
        starts: starts of every problem.
        seed: of the starts; every problem has its own.
        optima: certified solutions of the problems over all ranks, to a relative gap well below
            ``GLOBAL_TOLERANCE``; solved for if None.
        max_evaluations: evaluations after which the ends that are not finished go on by themselves, once, with four
            times as many.
    """
    optima = [certified_optimum(problem) for problem in problems] if optima is None else optima
    layout = FactorLayout(dict(problems[0].operator.shapes), dict(ranks))
    x = torch.cat([draw_starts(p, ranks, starts, seed + 7919 * index) for index, p in enumerate(problems)])
    scales = torch.tensor([gradient_scale(p) for p in problems], dtype=x.dtype, device=x.device)
    tolerance = _CONVERGED * float(scales.min())
    functions = [objective_on(problem, layout) for problem in problems]
    ends = minimize(
        stacked(functions, [starts] * len(problems)), x, tolerance=tolerance, max_evaluations=max_evaluations
    )
    x, value, norm, used = ends.x, ends.value, ends.gradient_norm, ends.evaluations
    gaps = torch.cat([_relative(v, o) for v, o in zip(value.split(starts), optima, strict=True)])
    unfinished = ~ends.converged & (gaps > GLOBAL_TOLERANCE)
    if bool(unfinished.any()):
        parts = [part.nonzero()[:, 0] for part in unfinished.split(starts)]
        more = minimize(
            stacked(functions, [len(part) for part in parts]),
            x[unfinished],
            tolerance=tolerance,
            max_evaluations=4 * max_evaluations,
        )
        x[unfinished], value[unfinished], norm[unfinished] = more.x, more.value, more.gradient_norm
        used += more.evaluations
    out = []
    for index, (problem, optimum) in enumerate(zip(problems, optima, strict=True)):
        part = slice(index * starts, (index + 1) * starts)
        out.append(judge(problem, optimum, layout, x[part], value[part], norm[part] / scales[index], used))
    return out


def certified_optimum(problem: Problem) -> Solution:
    """The optimum over all ranks to a relative gap of 1e-10, or as near as rounding lets it."""
    return solve(problem, tolerance=1e-10)


def stacked(functions: Sequence[Function], rows: Sequence[int]) -> Function:
    """Several functions as one on stacked rows: the first ``rows[0]`` belong to the first function, and so on."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [f(part) for f, part in zip(functions, x.split(list(rows)), strict=True) if len(part)]
        return torch.cat([value for value, _ in parts]), torch.cat([gradient for _, gradient in parts])

    return evaluate


def merged(parts: Sequence[Census]) -> dict[Verdict, int]:
    """Counts of several censuses together."""
    return {verdict: sum(part.counts[verdict] for part in parts) for verdict in VERDICTS}


def _relative(value: Tensor, optimum: Solution) -> Tensor:
    certificate = optimum.certificate
    return (value - certificate.dual) / (certificate.objective_at_zero - certificate.dual)


def _penalties(problem: Problem, layout: FactorLayout, x: Tensor) -> Tensor:
    """The penalty of every row."""
    terms = [
        0.5 * problem.penalty[name] * x[:, low : low + (m + n) * rank].square().sum(1)
        for name, (low, m, n, rank) in layout.parts.items()
    ]
    return torch.stack(terms).sum(0)


def judge(
    problem: Problem, optimum: Solution, layout: FactorLayout, x: Tensor, value: Tensor, norm: Tensor, used: int
) -> Census:
    """Verdicts of one problem's ends.

    Args:
        problem: the problem.
        optimum: its certified solution over all ranks.
        layout: how rows of ``x`` hold the factors.
        x: the ends, ``(S, D)``, float64.
        value: their objectives, ``(S,)``.
        norm: their gradient norms in units of :func:`~ranksure.solvers.descent.gradient_scale`, ``(S,)``.
        used: evaluations that led there.
    """
    gaps = _relative(value, optimum)
    is_global = gaps <= GLOBAL_TOLERANCE  # not a number is not global
    counts: dict[Verdict, int] = dict.fromkeys(VERDICTS, 0)
    counts["global"] = int(is_global.sum())
    groups = []
    first = float(gaps.nan_to_num(nan=math.inf).min())
    for members in _groups(problem, layout, x, value, norm, optimum, ~is_global):
        chosen = members[int(norm[members].argmin())]
        factors = layout.unflatten(x[chosen][None])
        examined = None
        verdict: Verdict = "undetermined"
        if float(norm[chosen]) <= _STATIONARY:
            examined = classify(
                problem, factors, tolerance=GLOBAL_TOLERANCE, gradient_tolerance=_STATIONARY, optimum=optimum
            )
            verdict = _NAMES.get(examined.verdict, "undetermined")
        excess, gap = float(value[chosen]) - optimum.certificate.objective, float(gaps[chosen])
        lowest = gap <= first + _SAME
        if verdict == "spurious" and lowest and examined is not None and not examined.better_fits:
            verdict = "rank-bound"
        counts[verdict] += len(members)
        groups.append(Group(len(members), verdict, excess, gap, lowest, factors, examined))
    worst = float(gaps[is_global].max()) if counts["global"] else 0.0
    return Census(counts, worst, first, tuple(groups), optimum, used)


_NAMES: dict[str, Verdict] = {"saddle": "saddle", "spurious-local-minimum": "spurious", "global": "global"}


def _groups(
    problem: Problem, layout: FactorLayout, x: Tensor, value: Tensor, norm: Tensor, optimum: Solution, which: Tensor
) -> list[Tensor]:
    """Row numbers of ends that agree, in order of the objective; ends that are not stationary stay alone."""
    certificate = optimum.certificate
    near = _SAME * (certificate.objective_at_zero - certificate.dual)
    penalty = _penalties(problem, layout, x)
    order = value.nan_to_num(nan=math.inf).argsort()
    out: list[list[int]] = []
    open_groups: list[list[int]] = []
    for row in (int(i) for i in order if bool(which[i])):
        if not float(norm[row]) <= _STATIONARY:
            out.append([row])
            continue
        open_groups = [g for g in open_groups if float(value[row] - value[g[-1]]) <= near]
        for group in open_groups:
            if abs(float(penalty[row] - penalty[group[0]])) <= _SAME_PENALTY * certificate.objective_at_zero:
                group.append(row)
                break
        else:
            open_groups.append([row])
            out.append(open_groups[-1])
    return [torch.tensor(group) for group in out]
