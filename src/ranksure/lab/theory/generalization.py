"""Does the generalisation bound hold, how loose is it, and how does the true excess risk fall with N?

A finite population makes the population risk an exact sum: atoms ``G_a`` of known norm, labels drawn
from the softmax at ``delta_true``, which is therefore the population minimiser. A sample of N rows is a
table of counts, so N may be large; all draws are solved at once, each to a duality gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ranksure.lab.claim import Check, Claim, Curve, Finding, Run
from ranksure.lab.figures import curve_panels
from ranksure.losses import CrossEntropy
from ranksure.theory.generalization import (
    FORMS,
    Guarantee,
    data_dependent_guarantee,
    sharper_guarantee,
    theorem_guarantee,
)

ETA = 0.05
OUTPUTS, BLOCKS, SIDE = 3, 2, 3
NORM = 1.0  # R, by construction
STRENGTH = 16.0  # ||delta_true||_* over both blocks
SIGN_DRAWS = 256
TOLERANCE = 1e-8  # gap of every solution, in nats
LAMBDAS = {"theorem": "prescribed", "validated": "validated"}


@dataclass(frozen=True)
class Population:
    """Equally likely atoms with features ``(M, C, T, m, n)`` and labels from the softmax at ``delta`` (T, m, n)."""

    features: Tensor
    delta: Tensor

    @classmethod
    def random(cls, atoms: int, seed: int) -> Population:
        """Rank-one features whose norm over both blocks is ``NORM`` for every atom and contrast."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        left, right = normal(atoms, OUTPUTS - 1, BLOCKS, SIDE), normal(atoms, 1, BLOCKS, SIDE)
        features = left[..., :, None] * right[..., None, :]
        features = NORM * features / features.flatten(2).norm(dim=2)[..., None, None, None]
        delta = normal(BLOCKS, SIDE)[:, :, None] * normal(BLOCKS, SIDE)[:, None, :]
        delta = STRENGTH / BLOCKS * delta / delta.flatten(1).norm(dim=1)[:, None, None]
        return cls(features, delta)

    def logits(self, delta: Tensor) -> Tensor:
        """Logits of every atom, ``(..., M, K)``, for ``delta`` of shape ``(..., T, m, n)``."""
        flat = self.features.flatten(2).flatten(0, 1)
        values = delta.flatten(-3) @ flat.T
        return values.unflatten(-1, self.features.shape[:2]) @ CrossEntropy().contrasts(OUTPUTS).T

    def risk(self, delta: Tensor) -> Tensor:
        """Population risk: an exact sum over atoms and labels."""
        truth = torch.softmax(self.logits(self.delta), -1)
        return -(truth * torch.log_softmax(self.logits(delta), -1)).sum((-2, -1)) / len(self.features)

    def excess(self, delta: Tensor) -> Tensor:
        """Excess risk over ``delta_true``: a mean of relative entropies, so that nothing cancels."""
        true, log = self.logits(self.delta), torch.log_softmax(self.logits(delta), -1)
        return (torch.softmax(true, -1) * (torch.log_softmax(true, -1) - log)).sum((-2, -1)) / len(self.features)

    def sample(self, n: int, draws: int, rng: np.random.Generator) -> Tensor:
        """Shares of (atom, label) among ``n`` independent rows, ``(draws, M, K)``."""
        chances = (torch.softmax(self.logits(self.delta), -1) / len(self.features)).flatten().numpy()
        counts = rng.multinomial(n, chances / chances.sum(), size=draws)
        return torch.from_numpy(counts / n).unflatten(1, (len(self.features), OUTPUTS))

    def empirical(self, delta: Tensor, shares: Tensor) -> Tensor:
        """Mean loss of each sample, for its own ``delta``."""
        return -(shares * torch.log_softmax(self.logits(delta), -1)).sum((-2, -1))

    def rademacher(self, shares: Tensor, n: int, rng: np.random.Generator) -> Tensor:
        """Monte Carlo mean of ``max_j ||(1/N) sum sigma G||_op`` of each sample: signs of equal rows add up."""
        counts = np.rint(shares.sum(-1).numpy() * n).astype(np.int64)
        size = (SIGN_DRAWS, *counts.shape, OUTPUTS - 1)
        sums = torch.from_numpy((2 * rng.binomial(counts[..., None], 0.5, size=size) - counts[..., None]) / n)
        totals = torch.einsum("sbac,actmn->sbtmn", sums, self.features)
        return torch.linalg.matrix_norm(totals, 2).amax(-1).mean(0)


