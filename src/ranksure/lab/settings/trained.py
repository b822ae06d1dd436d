"""The trainings that experiments share, each a finished part on disk: linearised and real, LoRA and full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ranksure.errors import SettingError
from ranksure.factors import Factors
from ranksure.lab.settings.parts import Made, flat, unflat
from ranksure.lab.settings.prepared import Prepared
from ranksure.lab.settings.real_network import RealNetwork, full_fine_tuning
from ranksure.lab.settings.run import SettingRun
from ranksure.lab.settings.training import Objective, Rule, Training, train
from ranksure.operators.base import cast_factors
from ranksure.problem import Problem
from ranksure.solvers.initial import initial_factors
from ranksure.solvers.proximal import proximal_gradient, smoothness_bound
from ranksure.solvers.solution import Solution

NEAR = 1e-4
"""How near a curve must end to the certified optimum, relative (see :func:`relative_excess`)."""

_AIM = 1e-5  # where a run may stop: a tenth of what is asked for
_LARGE = 32 << 20  # bytes of the float64 operator above which steps are made in float32
_TRIES = 4  # of the learning rate, each half of the one before


@dataclass(frozen=True, kw_only=True)
class Trained(Training):
    """A training held against the certified optimum, of a real network against that of its linearisation."""

    label: str  # rank 4, full fine-tuning ...
    rank: int | None  # None for full fine-tuning
    method: str  # adam, gd (with momentum) or proximal gradient
    excess: float  # relative_excess of the value


def relative_excess(value: float, optimum: Solution) -> float:
    """``(value - F*)`` as a share of the smaller of ``F*`` and the possible gain ``F(0) - F*``.

    The stricter of two readings of "within 1e-4 relative of the optimum".
    """
    return (value - optimum.certificate.objective) / max(_unit(optimum), 1e-300)


def _unit(optimum: Solution) -> float:
    best, zero = optimum.certificate.objective, optimum.certificate.objective_at_zero
    return min(best, zero - best)


def linear_lora(run: SettingRun, prepared: Prepared, lam: float, rank: int, method: str = "adam") -> Trained:
    """LoRA of one rank on the linearised problem, from PEFT's initialisation, all rows in every step.

    Steps are made in the coordinates of the problem's span, which changes nothing but the cost: the start's component
    outside it moves no logit and only decays.
    """
    rule = linear_rule(run, method)

    def make(optimum: Solution) -> tuple[Training, dict[str, Any]]:
        problem = prepared.problem.with_penalty(lam)
        working, bases = problem.reduced
        descended = _for_steps(problem)
        start = initial_factors(problem, rank, seed=prepared.seed)
        start = cast_factors(bases.restrict(start) if bases is not None else start, descended.operator)

        def objective(x: Factors) -> tuple[float, Factors]:
            value, gradient = descended.value_and_gradient(x)
            return float(value), gradient

        best, unit = optimum.certificate.objective, _unit(optimum)
        rate = rule.learning_rate if method == "adam" else rule.learning_rate * _gd_rate(working, optimum, start)
        with run.reporter.stage(f"Linearised, rank {rank}, {method}: {prepared.place}") as advance:
            done, rate = _with_smaller_rates(
                objective,
                start,
                replace(rule, learning_rate=rate),
                target=best + _AIM * unit,
                level=best + NEAR * unit,
                progress=advance,
            )
        factors = bases.lift(done.factors) if bases is not None else done.factors
        done = replace(done, factors=cast_factors(factors, prepared.problem.operator))
        return done, {"learning_rate": rate}

    label = f"rank {rank}" if method == "adam" else f"rank {rank}, GD"
    return _found(prepared, lam, "linear-lora", {"rank": rank, "rule": asdict(rule)}, make, label, rank, method)


def linear_full(run: SettingRun, prepared: Prepared, lam: float) -> Trained:
    """Full fine-tuning of the linearised problem: accelerated proximal gradient from zero."""
    most, every = run.size(3000, 3000, 20_000), run.size(5, 20, 20)

    def make(optimum: Solution) -> tuple[Training, dict[str, Any]]:
        problem = prepared.problem.with_penalty(lam)
        bases = problem.reduced[1]
        best, zero = optimum.certificate.objective, optimum.certificate.objective_at_zero
        curve: list[tuple[int, float]] = [(0, zero)]
        with run.reporter.stage(f"Linearised, full fine-tuning: {prepared.place}") as advance:

            def look(step: int, certificate: Any) -> None:
                curve.append((step, certificate.objective))
                advance(step, most)

            done = proximal_gradient(
                _for_steps(problem),
                tolerance=5 * _AIM * _unit(optimum) / max(zero - best, 1e-300),  # in units of the possible gain
                best_dual=optimum.certificate.dual,
                max_iterations=most,
                check_every=every,
                progress=look,
            )
        factors = bases.lift(done.factors) if bases is not None else done.factors
        ended = "target" if done.status == "converged" else "steps"
        return Training(factors, done.certificate.objective, curve, done.evaluations, done.seconds, ended), {}

    key = {"most": most, "every": every, "aim": _AIM}
    return _found(prepared, lam, "linear-full", key, make, "full fine-tuning", None, "proximal gradient")


def real_lora(run: SettingRun, prepared: Prepared, lam: float, rank: int) -> Trained:
    """LoRA of one rank on the real network, from PEFT's initialisation, all rows in every step."""
    rule = real_rule(run)

    def make(_: Solution) -> tuple[Training, dict[str, Any]]:
        problem = prepared.problem.with_penalty(lam)
        start = cast_factors(initial_factors(problem, rank, seed=prepared.seed), problem.operator)
        stage = run.reporter.stage(f"Real network, rank {rank}: {prepared.place}")
        with RealNetwork(prepared.task, prepared.targets, prepared.splits.train) as network, stage as advance:
            done, rate = _with_smaller_rates(network.lora_objective(lam), start, rule, progress=advance)
        return done, {"learning_rate": rate}

    return _found(prepared, lam, "real-lora", {"rank": rank, "rule": asdict(rule)}, make, f"rank {rank}", rank, "adam")


