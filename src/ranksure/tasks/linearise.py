"""From (task, targets, rows, loss) to a linearised problem: the one recipe of planner, fit and lab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.capture import Progress, capture
from ranksure.data.samples import Samples
from ranksure.factors import Factors
from ranksure.losses import Loss, accuracy
from ranksure.network.logits import predict
from ranksure.operators.base import TangentOperator, cast_factors
from ranksure.problem import Problem, uniform_penalty
from ranksure.progress import Clock, Silent
from ranksure.tasks.head import HeadFit, fit_head, head_features, install_head
from ranksure.tasks.task import Task


@dataclass
class HeldOut:
    """Rows that the network was captured on, as a rule such as the solver never sees; with sentences for the user."""

    operator: TangentOperator
    base_logits: Tensor
    labels: Tensor
    loss: Loss
    rows: Samples
    notes: list[str] = field(default_factory=list)

    def logits(self, factors: Factors) -> Tensor:
        """Linearised logits, ``(N, K)``, float64."""
        contrasts = self.loss.contrasts(self.base_logits.shape[1])
        present = {name: pair for name, pair in factors.items() if pair[0].shape[1] > 0}
        if not present:
            return self.base_logits
        z = self.operator.apply_factors(cast_factors(present, self.operator)).double()
        return self.base_logits + z @ contrasts.T

    def losses(self, factors: Factors) -> Tensor:
        """Loss of each row."""
        return self.loss.value(self.logits(factors), self.labels)

    def accuracy(self, factors: Factors) -> float | None:
        """Share of rows classified correctly; None for regression."""
        return accuracy(self.logits(factors), self.labels, self.loss)

    def problem(self) -> Problem:
        """The problem of these rows at ``lambda = 1`` for every module."""
        return Problem(self.operator, self.base_logits, self.labels, self.loss, uniform_penalty(self.operator, 1.0))


@dataclass
class Linearisation:
    """A task at its present weights.

    Attributes:
        problem: the linearised problem at ``lambda = 1`` (see ``Problem.with_penalty``), samples in the order of the
            rows; its operator and base logits are those of the capture.
        head: the head that was fitted; None where the task brought a trained one, or has none.
        held_out: the other parts, in the order that they were given.
        notes: sentences for the user.
    """

    problem: Problem
    head: HeadFit | None
    held_out: list[HeldOut | None]
    notes: list[str]


def linearise(
    task: Task[Any],
    targets: Mapping[str, nn.Module],
    rows: Samples,
    loss: Loss,
    *,
    held_out: Sequence[Samples | None] = (),
    dtype: torch.dtype = torch.float32,
    clock: Clock | None = None,
) -> Linearisation:
    """Fit and install the head where it is new, and capture the network around it.

    Its two steps, :func:`fit_new_head` and :func:`capture_rows`, serve who needs one of them only.

    Args:
        task: the network and how rows reach it.
        targets: modules by name (see :func:`ranksure.network.targets.select_targets`).
        rows: training rows: of the head and of the problem.
        loss: of the problem.
        held_out: further rows to capture; None entries stay None.
        dtype: as for :func:`capture_rows`.
        clock: times the stages ``head`` and ``capture``; silent by default.

    Raises:
        CaptureError: as :func:`ranksure.capture.capture`.
    """
    clock = clock or Clock(Silent())
    head = None
    if task.head_is_new:
        with clock.stage("head", "Fitting the new head") as advance:
            head = fit_new_head(task, rows, loss, advance)
    with clock.stage("capture", "Capturing gradients of the training rows") as advance:
        train = capture_rows(task, targets, rows, loss, dtype, advance)
    held: list[HeldOut | None] = []
    if held_out:
        with clock.stage("capture", "Capturing gradients of the held-out rows") as advance:
            for part in held_out:
                held.append(None if part is None else capture_rows(task, targets, part, loss, dtype, advance))
    return Linearisation(train.problem(), head, held, train.notes)


def fit_new_head(task: Task[Any], rows: Samples, loss: Loss, progress: Progress | None = None) -> HeadFit | None:
    """Fit the task's head on rows and install it, where it is new; a trained one stays, and None is returned."""
    if not task.head_is_new:
        return None
    fit = _fitted(task, rows, loss, progress)
    assert task.head is not None
    install_head(task.model, task.head, fit)
    return fit


def capture_rows(
    task: Task[Any],
    targets: Mapping[str, nn.Module],
    rows: Samples,
    loss: Loss,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> HeldOut:
    """Gradients and base logits of rows, in their order, with their labels; the task's head is in place.

    Raises:
        CaptureError: as :func:`ranksure.capture.capture`.
    """
    batches, back = task.batches_by_length(rows)
    found = capture(task.model, batches, targets, loss.contrasts(task.n_outputs), dtype=dtype, progress=progress)
    return HeldOut(found.operator.select(back), found.base_logits[back], task.labels(rows), loss, rows, found.notes)


def accuracy_of_head(task: Task[Any], train: Samples, judge: HeldOut, progress: Progress | None = None) -> float | None:
    """Accuracy of a task's head on other rows before any adapter; a new head is fitted, and nothing is installed."""
    if not task.head_is_new:
        batches, back = task.batches_by_length(judge.rows)
        return accuracy(predict(task.model, batches).double()[back], judge.labels, judge.loss)
    features = _features(task, judge.rows, progress)
    return accuracy(_fitted(task, train, judge.loss, progress).logits(features), judge.labels, judge.loss)


def _fitted(task: Task[Any], rows: Samples, loss: Loss, progress: Progress | None) -> HeadFit:
    assert task.head is not None
    bias = getattr(task.model.get_submodule(task.head), "bias", None) is not None
    features = _features(task, rows, progress)
    return fit_head(features, task.labels(rows), loss, task.n_outputs, bias=bias)


def _features(task: Task[Any], rows: Samples, progress: Progress | None) -> Tensor:
    """What the head reads of each row, ``(N, d)``, float64."""
    assert task.head is not None
    batches, back = task.batches_by_length(rows)
    return head_features(task.model, task.head, batches, task.n_outputs, progress)[back]
