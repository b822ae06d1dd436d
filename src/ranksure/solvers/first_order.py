"""First-order LoRA training of the linearised problem, as in the paper: GD, SGD and Adam.

The objective is the factored one, ``sum_i w_i loss(z_i) + sum_j (lambda_j / 2)(||u_j||^2 + ||v_j||^2)``, with
``sum_j <P_j, Q_j Q_j^T>`` added under a perturbation (Theorem 4.1 of Jang, Lee and Ryu 2024), and every method sees
the gradient of all of it. So the weight decay is a true L2 penalty also under Adam: decoupled decay (AdamW) minimises
something else, for which no lambda and no certificate exist.

Mini-batches partition the samples once, at random, and come in a new random order in every epoch. The loss of a
batch is scaled by the number of batches, so a random batch is unbiased for any sizes and weights; the penalty and the
perturbation belong to the factors and enter every step whole, as an optimiser's ``weight_decay`` does. The updates
are torch's own (``torch.optim``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch

from ranksure.certificate import Certificate, certify_point
from ranksure.errors import SettingError
from ranksure.factors import Factors, balanced
from ranksure.operators.base import cast_factors, zero_factors
from ranksure.perturbation import Perturbation
from ranksure.problem import Problem
from ranksure.solvers.batches import mini_batches
from ranksure.solvers.initial import Init, initial_factors
from ranksure.solvers.solution import Solution, Status

Method: TypeAlias = Literal["gd", "sgd", "adam"]
Schedule: TypeAlias = Literal["constant", "inverse-sqrt"]


@dataclass(frozen=True)
class TrainingPoint:
    """One looked-at step of a run.

    Attributes:
        step: number of updates made.
        seconds: seconds of training, certificates not counted.
        factored_objective: loss plus ``(lambda/2)(||u||^2 + ||v||^2)``, plus ``<P, Q Q^T>`` under a perturbation:
            what the method minimises (without weight decay: what it would).
        objective: loss plus nuclear norms: ``F`` at the same update, never above the factored one. Under a
            perturbation, the lowest perturbed objective over all factorisations of the same update.
        relative_gap: certified relative gap of ``objective``, by the best dual value so far.
        spectral_ratio: largest ``rho_j``.
        loss: the data loss alone.
        excess: ``factored_objective`` minus the given optimum's objective; None where none was given.
    """

    step: int
    seconds: float
    factored_objective: float
    objective: float
    relative_gap: float
    spectral_ratio: float
    loss: float
    excess: float | None = None


@dataclass(frozen=True)
class TrainingRun:
    """A finished run.

    Attributes:
        solution: the last update in balanced factors (under a perturbation: in its lowest ones) with its
            certificate; ``evaluations`` counts gradient steps.
        trajectory: the looked-at steps, the start first.
        factors: the last factors as training left them, trained blocks only.
    """

    solution: Solution
    trajectory: list[TrainingPoint]
    factors: Factors


def train_lora(
    problem: Problem,
    ranks: int | dict[str, int],
    *,
    method: Method,
    learning_rate: float,
    schedule: Schedule = "constant",
    batch_size: int | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    init: Init = "peft",
    start: Factors | None = None,
    freeze_a: bool = False,
    weight_decay: bool = True,
    perturbation: Perturbation | None = None,
    optimum: Solution | None = None,
    seed: int = 0,
    steps: int = 1000,
    looks: int = 20,
    tolerance: float = 0.0,
    best_dual: float = -math.inf,
    max_seconds: float = math.inf,
    progress: Callable[[TrainingPoint], None] | None = None,
) -> TrainingRun:
    """Train LoRA factors in the operator's dtype; certificates are in float64.

    Args:
        problem: the problem.
        ranks: rank of every block, or by block name (zero or absent leaves a block out), clipped to its size.
        method: ``gd`` (all samples), ``sgd`` (mini-batches) or ``adam`` (either).
        learning_rate: step size, the first one under a decaying schedule.
        schedule: ``constant``, or ``inverse-sqrt``: ``learning_rate / sqrt(t)`` at step ``t = 1, 2, ...``
        batch_size: samples of a mini-batch; None for all.
        betas: Adam's decay rates of the first and second moments.
        epsilon: Adam's constant in the denominator.
        init: see :func:`initial_factors`.
        start: factors to start from, instead of an initialisation.
        freeze_a: train ``u`` (PEFT's ``lora_B``) alone, a convex problem; certificates are still of the full one.
        weight_decay: False trains on the loss (and the perturbation) alone; looks still report the whole problem.
        perturbation: the ``P`` of Theorem 4.1; certificates and duals are then of ``perturbation.problem``.
        optimum: a solution of the problem that is certified: its dual enters every gap, its objective ``excess``.
        seed: of the initialisation and of the mini-batches.
        steps: most updates.
        looks: about how many steps to look at, spaced geometrically.
        tolerance: stop when the relative gap at a look is at most this: the run has then ``converged``.
        best_dual: a dual value known to be feasible for the problem that is certified.
        max_seconds: most seconds of training, certificates not counted.
        progress: called at every look.

    Raises:
        SettingError: a setting out of range, frozen factors that are all zero, or what is of another problem.
    """
    _check(method, schedule, batch_size, learning_rate, betas, epsilon, steps, looks, max_seconds)
    x = _start(problem, start or initial_factors(problem, ranks, init=init, seed=seed), freeze_a)
    moving = [part for pair in x.values() for part in pair[: 1 if freeze_a else 2]]
    kind: Any = partial(torch.optim.Adam, betas=betas, eps=epsilon) if method == "adam" else torch.optim.SGD
    seen = _Looks(problem, x, perturbation, optimum, best_dual, progress)
    batches = mini_batches(problem, batch_size, seed)
    update = _updates(batches, x, kind(moving, lr=learning_rate), schedule, weight_decay, perturbation)
    return seen.run(update, steps, looks, tolerance, max_seconds, f"lower the learning rate {learning_rate:g}")


def _updates(
    batches: Iterator[Problem],
    x: Factors,
    optimiser: torch.optim.Optimizer,
    schedule: Schedule,
    weight_decay: bool,
    perturbation: Perturbation | None,
) -> Callable[[int], float]:
    """The update of a step; it returns the objective before it, of all samples or of its batch."""
    rate = optimiser.param_groups[0]["lr"]

    def update(step: int) -> float:
        optimiser.param_groups[0]["lr"] = rate / math.sqrt(step) if schedule == "inverse-sqrt" else rate
        problem = next(batches)
        value, gradient = problem.value_and_gradient(x)
        moved = {} if perturbation is None else perturbation.gradient(x)
        for name, pair in x.items():
            for side, part in enumerate(pair):
                slope = gradient[name][side]
                if not weight_decay:
                    slope = slope.sub(part, alpha=problem.penalty[name])
                part.grad = slope + moved[name][side] if name in moved else slope
        optimiser.step()
        return float(value)

    return update


def _start(problem: Problem, factors: Factors, freeze_a: bool) -> Factors:
    """Copies of the factors that will be trained."""
    like = problem.operator
    factors = {name: pair for name, pair in cast_factors(factors, like).items() if pair[0].shape[1]}
    if not factors:
        raise SettingError("every rank is zero: there is nothing to train")
    if freeze_a and not any(bool(v.any()) for _, v in factors.values()):
        raise SettingError("freeze_a keeps v at its start, and that is zero in every block: nothing could move")
    return {name: (u.clone(), v.clone()) for name, (u, v) in factors.items()}


class _Looks:
    """A run's points, certified at some steps, and the time that training takes apart from that."""

    def __init__(
        self,
        problem: Problem,
        x: Factors,
        perturbation: Perturbation | None,
        optimum: Solution | None,
        best_dual: float,
        progress: Callable[[TrainingPoint], None] | None,
    ) -> None:
        self.problem, self.x, self.perturbation, self.optimum = problem, x, perturbation, optimum
        self.exact, self.progress = problem.exact, progress
        self.certified = self.exact if perturbation is None else _perturbed(problem, perturbation)
        self.best_dual = best_dual
        if optimum is not None:
            self.best_dual = max(best_dual, _checked_dual(self.certified, optimum))
        self.trajectory: list[TrainingPoint] = []
        self.spent = self.looked = 0.0

    def run(
        self,
        update: Callable[[int], float],
        steps: int,
        looks: int,
        tolerance: float,
        max_seconds: float,
        cure: str,
    ) -> TrainingRun:
        """Train to the tolerance, to divergence (``cure`` says what helps against it), or to one of the limits."""
        began = time.perf_counter()
        at = set(log_spaced(steps, looks))
        certificate = self.look(0)
        remedy = f"the tolerance was not reached in {steps} steps; raise steps, or change the learning rate or the rank"
        step = 0
        while step < steps and certificate.relative_gap > tolerance:
            step += 1
            value = update(step)
            self.spent = time.perf_counter() - began - self.looked
            if not math.isfinite(value) or not _bounded(self.x):
                remedy = f"the run diverged at step {step}: {cure}"
                break
            out_of_time = self.spent > max_seconds
            if step in at or out_of_time:
                certificate = self.look(step)
            if out_of_time:
                remedy = f"the limit of {max_seconds:g} seconds was reached; raise max_seconds"
                break
        status: Status = "converged" if certificate.relative_gap <= tolerance else "not-converged"
        x = {name: (u.detach(), v.detach()) for name, (u, v) in self.x.items()}  # without their gradients
        last = {**zero_factors(self.problem.operator), **_lowest_factors(self.problem, x, self.perturbation)}
        history = [(point.seconds, point.relative_gap) for point in self.trajectory]
        remedy, seconds = "" if status == "converged" else remedy, time.perf_counter() - began
        return TrainingRun(Solution(last, certificate, status, remedy, step, seconds, history), self.trajectory, x)

    def look(self, step: int) -> Certificate:
        """Certify the point and add it to the trajectory."""
        paused = time.perf_counter()
        p, exact = self.perturbation, self.exact
        state = certify_point(self.certified, self.x if p is None else p.inward(self.x), self.best_dual)
        certificate = state.certificate
        self.best_dual = max(self.best_dual, certificate.dual)
        wide = cast_factors(self.x, exact.operator)
        loss = float(exact.data_loss(state.logits))
        factored = loss + float(exact.penalty_of(wide) + exact.linear_of(wide))
        if p is not None:
            factored += float(p.penalty_of(wide))
        factored = max(factored, certificate.objective)  # equal at balanced factors, up to rounding
        point = TrainingPoint(
            step,
            self.spent,
            factored,
            certificate.objective,
            certificate.relative_gap,
            certificate.spectral_ratio,
            loss,
            None if self.optimum is None else factored - self.optimum.certificate.objective,
        )
        self.trajectory.append(point)
        if self.progress is not None:
            self.progress(point)
        self.looked += time.perf_counter() - paused
        return certificate


def _lowest_factors(problem: Problem, x: Factors, perturbation: Perturbation | None) -> Factors:
    """The factors of the same update with the lowest objective; as they are after an overflow."""
    if not _bounded(x):
        return x
    if perturbation is None:
        return balanced(x)
    return cast_factors(perturbation.outward(balanced(perturbation.inward(x))), problem.operator)


def _perturbed(problem: Problem, perturbation: Perturbation) -> Problem:
    """The perturbed problem, if it is of this one."""
    base = perturbation.unperturbed
    same = (
        dict(base.operator.shapes) == dict(problem.operator.shapes)
        and all(base.penalty[name] == problem.penalty[name] for name in problem.operator.shapes)
        and torch.equal(base.labels, problem.labels)
        and torch.equal(base.base_logits, problem.base_logits)
        and torch.equal(base.weights, problem.weights)
    )
    if not same:
        raise SettingError("the perturbation is of another problem: build it from the one that is trained")
    return perturbation.problem


def _checked_dual(problem: Problem, optimum: Solution) -> float:
    """The optimum's dual value, if it is of this problem: a bound of another one would prove what is false."""
    claimed = optimum.certificate.objective
    shapes = {name: (u.shape[0], v.shape[0]) for name, (u, v) in optimum.factors.items()}
    fits = shapes.items() <= dict(problem.operator.shapes).items()
    own = certify_point(problem, optimum.factors).certificate.objective if fits else math.nan
    if not abs(own - claimed) <= 1e-6 * max(abs(claimed), problem.objective_at_zero):
        raise SettingError("the optimum is not of this problem (or, under a perturbation, not of perturbation.problem)")
    return optimum.certificate.dual


def log_spaced(steps: int, looks: int) -> list[int]:
    """About ``looks`` step numbers from 1 to ``steps``, spaced geometrically; the last is ``steps``."""
    if looks == 1:
        return [steps]
    return sorted({round(steps ** (index / (looks - 1))) for index in range(looks)} | {steps})


def _bounded(x: Factors) -> bool:
    """Whether the factors are small enough that the squares of logits cannot overflow in float64."""
    return all(float(t.abs().max()) < 1e60 for pair in x.values() for t in pair)


def _check(
    method: str,
    schedule: str,
    batch_size: int | None,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    steps: int,
    looks: int,
    max_seconds: float,
) -> None:
    if method not in ("gd", "sgd", "adam"):
        raise SettingError(f"unknown method {method!r}: use gd, sgd or adam")
    if schedule not in ("constant", "inverse-sqrt"):
        raise SettingError(f"unknown schedule {schedule!r}: use constant or inverse-sqrt")
    if (batch_size is None) != (method == "gd") and method != "adam":
        raise SettingError("gd takes all samples (no batch_size) and sgd needs a batch_size")
    if batch_size is not None and batch_size < 1:
        raise SettingError(f"batch_size must be at least 1, not {batch_size}")
    if not 0 < learning_rate < math.inf:
        raise SettingError(f"the learning rate must be positive and finite, not {learning_rate}")
    if not all(0 <= beta < 1 for beta in betas) or not epsilon > 0:
        raise SettingError(f"Adam needs betas in [0, 1) and a positive epsilon, not {betas} and {epsilon}")
    if steps < 1 or looks < 1 or not max_seconds > 0:
        raise SettingError("steps, looks and max_seconds must be positive")
