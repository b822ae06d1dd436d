"""Theorem 4.1 of Jang, Lee and Ryu (2024) as an experiment: where random starts end, below and above the threshold.

Derivations, and what the experiment cannot show: docs/theory/landscape.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ranksure.factors import FactorLayout
from ranksure.lab.claim import Check, Claim, Finding, Run
from ranksure.lab.landscape.census import GLOBAL_TOLERANCE, Cell, Group, Verdict, census, certified_optimum
from ranksure.lab.landscape.figure import draw
from ranksure.lab.landscape.instances import Trap, gaussian_problem, spurious_instance, two_block_instance
from ranksure.lab.settings.minilm import captured
from ranksure.perturbation import random_perturbation
from ranksure.problem import Problem
from ranksure.solvers.descent import gradient_scale
from ranksure.solvers.lbfgs import minimize, objective_on
from ranksure.theory.bounds import is_within_existence, landscape_rank, landscape_ranks, unknowns
from ranksure.theory.capacity import capacity_rank
from ranksure.theory.stationarity import classify

SIZE = 0.05
"""Spectral norm of the random P, in units of lambda."""

SHARE = 0.1
"""lambda as a share of lambda_max, on Gaussian and bundled data."""


def measure(run: Run) -> Finding:
    """Gaussian measurements, the explicit instances, and the bundled model and data."""
    gaussian = gaussian_cells(run)
    traps = [spurious_instance(r, extra=1) for r in run.size([1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6])]
    tight = trap_cells(run, traps)
    blocks = block_cells(run)
    bundled = bundled_cells(run)
    survived = {trap.ranks["w"]: survives(trap, run.seed) for trap in traps}
    checks = [
        *gaussian_checks(gaussian),
        trapped_check(traps, [cell for cell in tight if not cell.above], survived),
        clear_check(
            "One rank higher (r + 1, the smallest above the threshold) the instance has none, with or without P.",
            [cell for cell in tight if cell.above],
        ),
        blocks_check([cell for cell in blocks if not cell.above]),
        clear_check(
            "With every block above its own threshold there are none.", [cell for cell in blocks if cell.above]
        ),
        capacity_check([cell for cell in gaussian + tight + blocks if not cell.above]),
        bundled_check(bundled),
    ]
    numbers = {
        "global_tolerance": GLOBAL_TOLERANCE,
        "perturbation": SIZE,
        "gaussian": [cell.to_json() for cell in gaussian],
        "onset": onset(gaussian),
        "explicit": [cell.to_json() for cell in tight],
        "explicit_excess": {str(trap.ranks["w"]): trap.excess for trap in traps},
        "survives": {str(r): sizes for r, sizes in survived.items()},
        "blocks": [cell.to_json() for cell in blocks],
        "bundled": [cell.to_json() for cell in bundled],
    }
    return Finding(checks, draw(gaussian, tight, blocks, bundled), numbers)


# ---- measurements


def gaussian_cells(run: Run) -> list[Cell]:
    """Ranks against N on Gaussian measurements with a random P; several instances of each N in one batch."""
    shape: tuple[int, int] = run.size((5, 5), (8, 8), (12, 12))
    top = run.size(4, 7, 9)
    instances, starts = run.size((2, 8), (3, 16), (5, 32))
    # N = r (r + 1) / 2 - 1: the largest that rank r is above.
    samples = [r * (r + 1) // 2 - 1 for r in range(2, top + 1)]
    cells = []
    with run.reporter.stage("Gaussian measurements") as advance:
        for column, n in enumerate(samples):
            seeds = [run.seed + 1000 * n + index for index in range(instances)]
            problems = [_perturbed(gaussian_problem(n, shape, share=SHARE, seed=s), SIZE, s) for s in seeds]
            optima = [certified_optimum(problem) for problem in problems]
            for r in range(1, top + 1):
                parts = census(problems, {"w": r}, starts, seed=run.seed + r, optima=optima)
                cells.append(Cell("", {"w": r}, n, {"w": shape}, SIZE, parts))
                advance(column * top + r, len(samples) * top)
    return cells


def trap_cells(run: Run, traps: Sequence[Trap]) -> list[Cell]:
    """The explicit instance at rank r and r + 1, without and with P."""
    starts = run.size(120, 500, 2000)
    cells = []
    with run.reporter.stage("The explicit instance") as advance:
        for index, trap in enumerate(traps):
            r = trap.ranks["w"]
            for rank in (r, r + 1):
                cells += _both(run, f"{rank}\nr={r}", trap.problem, {"w": rank}, starts)
            advance(index + 1, len(traps))
    return cells


def block_cells(run: Run) -> list[Cell]:
    """Two blocks: ranks that only the sum over blocks puts above the threshold, and ranks that every block does."""
    trap = two_block_instance()
    shapes = dict(trap.problem.operator.shapes)
    own = landscape_ranks(trap.problem.operator.n_samples, shapes)
    cells = []
    for ranks in (trap.ranks, {name: block.rank for name, block in own.items()}):
        cells += _both(run, str(tuple(ranks.values())), trap.problem, ranks, run.size(120, 500, 2000))
    return cells


def bundled_cells(run: Run) -> list[Cell]:
    """The last layer's query and value of the bundled model under mean pooling, on the bundled data."""
    every = [1, 2, 4, 0]  # 0 stands for the threshold
    settings = run.size({16: [1, 0]}, {32: every, 64: [1, 2]}, {32: every, 64: every})
    starts = run.size(8, 16, 32)
    cells = []
    with run.reporter.stage("The bundled model and data") as advance:
        for index, (n, ranks) in enumerate(settings.items()):
            # In the coordinates of the span, where P is drawn too: the theorem is as good there.
            problem = captured(n, share=SHARE, pooling="mean", seed=run.seed).reduced[0]
            shapes = dict(problem.operator.shapes)
            optimum = certified_optimum(problem)
            for rank in ranks:
                # Under softmax two classes are one equation per sample.
                at = dict.fromkeys(shapes, rank or landscape_rank(n))
                label = f"{rank or landscape_rank(n)}\nN={n}"
                found = census([problem], at, starts, seed=run.seed, optima=[optimum])
                cells.append(Cell(label, at, n, shapes, 0.0, found))
                if rank == 0:
                    found = census([_perturbed(problem, SIZE, run.seed)], at, starts, seed=run.seed)
                    cells.append(Cell(label.replace("\n", "+P\n"), at, n, shapes, SIZE, found))
            advance(index + 1, len(settings))
    return cells


