"""First-order LoRA training of the linearised problem, as in the paper: GD, SGD and Adam.

The objective is the factored one, ``sum_i w_i loss(z_i) + sum_j (lambda_j / 2)(||u_j||^2 + ||v_j||^2)``, with
``sum_j <P_j, Q_j Q_j^T>`` added under a perturbation (Theorem 4.1 of Jang, Lee and Ryu 2024), and every method sees
the gradient of all of it. So the weight decay is a true L2 penalty also under Adam: decoupled decay (AdamW) minimises
something else, for which no lambda and no certificate exist.

Mini-batches partition the samples once, at random, and come in a new random order in every epoch. The loss of a
batch is scaled by the number of batches, so a random batch is unbiased for any sizes and weights; the penalty and the
perturbation belong to the factors and enter every step whole, as an optimiser's ``weight_decay`` does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ranksure.certificate import Certificate, certify
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
    """Train LoRA factors on the linearised problem.

    Args:
        problem: the problem; training runs in its operator's dtype, certificates in float64.
        ranks: rank of every block, or by block name (zero or absent leaves a block out), clipped to its size.
        method: ``gd`` (all samples), ``sgd`` (mini-batches) or ``adam`` (either).
        learning_rate: step size, the first one under a decaying schedule.
        schedule: ``constant``, or ``inverse-sqrt``: ``learning_rate / sqrt(t)`` at step ``t = 1, 2, ...``
        batch_size: samples of a mini-batch; None for all.
        betas: Adam's decay rates of the first and second moments.
        epsilon: Adam's constant in the denominator.
        init: see :func:`initial_factors`.
        start: factors to start from, instead of an initialisation.
        freeze_a: leave ``v`` (PEFT's ``lora_A``) at its start and train ``u`` (``lora_B``) alone: a convex problem.
            Certificates are still about the full one.
        weight_decay: False trains on the loss (and the perturbation) alone; the looks, and their certificates,
            are still about the problem at its lambda, which is then a what-if.
        perturbation: the ``P`` of Theorem 4.1, of this same problem. Objectives, certificates, ``best_dual`` and
            ``optimum`` are then those of the perturbed problem, ``perturbation.problem``.
        optimum: a certified solution of the problem (of ``perturbation.problem`` under a perturbation); its dual
            value enters every gap, and its objective gives the ``excess`` of every look.
        seed: seed of the initialisation and of the mini-batches.
        steps: most updates.
        looks: about how many steps to look at, spaced geometrically.
        tolerance: stop when the relative gap at a look is at most this.
        best_dual: a dual value known to be feasible for the problem that is certified.
        max_seconds: most seconds of training, certificates not counted.
        progress: called at every look.

    Returns:
        The last point and the trajectory. ``solution.status`` is ``converged`` when the tolerance was reached.

    Raises:
        SettingError: an unknown name, a number out of range, mini-batches of an operator that has none, frozen
            factors that are all zero, or a perturbation or an optimum of another problem.
    """
    _check(method, schedule, batch_size, learning_rate, betas, epsilon, steps, looks, max_seconds)
    factors = cast_factors(start, problem.operator) if start else initial_factors(problem, ranks, init=init, seed=seed)
    factors = {name: pair for name, pair in factors.items() if pair[0].shape[1]}
    if not factors:
        raise SettingError("every rank is zero: there is nothing to train")
    if freeze_a and not any(bool(v.any()) for _, v in factors.values()):
        raise SettingError("freeze_a keeps v at its start, and that is zero in every block: nothing could move")
    exact = problem.to(torch.float64) if hasattr(problem.operator, "to") else problem
    certified = exact if perturbation is None else _perturbed(problem, perturbation)
    if optimum is not None:
        best_dual = max(best_dual, _checked_dual(certified, optimum))
    x = {name: (u.clone(), v.clone()) for name, (u, v) in factors.items()}
    update = _Adam(betas, epsilon) if method == "adam" else _Descent()
    at = set(log_spaced(steps, looks))
    trajectory: list[TrainingPoint] = []
    spent = looked = 0.0
    began = time.perf_counter()
    batches = mini_batches(problem, batch_size, seed)

    def look(step: int) -> Certificate:
        nonlocal best_dual, looked
        paused = time.perf_counter()
        state = certify(certified, x if perturbation is None else perturbation.inward(x), best_dual)
        certificate = state.certificate
        best_dual = max(best_dual, certificate.dual)
        wide = cast_factors(x, exact.operator)
        loss = float(exact.data_loss(state.logits))
        factored = loss + float(exact.penalty_of(wide) + exact.linear_of(wide))
        if perturbation is not None:
            factored += float(perturbation.penalty_of(wide))
        factored = max(factored, certificate.objective)  # equal at balanced factors, up to rounding
        point = TrainingPoint(
            step,
            spent,
            factored,
            certificate.objective,
            certificate.relative_gap,
            certificate.spectral_ratio,
            loss,
            None if optimum is None else factored - optimum.certificate.objective,
        )
        trajectory.append(point)
        if progress is not None:
            progress(point)
        looked += time.perf_counter() - paused
        return certificate

    certificate = look(0)
    remedy = f"the tolerance was not reached in {steps} steps; raise steps, or change the learning rate or the rank"
    step = 0
    while step < steps and certificate.relative_gap > tolerance:
        step += 1
        rate = learning_rate / math.sqrt(step) if schedule == "inverse-sqrt" else learning_rate
        value, gradient = _training_gradient(next(batches), x, weight_decay, perturbation, freeze_a)
        x = update(x, gradient, rate)
        spent = time.perf_counter() - began - looked
        if not math.isfinite(float(value)) or not _bounded(x):
            remedy = f"the run diverged at step {step}: lower the learning rate {learning_rate:g}"
            break
        out_of_time = spent > max_seconds
        if step in at or out_of_time:
            certificate = look(step)
        if out_of_time:
            remedy = f"the limit of {max_seconds:g} seconds was reached; raise max_seconds"
            break
    status: Status = "converged" if certificate.relative_gap <= tolerance else "not-converged"
    last = {**zero_factors(problem.operator), **_lowest_factors(problem, x, perturbation)}
    history = [(point.seconds, point.relative_gap) for point in trajectory]
    solution = Solution(
        last, certificate, status, "" if status == "converged" else remedy, step, time.perf_counter() - began, history
    )
    return TrainingRun(solution, trajectory, x)


def _training_gradient(
    problem: Problem, x: Factors, weight_decay: bool, perturbation: Perturbation | None, freeze_a: bool
) -> tuple[Tensor, Factors]:
    """Value of the problem (to tell divergence) and the gradient that training follows."""
    value, gradient = problem.value_and_gradient(x)
    moved = {} if perturbation is None else perturbation.gradient(x)
    for name, (u, v) in x.items():
        gu, gv = gradient[name]
        if not weight_decay:
            decay = problem.penalty[name]
            gu, gv = gu.sub(u, alpha=decay), gv.sub(v, alpha=decay)
        if name in moved:
            gu, gv = gu + moved[name][0], gv + moved[name][1]
        gradient[name] = (gu, torch.zeros_like(gv) if freeze_a else gv)  # no method moves along a zero gradient
    return value, gradient


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
    own = certify(problem, optimum.factors).certificate.objective if fits else math.nan
    if not abs(own - claimed) <= 1e-6 * max(abs(claimed), problem.objective_at_zero):
        raise SettingError("the optimum is not of this problem (or, under a perturbation, not of perturbation.problem)")
    return optimum.certificate.dual


def log_spaced(steps: int, looks: int) -> list[int]:
    """About ``looks`` step numbers from 1 to ``steps``, spaced geometrically; the last is ``steps``."""
    if looks == 1:
        return [steps]
    return sorted({round(steps ** (index / (looks - 1))) for index in range(looks)} | {steps})


class _Descent:
    """``x - rate * gradient``."""

    def __call__(self, x: Factors, gradient: Factors, rate: float) -> Factors:
        return {
            name: (u.sub(gradient[name][0], alpha=rate), v.sub(gradient[name][1], alpha=rate))
            for name, (u, v) in x.items()
        }


class _Adam:
    """Adam (Kingma and Ba 2015, algorithm 1), with bias correction."""

    def __init__(self, betas: tuple[float, float], epsilon: float) -> None:
        self.betas, self.epsilon, self.t = betas, epsilon, 0
        self.moments: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Factors, gradient: Factors, rate: float) -> Factors:
        self.t += 1
        out: Factors = {}
        for name, (u, v) in x.items():
            gu, gv = gradient[name]
            out[name] = (self._moved((name, 0), u, gu, rate), self._moved((name, 1), v, gv, rate))
        return out

    def _moved(self, key: tuple[str, int], x: Tensor, g: Tensor, rate: float) -> Tensor:
        first, second = self.moments.setdefault(key, (torch.zeros_like(x), torch.zeros_like(x)))
        beta1, beta2 = self.betas
        first.lerp_(g, 1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        scale = (second / (1 - beta2**self.t)).sqrt_().add_(self.epsilon)
        return x.addcdiv(first, scale, value=-rate / (1 - beta1**self.t))


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
