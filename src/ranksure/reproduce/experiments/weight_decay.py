"""Effect of lambda on the rank of the optimum and on the test loss: the path from lambda_max down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ranksure.certificate import certify
from ranksure.reproduce.experiment import Check, Curve, Experiment, Finding, Run
from ranksure.reproduce.figures import curve_panels
from ranksure.reproduce.prepared import LOSS, Prepared
from ranksure.reproduce.storage import Made
from ranksure.solvers.path import lambda_path
from ranksure.theory.bounds import existence_rank

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Path:
    """The path of one setting.

    Attributes:
        title: setting and seed.
        equations: ``K N``.
        lambdas: as shares of lambda_max, the largest first.
        ranks: largest rank of a block of the optimum.
        totals: ranks of all blocks together.
        counts: ``sum_j r_j (r_j + 1) / 2``.
        gaps: relative gap of each optimum.
        train_loss: mean loss on the training rows.
        test_loss: mean loss on the test rows.
        test_accuracy: on them.
    """

    title: str
    equations: int
    lambdas: list[float]
    ranks: list[int]
    totals: list[int]
    counts: list[int]
    gaps: list[float]
    train_loss: list[float]
    test_loss: list[float]
    test_accuracy: list[float]


def measure(run: Run) -> Finding:
    """Run the experiment."""
    text, others = run.first_and_others()
    images = [setting for setting in others if setting.kind == "image" and setting.classes is None]
    chosen = text[: run.size(1, 2, 2)] + images[: run.size(0, 1, 1)]
    # More rows than elsewhere: with few, the fitted head leaves so little to explain that rank 1 does it.
    more = {setting.name: run.size(1, 2 if setting in images else 4, 8) for setting in chosen}
    wanted = [(setting.with_samples(more[setting.name] * setting.n), run.seed) for setting in chosen]
    if run.full:
        wanted += [(setting, run.seed + k) for k in (1, 2) for setting in text + images]
    ready, missing = run.available(wanted)
    paths = []
    for prepared in ready:
        paths.append(path(run, prepared))
        prepared.release()
    return finding(paths, missing)


def path(run: Run, prepared: Prepared) -> Path:
    """The certified path of one setting."""
    count, smallest = run.size(4, 12, 20), run.size(0.1, 1e-3, 1e-4)

    def make() -> Made:
        held = prepared.held_out("report")
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
            logits = certify(problem.with_penalty(point.lam), factors).logits
            rows.append(
                {
                    "lambda": point.lam / prepared.lambda_max,
                    "rank": max(ranks.values(), default=0),
                    "total": sum(ranks.values()),
                    "count": sum(rank * (rank + 1) // 2 for rank in ranks.values()),
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
    columns = ["setting", "lambda / lambda_max", "largest rank", "total rank", "sum of r(r+1)/2", "K N", "relative gap"]
    columns += ["training loss", "test loss", "test accuracy"]
    rows = [
        [one.title, lam, rank, total, count, one.equations, gap, loss, test, share]
        for one in paths
        for lam, rank, total, count, gap, loss, test, share in zip(
            one.lambdas,
            one.ranks,
            one.totals,
            one.counts,
            one.gaps,
            one.train_loss,
            one.test_loss,
            one.test_accuracy,
            strict=True,
        )
    ]
    return Finding(
        checks=checks(paths),
        columns=columns,
        rows=rows,
        figure=curve_panels(curves, x="λ / λ_max", y="", markers=True, height=2.8),
        curves=curves,
        axes={"x": "lambda as a share of lambda_max", "y": "rank, or mean loss"},
        missing=missing,
    )


def checks(paths: Sequence[Path]) -> list[Check]:
    """The parts of the claim."""
    worst = max((gap for one in paths for gap in one.gaps), default=float("inf"))
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
        Check(
            "Every optimum of the path is certified to a relative gap of at most 1e-6.",
            f"The largest relative gap of {sum(len(one.gaps) for one in paths)} optima is {worst:.1e}.",
            worst <= 1e-6,
        ),
        Check(
            "Weight decay lowers the rank of the optimum, which is zero at lambda_max and never above the bound.",
            f"Total rank from just below lambda_max to the smallest lambda: {ranks}; sum r(r+1)/2 <= KN "
            f"{'everywhere' if within else 'NOT everywhere'}.",
            bool(paths) and grows and within,
        ),
        Check(
            "Some weight decay is good for the test loss: the smallest lambda is not the best.",
            f"Test loss: {tests}.",
            bool(paths) and small and strictly,
        ),
    ]


EXPERIMENT = Experiment(
    title="Weight decay, rank and test loss",
    claim="A larger weight decay gives an optimum of lower rank; the test loss is lowest at some positive lambda.",
    where="the regulariser of Theorems 3.1 and 5.1",
    minutes=(1, 30),
    measure=measure,
)
