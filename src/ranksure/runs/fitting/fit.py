"""``ranksure.fit()``: train the real network at the planned rank, with the decay of the theory, and certify it."""

from __future__ import annotations

import dataclasses
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from ranksure.adapters.loaded import Adapter, read_adapter
from ranksure.adapters.matrices import is_factor
from ranksure.errors import SettingError, settings_of
from ranksure.factors import Factors, ranks_of
from ranksure.files import writing
from ranksure.network.checkpoints import quiet
from ranksure.planner.prepare import Prepared, prepare
from ranksure.planner.run import run_plan
from ranksure.planner.settings import PlanSettings
from ranksure.planner.solved import SOLVED
from ranksure.progress import Clock, Reporter, Silent
from ranksure.quantities import parse_memory
from ranksure.records.certificate import RunCertificate
from ranksure.records.fit import Solved, Stage
from ranksure.runs.certificate.callback import preserved_randomness
from ranksure.runs.certificate.certify import certify_adapter
from ranksure.runs.certificate.settings import TOLERANCE, CertifySettings
from ranksure.runs.fitting.causal_inputs import causal_setup
from ranksure.runs.fitting.certified import at_ranks, kept, other_objective, rounds, solve, solved_record, with_zeros
from ranksure.runs.fitting.export import evaluate, write_adapter
from ranksure.runs.fitting.folder import Workspace, left_as_found
from ranksure.runs.fitting.inputs import Setup, place_factors
from ranksure.runs.fitting.plan_folder import PlanFolder, read_plan
from ranksure.runs.fitting.result import FitResult, fit_record
from ranksure.runs.fitting.saved_inputs import saved_setup
from ranksure.runs.fitting.settings import FitSettings
from ranksure.runs.fitting.stage import train_stage
from ranksure.runs.fitting.task_inputs import SHARED, task_setup


def fit(
    model: Any = None,
    data: Any = None,
    *,
    out: str | os.PathLike[str],
    plan: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    reporter: Reporter | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    restart: bool = False,
    command: str | None = None,
    **settings: Any,
) -> FitResult:
    """Train a LoRA adapter on the real network with true L2 decay, and certify the run.

    An unfinished run of the same settings in ``out`` is gone on with, and ends with the same weights as if it had
    not been interrupted (on one machine, with the same number of threads). ``transformers.Trainer`` trains.

    Args:
        model: model folder, Hub id, or a sequence-classification model in memory (it is wrapped in place); the
            plan's by default.
        data: the training rows, as for :func:`ranksure.plan`; for a plan on the bundled data, that.
        out: the folder to write: ``adapter`` (a PEFT adapter with ``certificate.json`` and ``fit.json``) appears
            whole, when all is done.
        plan: folder of a plan: gives the model, head, ranks and lambda, and the prediction to compare with.
        tokenizer: needed with a model in memory.
        reporter: receives progress.
        callbacks: further callbacks for the Trainer.
        restart: throw an unfinished run in ``out`` away.
        command: the command line that asks for this, for ``fit.json``.
        **settings: see :class:`~ranksure.runs.fitting.settings.FitSettings`.

    Returns:
        The result: numbers, the certificate, sentences, and the trained model.

    Raises:
        RanksureError: whatever in the input cannot be used, in one line.
    """
    options = settings_of(FitSettings, "fit", settings)
    if options.certified and callbacks:
        raise SettingError("`callbacks` are the Trainer's, which `method` certified does not use: leave them out")
    clock = Clock(reporter or Silent())
    began = time.perf_counter()
    with writing(out), left_as_found(out) as work, preserved_randomness(), _quiet():
        folder, prepared = _plan_folder(work, model, data, plan, tokenizer, options, clock)
        setup = _setup(model, data, folder, prepared, tokenizer, options, clock)
        weighting = options.weighting if setup.saved is None else setup.saved.weighting
        options = dataclasses.replace(options, loss=setup.kind, weighting=weighting)
        run = _Run(setup, options, folder, work, clock, list(callbacks), command)
        resumed = work.open(run.asked(), restart)
        if work.finished:
            work.tidy(options.keep_checkpoints)
            return FitResult.read(work.adapter)
        return run.go(resumed, began)


