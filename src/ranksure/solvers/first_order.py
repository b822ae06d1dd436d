"""First-order LoRA training of the linearised problem, as in the paper: GD, SGD and Adam.

The objective is the factored one, ``sum_i w_i loss(z_i) + sum_j (lambda_j / 2)(||u_j||^2 + ||v_j||^2)``,
and every method sees the gradient of all of it. So the weight decay is a true L2 penalty also under
Adam: decoupled decay (AdamW) minimises something else, for which no lambda and no certificate exist.

Mini-batches partition the samples once, at random, and come in a new random order in every epoch. The
gradient of a batch is scaled by the number of batches, so a random batch is unbiased for any sizes and
weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ranksure.certificate import Certificate, certify, nuclear_norms
from ranksure.errors import SettingError
from ranksure.operators.base import Factors, cast_factors, zero_factors
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator
from ranksure.problem import Problem
from ranksure.solvers.balancing import balanced
from ranksure.solvers.solution import Solution, Status

Method: TypeAlias = Literal["gd", "sgd", "adam"]
Schedule: TypeAlias = Literal["constant", "inverse-sqrt"]
Init: TypeAlias = Literal["peft", "peft-gaussian", "small", "large"]

_RANDOM_SCALE = {"small": 1e-4, "large": 10.0}  # penalty of the start as a share of F(0)


@dataclass(frozen=True)
class TrainingPoint:
    """One looked-at step of a run.

    Attributes:
        step: number of updates made.
        seconds: seconds of training, certificates not counted.
        factored_objective: loss plus ``(lambda/2)(||u||^2 + ||v||^2)``: what the method minimises.
        objective: loss plus nuclear norms: ``F`` at the same update, never above the factored one.
        relative_gap: certified relative gap, by the best dual value so far.
        spectral_ratio: largest ``rho_j``.
    """

    step: int
    seconds: float
    factored_objective: float
    objective: float
    relative_gap: float
    spectral_ratio: float


@dataclass(frozen=True)
class TrainingRun:
    """A finished run.

    Attributes:
        solution: the last point, balanced, with its certificate; ``evaluations`` counts gradient steps.
        trajectory: the looked-at steps, the start first.
    """

    solution: Solution
    trajectory: list[TrainingPoint]


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
        seed: seed of the initialisation and of the mini-batches.
        steps: most updates.
        looks: about how many steps to look at, spaced geometrically.
        tolerance: stop when the relative gap at a look is at most this.
        best_dual: a dual value known to be feasible for this problem.
        max_seconds: most seconds of training, certificates not counted.
        progress: called at every look.

    Returns:
        The last point and the trajectory. ``solution.status`` is ``converged`` when the tolerance was reached.

    Raises:
        SettingError: an unknown name, a number out of range, or mini-batches of an operator that has none.
    """
    _check(method, schedule, batch_size, learning_rate, betas, epsilon, steps, looks, max_seconds)
    factors = cast_factors(start, problem.operator) if start else initial_factors(problem, ranks, init=init, seed=seed)
    factors = {name: pair for name, pair in factors.items() if pair[0].shape[1]}
    if not factors:
        raise SettingError("every rank is zero: there is nothing to train")
    certified = problem.to(torch.float64) if hasattr(problem.operator, "to") else problem
    x = {name: (u.clone(), v.clone()) for name, (u, v) in factors.items()}
    update = _Adam(betas, epsilon) if method == "adam" else _Descent()
    at = set(log_spaced(steps, looks))
    trajectory: list[TrainingPoint] = []
    spent = looked = 0.0
    began = time.perf_counter()
    batches = _batches(problem, batch_size, seed)

    def look(step: int) -> Certificate:
        nonlocal best_dual, looked
        paused = time.perf_counter()
        certificate = certify(certified, x, best_dual).certificate
        best_dual = max(best_dual, certificate.dual)
        penalty = float(certified.penalty_of(cast_factors(x, certified.operator)))
        nuclear = sum(certified.penalty[name] * norm for name, norm in nuclear_norms(x).items())
        factored = certificate.objective + max(penalty - nuclear, 0.0)
        ratio = certificate.spectral_ratio
        point = TrainingPoint(step, spent, factored, certificate.objective, certificate.relative_gap, ratio)
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
        value, gradient = next(batches).value_and_gradient(x)
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
    last = {**zero_factors(problem.operator), **(balanced(x) if _bounded(x) else x)}
    history = [(point.seconds, point.relative_gap) for point in trajectory]
    solution = Solution(
        last, certificate, status, "" if status == "converged" else remedy, step, time.perf_counter() - began, history
    )
    return TrainingRun(solution, trajectory)


