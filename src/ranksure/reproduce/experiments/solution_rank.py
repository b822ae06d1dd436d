"""The rank of the full fine-tuning solution against the bound r(r+1)/2 <= KN, over the number of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ranksure.factors import singular_values
from ranksure.reproduce.experiment import Check, Curve, Experiment, Finding, Run
from ranksure.reproduce.figures import curve_panels
from ranksure.reproduce.prepared import Prepared
from ranksure.reproduce.settings import Setting
from ranksure.reproduce.trainings import linear_full
from ranksure.theory.bounds import existence_rank

SHARES = (0.1, 0.01)  # lambda as shares of lambda_max
_NUMERICAL = 1e-3  # share of a block's largest singular value above which one counts


@dataclass(frozen=True)
class Solved:
    """One certified optimum.

    Attributes:
        title: setting and seed.
        n: samples.
        k: outputs.
        share: lambda as a share of lambda_max.
        lam: lambda.
        ranks: of the optimum, by block.
        gap: its relative gap.
        proximal: numerical ranks of the proximal gradient solution; None where it was not run.
    """

    title: str
    n: int
    k: int
    share: float
    lam: float
    ranks: dict[str, int]
    gap: float
    proximal: dict[str, int] | None

    @property
    def bound(self) -> int:
        """Largest ``r`` with ``r(r+1)/2 <= KN``."""
        return existence_rank(self.k * self.n)

    @property
    def count(self) -> int:
        """``sum_j r_j (r_j + 1) / 2``, which the theorem bounds by ``K N``."""
        return equations(self.ranks)


def equations(ranks: dict[str, int]) -> int:
    """``sum_j r_j (r_j + 1) / 2``."""
    return sum(rank * (rank + 1) // 2 for rank in ranks.values())


def measure(run: Run) -> Finding:
    """Run the experiment."""
    sizes = run.size([8, 16], [8, 16, 32, 64, 128, 256], [8, 16, 32, 64, 128, 256, 512])
    proximal_to = run.size(8, 32, 256)
    text, others = run.first_and_others()
    others = [setting for setting in others if setting.kind == "image" and setting.classes is None]
    wanted: list[tuple[Setting, int]] = [(setting.with_samples(n), run.seed) for setting in text[:1] for n in sizes]
    if not run.small:
        few = run.size([], [10, 20, 40, 80], [10, 20, 40, 80, 160])
        wanted += [(setting.with_samples(n), run.seed) for setting in others for n in few]
    solved: list[Solved] = []
    ready, missing = run.available(wanted)
    for prepared in ready:
        prepared.release()
        for share in SHARES:
            with_proximal = prepared.n <= proximal_to and share == SHARES[0] and prepared.n_outputs == 2
            solved.append(solve_one(run, prepared, share, with_proximal))
    return finding(solved, missing)


def solve_one(run: Run, prepared: Prepared, share: float, with_proximal: bool) -> Solved:
    """The certified optimum at a share of lambda_max, and the proximal solution where asked for."""
    lam = share * prepared.lambda_max
    optimum = prepared.optimum(lam)
    proximal = None
    if with_proximal:
        proximal = numerical_ranks(linear_full(run, prepared, lam).factors)
    return Solved(
        prepared.label,
        prepared.n,
        prepared.n_outputs,
        share,
        lam,
        optimum.ranks,
        optimum.certificate.relative_gap,
        proximal,
    )


def numerical_ranks(factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, int]:
    """Singular values above 1e-3 of the largest, by block."""
    out = {}
    for name, values in singular_values(factors).items():
        out[name] = int((values > _NUMERICAL * values.max()).sum()) if values.numel() else 0
    return out


def finding(solved: Sequence[Solved], missing: Sequence[str]) -> Finding:
    """What the optima say."""
    curves: list[Curve] = []
    for title in dict.fromkeys(one.title for one in solved):
        mine = [one for one in solved if one.title == title]
        sizes = sorted({one.n for one in mine})
        group = f"{title}\nK={mine[0].k}"
        curves.append(Curve("bound, r(r+1)/2 ≤ KN", sizes, [existence_rank(mine[0].k * n) for n in sizes], group))
        for share in SHARES:
            at = sorted((one for one in mine if one.share == share), key=lambda one: one.n)
            ranks = [max(one.ranks.values(), default=0) for one in at]
            curves.append(Curve(f"optimum, λ = {share:.0%} of λ_max", [one.n for one in at], ranks, group))
    columns = ["setting", "K", "N", "lambda", "share of lambda_max", "ranks of the optimum", "sum of r(r+1)/2", "K N"]
    columns += ["bound", "relative gap", "ranks of the proximal solution"]
    rows: list[list[Any]] = [
        [
            one.title,
            one.k,
            one.n,
            one.lam,
            one.share,
            _joined(one.ranks),
            one.count,
            one.k * one.n,
            one.bound,
            one.gap,
            None if one.proximal is None else _joined(one.proximal),
        ]
        for one in solved
    ]
    return Finding(
        checks=checks(solved),
        columns=columns,
        rows=rows,
        figure=curve_panels(curves, x="training rows N", y="rank", y_scale="log", markers=True, height=3.6),
        curves=curves,
        axes={"x": "training rows N", "y": "largest rank of a block"},
        missing=missing,
    )


def _joined(ranks: dict[str, int]) -> str:
    return "+".join(str(rank) for rank in ranks.values())


def checks(solved: Sequence[Solved]) -> list[Check]:
    """The parts of the claim."""
    worst = max((one.gap for one in solved), default=float("inf"))
    within = [one for one in solved if one.count <= one.k * one.n]
    closest = max(solved, key=lambda one: one.count / (one.k * one.n), default=None)
    found = [
        Check(
            "Every optimum is certified to a relative gap of at most 1e-6.",
            f"The largest relative gap of {len(solved)} optima is {worst:.1e}.",
            worst <= 1e-6,
        ),
        Check(
            "Full fine-tuning has a solution with r(r+1)/2 <= KN, summed over blocks.",
            f"{len(within)} of {len(solved)} certified optima have sum r(r+1)/2 <= KN; the closest to the bound uses "
            f"{closest.count} of {closest.k * closest.n} ({closest.title}, N = {closest.n}, ranks "
            f"{_joined(closest.ranks)}, bound {closest.bound})."
            if closest is not None
            else "Nothing was solved.",
            bool(solved) and len(within) == len(solved),
        ),
    ]
    both = [one for one in solved if one.proximal is not None]
    if both:
        kept = sum(equations(one.proximal or {}) <= one.k * one.n for one in both)
        found.append(
            Check(
                "Full fine-tuning by proximal gradient finds such a solution.",
                f"{kept} of {len(both)} proximal solutions have sum r(r+1)/2 <= KN (singular values above "
                f"{_NUMERICAL:g} of the largest), at ranks "
                f"{', '.join(f'{_joined(one.proximal or {})} for N = {one.n}' for one in both)}.",
                kept == len(both),
            )
        )
    return found


EXPERIMENT = Experiment(
    title="Rank of the full fine-tuning solution",
    claim="With N samples and K outputs, full fine-tuning has a solution of rank r with r(r+1)/2 <= KN.",
    where="Theorem 3.1",
    minutes=(2, 60),
    measure=measure,
)
