"""The network's own answer in ``benchmarks.advice``: the solver's work over time, the rank it recommends, its path.

The same rows, head, lambda and objective as the sweep's; no rank and no learning rate is given.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.advice_training import Bench
from benchmarks.advice_whole import in_model, labelled
from ranksure.data.samples import Samples
from ranksure.factors import Factors, truncated
from ranksure.network.gradient import gradient_pass
from ranksure.network.logits import predict
from ranksure.network.side_path import applied
from ranksure.solvers.network import NetworkSolution, descend_at_ranks, network_objective, solve_objective
from ranksure.solvers.network_objective import NetworkObjective

TOLERANCE = 0.01
"""The gap to reach, as a share of the gain."""

CAPTURED = 0.99
"""What the recommended rank captures of the solution's gain, as a plan's ``captured``."""

MOST_GRADIENTS = 700
SHARES = (0.5, 0.25, 0.12, 0.06, 0.03, 0.015, 0.007)
"""The path: lambda as shares of lambda_max."""

PATIENCE = 2
"""The path ends after this many rises of the held-out loss."""


@dataclass
class Trace:
    """The lowest value of the objective so far, by gradients and processor seconds, of one solve."""

    began: float
    points: list[tuple[int, float, float]] = field(default_factory=list)

    def watch(self, objective: NetworkObjective) -> None:
        """Look at every evaluation from now on; on factors ``Phi`` is at least the objective of their update."""
        evaluate, before = objective.value_and_gradient, objective.counts.gradients

        def watched(factors: Factors) -> tuple[float, Factors]:
            value, gradient = evaluate(factors)
            if not self.points or value < self.points[-1][1]:
                spent = objective.counts.gradients - before
                self.points.append((spent, value, time.process_time() - self.began))
            return value, gradient

        objective.value_and_gradient = watched


def network_answer(bench: Bench, select: Samples | None, lambda_max: float) -> dict[str, Any]:
    """Solve, search the smallest rank, and follow the path; counts, seconds and held-out figures of each."""
    task = bench.task
    targets = in_model(task, bench.shapes)
    batches, _ = labelled(task, bench.rows)
    gaps: list[tuple[int, float, float, float]] = []
    trace = Trace(time.process_time())
    with network_objective(
        task.model, batches, targets, weight_decay=bench.lam, loss="cross-entropy", memory_bytes=8 * 2**30
    ) as objective:
        out: dict[str, Any] = {"one_gradient": own_names(bench, one_gradient_ranks(objective, bench.lam))}
        solved = objective.with_penalty(bench.lam)  # a copy, so that only this solve is watched
        trace.watch(solved)
        solution = solve_objective(
            solved,
            tolerance=TOLERANCE,
            max_gradients=MOST_GRADIENTS,
            progress=lambda count, point: gaps.append(
                (count, point.objective, point.gap, time.process_time() - trace.began)
            ),
        )
        out |= _solution(bench, solution, lowest(trace, gaps), gaps, time.process_time() - trace.began)
        out["table"] = rank_table(objective, solution)
        path, chosen = followed_path(bench, objective, lambda_max, select)
    out["heldout"] = heldout(bench, solution.factors, bench.report_rows, bench.report_labels)
    out["path"] = path
    if chosen is not None:
        out["chosen"] = {**chosen[0], **heldout(bench, chosen[1], bench.report_rows, bench.report_labels)}
    return out


def lowest(trace: Trace, rounds: Iterable[tuple[int, float, float, float]]) -> list[tuple[int, float, float]]:
    """Gradients, objective and seconds whenever the objective was lower than ever before, from both records."""
    every = sorted([*trace.points, *((count, value, seconds) for count, value, _, seconds in rounds)])
    out: list[tuple[int, float, float]] = []
    for point in every:
        if not out or point[1] < out[-1][1]:
            out.append(point)
    return out


def _solution(
    bench: Bench,
    solution: NetworkSolution,
    trace: list[tuple[int, float, float]],
    gaps: list[tuple[int, float, float, float]],
    seconds: float,
) -> dict[str, Any]:
    states = solution.states.values()
    ranks = own_names(bench, solution.ranks)
    return {
        "objective": solution.objective,
        "loss": solution.loss,
        "ranks": ranks,
        "parameters": bench.parameters(ranks),
        "gap": solution.gap,
        "relative_gap": solution.relative_gap,
        "status": solution.status,
        "remedy": solution.remedy,
        "e": max(state.stationarity or 0.0 for state in states),
        "w": max(state.outside_norm for state in states) / bench.lam,
        "gradients": solution.gradients,
        "forwards": solution.forwards,
        "captures": solution.captures,
        "seconds": seconds,
        "trace": trace,
        "rounds": gaps,
    }


def rank_table(objective: NetworkObjective, solution: NetworkSolution) -> dict[str, Any]:
    """What each uniform rank reaches from the truncated solution, and the smallest that captures ``CAPTURED``."""
    before, began = objective.counts.gradients, time.process_time()
    needed = max(solution.ranks.values(), default=0)
    rows: list[dict[str, Any]] = []
    gain = objective.at_zero - solution.objective
    recommended = needed
    for rank in range(1, needed):
        start = truncated(solution.factors, dict.fromkeys(solution.ranks, rank))
        point = descend_at_ranks(objective, start)
        share = (objective.at_zero - point.objective) / gain if gain > 0 else 1.0
        rows.append({"rank": rank, "objective": point.objective, "captured": share})
        if share >= CAPTURED:
            recommended = rank
            break
    reached = rows[-1]["objective"] if recommended < needed else solution.objective
    return {
        "recommended": recommended,
        "objective": reached,
        "rows": rows,
        "gradients": objective.counts.gradients - before,
        "seconds": time.process_time() - began,
    }


def followed_path(
    bench: Bench, objective: NetworkObjective, lambda_max: float, select: Samples | None
) -> tuple[dict[str, Any] | None, tuple[dict[str, Any], Factors] | None]:
    """Lambda by the network's own loss on the rows that choose it: warm starts to 10%, the chosen one to 1%."""
    if select is None:
        return None, None
    labels = bench.task.labels(select)
    before, began = objective.counts.gradients, time.process_time()
    best, factors, rises, steps = None, None, 0, []
    for share in SHARES:
        solution = solve_objective(
            objective.with_penalty(share * lambda_max), start=factors, tolerance=0.1, max_gradients=150
        )
        factors = solution.factors
        found = heldout(bench, factors, select, labels, objective)
        steps.append({"share": share, "ranks": solution.ranks, "loss": found["loss"], "status": solution.status})
        rises = rises + 1 if best is not None and found["loss"] >= best[0] else 0
        if not rises:
            best = (found["loss"], share, factors)
        if rises >= PATIENCE:
            break
    assert best is not None
    lam = best[1] * lambda_max
    final = solve_objective(
        objective.with_penalty(lam), start=best[2], tolerance=TOLERANCE, max_gradients=MOST_GRADIENTS
    )
    work = {"gradients": objective.counts.gradients - before, "seconds": time.process_time() - began}
    ranks = own_names(bench, final.ranks)
    chosen = {"weight_decay": lam, "ranks": ranks, "parameters": bench.parameters(ranks), "status": final.status}
    return {"steps": steps, **work}, (chosen, final.factors)


