"""The network's part of a plan, from the linearised one to the record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ranksure.factors import Factors
from ranksure.planner.network.path import EXPECTED, follow_path
from ranksure.planner.network.pieces import Pieces, Reached
from ranksure.planner.network.ranks import ROW_GRADIENTS, NetworkTable
from ranksure.planner.network.rows import HeldOutRows, held_out_rows, labelled
from ranksure.planner.network.search import PATTERN_GRADIENTS, smallest_pattern, smallest_uniform
from ranksure.planner.network.stage import MOST_GRADIENTS, Budget, Stage
from ranksure.planner.prepare import Linearised
from ranksure.planner.ranks import smallest_within_error
from ranksure.planner.solved import request_of
from ranksure.progress import Clock
from ranksure.quantities import parse_effort
from ranksure.records.plan import NetworkHeldOut, NetworkOptimum, NetworkPlan, NetworkRank, NetworkStep
from ranksure.solvers.network import network_objective
from ranksure.solvers.network_objective import NetworkObjective

_SOLVE = 60  # gradients of the chosen lambda's solve, as a rule


@dataclass(frozen=True)
class NetworkAnswer:
    """The network's answer: the record, the certified point, and the smallest rank within a standard error of the best
    on held-out rows.
    """

    record: NetworkPlan
    factors: Factors
    heldout_r: int | None


def plan_network(lin: Linearised, lam: float | None, clock: Clock, kept: Path | None) -> NetworkAnswer:
    """Solve the network itself, from the linearised problem's lambda_max.

    Args:
        lin: the linearised problem and what surrounds it.
        lam: lambda; None to choose it by held-out loss.
        clock: times the stages.
        kept: a file for what is finished, from which an interrupted run of the same request goes on.

    Raises:
        RanksureError: the network cannot be solved, in one line.
    """
    prepared = lin.prepared
    task, loss, split, options = prepared.task, prepared.loss, prepared.split, prepared.settings
    memory = options.memory_bytes
    with ExitStack() as stack:
        with clock.stage("network", "Making the network ready"):
            select, report = (
                stack.enter_context(held_out_rows(task, prepared.targets, rows, loss, memory / 8))
                for rows in (split.select, split.report)
            )
            batches, _ = labelled(task, split.train)
            objective = stack.enter_context(
                network_objective(task.model, batches, prepared.targets, loss=loss.name, memory_bytes=memory / 2)
            )
            per_pass = _timed(objective)
        passes, seconds = parse_effort(options.budget) if options.budget is not None else (math.inf, math.inf)
        request = {**request_of(prepared, ["budget"]), "at_zero": objective.at_zero, "lambda_max": lin.lambda_max}
        pieces = Pieces(kept if split.train.sha256 is not None else None, request)
        work = _Work(lin, Stage(objective, Budget(passes, seconds, per_pass), pieces, options.tolerance), clock)
        return work.answer(lam, select, report)


def _timed(objective: NetworkObjective) -> float:
    """Seconds of one pass forward and back, at a small update."""
    made = torch.Generator().manual_seed(0)

    def small(rows: int) -> Tensor:
        return (1e-4 * torch.randn(rows, 1, generator=made)).to(objective.device, objective.dtype)

    factors = {name: (small(m), small(n)) for name, (m, n) in objective.shapes.items()}
    began = time.perf_counter()
    objective.value_and_gradient(factors)
    return time.perf_counter() - began


class _Work:
    """The stages of one network's plan."""

    def __init__(self, lin: Linearised, stage: Stage, clock: Clock) -> None:
        self.lin, self.stage, self.clock = lin, stage, clock
        self.options = lin.prepared.settings

    def answer(self, lam: float | None, select: HeldOutRows | None, report: HeldOutRows | None) -> NetworkAnswer:
        """Path, solution, ranks, pattern, held-out rows."""
        stage, options = self.stage, self.options
        path: list[NetworkStep] = []
        start: Reached | None = None
        chosen_by = "the user"
        if lam is None:
            assert select is not None
            chosen_by = "the network's held-out loss on the path"
            with self._said("path", "Following lambda on the network", EXPECTED) as stage.advance:
                path, lam, start = follow_path(stage, self.lin.lambda_max, select)
        stage = stage.at(lam)
        with self._said("solve", "Solving the network to a certified point", _SOLVE) as stage.advance:
            factors = None if start is None else start.factors
            doing = "solving at the chosen lambda"
            solution = stage.solved("solution", factors, stage.tolerance, MOST_GRADIENTS, doing)
        table = NetworkTable(stage, solution)
        expected = ROW_GRADIENTS * sum(rank < table.largest for rank in options.ranks) + PATTERN_GRADIENTS
        with self._said("ranks", "Examining ranks on the network", expected if table.largest else 0) as stage.advance:
            for rank in sorted(set(options.ranks)):
                if table.fits(table.clipped(rank)) or not stage.spent(f"examining rank {rank}"):
                    table.row(rank)
            uniform = smallest_uniform(table, options.captured)
            pattern, point = smallest_pattern(table, options.captured, uniform)
        with self.clock.stage("network-heldout", "Measuring held-out rows on the network"):
            return self._record(table, lam, chosen_by, path, uniform, pattern, point, report)

    @contextmanager
    def _said(self, key: str, title: str, expected: int) -> Iterator[Callable[[], None]]:
        """A stage that says what it is expected to take, and how far it is in gradients."""
        stage, before = self.stage, self.stage.gradients
        seconds = expected * stage.budget.per_pass
        told = f"{title} (about {expected} passes, {seconds:.0f} s)" if seconds >= 1 else title
        with self.clock.stage(f"network-{key}", told) as advance:
            yield lambda: advance(done := stage.gradients - before, max(expected, done + 1))

    def _record(
        self,
        table: NetworkTable,
        lam: float,
        chosen_by: str,
        path: list[NetworkStep],
        uniform: int,
        pattern: dict[str, int],
        point: Reached,
        report: HeldOutRows | None,
    ) -> NetworkAnswer:
        stage, solution = self.stage, table.solution
        asked = set(self.options.ranks)
        known = [rank for rank in asked if table.known(rank)]
        examined: list[int] = sorted(set(known) | set(table.rows) | ({uniform} if uniform else set()))
        figures, heldout, heldout_r = _held_out(report, {rank: table.row(rank) for rank in examined}, solution)
        record = NetworkPlan(
            n_samples=len(self.lin.prepared.split.train),
            weight_decay=lam,
            weight_decay_chosen_by=chosen_by,
            lambda_max=self.lin.lambda_max,
            optimum=_optimum(solution, stage.objective),
            r=uniform,
            captured_uniform=table.captured(table.row(uniform).objective),
            pattern={name: rank for name, rank in pattern.items() if rank},
            captured_pattern=table.captured(point.objective),
            path=path,
            ranks=[_row(table, rank, rank in asked, figures.get(rank, (None, None))) for rank in examined],
            heldout=heldout,
            skipped=stage.objective.skipped,
            gradients=stage.gradients,
            stopped=stage.budget.stopped,
        )
        factors = {name: (u.cpu(), v.cpu()) for name, (u, v) in solution.factors.items()}
        return NetworkAnswer(record, factors, heldout_r)


