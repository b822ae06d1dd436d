"""The rank of the full fine-tuning solution against the bound r(r+1)/2 <= KN, over the number of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ranksure.factors import singular_values
from ranksure.lab.claim import Check, Claim, Curve, Finding, Table
from ranksure.lab.figures import curve_panels
from ranksure.lab.settings.prepared import Prepared, certified
from ranksure.lab.settings.run import SettingRun
from ranksure.lab.settings.trained import linear_full
from ranksure.theory.bounds import existence_rank, unknowns

SHARES = (0.1, 0.01)  # lambda as shares of lambda_max
_NUMERICAL = 1e-3  # share of a block's largest singular value above which one counts


@dataclass(frozen=True)
class Solved:
    """One certified optimum."""

    title: str
    n: int  # samples
    k: int  # outputs
    share: float  # lambda as a share of lambda_max
    lam: float
    ranks: dict[str, int]  # of the optimum, by block
    gap: float  # relative
    proximal: dict[str, int] | None  # numerical ranks of the proximal solution; None where it was not run

    @property
    def bound(self) -> int:
        """Largest ``r`` with ``r(r+1)/2 <= KN``."""
        return existence_rank(self.k * self.n)

    @property
    def count(self) -> int:
        """``sum_j r_j (r_j + 1) / 2``, which the theorem bounds by ``K N``."""
        return unknowns(self.ranks.values())


def measure(run: SettingRun) -> Finding:
    """Run the experiment."""
    sizes = run.size([8, 16], [8, 16, 32, 64, 128, 256], [8, 16, 32, 64, 128, 256, 512])
    few = run.size([], [10, 20, 40, 80], [10, 20, 40, 80, 160])
    proximal_to = run.size(8, 32, 256)
    wanted = [(setting.with_samples(n), run.seed) for setting in run.first_and_others()[0][:1] for n in sizes]
    wanted += [(setting.with_samples(n), run.seed) for setting in run.images_of_all_classes() for n in few]

    def one(prepared: Prepared) -> list[Solved]:
        prepared.release()
        with_proximal = prepared.n <= proximal_to and prepared.n_outputs == 2
        return [solve_one(run, prepared, share, with_proximal and share == SHARES[0]) for share in SHARES]

    return finding(*run.each(wanted, one))


def solve_one(run: SettingRun, prepared: Prepared, share: float, with_proximal: bool) -> Solved:
    """The certified optimum at a share of lambda_max, and the proximal solution where asked for."""
    lam = share * prepared.lambda_max
    optimum = prepared.optimum(lam)
    proximal = numerical_ranks(linear_full(run, prepared, lam).factors) if with_proximal else None
    gap = optimum.certificate.relative_gap
    return Solved(prepared.label, prepared.n, prepared.n_outputs, share, lam, optimum.ranks, gap, proximal)


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
    table = Table.of(
        solved,
        {
            "setting": lambda one: one.title,
            "K": lambda one: one.k,
            "N": lambda one: one.n,
            "lambda": lambda one: one.lam,
            "share of lambda_max": lambda one: one.share,
            "ranks of the optimum": lambda one: _joined(one.ranks),
            "sum of r(r+1)/2": lambda one: one.count,
            "K N": lambda one: one.k * one.n,
            "bound": lambda one: one.bound,
            "relative gap": lambda one: one.gap,
            "ranks of the proximal solution": lambda one: None if one.proximal is None else _joined(one.proximal),
        },
    )
    return Finding(
        checks=checks(solved),
        figure=curve_panels(curves, x="training rows N", y="rank", y_scale="log", markers=True, height=3.6),
        table=table,
        curves=curves,
        axes={"x": "training rows N", "y": "largest rank of a block"},
        missing=missing,
    )


def _joined(ranks: dict[str, int]) -> str:
    return "+".join(str(rank) for rank in ranks.values())


def checks(solved: Sequence[Solved]) -> list[Check]:
    """The parts of the claim."""
    within = sum(one.count <= one.k * one.n for one in solved)
    closest = max(solved, key=lambda one: one.count / (one.k * one.n))
    found = [
        certified("Every optimum", [one.gap for one in solved]),
        Check(
            "Full fine-tuning has a solution with r(r+1)/2 <= KN, summed over blocks.",
            f"{within} of {len(solved)} certified optima have sum r(r+1)/2 <= KN; the closest to the bound uses "
            f"{closest.count} of {closest.k * closest.n} ({closest.title}, N = {closest.n}, ranks "
            f"{_joined(closest.ranks)}, bound {closest.bound}).",
            within == len(solved),
        ),
    ]
    proximal = [(one, one.proximal) for one in solved if one.proximal is not None]
    if proximal:
        kept = sum(unknowns(ranks.values()) <= one.k * one.n for one, ranks in proximal)
        found.append(
            Check(
                "Full fine-tuning by proximal gradient finds such a solution.",
                f"{kept} of {len(proximal)} proximal solutions have sum r(r+1)/2 <= KN (singular values above "
                f"{_NUMERICAL:g} of the largest), at ranks "
                f"{', '.join(f'{_joined(ranks)} for N = {one.n}' for one, ranks in proximal)}.",
                kept == len(proximal),
            )
        )
    return found


CLAIM = Claim(
    title="Rank of the full fine-tuning solution",
    claim="With N samples and K outputs, full fine-tuning has a solution of rank r with r(r+1)/2 <= KN.",
    source="Theorem 3.1",
    minutes=(2, 60),
    measure=measure,
)
