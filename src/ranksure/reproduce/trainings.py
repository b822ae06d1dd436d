"""The trainings that experiments share, each a finished part on disk: linearised and real, LoRA and full."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ranksure.errors import SettingError
from ranksure.factors import Factors, nuclear_norms
from ranksure.operators.base import cast_factors
from ranksure.problem import Problem
from ranksure.reproduce.experiment import Run
from ranksure.reproduce.network import RealNetwork, full_fine_tuning
from ranksure.reproduce.prepared import Prepared
from ranksure.reproduce.storage import Made, flat, unflat
from ranksure.reproduce.training import Rule, Training, train
from ranksure.solvers.initial import initial_factors
from ranksure.solvers.proximal import proximal_gradient, smoothness_bound
from ranksure.solvers.solution import Solution

NEAR = 1e-4
"""How near a curve must end to the certified optimum, relative (see :func:`relative_excess`)."""

_AIM = 1e-5  # where a run may stop: a tenth of what is asked for
_LARGE = 32 << 20  # bytes of the float64 operator above which steps are made in float32
_TRIES = 4  # of the learning rate, each half of the one before


@dataclass(frozen=True)
class Trained:
    """A training as experiments use it.

    Attributes:
        label: ``rank 4`` or ``full fine-tuning``.
        rank: None for full fine-tuning.
        method: ``adam``, ``gd`` (with momentum) or ``proximal gradient``.
        objective: the last objective that counts (the lowest).
        excess: relative excess over the certified optimum; of a real network, over the linearised optimum.
        curve: (step, objective).
        reached: the first step looked at whose excess is at most ``NEAR``; None if there is none.
        steps: steps made.
        seconds: time.
        ended: why it ended.
        factors: the update.
    """

    label: str
    rank: int | None
    method: str
    objective: float
    excess: float
    curve: list[tuple[float, float]]
    reached: int | None
    steps: int
    seconds: float
    ended: str
    factors: Factors


def relative_excess(value: float, optimum: Solution) -> float:
    """``(value - F*)`` as a share of the smaller of ``F*`` and the possible gain ``F(0) - F*``.

    The stricter of two readings of "within 1e-4 relative of the optimum".
    """
    best, zero = optimum.certificate.objective, optimum.certificate.objective_at_zero
    return (value - best) / max(min(best, zero - best), 1e-300)


def linear_lora(run: Run, prepared: Prepared, lam: float, rank: int, method: str = "adam") -> Trained:
    """LoRA of one rank on the linearised problem, from PEFT's initialisation, all rows in every step.

    Steps are made in the coordinates of the problem's span, which changes nothing but the cost: the start's component
    outside it moves no logit and only decays.
    """
    optimum = prepared.optimum(lam)
    rule = linear_rule(run, method)
    key = {**prepared.key, "lambda": lam, "rank": rank, "rule": asdict(rule)}

    def make() -> Made:
        problem = prepared.problem.with_penalty(lam)
        working, bases = problem.reduced
        descended = _for_steps(problem)
        start = initial_factors(problem, rank, seed=prepared.seed)
        start = cast_factors(bases.restrict(start) if bases is not None else start, descended.operator)

        def objective(x: Factors) -> tuple[float, Factors]:
            value, gradient = descended.value_and_gradient(x)
            return float(value), gradient

        best = optimum.certificate.objective
        unit = min(best, optimum.certificate.objective_at_zero - best)
        target, level = best + _AIM * unit, best + NEAR * unit
        rate = rule.learning_rate if method == "adam" else rule.learning_rate * _gd_rate(working, optimum, start)
        with run.reporter.stage(f"Linearised, rank {rank}, {method}: {prepared.place}") as advance:
            done, rate = _with_smaller_rates(
                lambda rate: train(
                    objective, start, _at_rate(rule, rate), target=target, level=level, progress=advance
                ),
                rate,
            )
        factors = bases.lift(done.factors) if bases is not None else done.factors
        return _record(done, learning_rate=rate), flat(cast_factors(factors, prepared.problem.operator))

    facts, tensors = prepared.parts.get("linear-lora", key, make)
    label = f"rank {rank}" if method == "adam" else f"rank {rank}, GD"
    return _trained(label, rank, method, facts, unflat(tensors), optimum)


def linear_full(run: Run, prepared: Prepared, lam: float) -> Trained:
    """Full fine-tuning of the linearised problem: accelerated proximal gradient from zero."""
    optimum = prepared.optimum(lam)
    most = run.size(3000, 3000, 20_000)
    every = run.size(5, 20, 20)
    key = {**prepared.key, "lambda": lam, "most": most, "every": every, "aim": _AIM}

    def make() -> Made:
        problem = prepared.problem.with_penalty(lam)
        bases = problem.reduced[1]
        curve: list[tuple[int, float]] = [(0, optimum.certificate.objective_at_zero)]
        best, zero = optimum.certificate.objective, optimum.certificate.objective_at_zero
        # In units of the solver's gap, which is relative to the possible gain.
        aim = 5 * _AIM * min(best, zero - best) / max(zero - best, 1e-300)
        with run.reporter.stage(f"Linearised, full fine-tuning: {prepared.place}") as advance:

            def look(step: int, certificate: Any) -> None:
                curve.append((step, certificate.objective))
                advance(step, most)

            done = proximal_gradient(
                _for_steps(problem),
                tolerance=aim,
                best_dual=optimum.certificate.dual,
                max_iterations=most,
                check_every=every,
                progress=look,
            )
        factors = bases.lift(done.factors) if bases is not None else done.factors
        value = done.certificate.objective
        end = "target" if done.status == "converged" else "steps"
        training = Training(done.factors, value, curve, done.evaluations, done.seconds, end)
        return _record(training), flat(factors)

    facts, tensors = prepared.parts.get("linear-full", key, make)
    return _trained("full fine-tuning", None, "proximal gradient", facts, unflat(tensors), optimum)


def real_lora(run: Run, prepared: Prepared, lam: float, rank: int) -> Trained:
    """LoRA of one rank on the real network, from PEFT's initialisation, all rows in every step."""
    optimum = prepared.optimum(lam)
    rule = real_rule(run)
    key = {**prepared.key, "lambda": lam, "rank": rank, "rule": asdict(rule)}

    def make() -> Made:
        network = RealNetwork(prepared.task, prepared.targets, prepared.splits.train)
        problem = prepared.problem.with_penalty(lam)
        start = cast_factors(initial_factors(problem, rank, seed=prepared.seed), problem.operator)
        objective = network.lora_objective(lam)
        with run.reporter.stage(f"Real network, rank {rank}: {prepared.place}") as advance:
            done, rate = _with_smaller_rates(
                lambda rate: train(objective, start, _at_rate(rule, rate), progress=advance), rule.learning_rate
            )
        return _record(done, learning_rate=rate), flat(done.factors)

    facts, tensors = prepared.parts.get("real-lora", key, make)
    return _trained(f"rank {rank}", rank, "adam", facts, unflat(tensors), optimum)