def survives(trap: Trap, seed: int = 0, sizes: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)) -> list[float]:
    """Sizes ``||P|| / lambda`` at which descent from the trap still ends at a certified spurious minimum."""
    out = []
    for size in sizes:
        lam = min(trap.problem.penalty.values())
        perturbation = random_perturbation(trap.problem, size * lam, seed)
        problem = perturbation.problem
        layout = FactorLayout(dict(problem.operator.shapes), trap.ranks)
        start = layout.flatten(perturbation.inward(trap.factors))
        end = minimize(objective_on(problem, layout), start, tolerance=1e-9 * gradient_scale(problem))
        found = classify(problem, layout.unflatten(end.x), tolerance=GLOBAL_TOLERANCE)
        if found.verdict == "spurious-local-minimum":
            out.append(size)
    return out


def _perturbed(problem: Problem, size: float, seed: int) -> Problem:
    return random_perturbation(problem, size * min(problem.penalty.values()), seed).problem


def _both(run: Run, label: str, problem: Problem, ranks: Mapping[str, int], starts: int) -> list[Cell]:
    """Without P and with it."""
    shapes, n = dict(problem.operator.shapes), problem.operator.n_samples
    return [
        Cell(name, dict(ranks), n, shapes, size, census([found], ranks, starts, seed=run.seed))
        for name, size, found in ((label, 0.0, problem), (f"{label}\n+P", SIZE, _perturbed(problem, SIZE, run.seed)))
    ]


# ---- what the numbers say


def total(cells: Sequence[Cell], verdict: Verdict) -> int:
    """Starts of all cells with a verdict."""
    return sum(cell.counts[verdict] for cell in cells)