def _optimum(solution: Reached, objective: NetworkObjective) -> NetworkOptimum:
    gained = objective.at_zero - solution.objective
    return NetworkOptimum(
        objective=solution.objective,
        objective_at_zero=objective.at_zero,
        loss=solution.loss,
        gap=solution.gap,
        relative_gap=_share(solution.gap, gained, objective.noise),
        noise=objective.noise,
        modules=solution.modules,
        status=solution.status,
        remedy=solution.remedy,
        gradients=solution.gradients,
        forwards=solution.forwards,
        captures=solution.captures,
        history=solution.history,
    )


def _share(gap: float, gained: float, noise: float) -> float | None:
    """A gap as a share of what was gained; None where nothing was gained and yet something could be."""
    if gained > noise:
        return gap / gained
    return 0.0 if gap <= noise else None


def _row(table: NetworkTable, rank: int, requested: bool, figures: tuple[float | None, float | None]) -> NetworkRank:
    found = table.row(rank)
    same = found is table.solution
    return NetworkRank(
        rank=rank,
        objective=found.objective,
        captured=table.captured(found.objective),
        verdict=found.verdict,
        parameters=table.parameters(table.clipped(rank)),
        gap=found.gap,
        spectral_ratio=found.spectral_ratio,
        heldout_loss=figures[0],
        heldout_accuracy=figures[1],
        gradients=0 if same else found.gradients,
        start="the solution itself" if same else found.start,
        requested=requested,
    )


def _held_out(
    report: HeldOutRows | None, rows: dict[int, Reached], solution: Reached
) -> tuple[dict[int, tuple[float, float | None]], NetworkHeldOut | None, int | None]:
    """Figures by rank, without and with the certified point, and the smallest rank within one paired standard error."""
    if report is None:
        return {}, None, None
    base, before = report.measured({})
    losses, figures = {0: base}, {}
    known: dict[int, tuple[Tensor, float | None]] = {}
    for rank, row in rows.items():
        if id(row) not in known:  # several ranks may have the solution
            known[id(row)] = report.measured(row.factors)
        found = known[id(row)]
        losses[rank], figures[rank] = found[0], (float(found[0].mean()), found[1])
    own, share = known.get(id(solution)) or report.measured(solution.factors)
    summary = NetworkHeldOut(
        rows=len(report),
        loss_without_adapter=float(base.mean()),
        loss=float(own.mean()),
        accuracy_without_adapter=before,
        accuracy=share,
    )
    return figures, summary, smallest_within_error(losses)