def real_full(run: Run, prepared: Prepared, lam: float) -> Trained:
    """Full fine-tuning of the same modules of the real network, with the nuclear norm, by proximal gradient."""
    optimum = prepared.optimum(lam)
    rule = real_rule(run)
    key = {**prepared.key, "lambda": lam, "rule": asdict(rule)}

    def make() -> Made:
        network = RealNetwork(prepared.task, prepared.targets, prepared.splits.train)
        problem = prepared.problem
        step = 10 / max(smoothness_bound(problem.reduced[0])[0], 1e-300)  # of the linearised loss; halved where needed
        with run.reporter.stage(f"Real network, full fine-tuning: {prepared.place}") as advance:
            done = full_fine_tuning(network, problem.operator.shapes, lam, rule, step=step, progress=advance)
        return _record(done), flat(done.factors)

    facts, tensors = prepared.parts.get("real-full", key, make)
    return _trained("full fine-tuning", None, "proximal gradient", facts, unflat(tensors), optimum)


def linear_rule(run: Run, method: str) -> Rule:
    """How linearised LoRA is trained."""
    if method == "gd":  # slow near saddles, so no flat stretch is taken for its end
        steps = run.size(4000, 4000, 100_000)  # the rate is in units of _gd_rate
        return Rule("gd", 16.0, steps, patience=20, window=steps)
    return Rule("adam", 5e-3, run.size(3000, 3000, 30_000), window=400)


def real_rule(run: Run) -> Rule:
    """How the real network is trained."""
    return Rule(
        "adam", 5e-3, run.size(60, 200, 2000), window=run.size(20, 50, 200), tolerance=run.size(1e-3, 1e-3, 1e-5)
    )


def penalised(lam: float, loss: float, factors: Factors) -> float:
    """Loss plus nuclear norms."""
    return loss + lam * sum(nuclear_norms(factors).values())


def _for_steps(problem: Problem) -> Problem:
    """The problem in the coordinates of its span; in float32 where it is large. Certificates are in float64 anyway."""
    working, _ = problem.reduced
    return problem.single if working.operator.nbytes > _LARGE else working


def _gd_rate(working: Problem, optimum: Solution, start: Factors) -> float:
    """``1 / (2 L s + 2 lambda)``, one over a bound of the curvature while no factor outgrows ``s``.

    The bound is loose by a factor of ten and more, so the rule starts at a multiple of it; a rate that is too large
    after all is halved.
    """
    smoothness, _ = smoothness_bound(working)
    sizes = [float(torch.linalg.matrix_norm(v.double(), 2)) ** 2 for _, v in start.values() if v.numel()]
    for u, v in optimum.factors.values():
        if u.shape[1]:  # balanced: ||u||^2 is the largest singular value of the update
            sizes.append(float(torch.linalg.matrix_norm(u.double(), 2) * torch.linalg.matrix_norm(v.double(), 2)))
    return 1 / (2 * smoothness * max(sizes, default=1.0) + 2 * max(working.penalty.values()))


def _at_rate(rule: Rule, rate: float) -> Rule:
    return Rule(**{**asdict(rule), "learning_rate": rate})


def _with_smaller_rates(go: Any, rate: float) -> tuple[Training, float]:
    """Run, at half the learning rate again where training diverged."""
    for _ in range(_TRIES - 1):
        try:
            return go(rate), rate
        except SettingError:
            rate /= 2
    return go(rate), rate


def _record(done: Training, **more: Any) -> dict[str, Any]:
    return {
        "value": done.value,
        "curve": [list(point) for point in done.curve],
        "steps": done.steps,
        "seconds": round(done.seconds, 3),
        "ended": done.ended,
        "reached": done.reached,
        **more,
    }


def _trained(
    label: str, rank: int | None, method: str, facts: dict[str, Any], factors: Factors, optimum: Solution
) -> Trained:
    curve = [(float(step), float(value)) for step, value in facts["curve"]]
    reached = facts["reached"]
    if reached is None:  # looked at every few steps only
        reached = next((int(step) for step, value in curve if relative_excess(value, optimum) <= NEAR), None)
    return Trained(
        label,
        rank,
        method,
        facts["value"],
        relative_excess(facts["value"], optimum),
        curve,
        reached,
        facts["steps"],
        facts["seconds"],
        facts["ended"],
        factors,
    )
