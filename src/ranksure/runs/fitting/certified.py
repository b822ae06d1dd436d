"""A fit by the network's own solver: no rank and no learning rate, and a certificate over all ranks at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from ranksure.adapters.matrices import zero_column
from ranksure.errors import SettingError
from ranksure.factors import Factors, ranks_of
from ranksure.network.logits import Batch
from ranksure.progress import Clock
from ranksure.quantities import parse_memory
from ranksure.records.certificate import RunCertificate
from ranksure.records.fit import Solved
from ranksure.runs.certificate.settings import TOLERANCE
from ranksure.runs.fitting.folder import Workspace
from ranksure.runs.fitting.inputs import Setup
from ranksure.runs.fitting.settings import FitSettings
from ranksure.solvers.network import NetworkSolution, network_objective, solve_objective
from ranksure.solvers.network_objective import NetworkObjective

MOST = 700
"""Gradients, where no limit is given."""


def solve(
    setup: Setup,
    options: FitSettings,
    lam: float,
    start: Factors | None,
    batches: Sequence[Batch],
    work: Workspace,
    clock: Clock,
) -> tuple[NetworkSolution, bool]:
    """Solve the network from factors by their names on disk, or go on from the last round that ``work`` holds.

    What is worse than no update is no start.

    Returns:
        The solution, and whether it began at ``start``.

    Raises:
        SettingError: no update is best, or none was found within the limit.
        DataError, CaptureError: as :func:`ranksure.solvers.network.solve_network`.
    """
    targets = {setup.prefix + name: setup.base.get_submodule(setup.prefix + name) for name in setup.shapes}
    most = options.max_steps or MOST
    asked: dict[str, Any] = {"weight_decay": lam, "loss": setup.kind, "weighting": options.weighting}
    asked["memory_bytes"] = parse_memory(options.memory)
    with (
        clock.stage("train", "Solving the network") as advance,
        network_objective(setup.base, batches, targets, **asked) as objective,
    ):
        begun = None if start is None else _lower(objective, setup, start)
        solved = solve_objective(
            objective,
            start=begun,
            tolerance=options.gain,
            of_objective=TOLERANCE if options.tolerance is None else math.inf,
            max_gradients=most,
            progress=lambda gradients, point: advance(min(gradients, most), most),
            checkpoint=work.save_round,
            resume=work.last_round(),
        )
    if any(solved.ranks.values()):
        return solved, begun is not None
    if solved.status == "converged":
        norms = max(state.gradient_norm for state in solved.states.values())
        raise SettingError(
            f"at lambda {lam:.4g} no update at all is best, so there is nothing to train: gradients there have norms "
            f"up to {norms:.4g}; choose a smaller `lam`"
        )
    raise SettingError(f"{most} gradients were too few for a first direction: raise `max_steps`")


def _lower(objective: NetworkObjective, setup: Setup, start: Factors) -> Factors | None:
    """The start with every target named; None, and a note, where no update at all has a lower objective."""
    factors = objective.zero()
    for name, pair in start.items():
        u, v = (x.to(objective.device, torch.float64) for x in pair)
        factors[setup.prefix + name] = (u, v)
    found = objective.loss(factors) + objective.penalty_of(factors)
    if found < objective.at_zero:
        return factors
    setup.notes.append(
        f"The start has objective {found:.5g}, and no update at all {objective.at_zero:.5g}: it began from none."
    )
    return None


def with_zeros(factors: Factors) -> Factors:
    """The same updates where every module has a column: PEFT has no rank 0."""
    return {name: pair if pair[0].shape[1] else zero_column(*pair) for name, pair in factors.items()}


def at_ranks(certificate: RunCertificate, ranks: dict[str, int]) -> RunCertificate:
    """A certificate of factors :func:`with_zeros`, of the ranks that they had."""
    modules = {name: replace(state, rank=ranks[name]) for name, state in certificate.modules.items()}
    return replace(certificate, modules=modules)


def kept(factors: Factors) -> Factors:
    """Those of a rank above zero."""
    return {name: pair for name, pair in factors.items() if pair[0].shape[1]}


def rounds(solved: NetworkSolution) -> list[dict[str, Any]]:
    """The history as a fit records it, the end included: gradients so far, the objective, and the gap."""
    end = (solved.gradients, solved.objective, solved.gap)
    every = solved.history if solved.history[-1] == end else [*solved.history, end]
    return [{"step": step, "objective": objective, "gap": gap} for step, objective, gap in every]


def solved_record(
    solved: NetworkSolution,
    setup: Setup,
    options: FitSettings,
    lam: float,
    start: Literal["nothing", "plan", "adapter"],
) -> Solved:
    """How the solver ended, as a fit records it."""
    ranks = ranks_of(setup.named_as_planned(solved.factors))
    return Solved(
        status=solved.status,
        remedy=solved.remedy,
        objective=solved.objective,
        objective_at_zero=solved.objective_at_zero,
        gap=solved.gap,
        relative_gap=solved.relative_gap,
        tolerance=options.gain,
        spectral_ratio=max(state.gradient_norm for state in solved.states.values()) / lam,
        noise=solved.noise,
        gradients=solved.gradients,
        forwards=solved.forwards,
        captures=solved.captures,
        start=start,
        skipped=solved.skipped,
        without=[name for name, rank in ranks.items() if not rank],
    )


def other_objective(solved: NetworkSolution, certificate: RunCertificate) -> list[str]:
    """A note where the network under the adapter, in its own precision, has another objective than the solver saw."""
    found, gained = certificate.objective, solved.objective_at_zero - solved.objective
    if found is None or abs(found - solved.objective) <= max(1e-3 * gained, 4 * solved.noise):
        return []
    return [
        f"The solver reached an objective of {solved.objective:.6g}; the network under the adapter, in its own "
        f"precision, has {found:.6g}."
    ]
