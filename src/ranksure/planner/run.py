"""``ranksure.plan()``: the question "which rank?" answered for a model and its data."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ranksure.capture import check_memory
from ranksure.errors import RanksureError, one_line
from ranksure.factors import Factors
from ranksure.losses import accuracy
from ranksure.network.logits import predict
from ranksure.network.side_path import applied
from ranksure.planner.advice import FoundRanks, by_linearised, by_network
from ranksure.planner.network.run import NetworkAnswer, plan_network
from ranksure.planner.prepare import Linearised, Prepared, estimate, linearise, prepare
from ranksure.planner.ranks import (
    RankTable,
    TableRow,
    clipped,
    parameters,
    rank_table,
    smallest_pattern,
    smallest_within_error,
)
from ranksure.planner.result import PlanResult, generalization_record
from ranksure.planner.settings import PlanSettings
from ranksure.planner.subsets import extrapolate, subset_row, subset_rows
from ranksure.problem import Problem
from ranksure.progress import Advance, Clock, Reporter, Silent
from ranksure.quantities import parse_share
from ranksure.records.plan import (
    Bound,
    Estimate,
    Extrapolation,
    Generalization,
    Head,
    HeldOutFigures,
    Linearity,
    Optimum,
    PathStep,
    Plan,
    PlanBounds,
    RankRow,
    Source,
    Subset,
)
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.path import PathPoint, lambda_path
from ranksure.solvers.solution import Solution
from ranksure.tasks.linearise import HeldOut
from ranksure.theory.bounds import Bounds, existence_bounds, landscape_bounds, numerical_rank
from ranksure.theory.generalization import generalization_bound

_PATIENCE = 3  # the path ends after this many points without a lower selection loss
_SIGN_DRAWS = 32  # adjoints spent on the Rademacher average of the generalisation bound
_GRAM_LIMIT = 4096  # largest N C whose Gram matrix is formed for the numerical rank


def plan(
    model: Any,
    data: Any,
    *,
    tokenizer: Any = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> PlanResult:
    """Find the LoRA rank that a fine-tuning needs, and prove the answer.

    Args:
        model: model folder, Hub id, or a sequence-classification model in memory.
        data: ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` file, ``save_to_disk`` folder, Hub id, data
            frame, data set, or :class:`~ranksure.data.texts.Rows`.
        tokenizer: needed with a model in memory.
        reporter: receives progress.
        **settings: see :class:`~ranksure.planner.settings.PlanSettings`.

    Returns:
        The result; ``result.lora_config`` is a ``peft.LoraConfig``, ``result.save(folder)`` writes
        ``plan.json`` and the solved adapter.

    Raises:
        RanksureError: whatever in the input cannot be used, in one line.
    """
    options = PlanSettings(**settings)
    clock = Clock(reporter or Silent())
    prepared = prepare(model, data, options, tokenizer, clock)
    return run_plan(prepared, clock)


def run_plan(prepared: Prepared, clock: Clock, kept: Path | None = None) -> PlanResult:
    """Everything after data and model are read; what the network's part finishes is kept in the file ``kept``."""
    options, task, train = prepared.settings, prepared.task, prepared.split.train
    guess = estimate(prepared)
    check_memory(guess.total_bytes, options.memory_bytes, "the captured factors and their working copies")
    lin = linearise(prepared, clock)
    bounds = _bounds(lin, clock)
    lam, path = _choose_lambda(lin, clock)
    problem = lin.problem.with_penalty(lam)
    solution = _solve(problem, path, options, clock)
    with clock.stage("generalization", "Computing the generalisation bound") as advance:
        generalization = _generalization(lin, problem, advance)
    ranks = _examine_ranks(problem, solution, options, clock)
    subsets, extrapolation = _subsets(problem, solution, prepared, clock)
    with clock.stage("linearity", "Comparing with the real network"):
        linearity = _linearity(lin, solution.factors)
    figures, heldout, heldout_rank = _held_out(lin, ranks.table)
    answer = None if options.linearised else _network(lin, clock, lam, kept)
    advice = by_linearised(problem, ranks, lam, heldout_rank, None if options.merged else task.adapted)
    record = Plan(
        model=task.name,
        revision=task.revision,
        data=Source(source=train.source, sha256=train.sha256, rows=prepared.split.total),
        n_samples=problem.operator.n_samples,
        n_outputs=task.n_outputs,
        loss=prepared.loss.name,
        mean_per=prepared.loss.term,
        pooling=task.pooling,
        task=task.record(),
        weight_decay=lam,
        weight_decay_chosen_by="held-out loss on the path" if options.weight_decay == "auto" else "the user",
        lambda_max=lin.lambda_max,
        target_modules=list(problem.operator.shapes),
        shapes=dict(problem.operator.shapes),
        bounds=bounds,
        path=_path_record(lin, path),
        optimum=_optimum_record(solution),
        ranks=[_row_record(problem, row, figures) for row in ranks.table.rows],
        heldout=heldout,
        recommended=advice
        if answer is None
        else by_network(advice, answer.record, answer.heldout_r, problem, prepared),
        subsets=subsets,
        extrapolation=extrapolation,
        linearity=linearity,
        generalization=generalization,
        network=None if answer is None else answer.record,
        head=_head_record(lin),
        captured_target=options.captured,
        seed=options.seed,
        estimate=Estimate(bytes=guess.total_bytes, seconds=guess.capture_seconds + guess.solve_seconds),
        seconds={**clock.seconds, "total": round(sum(clock.seconds.values()), 3)},
        notes=prepared.notes,
        settings=options.to_json(),
        versions={name: version(name) for name in ("torch", "transformers", "peft")},
    )
    task.kept.clear()  # prepared inputs, which the result need not hold
    return PlanResult(record, (answer or solution).factors, prepared, solution.factors)


def _network(lin: Linearised, clock: Clock, lam: float, kept: Path | None) -> NetworkAnswer | None:
    """The network's own answer; where it cannot be had, a note says why, and what the linearised one says stands."""
    try:
        return plan_network(lin, None if lin.chooses else lam, clock, kept)
    except RanksureError as error:
        lin.prepared.notes.append(f"The network itself was not solved, only its linearisation: {one_line(error)}")
        return None


def _solve(problem: Problem, path: list[PathPoint], options: PlanSettings, clock: Clock) -> Solution:
    """The certified optimum, from the nearest point of the path."""
    lam = max(problem.penalty.values())
    start = min(path, key=lambda point: abs(math.log(point.lam / lam))).solution.factors if path else None
    with clock.stage("solve", "Solving to a certified optimum") as advance:
        return solve(
            problem,
            tolerance=options.linear_tolerance,
            start=start,
            progress=lambda index, certificate: advance(
                _digits(certificate.relative_gap, options.linear_tolerance), 100
            ),
        )


def _examine_ranks(problem: Problem, solution: Solution, options: PlanSettings, clock: Clock) -> FoundRanks:
    with clock.stage("ranks", "Examining ranks") as advance:
        table, smallest = rank_table(
            problem,
            solution,
            list(options.ranks),
            share=options.captured,
            seed=options.seed,
            random_starts=options.random_starts,
            advance=advance,
        )
    if not any(solution.ranks.values()):
        return FoundRanks(table, 0, 1.0, dict.fromkeys(solution.ranks, 0), 1.0)
    uniform, reached = clipped(problem, smallest), table.row(smallest).captured[0]
    with clock.stage("pattern", "Finding the smallest rank pattern") as advance:
        pattern, point = smallest_pattern(problem, solution, options.captured, advance)
    if parameters(problem, uniform) < parameters(problem, pattern):
        return FoundRanks(table, smallest, reached, uniform, reached)
    return FoundRanks(table, smallest, reached, pattern, table.captured(point.certificate)[0])


def _subsets(
    problem: Problem, solution: Solution, prepared: Prepared, clock: Clock
) -> tuple[list[Subset], Extrapolation | None]:
    n, options = problem.operator.n_samples, prepared.settings
    if prepared.split.total <= n or not any(solution.ranks.values()):
        return [], None
    with clock.stage("subsets", "Solving nested subsets") as advance:
        sizes = [size for size in (n // 4, n // 2) if size >= 4]
        rows = subset_rows(problem, sizes, options.ranks, options.captured, advance)
        rows.append(subset_row(problem, solution, n, options.ranks, options.captured))
        return rows, extrapolate(rows, prepared.split.total)


def _digits(gap: float, tolerance: float) -> int:
    """Progress of a solve in percent of the decimal digits that the gap has to lose."""
    if not 0 < gap < 1:
        return 0 if gap else 100
    return min(100, int(100 * math.log10(gap) / math.log10(tolerance)))


def _bounds(lin: Linearised, clock: Clock) -> PlanBounds:
    problem, task = lin.problem, lin.prepared.task
    operator = problem.reduced[0].operator
    shapes = dict(problem.operator.shapes)
    n = problem.operator.n_samples
    effective = problem.loss.effective_outputs(task.n_outputs)
    whole, each = None, None
    if n * problem.operator.n_outputs <= _GRAM_LIMIT:
        with clock.stage("bounds", "Measuring the rank of the operator") as advance:
            total = None
            each = {}
            for index, name in enumerate(shapes):
                gram = operator.gram([name])
                each[name] = numerical_rank(gram)
                total = gram if total is None else total + gram
                advance(index + 1, len(shapes))
            assert total is not None
            whole = numerical_rank(total)
    return PlanBounds(
        existence=_bound(existence_bounds(n, task.n_outputs, effective, whole, shapes)),
        landscape=_bound(landscape_bounds(n, task.n_outputs, effective, each, shapes)),
        operator_rank=whole,
    )


def _bound(bounds: Bounds) -> Bound:
    return Bound(paper=bounds.paper, effective=bounds.effective, numerical=bounds.numerical)


def _choose_lambda(lin: Linearised, clock: Clock) -> tuple[float, list[PathPoint]]:
    asked = lin.prepared.settings.weight_decay
    if not isinstance(asked, str):
        return float(asked), []
    share = parse_share(asked)
    if share is not None:
        return max(share * lin.lambda_max, 1e-300), []
    if lin.lambda_max == 0:
        return 1.0, []
    select = lin.select
    assert select is not None
    losses: list[float] = []

    def enough(points: list[PathPoint]) -> bool:
        losses.append(float(select.losses(points[-1].solution.factors).mean()))
        return len(losses) - losses.index(min(losses)) > _PATIENCE

    with clock.stage("path", "Following the path of lambda") as advance:
        path = lambda_path(lin.problem, stop=enough, progress=lambda index, point: advance(index + 1, 12))
    return path[losses.index(min(losses))].lam, path


def _path_record(lin: Linearised, path: list[PathPoint]) -> list[PathStep]:
    return [
        PathStep(
            weight_decay=point.lam,
            selection_loss=float(lin.select.losses(point.solution.factors).mean()) if lin.select else None,
            objective=point.solution.certificate.objective,
            ranks=point.solution.ranks,
            relative_gap=point.solution.certificate.relative_gap,
        )
        for point in path
    ]


def _optimum_record(solution: Solution) -> Optimum:
    certificate = solution.certificate
    return Optimum(
        objective=certificate.objective,
        dual=certificate.dual,
        gap=certificate.gap,
        relative_gap=certificate.relative_gap,
        objective_at_zero=certificate.objective_at_zero,
        ranks=solution.ranks,
        spectral_ratio=certificate.spectral_ratio,
        status=solution.status,
        remedy=solution.remedy,
    )


_Figures = dict[int, tuple[float, float | None]]  # held-out loss and accuracy by rank


def _held_out(lin: Linearised, table: RankTable) -> tuple[_Figures, HeldOutFigures | None, int | None]:
    """Figures by rank, without an adapter, and the smallest rank within one paired standard error of the best."""
    held = lin.report
    if held is None:
        return {}, None, None
    base = held.losses({})
    losses: dict[int, Tensor] = {0: base}
    figures: _Figures = {}
    for row in table.rows:
        losses[row.rank] = held.losses(row.factors)
        figures[row.rank] = float(losses[row.rank].mean()), held.accuracy(row.factors)
    best = min(losses, key=lambda rank: float(losses[rank].mean()))
    summary = HeldOutFigures(
        rows=len(held.rows),
        loss_without_adapter=float(base.mean()),
        accuracy_without_adapter=held.accuracy({}),
        best_rank=best,
        note="rows that chose nothing; figures of the linearised network",
    )
    return figures, summary, smallest_within_error(losses)


def _row_record(problem: Problem, row: TableRow, figures: _Figures) -> RankRow:
    loss, accuracy = figures.get(row.rank, (None, None))
    return RankRow(
        rank=row.rank,
        objective=row.certificate.objective,
        gap=row.certificate.gap,
        spectral_ratio=row.certificate.spectral_ratio,
        captured=row.captured,
        heldout_loss=loss,
        heldout_accuracy=accuracy,
        parameters=parameters(problem, clipped(problem, row.rank)),
        verdict=row.verdict,
        starts=row.starts,
        stationary=row.stationary,
        negative_curvature=row.negative_curvature,
        requested=row.requested,
    )


def _generalization(lin: Linearised, problem: Problem, advance: Advance) -> Generalization:
    """Theorem 5.1 on the training rows, with what speaks against it here."""
    reasons = []
    if lin.head is not None:
        reasons.append("the head was fitted on these rows")
    if lin.prepared.split.train.label_names is not None:
        reasons.append("the rows were drawn by class")  # in the classes' shares, hence not independent
    seed = lin.prepared.settings.seed
    bound = generalization_bound(problem, draws=_SIGN_DRAWS, seed=seed, reasons=reasons, advance=advance)
    return generalization_record(bound, max(problem.penalty.values()), lin.lambda_max)


def _head_record(lin: Linearised) -> Head:
    fit = lin.head
    if fit is None:
        return Head(accuracy=lin.pooling_accuracy)
    return Head(new=True, accuracy=lin.pooling_accuracy, ridge=fit.ridge, cross_validated_loss=min(fit.scores))


def _linearity(lin: Linearised, factors: Factors) -> Linearity:
    """``||z(W0 + delta) - z_lin|| / ||z_lin - z(W0)||`` in the logits that the loss can see."""
    prepared, loss = lin.prepared, lin.prepared.loss
    out: dict[str, Any] = {}
    if all(u.shape[1] == 0 for u, _ in factors.values()):
        return Linearity(train=0.0, heldout=0.0 if lin.report else None, note="the update is zero")
    problem = lin.problem
    train = HeldOut(problem.operator, problem.base_logits, problem.labels, loss, prepared.split.train)
    contrasts = loss.contrasts(prepared.task.n_outputs)
    for key, part in (("train", train), ("heldout", lin.report)):
        if part is None:
            continue
        linear, base, labels = part.logits(factors), part.base_logits, part.labels
        with applied(prepared.targets, factors):
            batches, back = prepared.task.batches_by_length(part.rows)
            real = predict(prepared.task.model, batches).double()[back]
        moved = ((linear - base) @ contrasts).norm()
        out[key] = float(((real - linear) @ contrasts).norm() / moved.clamp(min=1e-300))
        out[f"{key}_real_loss"] = float(loss.value(real, labels).mean())
        out[f"{key}_linear_loss"] = float(loss.value(linear, labels).mean())
        out[f"{key}_real_accuracy"] = accuracy(real, labels, loss)
    return Linearity(**out)