def _tally(cells: Sequence[Cell]) -> str:
    starts = sum(cell.starts for cell in cells)
    worst = max((part.worst_global for cell in cells for part in cell.parts), default=0.0)
    return (
        f"{total(cells, 'global')} of {starts} starts end globally optimal (relative gap at most {worst:.0e}), "
        f"{total(cells, 'spurious')} at spurious minima, {total(cells, 'rank-bound')} at the best known of their rank, "
        f"{total(cells, 'saddle')} at saddles, {total(cells, 'undetermined')} not determined"
    )


def clear_check(claim: str, cells: Sequence[Cell]) -> Check:
    """Every start of the cells ends globally optimal."""
    starts = sum(cell.starts for cell in cells)
    return Check(claim, _tally(cells), starts > 0 and total(cells, "global") == starts)


def onset(cells: Sequence[Cell]) -> list[dict[str, int]]:
    """For every N: the threshold, the capacity count's rank, the optimum's rank, and the ranks with trouble.

    ``optimum`` is the largest rank of an optimum over the instances; ``not_global`` and ``spurious`` the highest rank
    (0 for none) at which any start was not globally optimal, or at a certified spurious minimum.
    """
    out = []
    for n in sorted({cell.n for cell in cells}):
        row = [cell for cell in cells if cell.n == n]
        out.append(
            {
                "n": n,
                "threshold": landscape_rank(n),
                "capacity": capacity_rank(n, 1, row[0].shapes) or 0,
                "optimum": max(part.optimum.ranks["w"] for cell in row for part in cell.parts),
                "not_global": max((c.ranks["w"] for c in row if c.counts["global"] < c.starts), default=0),
                "spurious": max((c.ranks["w"] for c in row if c.counts["spurious"] > 0), default=0),
            }
        )
    return out


def in_reach(cells: Sequence[Cell]) -> tuple[int, int]:
    """Starts that are not globally optimal, and all, where the rank is at least that of the instance's own optimum."""
    parts = [part for c in cells for part in c.parts if c.ranks["w"] >= part.optimum.ranks["w"]]
    return sum(part.starts - part.counts["global"] for part in parts), sum(part.starts for part in parts)


def gaussian_checks(cells: Sequence[Cell]) -> list[Check]:
    """None above the threshold; and where trouble really begins, which no theorem says."""
    facts = onset(cells)
    missed, within = in_reach([cell for cell in cells if not cell.above])
    places = "; ".join(f"{f['n']}: {f['not_global']}, {f['spurious']}, {f['optimum']}, {f['threshold']}" for f in facts)
    first = clear_check(
        "Above the threshold, r (r + 1) / 2 > K N, with a random P, no start ends at a spurious minimum (Gaussian).",
        [cell for cell in cells if cell.above],
    )
    second = Check(
        "The threshold is sufficient, not necessary: on Gaussian data trouble ends below it for some N.",
        "for each N, the highest rank with a start that is not globally optimal, with one at a spurious minimum, the "
        f"optimum's rank and the threshold: {places}. Below the threshold, {missed} of the {within} starts at a rank "
        "of at least their own instance's optimum are not globally optimal",
        any(fact["not_global"] < fact["threshold"] - 1 for fact in facts),
    )
    return [first, second]


def is_trap(group: Group, excess: float | None = None) -> bool:
    """Whether a group is a strict spurious minimum with a proved local minimum near, and of this excess."""
    found = group.examined
    proved = group.verdict == "spurious" and found is not None and found.strict is True and found.radius is not None
    return proved and (excess is None or abs(group.excess - excess) <= 1e-9)


