"""The network itself: low-rank factors on a real network, certified against all ranks of the model re-linearised there.

``Phi(u, v) = loss(W0 + u v^T) + sum_j (lambda_j / 2)(||u_j||^2 + ||v_j||^2)`` is descended by L-BFGS; one gradient pass
then gives the duality gap of the model re-linearised at that point (:mod:`ranksure.relinearised`). New directions are
added only outside the tangent space of the factors, and only when descent at the present ranks is done: a spectral
ratio above one in the middle of a descent is no missing rank. No rank and no learning rate is chosen.

What holds: the objective is that of the network, measured. The gap bounds what the model re-linearised at the end point
could still gain at any rank; it bounds no optimum of the network, which is not convex.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from ranksure.factors import Factors, ranks_of
from ranksure.losses import Kind
from ranksure.network.batch_losses import Forward, Weighting
from ranksure.network.gradient import mean_loss
from ranksure.network.logits import Batch, batch_rows, frozen
from ranksure.network.prefix import cached_prefix
from ranksure.network.row_losses import LossCheck
from ranksure.relinearised import ModuleState
from ranksure.solvers.network_objective import NetworkObjective, NetworkPoint
from ranksure.solvers.network_rounds import Checkpoint, Progress, Rounds
from ranksure.solvers.solution import Status


@dataclass(frozen=True)
class NetworkSolution:
    """Where the solver ended.

    Attributes:
        factors: balanced factors by module, float64.
        objective: of the network at the point, with the nuclear norm as the penalty.
        objective_at_zero: the loss of the network without an update.
        loss: mean loss at the point.
        states: spectral facts by module; ``stationarity`` and ``outside_norm`` say how near a first-order optimum is.
        gap: bound on what the model re-linearised at the point could still gain at any rank.
        noise: how much an evaluation changes with the order of its rows.
        status: ``converged`` where the gap is at most ``tolerance`` of what was gained.
        remedy: what to do where it is not.
        gradients: passes forward and back over the data.
        forwards: passes forward alone.
        captures: captures of the model re-linearised at a point.
        seconds: wall-clock time.
        skipped: frozen layers that ran once.
        unreached: modules that the loss does not depend on: nothing was or can be gained there.
        history: objective and gap of every round, with the gradients until then.
    """

    factors: Factors
    objective: float
    objective_at_zero: float
    loss: float
    states: dict[str, ModuleState]
    gap: float
    noise: float
    status: Status
    remedy: str
    gradients: int
    forwards: int
    captures: int
    seconds: float
    skipped: list[str]
    unreached: list[str]
    history: list[tuple[int, float, float]] = field(default_factory=list)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every module."""
        return ranks_of(self.factors)

    @property
    def relative_gap(self) -> float:
        """The gap as a share of what was gained."""
        gained = self.objective_at_zero - self.objective
        return self.gap / gained if gained > 0 else (0.0 if self.gap <= self.noise else math.inf)


class Solving(TypedDict, total=False):
    """What :func:`solve_objective` is told."""

    start: Factors | None
    tolerance: float
    of_objective: float
    max_gradients: int
    max_seconds: float
    progress: Progress
    checkpoint: Callable[[Checkpoint], None] | None
    resume: Checkpoint | None


def solve_network(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Mapping[str, nn.Module],
    *,
    weight_decay: float | Mapping[str, float],
    loss: Kind | None = None,
    weighting: Weighting = "token",
    memory_bytes: float = 4 * 2**30,
    **solving: Unpack[Solving],
) -> NetworkSolution:
    """Minimise ``mean loss + lambda sum_j ||delta_j||_*`` of a network over updates of its target modules.

    Full batch, in evaluation mode: dropout is off. What lies below the lowest target runs once.

    Args:
        model: the network; nothing in it changes. An adapter that it already has counts as part of it.
        batches: with ``labels``, as the model takes them.
        targets: modules by name (see :func:`ranksure.network.targets.select_targets`).
        weight_decay: lambda, for all modules or by name: the L2 decay of factors of scale one.
        loss: its name; by the model's own rules by default, checked against the loss that it computes itself.
        weighting: of a causal language model's tokens: every ``token`` or every ``sample`` alike.
        memory_bytes: for what the frozen layers give, and for a capture where the cheap certificate is loose.
        **solving: as :func:`solve_objective`'s.

    Raises:
        SettingError: a lambda that is not positive, a loss that is not the model's own, or a start at which the network
            overflows.
        TargetError: a module that is quantised.
        DataError, CaptureError: as :func:`ranksure.network.gradient.gradient_pass`.
    """
    with network_objective(
        model,
        batches,
        targets,
        weight_decay=weight_decay,
        loss=loss,
        weighting=weighting,
        memory_bytes=memory_bytes,
    ) as objective:
        return solve_objective(objective, **solving)


