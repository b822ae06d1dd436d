"""Theorem 3.1 of Jang, Lee and Ryu (2024) as an experiment: the rank of full fine-tuning, before and after reduction.

"Full fine-tuning" is accelerated proximal gradient on dense updates from zero. Its singular-value thresholding sets
singular values to exact zeros, so the rank of an iterate is a count, not a cut-off. Where the optimum is unique and
the iterate close to it, that rank is the optimum's own, and the bound holds without our help; it takes an iterate
that has not settled, or an optimum that is not unique, to need the reduction. All three are measured, with the
certified relative gap of every point. On the bundled model proximal gradient is far from settled after the steps
that there is time for, so the certified solver's optimum is shown beside it. Derivation: docs/theory/rank-reduction.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from ranksure.certificate import certify_point, lambda_max
from ranksure.lab.claim import Check, Claim, Finding, Run
from ranksure.lab.figures import COLOURS, INK, panels
from ranksure.lab.landscape.instances import gaussian_problem, squared_error_problem
from ranksure.lab.settings.minilm import captured
from ranksure.problem import Problem
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.proximal import proximal_gradient
from ranksure.solvers.solution import Solution
from ranksure.theory.bounds import existence_rank, numerical_rank, unknowns
from ranksure.theory.rank_reduction import reduce_rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 32
"""Side of the synthetic blocks."""

SHARE = 0.001
"""lambda of the Gaussian problem, as a share of lambda_max."""

BUNDLED_SHARE = 0.01

SHORT, LONG = 1e-3, 1e-6
"""Relative gaps at which the synthetic runs stop."""

ACCURACY = 1e-9
"""Largest change of a prediction, relative to the largest prediction, and of the objective to F(0)."""

GAUSSIAN, FLAT, BUNDLED = "Gaussian", "Gaussian, many optima", "MiniLM, Rotten Tomatoes"


@dataclass(frozen=True)
class Case:
    """One solution before and after reduction."""

    setting: str
    method: str  # proximal-gradient, or solve: the certified solver, which grows the rank from zero
    n: int
    k: int
    equations: int  # N times the contrasts that the loss sees
    operator_rank: int  # singular values above 1e-6 of the largest, from the Gram matrix
    asked: float  # relative gap at which the run was to stop
    gap_before: float  # certified
    gap_after: float  # by the best dual value of both points
    before: list[int]  # rank of each block
    after: list[int]
    change: float  # largest change of a prediction relative to the largest prediction
    rise: float  # objective after less before, in units of F(0)
    seconds: float  # of the reduction

    @property
    def count_before(self) -> int:
        return unknowns(self.before)

    @property
    def count_after(self) -> int:
        return unknowns(self.after)


def measure(run: Run) -> Finding:
    """Two synthetic settings and the bundled model and data, over N."""
    cases: list[Case] = []
    synthetic = run.size([8, 32], [8, 16, 32, 64, 128, 256], [8, 16, 32, 64, 128, 256, 400])
    with run.reporter.stage("Synthetic problems") as advance:
        for index, n in enumerate(synthetic):
            seed = run.seed + n
            gaussian, flat = gaussian_problem(n, (SIDE, SIDE), share=SHARE, seed=seed), flat_problem(n, seed=seed)
            for setting, problem, gap in ((GAUSSIAN, gaussian, SHORT), (GAUSSIAN, gaussian, LONG), (FLAT, flat, LONG)):
                solution = proximal_gradient(problem, tolerance=gap)
                cases.append(reduced(setting, "proximal-gradient", problem, solution, gap, run.seed))
            advance(index + 1, len(synthetic))
    sizes = run.size([8], [16, 32, 64, 128], [16, 32, 64, 128, 256])
    iterations = run.size(60, 120, 600)
    with run.reporter.stage("Capturing the bundled model") as advance:
        whole = captured(max(sizes), progress=advance)
    with run.reporter.stage("The bundled model and data") as advance:
        for index, n in enumerate(sizes):
            few = whole.subset(torch.arange(n))
            problem = few.with_penalty(BUNDLED_SHARE * lambda_max(few)).reduced[0]
            solution = proximal_gradient(problem, tolerance=SHORT, max_iterations=iterations)
            cases.append(reduced(BUNDLED, "proximal-gradient", problem, solution, SHORT, run.seed))
            cases.append(reduced(BUNDLED, "solve", problem, solve(problem, tolerance=LONG), LONG, run.seed))
            advance(index + 1, len(sizes))
    return Finding(checks_of(cases), draw(cases), {"cases": [asdict(c) for c in cases], "accuracy": ACCURACY})


# ---- problems and solutions


def flat_problem(n: int, seed: int) -> Problem:
    """One square block with many optima: the first equation reads the trace, the others are Gaussian.

    The labels are the readings of a positive definite ``X_0``, the first raised by ``N lambda / 2``. At ``X_0`` the
    weighted residual is ``-lambda`` on the first equation and zero elsewhere, so ``g = A^*(R) = -lambda I``, and
    every positive semidefinite ``X`` with the same readings is optimal.
    """
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(n, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)[:, 0]
    gradients[0] = torch.eye(SIDE, dtype=torch.float64)
    planted = torch.diag(0.5 + torch.rand(SIDE, generator=generator, dtype=torch.float64))
    labels = torch.einsum("imn,mn->i", gradients, planted)[:, None]
    penalty = 0.2
    labels[0] += n * penalty / 2
    return squared_error_problem({"w": gradients}, labels, {"w": penalty})


def reduced(setting: str, method: str, problem: Problem, solution: Solution, asked: float, seed: int) -> Case:
    """A solution before and after the reduction; both certificates know both dual values."""
    found = reduce_rank(problem, solution.factors, seed=seed)
    end = certify_point(problem, found.factors, solution.certificate.dual).certificate
    start = certify_point(problem, solution.factors, end.dual).certificate
    operator = problem.operator
    return Case(
        setting=setting,
        method=method,
        n=operator.n_samples,
        k=problem.n_logits,
        equations=operator.n_samples * operator.n_outputs,
        operator_rank=numerical_rank(operator.gram()),
        asked=asked,
        gap_before=start.relative_gap,
        gap_after=end.relative_gap,
        before=list(solution.ranks.values()),
        after=list(found.ranks_after.values()),
        change=found.relative_change,
        rise=(end.objective - start.objective) / start.objective_at_zero,
        seconds=found.seconds,
    )


# ---- what the numbers say


def checks_of(cases: Sequence[Case]) -> list[Check]:
    """The parts of the claim, judged on these cases."""
    beyond = [c for c in cases if c.count_before > c.operator_rank]
    flat = [c for c in beyond if c.setting == FLAT and c.gap_before <= c.asked]
    tightest = max(cases, key=lambda c: max(c.after) / math.sqrt(2 * c.k * c.n))
    effective = max(cases, key=lambda c: max(c.after) / math.sqrt(2 * c.equations))
    return [
        Check(
            "After the reduction sum_j r_j (r_j + 1) / 2 is at most the rank of the operator.",
            f"in {sum(c.count_after <= c.operator_rank for c in cases)} of {len(cases)} cases; before it was above in "
            f"{len(beyond)} (ranks at 1e-6 of the largest singular value)",
            all(c.count_after <= c.operator_rank for c in cases),
        ),
        Check(
            "The reduction changes no prediction on the data.",
            f"largest change {max(c.change for c in cases):.0e} of the largest prediction",
            all(c.change <= ACCURACY for c in cases),
        ),
        Check(
            "The reduction raises no objective, so a solution stays one.",
            f"largest rise {max(c.rise for c in cases):.0e} F(0), largest fall {-min(c.rise for c in cases):.0e} F(0); "
            f"relative gaps up to {max(c.gap_before for c in cases):.0e} before and "
            f"{max(c.gap_after for c in cases):.0e} after",
            all(c.rise <= ACCURACY and c.gap_after <= c.gap_before + ACCURACY for c in cases),
        ),
        Check(
            "The rank of the solution is below sqrt(2KN).",
            f"the largest block's rank is at most {max(tightest.after)} where sqrt(2KN) = "
            f"{math.sqrt(2 * tightest.k * tightest.n):.1f} (N = {tightest.n}, {tightest.setting}); counting only the "
            f"equations that the loss sees, at most {max(effective.after)} where the bound is "
            f"{existence_rank(effective.equations)}",
            all(max(c.after) < math.sqrt(2 * c.k * c.n) for c in cases),
        ),
        Check(
            "Where the optimum is not unique, an optimum of a rank above the bound becomes one within it.",
            "; ".join(f"N = {c.n}: rank {max(c.before)} to {max(c.after)}, gap {c.gap_after:.0e}" for c in flat)
            or "no certified optimum had a rank above the bound",
            bool(flat) and all(c.gap_after <= c.asked and c.count_after <= c.operator_rank for c in flat),
        ),
    ]


def draw(cases: Sequence[Case]) -> Figure:
    """Rank of the largest block against N, before and after, one panel for each setting."""
    figure, axes = panels(3, height=4.2)
    top = 2 + max(max(*c.before, math.sqrt(2 * c.k * c.n)) for c in cases)
    for ax, setting in zip(axes[0], (GAUSSIAN, FLAT, BUNDLED), strict=True):
        here = [c for c in cases if c.setting == setting]
        for asked, dashes, colour in ((SHORT, "-", COLOURS[1]), (LONG, "--", COLOURS[2])):
            line = [c for c in here if c.asked == asked and (asked == SHORT or c.gap_before <= asked)]
            if not line:
                continue
            kind = "unsettled run" if asked == SHORT else "certified optimum (gap ≤ 1e-6)"
            n, empty = [c.n for c in line], {"markerfacecolor": "none", "markersize": 9, "linestyle": dashes}
            ax.plot(n, [max(c.before) for c in line], "o", color=colour, label=f"{kind}, before", **empty)
            ax.plot(n, [max(c.after) for c in line], "s", color=colour, label=f"{kind}, after", linestyle=dashes)
        sizes = sorted({(c.n, c.k, c.equations) for c in here})
        n, exact = [s[0] for s in sizes], [existence_rank(s[2]) for s in sizes]
        ax.plot(n, [math.sqrt(2 * s[1] * s[0]) for s in sizes], color=INK, lw=1, label="√(2KN)")
        ax.plot(n, exact, color=INK, lw=1, ls=":", label="largest r with r(r+1)/2 ≤ equations")
        ax.set_xscale("log", base=2)
        ax.set_xticks(n, [str(x) for x in n])
        ax.set_ylim(0, top)
        ax.set_title(setting)
        ax.set_xlabel("samples N")
    axes[0, 0].set_ylabel("rank of the largest block")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


CLAIM = Claim(
    title="Low-rank solutions of full fine-tuning",
    claim="If the linearised problem has a solution, it has one with r(r+1)/2 <= KN: of rank at most about sqrt(2KN).",
    source="Jang, Lee and Ryu (2024), Theorem 3.1; Barvinok (1995), Pataki (1998)",
    measure=measure,
)