def trapped_check(traps: Sequence[Trap], cells: Sequence[Cell], survived: Mapping[int, Sequence[float]]) -> Check:
    """Below the threshold the explicit instance traps starts, at the point and the excess that are known on paper."""
    excess = {trap.ranks["w"]: trap.excess for trap in traps}
    plain = [cell for cell in cells if cell.size == 0]
    moved = [cell for cell in cells if cell.size > 0]
    proved = [
        trap.ranks["w"]
        for trap in traps
        if classify(trap.problem, trap.factors, tolerance=GLOBAL_TOLERANCE).strict is True
    ]
    matches = all(is_trap(g, excess[cell.ranks["w"]]) for cell in plain for part in cell.parts for g in part.groups)
    stays = all(is_trap(g) for cell in moved for part in cell.parts for g in part.groups)
    elsewhere = sum(cell.starts - cell.counts["spurious"] - cell.counts["global"] for cell in plain)
    largest = max(set.intersection(*(set(sizes) for sizes in survived.values())), default=0.0)
    per_rank = ", ".join(f"{cell.counts['spurious']} at r = {cell.ranks['w']}" for cell in plain)
    return Check(
        "The threshold is tight: the explicit instance (N = r (r + 3) / 2, one equation fewer than the threshold of "
        "rank r + 1) has a strict spurious minimum at rank r of known excess, and it survives a small P.",
        f"proved strict from its closed form at r = {', '.join(map(str, proved))}; random starts trapped, of "
        f"{plain[0].starts} each: {per_rank}; {elsewhere} ended elsewhere, neither there nor "
        f"globally optimal; the excess is that of the closed "
        f"form to 1e-9: {'yes' if matches else 'no'}; with ||P|| = {SIZE} lambda {total(moved, 'spurious')} of "
        f"{sum(cell.starts for cell in moved)} are trapped, and descent from the trap itself still ends at a certified "
        f"spurious minimum at ||P|| = {largest:g} lambda for every r",
        len(proved) == len(traps)
        and matches
        and stays
        and min(total([c], "spurious") for c in plain[:2]) > 0
        and total(moved, "spurious") > 0
        and largest > 0,
    )


def blocks_check(cells: Sequence[Cell]) -> Check:
    """Ranks that pass in the sum over blocks only have a spurious minimum, with P too."""
    first = cells[0]
    equations = unknowns(first.ranks.values())
    strict = all(is_trap(group) for cell in cells for part in cell.parts for group in part.groups)
    return Check(
        "With several blocks the sum over blocks is not enough: each block must pass by itself.",
        f"ranks {tuple(first.ranks.values())}, {equations} > {first.n} equations in the sum: "
        + "; ".join(
            f"{cell.counts['spurious']} of {cell.starts} starts end at a strict spurious minimum "
            f"{f'with ||P|| = {cell.size} lambda' if cell.size else 'without P'}"
            for cell in cells
        ),
        not is_within_existence(first.ranks, first.n) and strict and all(c.counts["spurious"] > 0 for c in cells),
    )


def capacity_check(cells: Sequence[Cell]) -> Check:
    """Park's count is met where spurious minima are."""
    met = [cell for cell in cells if cell.has_capacity]
    bad = [cell for cell in met if cell.counts["spurious"] > 0]
    return Check(
        "A capacity to interpolate, r (m + n) - r^2 > 1.35 K N (Park 2026), does not separate: at lambda > 0 it "
        "promises no landscape.",
        f"{len(bad)} of the {len(met)} settings below the threshold that meet it have certified spurious minima, "
        f"{total(bad, 'spurious')} starts in all",
        bool(bad),
    )


_OTHERS: tuple[tuple[Verdict, str], ...] = (
    ("rank-bound", "at the best known of their rank"),
    ("spurious", "at spurious minima"),
    ("saddle", "at saddles"),
    ("undetermined", "not determined"),
)


def bundled_check(cells: Sequence[Cell]) -> Check:
    """The bundled model and data: shares by rank; above the threshold every start is globally optimal."""
    above = [cell for cell in cells if cell.above]
    lines = []
    for cell in cells:
        rank, n = " ".join(cell.label.split("\n")[:-1]), cell.label.split("\n")[-1]
        stuck = [f"{cell.counts[v]} {name}" for v, name in _OTHERS if cell.counts[v]]
        lines.append(f"{n} rank {rank}: {', '.join([str(cell.counts['global']) + ' globally optimal', *stuck])}")
    return Check(
        "On the bundled model and data every start at the threshold's rank ends globally optimal.",
        f"of {cells[0].starts} starts each: {'; '.join(lines)}",
        bool(above) and total(above, "global") == sum(cell.starts for cell in above),
    )


CLAIM = Claim(
    title="No spurious minima above the threshold, and tight just below it",
    claim="With r (r + 1) / 2 > K N in every block, LoRA has no spurious local minimum, for almost every P; one rank "
    "lower it can have them.",
    source="Jang, Lee and Ryu 2024, Theorem 4.1; tightness as in Waldspurger and Waters 2020",
    measure=measure,
)