def heldout(
    bench: Bench, factors: Factors, rows: Samples, labels: Tensor, objective: NetworkObjective | None = None
) -> dict[str, Any]:
    """Losses and accuracy of the network with an update on rows that it was not solved on."""
    batches, back = bench.task.batches_by_length(rows)
    whole = nullcontext() if objective is None else objective.whole()
    with applied(in_model(bench.task, bench.shapes), factors), whole:
        logits = predict(bench.task.model, batches)[back]
    losses = cross_entropy(logits, labels, reduction="none")
    accuracy = float((logits.argmax(1) == labels).double().mean())
    return {"loss": float(losses.mean()), "losses": [round(x, 6) for x in losses.tolist()], "accuracy": accuracy}


def one_gradient_ranks(objective: NetworkObjective, lam: float) -> dict[str, int]:
    """By module, how many singular values of the gradient without an adapter are above lambda."""
    found: dict[str, int] = {}

    def count(name: str, gradient: Tensor) -> None:
        found[name] = int((torch.linalg.svdvals(gradient.double()) > lam).sum())

    gradient_pass(objective.model, objective.batches, objective.targets, kind=objective.kind, consume=count)
    return found


def own_names(bench: Bench, ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks by the names that PEFT and the plan have for modules."""
    return {name.removeprefix(bench.task.prefix): rank for name, rank in ranks.items()}