@contextmanager
def network_objective(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Mapping[str, nn.Module],
    *,
    weight_decay: float | Mapping[str, float] = 1.0,
    loss: Kind | None = None,
    weighting: Weighting = "token",
    memory_bytes: float = 4 * 2**30,
) -> Generator[NetworkObjective]:
    """The objective of a network on these rows, made ready once for many solves (see ``with_penalty``).

    Within the context the frozen layers below the targets do not run again. Arguments and errors: as
    :func:`solve_network`.
    """
    kind = loss or _own_kind(model, batches[0])
    _check_rows(model, batches, kind, weighting)  # by the whole network, as is the next
    turned = _turned_loss(model, batches, kind, weighting)
    with cached_prefix(model, batches, targets, memory_bytes) as prefix:
        objective = NetworkObjective(
            model,
            prefix.batches,
            targets,
            weight_decay,
            kind,
            prefix.paused,
            weighting=weighting,
            memory_bytes=memory_bytes,
            skipped=prefix.skipped,
        )
        objective.disorder = abs(turned - objective.at_zero)
        yield objective


def solve_objective(
    objective: NetworkObjective,
    *,
    start: Factors | None = None,
    tolerance: float = 0.01,
    of_objective: float = math.inf,
    max_gradients: int = 700,
    max_seconds: float = math.inf,
    progress: Progress = lambda gradients, point: None,
    checkpoint: Callable[[Checkpoint], None] | None = None,
    resume: Checkpoint | None = None,
) -> NetworkSolution:
    """:func:`solve_network` of a network made ready; counts are those of this solve alone.

    Args:
        objective: from :func:`network_objective`.
        start: factors to start from; no update by default.
        tolerance: the gap to reach, as a share of what was gained.
        of_objective: and as a share of the objective reached, of which what was gained may be a multiple.
        max_gradients: most passes forward and back over the data.
        max_seconds: for this call, looked at between evaluations.
        progress: called with the gradients so far and the last point that was examined, after every gradient.
        checkpoint: called after every round with what is needed to go on.
        resume: such a thing, of the same objective: the solve goes on to the same bits.

    Raises:
        SettingError: a start at which the network overflows.
    """
    rounds = Rounds(objective, tolerance, max_gradients, max_seconds, progress, checkpoint, of_objective)
    end = rounds.run(start, resume)
    point, counts = end.point, rounds.counts
    return NetworkSolution(
        factors=point.factors,
        objective=point.objective,
        objective_at_zero=objective.at_zero,
        loss=point.loss,
        states=point.states,
        gap=end.gap,
        noise=objective.noise,
        status=end.status,
        remedy=end.remedy,
        gradients=counts.gradients,
        forwards=counts.forwards,
        captures=counts.captures,
        seconds=rounds.seconds,
        skipped=objective.skipped,
        unreached=point.unreached,
        history=rounds.history,
    )


def descend_at_ranks(objective: NetworkObjective, start: Factors, *, max_gradients: int = 40) -> NetworkPoint:
    """Descent at the ranks of a start, which neither grow nor shrink, and what one gradient pass says of its end."""
    rounds = Rounds(objective, 1e-3, max_gradients - 1, inner=1e-4)  # the last one examines
    return objective.examine_start(rounds.descended(start)[0])


def _own_kind(model: nn.Module, batch: Batch) -> Kind:
    """The loss that the model itself trains with on such labels, compared with what it computes."""
    forward = Forward(model, check=True)
    with frozen(model):
        forward.gradients(batch, lambda: None, lambda: None)
    assert forward.kind is not None
    return forward.kind


def _check_rows(model: nn.Module, batches: Sequence[Batch], kind: Kind, weighting: Weighting) -> None:
    """The mean loss is one of the rows, however they share batches.

    Raises:
        RowsInteract: it is not.
    """
    forward, check = Forward(model, kind, weighting), LossCheck(batches)
    with frozen(model), torch.no_grad():
        for batch in batches:
            forward.losses_only(batch)
            check.see(batch, forward)
        check.finish(forward)


def _turned_loss(model: nn.Module, batches: Sequence[Batch], kind: Kind, weighting: Weighting) -> float:
    """Mean loss with batches and rows in the opposite order: what differs is the noise of an evaluation."""
    turned = [{key: _turned(value, batch_rows(batch)) for key, value in batch.items()} for batch in batches]
    return mean_loss(model, turned[::-1], kind=kind, weighting=weighting)


def _turned(value: object, rows: int) -> object:
    return value.flip(0) if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