def real_full(run: SettingRun, prepared: Prepared, lam: float) -> Trained:
    """Full fine-tuning of the same modules of the real network, with the nuclear norm, by proximal gradient."""
    rule = real_rule(run)

    def make(_: Solution) -> tuple[Training, dict[str, Any]]:
        problem = prepared.problem
        step = 10 / max(smoothness_bound(problem.reduced[0])[0], 1e-300)  # of the linearised loss; halved where needed
        stage = run.reporter.stage(f"Real network, full fine-tuning: {prepared.place}")
        with RealNetwork(prepared.task, prepared.targets, prepared.splits.train) as network, stage as advance:
            return full_fine_tuning(network, problem.operator.shapes, lam, rule, step=step, progress=advance), {}

    key = {"rule": asdict(rule)}
    return _found(prepared, lam, "real-full", key, make, "full fine-tuning", None, "proximal gradient")


def _found(
    prepared: Prepared,
    lam: float,
    kind: str,
    key: dict[str, Any],
    make: Callable[[Solution], tuple[Training, dict[str, Any]]],
    label: str,
    rank: int | None,
    method: str,
) -> Trained:
    """The training of this key, made (with further facts for its record) where it is not on disk."""
    optimum = prepared.optimum(lam)

    def made() -> Made:
        done, more = make(optimum)
        facts = {name: value for name, value in vars(done).items() if name != "factors"}
        return facts | {"seconds": round(done.seconds, 3)} | more, flat(done.factors)

    facts, tensors = prepared.parts.get(kind, {**prepared.key, "lambda": lam, **key}, made)
    curve = [(float(step), float(value)) for step, value in facts["curve"]]
    reached = facts["reached"]
    if reached is None:  # looked at every few steps only
        reached = next((int(step) for step, value in curve if relative_excess(value, optimum) <= NEAR), None)
    return Trained(
        unflat(tensors),
        facts["value"],
        curve,
        facts["steps"],
        facts["seconds"],
        facts["ended"],
        reached,
        label=label,
        rank=rank,
        method=method,
        excess=relative_excess(facts["value"], optimum),
    )


def linear_rule(run: SettingRun, method: str) -> Rule:
    """How linearised LoRA is trained."""
    if method == "gd":  # slow near saddles, so no flat stretch is taken for its end
        steps = run.size(4000, 4000, 100_000)  # the rate is in units of _gd_rate
        return Rule("gd", 16.0, steps, patience=20, window=steps)
    return Rule("adam", 5e-3, run.size(3000, 3000, 30_000), window=400)


def real_rule(run: SettingRun) -> Rule:
    """How the real network is trained."""
    return Rule(
        "adam", 5e-3, run.size(60, 200, 2000), window=run.size(20, 50, 200), tolerance=run.size(1e-3, 1e-3, 1e-5)
    )


def _for_steps(problem: Problem) -> Problem:
    """The problem in the coordinates of its span; in float32 where it is large. Certificates are in float64 anyway."""
    working, _ = problem.reduced
    return working.to(torch.float32) if working.operator.nbytes > _LARGE else working


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


def _with_smaller_rates(objective: Objective, start: Factors, rule: Rule, **more: Any) -> tuple[Training, float]:
    """Train, at half the learning rate again where training diverged; the run and its rate."""
    for _ in range(_TRIES - 1):
        try:
            return train(objective, start, rule, **more), rule.learning_rate
        except SettingError:
            rule = replace(rule, learning_rate=rule.learning_rate / 2)
    return train(objective, start, rule, **more), rule.learning_rate