def initial_factors(problem: Problem, ranks: int | dict[str, int], *, init: Init = "peft", seed: int = 0) -> Factors:
    """Factors to start training from.

    Args:
        problem: the problem.
        ranks: rank of every block, or by block name, clipped to the block's size.
        init: ``peft``: PEFT's default, ``u = 0`` (``lora_B``) and ``v`` (``lora_A``) Kaiming-uniform, that is
            uniform in ``+- 1/sqrt(n)``; ``peft-gaussian``: PEFT's ``init_lora_weights="gaussian"``, ``u = 0``
            and ``v`` normal with deviation ``1/r``; ``small`` and ``large``: both normal, scaled so that the
            penalty of all blocks is 1e-4 or 10 times ``F(0)``.
        seed: seed of the random numbers, drawn on the CPU in float64.

    Returns:
        Factors ``(m, r)`` and ``(n, r)`` by block, in the operator's dtype.

    Raises:
        SettingError: an unknown initialisation or block, or a negative rank.
    """
    shapes = problem.operator.shapes
    wanted = dict.fromkeys(shapes, ranks) if isinstance(ranks, int) else ranks
    if init not in ("peft", "peft-gaussian", *_RANDOM_SCALE):
        raise SettingError(f"unknown initialisation {init!r}: use peft, peft-gaussian, small or large")
    unknown = [name for name in wanted if name not in shapes]
    if unknown or any(rank < 0 for rank in wanted.values()):
        raise SettingError(f"ranks name the unknown block {unknown[0]}" if unknown else "a rank cannot be negative")
    generator = torch.Generator().manual_seed(seed)
    out: Factors = {}
    for name, (m, n) in shapes.items():
        rank = min(wanted.get(name, 0), m, n)
        u = torch.zeros(m, rank, dtype=torch.float64)
        v = torch.zeros(n, rank, dtype=torch.float64)
        if init == "peft":
            v = (2 * torch.rand(n, rank, generator=generator, dtype=torch.float64) - 1) / math.sqrt(n)
        else:
            v.normal_(generator=generator)
            if init == "peft-gaussian":
                v /= max(rank, 1)
            else:
                u.normal_(generator=generator)
        out[name] = (u, v)
    if init in _RANDOM_SCALE:
        penalty = float(problem.penalty_of(out))
        if penalty > 0:
            scale = math.sqrt(_RANDOM_SCALE[init] * problem.objective_at_zero / penalty)
            out = {name: (scale * u, scale * v) for name, (u, v) in out.items()}
    return cast_factors(out, problem.operator)


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


def _batches(problem: Problem, batch_size: int | None, seed: int) -> Iterator[Problem]:
    """The problem itself for ever, or the problems of its mini-batches in a random order per epoch."""
    n = problem.operator.n_samples
    if batch_size is None or batch_size >= n:
        while True:
            yield problem
    generator = torch.Generator().manual_seed(seed + 1)
    parts = torch.randperm(n, generator=generator).split(batch_size)
    problems = [_subproblem(problem, part, len(parts)) for part in parts]
    while True:
        for index in torch.randperm(len(parts), generator=generator).tolist():
            yield problems[index]


def _subproblem(problem: Problem, samples: Tensor, scale: float) -> Problem:
    """The problem on some samples, their weights times ``scale``."""
    operator, samples = problem.operator, samples.to(problem.operator.device)
    if isinstance(operator, FactoredOperator):
        part = operator.select(samples)
    elif isinstance(operator, DenseOperator):
        part = DenseOperator({name: g[samples] for name, g in operator.jacobians.items()})
    else:
        raise SettingError(f"mini-batches need a factored or dense operator, not a {type(operator).__name__}")
    return replace(
        problem,
        operator=part,
        base_logits=problem.base_logits[samples],
        labels=problem.labels[samples],
        weights=problem.weights[samples] * scale,
    )


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
