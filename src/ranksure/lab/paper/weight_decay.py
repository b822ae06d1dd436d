"""Effect of lambda on the rank of the optimum and on the test loss: the path from lambda_max down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ranksure.certificate import certify_point
from ranksure.lab.claim import Check, Claim, Curve, Finding, Table
from ranksure.lab.figures import curve_panels
from ranksure.lab.settings.parts import Made
from ranksure.lab.settings.prepared import LOSS, Prepared, certified
from ranksure.lab.settings.run import SettingRun
from ranksure.solvers.path import lambda_path
from ranksure.theory.bounds import existence_rank, unknowns

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Path:
    """The path of one setting, lambda by lambda."""

    title: str
    equations: int  # K N
    lambdas: list[float]  # as shares of lambda_max, the largest first
    ranks: list[int]  # largest rank of a block of the optimum
    totals: list[int]  # ranks of all blocks together
    counts: list[int]  # sum_j r_j (r_j + 1) / 2
    gaps: list[float]  # relative, of each optimum
    train_loss: list[float]
    test_loss: list[float]
    test_accuracy: list[float]


def measure(run: SettingRun) -> Finding:
    """Run the experiment."""
    text, images = run.first_and_others()[0], run.images_of_all_classes()
    chosen = text[: run.size(1, 2, 2)] + images[: run.size(0, 1, 1)]
    # More rows than elsewhere: with few, the fitted head leaves so little to explain that rank 1 does it.
    more = {setting.name: run.size(1, 2 if setting in images else 4, 8) for setting in chosen}
    wanted = [(setting.with_samples(more[setting.name] * setting.n), run.seed) for setting in chosen]
    if run.full:
        wanted += [(setting, run.seed + k) for k in (1, 2) for setting in text + images]
    return finding(*run.each(wanted, lambda prepared: [path(run, prepared)]))


def path(run: SettingRun, prepared: Prepared) -> Path:
    """The certified path of one setting."""
    count, smallest = run.size(4, 12, 20), run.size(0.1, 1e-3, 1e-4)

    def make() -> Made:
        held = prepared.held_out
        with run.reporter.stage(f"Path of lambda: {prepared.place}") as advance:
            points = lambda_path(
                prepared.problem,
                count=count,
                smallest=smallest,
                tolerance=_TOLERANCE,
                progress=lambda index, _: advance(index + 1, count),
            )
        problem = prepared.problem
        rows = []
        for point in points:
            factors, ranks = point.solution.factors, point.solution.ranks
            logits = certify_point(problem.with_penalty(point.lam), factors).logits
            rows.append(
                {
                    "lambda": point.lam / prepared.lambda_max,
                    "rank": max(ranks.values(), default=0),
                    "total": sum(ranks.values()),
                    "count": unknowns(ranks.values()),
                    "gap": point.solution.certificate.relative_gap,
                    "objective": point.solution.certificate.objective,
                    "train_loss": float(problem.data_loss(logits)),
                    "test_loss": float(LOSS.value(held.logits(factors), held.labels).mean()),
                    "test_accuracy": held.accuracy(factors),
                }
            )
        return {"rows": rows}, {}

    key = {**prepared.key, "count": count, "smallest": smallest, "tolerance": _TOLERANCE}
    rows = prepared.parts.get("path", key, make)[0]["rows"]
    names = ("lambda", "rank", "total", "count", "gap", "train_loss", "test_loss", "test_accuracy")
    return Path(prepared.label, prepared.n_outputs * prepared.n, *([row[name] for row in rows] for name in names))


def finding(paths: Sequence[Path], missing: Sequence[str]) -> Finding:
    """What the paths say."""
    curves = []
    for one in paths:
        curves.append(Curve("rank, all blocks together", one.lambdas, one.totals, f"{one.title}: rank"))
        curves.append(Curve("test loss", one.lambdas, one.test_loss, f"{one.title}: loss"))
        curves.append(Curve("training loss", one.lambdas, one.train_loss, f"{one.title}: loss"))

    def of(values: str) -> Callable[[tuple[Path, int]], float]:
        return lambda at: getattr(at[0], values)[at[1]]

    table = Table.of(
        [(one, index) for one in paths for index in range(len(one.lambdas))],
        {
            "setting": lambda at: at[0].title,
            "lambda / lambda_max": of("lambdas"),
            "largest rank": of("ranks"),
            "total rank": of("totals"),
            "sum of r(r+1)/2": of("counts"),
            "K N": lambda at: at[0].equations,
            "relative gap": of("gaps"),
            "training loss": of("train_loss"),
            "test loss": of("test_loss"),
            "test accuracy": of("test_accuracy"),
        },
    )
    return Finding(
        checks=checks(paths),
        figure=curve_panels(curves, x="λ / λ_max", y="", markers=True, height=2.8),
        table=table,
        curves=curves,
        axes={"x": "lambda as a share of lambda_max", "y": "rank, or mean loss"},
        missing=missing,
    )


def checks(paths: Sequence[Path]) -> list[Check]:
    """The parts of the claim."""
    within = all(count <= one.equations for one in paths for count in one.counts)
    ranks = "; ".join(
        f"{one.totals[1]} to {one.totals[-1]} ({one.title}, bound {existence_rank(one.equations)} for a block)"
        for one in paths
    )
    grows = all(one.totals[0] == 0 and one.totals[-1] >= one.totals[1] > 0 for one in paths)
    grows = grows and any(one.totals[-1] > one.totals[1] for one in paths)
    best = [min(range(len(one.lambdas)), key=one.test_loss.__getitem__) for one in paths]
    tests = "; ".join(
        f"lowest at {one.lambdas[index]:.2g} of lambda_max, {one.test_loss[index]:.4f} against {one.test_loss[0]:.4f} "
        f"without adapter and {one.test_loss[-1]:.4f} at {one.lambdas[-1]:.2g} ({one.title})"
        for one, index in zip(paths, best, strict=True)
    )
    small = all(one.test_loss[-1] >= one.test_loss[index] for one, index in zip(paths, best, strict=True))
    strictly = any(one.test_loss[-1] > one.test_loss[index] for one, index in zip(paths, best, strict=True))
    return [
        certified("Every optimum of the path", [gap for one in paths for gap in one.gaps]),
        Check(
            "Weight decay lowers the rank of the optimum, which is zero at lambda_max and never above the bound.",
            f"Total rank from just below lambda_max to the smallest lambda: {ranks}; sum r(r+1)/2 <= KN "
            f"{'everywhere' if within else 'NOT everywhere'}.",
            grows and within,
        ),
        Check(
            "Some weight decay is good for the test loss: the smallest lambda is not the best.",
            f"Test loss: {tests}.",
            small and strictly,
        ),
    ]


CLAIM = Claim(
    title="Weight decay, rank and test loss",
    claim="A larger weight decay gives an optimum of lower rank; the test loss is lowest at some positive lambda.",
    source="the regulariser of Theorems 3.1 and 5.1",
    minutes=(1, 30),
    measure=measure,
)