class _Run:
    """One fit: its stages, and the end of it."""

    def __init__(
        self,
        setup: Setup,
        options: FitSettings,
        plan: PlanFolder | None,
        work: Workspace,
        clock: Clock,
        callbacks: list[TrainerCallback],
        command: str | None,
    ) -> None:
        self.command = command
        self.setup, self.options, self.plan, self.work, self.clock = setup, options, plan, work, clock
        self.callbacks = callbacks
        self.scale = 1.0
        if options.lora_alpha is not None:
            if options.rank is None:
                raise SettingError("`lora_alpha` needs `rank`: a plan's ranks have scale 1")
            self.scale = options.lora_alpha / options.rank
        self.start: Factors | None = None
        if plan is not None and (options.linear or options.certified):
            self.start = plan.factors()
        elif setup.saved is not None:
            self.start = setup.named_as_planned(setup.saved.read.factors)
        self.ranks = {} if options.certified else self._ranks()
        self.lam = self._lambda()
        if options.certified and not self.lam:
            raise SettingError("`method` certified needs a penalty: give `lam` above 0, or `plan` with a plan's folder")
        self.asks = CertifySettings(
            lam=self.lam or None,
            loss=setup.kind,
            weighting=options.weighting,
            tolerance=TOLERANCE if options.certified else options.gain,
            memory_bytes=parse_memory(options.memory),
        )
        self.batches: Sequence[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []

    def asked(self) -> dict[str, Any]:
        """All that the result depends on."""
        setup, deciding = self.setup, self.options.deciding()
        if not self.options.certified:  # as runs of before there were methods have it
            deciding = {name: value for name, value in deciding.items() if name not in ("method", "adapter")}
        return {
            "model": setup.name,
            "data": setup.sha256,
            "rows": len(setup.features),
            "ranks": self.ranks,
            "lambda": self.lam,
            **deciding,
            **({} if setup.saved is None else {"adapter": setup.saved.run.adapter_sha256}),
        }

    def go(self, resumed: bool, began: float) -> FitResult:
        """Train stage after stage, certify, write."""
        options, work = self.options, self.work
        self.batches = self.setup.batches(self.setup.features)
        if options.certified:
            return self._solved(resumed, began)
        while True:
            stage = len(work.stages)
            factors = work.factors() or self.start
            ranks = self.ranks if factors is None else ranks_of(factors)
            model = self._wrapped(ranks, factors)
            steps = 0
            if options.mode == "train":
                folder = work.checkpoints(stage)
                self.history, steps = train_stage(
                    model, self.setup, options, self.asks, folder, self.batches, self.callbacks, self.clock
                )
            self._check_finite(model)
            read = read_adapter(model)
            verdict = self._certify(model, read)
            last = Stage(
                ranks=ranks,
                steps=steps,
                verdict=verdict.verdict,
                objective=verdict.objective,
                loss=verdict.loss,
                history=self.history,
            )
            if not options.grow or verdict.verdict != "rank-bound" or stage >= options.grow_stages:
                break
            self._grow(model, verdict, last)
        return self._finish(model, read, verdict, last, resumed, began)

    def _solved(self, resumed: bool, began: float) -> FitResult:
        """Solve, certify all targets, and write those that have an update."""
        setup, options = self.setup, self.options
        solved, started = solve(setup, options, self.lam, self.start, self.batches, self.work, self.clock)
        factors = setup.named_as_planned(solved.factors)
        whole = with_zeros(factors)
        model = self._wrapped(ranks_of(whole), whole)
        verdict = at_ranks(self._certify(model, read_adapter(model)), solved.ranks)
        setup.notes += other_objective(solved, verdict)
        ranks = ranks_of(kept(factors))
        model = self._wrapped(ranks, kept(factors))
        last = Stage(
            ranks=ranks,
            steps=solved.gradients,
            verdict=verdict.verdict,
            objective=verdict.objective,
            loss=verdict.loss,
            history=rounds(solved),
        )
        start = ("plan" if setup.saved is None else "adapter") if started else "nothing"
        record = solved_record(solved, setup, options, self.lam, start)
        return self._finish(model, read_adapter(model), verdict, last, resumed, began, record)

    def _ranks(self) -> dict[str, int]:
        if self.start is not None:
            ranks = ranks_of(self.start)
        elif self.options.rank is not None:
            ranks = self.setup.ranks(self.options.rank)
        elif self.plan is not None:
            ranks = self.plan.pattern
        else:
            raise SettingError("say which rank to train at: `rank` R, or `plan` with a plan's folder")
        for name, rank in ranks.items():
            if name not in self.setup.shapes:
                raise SettingError(
                    f"the plan's module {name} is no target in {self.setup.name}: is it the plan's model?"
                )
            if not 1 <= rank <= min(shape := self.setup.shapes[name]):
                raise SettingError(f"rank {rank} of {name} is none that a {shape[0]} x {shape[1]} matrix can have")
        return ranks

    def _lambda(self) -> float:
        if self.options.lam is not None:
            return self.options.lam
        if self.options.weight_decay is not None:
            saved = self.setup.saved
            scale = self.scale if saved is None else saved.scale
            if scale is None:
                raise SettingError("the adapter's modules have several scales, so lambda is several: give `lam`")
            return self.options.weight_decay / scale
        return 0.0 if self.plan is None else self.plan.weight_decay

    def _as_planned(self) -> bool:
        """Whether what was trained is what the plan speaks of."""
        if self.plan is None or not self.setup.same_data or self.work.stages or self.options.train_head:
            return False
        if self.options.rank is not None and set(self.ranks) != set(self.plan.record.target_modules):
            return False
        return math.isclose(self.lam, self.plan.weight_decay, rel_tol=1e-9)

    def _wrapped(self, ranks: dict[str, int], factors: Factors | None) -> PeftModel:
        base = self.setup.base
        if isinstance(base, PeftModel):  # a stage before this one
            self.setup.base = base = base.unload()
        model = self.setup.wrap(ranks, self.scale, self.options.lora_dropout, self.options.seed)
        if factors is not None:
            place_factors(model, factors, self.setup.prefix)
        self.setup.base = model
        for name, parameter in model.named_parameters():
            head = self.options.train_head and ".modules_to_save." in name
            parameter.requires_grad_(is_factor(name) or head)
        return model

    def _certify(self, model: nn.Module, read: Adapter) -> RunCertificate:
        with self.clock.stage("certify", "Certifying the run") as advance:
            count = len(self.batches)
            found = certify_adapter(model, read, self.batches, self.asks, progress=lambda done: advance(done, count))
        # Of what is saved beside the factors, only what was trained is outside the certificate.
        trained = (found.outside or ["the head"]) if self.options.train_head else []
        if self.setup.saved is not None:
            trained = self.setup.saved.read.outside
        return dataclasses.replace(found, outside=trained)

    def _grow(self, model: PeftModel, verdict: RunCertificate, last: Stage) -> None:
        """Add the missing directions, and record them as the next stage's start."""
        from ranksure.runs.resizing.grow import grow

        with self.clock.stage("grow", "Adding the missing directions"):
            growth = grow(model, self.batches, certificate=verdict, **vars(self.asks))
        self.work.close_stage(last, self.setup.named_as_planned(growth.factors))

    def _check_finite(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if is_factor(name) and not bool(torch.isfinite(parameter).all()):
                raise SettingError("training diverged: the factors are not finite; lower the learning rate")

    def _finish(
        self,
        model: PeftModel,
        read: Adapter,
        verdict: RunCertificate,
        last: Stage,
        resumed: bool,
        began: float,
        solved: Solved | None = None,
    ) -> FitResult:
        setup, options = self.setup, self.options
        with self.clock.stage("evaluate", "Evaluating"):
            zero, held = evaluate(model, read, setup, self.batches, options.weighting)
        predicted = None
        if self.plan is not None and self._as_planned():
            predicted = self.plan.prediction(options.rank, options.linear or options.certified)
        record = fit_record(
            setup,
            options,
            verdict,
            last,
            self.work.stages,
            self.lam,
            self.scale,
            objective_at_zero=zero,
            heldout=held,
            prediction=predicted,
            solved=solved,
            command=self.command,
            resumed=resumed,
            seconds={**self.clock.seconds, "total": time.perf_counter() - began},
        )
        result = FitResult(record, verdict, self.work.adapter, model)
        with self.clock.stage("export", "Writing and checking the adapter"):
            write_adapter(model, read.factors, setup, result)
        self.work.tidy(options.keep_checkpoints)
        return result


def _plan_folder(
    work: Workspace, model: Any, data: Any, plan: Any, tokenizer: Any, options: FitSettings, clock: Clock
) -> tuple[PlanFolder | None, Prepared | None]:
    """The plan given; made in the folder where the linear optimum is asked for without one, and what it was made of."""
    if plan is not None:
        return read_plan(plan), None
    if not options.linear:
        return None, None
    own, prepared = work.out / "plan", None
    if not (own / "plan.json").is_file() or (own / SOLVED).is_file():  # solved, but not written as an adapter
        if model is None or data is None:
            raise SettingError("give `plan`, or `model` and `data` to plan on")
        if options.samples is None:
            raise SettingError("the linear optimum needs `samples`, the rows to solve on (or `plan`)")
        lam = options.lam if options.lam is not None else options.weight_decay
        shared = {name: getattr(options, name) for name in (*SHARED, "samples", "seed", "memory", "device")}
        shared |= {"weight_decay": "auto" if lam is None else lam, "linearised": True}  # whose optimum it asks for
        prepared = prepare(model, data, PlanSettings(**shared), tokenizer, clock)
        run_plan(prepared, clock).save(own)
    return read_plan(own), prepared


def _setup(
    model: Any,
    data: Any,
    folder: PlanFolder | None,
    prepared: Prepared | None,
    tokenizer: Any,
    options: FitSettings,
    clock: Clock,
) -> Setup:
    """Model and rows: of an adapter to start from, for language modelling, or of a task."""
    if options.adapter is not None:
        if folder is not None:
            raise SettingError("give `plan` or `adapter` to start from, not both")
        return saved_setup(model, data, options, tokenizer, clock)
    if options.task == "CAUSAL_LM":
        if folder is not None:
            raise SettingError("a plan is for classification, not for CAUSAL_LM: leave `plan` or `task` out")
        return causal_setup(model, data, options, tokenizer, clock)
    return task_setup(model, data, options, folder, tokenizer, clock, prepared)


@contextmanager
def _quiet() -> Iterator[None]:
    """No loading bars and warnings of transformers; what matters is told by the result."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about itself
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*was renamed.*")
        yield