def solve(population: Population, shares: Tensor, lam: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Minimise every draw's objective by accelerated proximal gradient until its duality gap is ``TOLERANCE``.

    Args:
        population: the features.
        shares: samples, ``(B, M, K)``.
        lam: lambda of each draw, ``(B,)``.
        start: starting updates ``(B, T, m, n)``, zero by default.

    Returns:
        Updates ``(B, T, m, n)`` and duality gaps ``(B,)``.
    """
    features, contrasts = population.features, CrossEntropy().contrasts(OUTPUTS)
    rows = features.flatten(2)
    weights = shares.sum(-1)
    hessian = torch.einsum("ba,acd,ace->bde", weights, rows, rows)
    step = 1 / (0.5 * torch.linalg.eigvalsh(hessian)[:, -1])
    delta = torch.zeros(len(shares), *features.shape[2:], dtype=torch.float64) if start is None else start.clone()
    out, gaps = delta.clone(), torch.full((len(shares),), math.inf, dtype=torch.float64)
    live = torch.arange(len(shares))
    point, momentum = delta.clone(), torch.ones(len(shares), dtype=torch.float64)
    for iteration in range(100_000):
        if iteration % 10 == 0:
            gap = _gap(population, shares[live], lam[live], delta)
            out[live], gaps[live] = delta, gap
            keep = gap > TOLERANCE
            live, delta, point, momentum = live[keep], delta[keep], point[keep], momentum[keep]
            if len(live) == 0:
                break
        share, rate = shares[live], step[live, None, None, None]
        probabilities = torch.softmax(population.logits(point), -1)
        residual = (share.sum(-1, keepdim=True) * probabilities - share) @ contrasts
        moved = point - rate * torch.einsum("bac,actmn->btmn", residual, features)
        u, s, vh = torch.linalg.svd(moved)
        s = (s - (lam * step)[live, None, None]).clamp(min=0)
        new = (u * s[..., None, :]) @ vh
        restart = ((point - new) * (new - delta)).sum((1, 2, 3)) > 0  # O'Donoghue and Candes 2015, gradient scheme
        momentum = torch.where(restart, 1.0, momentum)
        following = (1 + torch.sqrt(1 + 4 * momentum**2)) / 2
        point = new + ((momentum - 1) / following)[:, None, None, None] * (new - delta)
        delta, momentum = new, following
    return out, gaps


def _gap(population: Population, shares: Tensor, lam: Tensor, delta: Tensor) -> Tensor:
    """``F(delta) - D(c R)`` at the largest feasible ``c <= 1`` (base logits are zero; see docs/mathematics.md)."""
    weights = shares.sum(-1, keepdim=True)
    probabilities = torch.softmax(population.logits(delta), -1)
    residual = (weights * probabilities - shares) @ CrossEntropy().contrasts(OUTPUTS)
    gradient = torch.einsum("bac,actmn->btmn", residual, population.features)
    scale = (lam / torch.linalg.matrix_norm(gradient, 2).amax(-1).clamp(min=1e-300)).clamp(max=1)[:, None, None]
    mixed = scale * weights * probabilities + (1 - scale) * shares
    dual = -(torch.special.xlogy(mixed, mixed) - torch.special.xlogy(mixed, weights)).sum((1, 2))
    nuclear = torch.linalg.svdvals(delta).sum((1, 2))
    return population.empirical(delta, shares) + lam * nuclear - dual


def guarantees(population: Population, shares: Tensor, n: int, rng: np.random.Generator) -> dict[str, list[Guarantee]]:
    """The three forms for every draw; R and S are known, so none is a heuristic."""
    contrasts, lipschitz = OUTPUTS - 1, CrossEntropy().lipschitz(OUTPUTS)
    total = math.sqrt(contrasts) * NORM
    theorem = theorem_guarantee(lipschitz, NORM, n, contrasts, ETA)
    sharper = sharper_guarantee(lipschitz, total, n, contrasts, ETA)
    own = [
        data_dependent_guarantee(lipschitz, total, float(value), SIGN_DRAWS, n, contrasts, ETA)
        for value in population.rademacher(shares, n, rng)
    ]
    return {"theorem": [theorem] * len(own), "sharper": [sharper] * len(own), "data_dependent": own}


def at_size(
    population: Population, n: int, draws: int, factors: list[float], rng: np.random.Generator
) -> dict[str, Any]:
    """Solve every draw of ``n`` rows at each form's lambda, and along a path from which validation picks.

    Returns:
        Medians and shares over the draws by form and of the validated lambda, and the largest duality gap.
    """
    shares, validation = population.sample(n, draws, rng), population.sample(n, draws, rng)
    strength = float(torch.linalg.svdvals(population.delta).sum())
    out: dict[str, Any] = {"n": n}
    worst = 0.0

    def medians(lam: Tensor, delta: Tensor, excess: Tensor) -> dict[str, float]:
        return {
            "lambda": float(lam.median()),
            "excess_median": float(excess.median()),
            "excess_95": float(excess.quantile(0.95)),
            "zero_solutions": float((delta.flatten(1).abs().amax(1) == 0).double().mean()),
        }

    for form, given in guarantees(population, shares, n, rng).items():
        prescribed = torch.tensor([g.prescribed for g in given], dtype=torch.float64)
        delta, gaps = solve(population, shares, prescribed)
        worst = max(worst, float(gaps.max()))
        excess = population.excess(delta)
        bound = torch.tensor([g.excess_risk(strength, TOLERANCE) for g in given], dtype=torch.float64)
        out[form] = medians(prescribed, delta, excess) | {
            "kappa": float(prescribed.median() / 2),
            "bound_median": float(bound.median()),
            "holds": float((excess <= bound).double().mean()),
            "looseness_median": float((bound / excess).median()),
        }
    path, delta = [], None
    for factor in factors:  # largest first: each solution starts the next
        lam = torch.full((draws,), factor * out["theorem"]["lambda"], dtype=torch.float64)
        delta, gaps = solve(population, shares, lam, delta)
        worst = max(worst, float(gaps.max()))
        path.append((lam, delta, population.empirical(delta, validation)))
    lams, deltas, losses = (torch.stack(part) for part in zip(*path, strict=True))
    best, each = losses.argmin(0), torch.arange(draws)
    picked = deltas[best, each]
    return out | {
        "validated": medians(lams[best, each], picked, population.excess(picked)),
        "largest_gap": worst,
    }


def slope(x: list[float], y: list[float]) -> float:
    """Least-squares slope of ``log y`` against ``log x``."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def measure(run: Run) -> Finding:
    """Measure coverage, looseness and rates over N."""
    draws = run.size(20, 200, 1000)
    sizes: list[int] = run.size(
        [100, 100_000, 1_000_000],
        [100, 1000, 10_000, 100_000, 300_000, 1_000_000, 10_000_000],
        [100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000],
    )
    factors = [2.0**-k for k in range(2, run.size(11, 14, 16))]
    population = Population.random(run.size(24, 24, 48), run.seed)
    rng = np.random.default_rng(run.seed)
    results = []
    with run.reporter.stage(f"Solving {draws} draws of every N") as advance:
        for index, n in enumerate(sizes):
            results.append(at_size(population, n, draws, factors, rng))
            advance(index + 1, len(sizes))
    return judged(population, draws, results)


def judged(population: Population, draws: int, table: list[dict[str, Any]]) -> Finding:
    """The checks, the figure and the numbers of all sizes together."""
    sizes = [row["n"] for row in table]
    nothing = float(population.excess(torch.zeros_like(population.delta)))
    held = {form: min(row[form]["holds"] for row in table) for form in FORMS}
    loose = {form: [row[form]["looseness_median"] for row in table] for form in FORMS}
    moving = [row for row in table if row["theorem"]["zero_solutions"] == 0]
    rates = {
        form: slope([r["n"] for r in rows], [r[form]["excess_median"] for r in rows])
        for form, rows in (("theorem", moving), ("validated", table))
        if len(rows) > 1
    }
    ratios = [row["theorem"]["lambda"] / row["validated"]["lambda"] for row in table]
    zeros = [row["n"] for row in table if row["theorem"]["zero_solutions"] == 1]
    # The bound is c / sqrt(N): where it meets the excess risk of no adapter at all.
    last = table[-1]
    useful = {form: math.ceil(last[form]["bound_median"] ** 2 * last["n"] / nothing**2) for form in FORMS}
    span = f"N from {sizes[0]:,} to {sizes[-1]:,}"
    rate_text = ", ".join(f"{rate:.2f} at the {LAMBDAS[form]} lambda" for form, rate in rates.items())
    checks = [
        Check(
            f"At lambda = 2 kappa the excess risk is at most 6 kappa ||delta_true||_* with probability {1 - ETA:.0%}.",
            f"it is on {held['theorem']:.1%} of {draws} draws at the worst of {len(sizes)} sizes ({span}); the bound "
            f"is {min(loose['theorem']):.0f} to {max(loose['theorem']):.0f} times the median excess risk, and below "
            f"that of no adapter only from N of about {useful['theorem']:.2g}",
            held["theorem"] >= 1 - ETA,
        ),
        Check(
            f"So do the forms with smaller constants and with the rows' own Rademacher average, each at its own "
            f"lambda, with probability {1 - ETA:.0%}.",
            f"they hold on {held['sharper']:.1%} and {held['data_dependent']:.1%} of the draws at the worst size; "
            f"{min(loose['sharper']):.0f} to {max(loose['sharper']):.0f} and {min(loose['data_dependent']):.0f} to "
            f"{max(loose['data_dependent']):.0f} times the median excess risk",
            min(held["sharper"], held["data_dependent"]) >= 1 - ETA,
        ),
        Check(
            "The excess risk falls at least as fast as the bound, as N^(-1/2).",
            f"log-log slope {rate_text or 'not measured'}; at the prescribed lambda "
            f"{f'nothing is learned up to N = {max(zeros):,}' if zeros else 'something is learned at every N'}, since "
            f"it is {min(ratios):.0f} to {max(ratios):.0f} times the lambda that as many validation rows pick",
            len(rates) == 2 and max(rates.values()) <= -0.5,
        ),
    ]
    numbers = {
        "eta": ETA,
        "draws": draws,
        "sizes": table,
        "holds_worst": held,
        "slopes": rates,
        "lambda_ratio": ratios,
        "useful_from": useful,
        "excess_of_no_adapter": nothing,
        "risk_of_truth": float(population.risk(population.delta)),
        "nuclear_norm_of_truth": float(torch.linalg.svdvals(population.delta).sum()),
    }
    curves = _curves(table, ratios)
    level = {curves[0].group: nothing}
    figure = curve_panels(curves, x="rows N", y="", y_scale="log", level=level, level_label="no adapter", markers=True)
    return Finding(checks, figure, numbers, curves=curves, axes={"x": "rows N", "y": "excess risk in nats, or a ratio"})


def _curves(table: list[dict[str, Any]], ratios: list[float]) -> list[Curve]:
    """Excess risks and the bound, then how many times the bound and its lambda are too large."""
    sizes = [row["n"] for row in table]
    bound, loose = ([row["theorem"][key] for row in table] for key in ("bound_median", "looseness_median"))
    measured = {form: [row[form]["excess_median"] for row in table] for form in LAMBDAS}
    validated = [high / low for high, low in zip(bound, measured["validated"], strict=True)]
    risk, ratio = "Excess risk (nats, median of draws)", "How many times too large"
    return [
        Curve("bound, prescribed lambda", sizes, bound, risk),
        *(Curve(f"measured, {name} lambda", sizes, measured[form], risk) for form, name in LAMBDAS.items()),
        Curve("bound / risk, prescribed lambda", sizes, loose, ratio),
        Curve("bound / risk, validated lambda", sizes, validated, ratio),
        Curve("prescribed / validated lambda", sizes, ratios, ratio),
    ]


CLAIM = Claim(
    title="Generalisation of the regularised solution",
    claim="With probability at least 1 - eta, training at lambda = 2 kappa, kappa of order sqrt(K) G R / sqrt(N), has "
    "an excess risk of at most 6 kappa ||delta_true||_*.",
    source="Jang, Lee and Ryu 2024, Theorem 5.1",
    measure=measure,
)
