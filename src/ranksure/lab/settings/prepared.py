"""A setting made ready once: rows split, head fitted, gradients captured, optima certified; all found again on disk.

The network itself is loaded only when something has to run through it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from ranksure.certificate import Certificate, certify_point, lambda_max
from ranksure.data.samples import Samples
from ranksure.errors import DataError
from ranksure.lab.claim import Check
from ranksure.lab.settings.named import Setting
from ranksure.lab.settings.parts import Made, Parts, flat, unflat
from ranksure.losses import get_loss
from ranksure.operators.factored import FactoredOperator, Group
from ranksure.problem import Problem, uniform_penalty
from ranksure.progress import Reporter
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.solution import Solution
from ranksure.tasks.linearise import HeldOut, capture_rows, fit_new_head
from ranksure.tasks.load import load_task
from ranksure.tasks.task import Task
from ranksure.theory.bounds import landscape_rank

LOSS = get_loss("cross-entropy")
OPTIMUM = 1e-8
"""Relative gap that optima are solved to."""

PROMISED = 1e-6
"""Relative gap that is promised of them."""


def certified(what: str, gaps: Sequence[float]) -> Check:
    """Whether optima of these relative gaps are what is promised."""
    worst = max(gaps, default=math.inf)
    return Check(
        f"{what} is certified to a relative gap of at most 1e-6.",
        f"The largest relative gap of {len(gaps)} optima is {worst:.1e}.",
        worst <= PROMISED,
    )


@dataclass(frozen=True)
class Splits:
    """Disjoint rows: no input of ``select`` or ``report`` is one of ``train``, nor of one another."""

    train: Samples  # rows to train on
    select: Samples  # rows to choose lambda on
    report: Samples  # rows to report on


def split(samples: Samples, n: int, heldout: int, seed: int) -> Splits:
    """Shuffle, take ``n`` rows to train on, then up to ``heldout`` new inputs each to select and to report on.

    Raises:
        DataError: too few rows, or training rows of one class only.
    """
    shuffled = samples.shuffled(seed)
    if len(shuffled) < n + 2:
        raise DataError(f"{samples.source} has {len(samples)} rows: too few for {n} to train on and some to hold out")
    train = shuffled.subset(range(n))
    if len(set(train.labels)) < 2:
        raise DataError(f"the first {n} rows of {samples.source} hold one class only; ask for more")
    rest = shuffled.subset(range(n, len(shuffled)))
    seen = set(train.identities())
    new: list[int] = []
    for index, identity in enumerate(rest.identities()):
        if identity not in seen:
            seen.add(identity)
            new.append(index)
        if len(new) == 2 * heldout:
            break
    half = len(new) // 2
    if half == 0:
        raise DataError(f"{samples.source} has no rows to hold out beside the {n} to train on")
    return Splits(train, rest.subset(new[:half]), rest.subset(new[half:]))


class Prepared:
    """A setting ready for experiments, with a seed of its rows and of what the checkpoint leaves to chance.

    Raises:
        RanksureError: model or data is not installed or cannot be used.
    """

    def __init__(self, setting: Setting, seed: int, parts: Parts, reporter: Reporter) -> None:
        self.setting, self.seed, self.parts, self.reporter = setting, seed, parts, reporter
        self.key: dict[str, Any] = {"setting": setting.to_json(), "seed": seed}
        facts, tensors = parts.get("captured", self.key, self._captured)
        self.facts: dict[str, Any] = facts
        operator = _operator(facts, tensors)
        self.problem = Problem(operator, tensors["base_logits"], tensors["labels"], LOSS, uniform_penalty(operator, 1))
        """The linearised problem at lambda = 1."""
        self._tensors = tensors
        self._optima: dict[float, Solution] = {}

    # ---- what is known without the network

    @property
    def n(self) -> int:
        """Training rows."""
        return self.problem.operator.n_samples

    @property
    def n_outputs(self) -> int:
        """Logits ``K``."""
        return self.problem.n_logits

    @property
    def label(self) -> str:
        """For figures: title and seed."""
        return f"{self.setting.title}, seed {self.seed}"

    @property
    def place(self) -> str:
        """For progress: title, seed and rows."""
        return f"{self.label}, N={self.setting.n}"

    @property
    def lambda_max(self) -> float:
        """Smallest lambda whose optimum is zero."""
        return float(self.facts["lambda_max"])

    @property
    def paper_rank(self) -> int:
        """Smallest rank with ``r (r + 1) / 2 > K N``, at which Theorem 4.1 speaks; clipped to the blocks."""
        return min(landscape_rank(self.n_outputs * self.n), self.largest_rank)

    @property
    def largest_rank(self) -> int:
        """Of any block."""
        return max(min(shape) for shape in self.problem.operator.shapes.values())

    def ranks(self, few: Iterable[int]) -> list[int]:
        """Low ranks and the paper's, ascending."""
        return sorted({rank for rank in few if rank < self.paper_rank} | {self.paper_rank})

    def optimum(self, lam: float) -> Solution:
        """The optimum at a uniform lambda, with its certificate computed anew from the stored factors."""
        if lam not in self._optima:
            problem = self.problem.with_penalty(lam)

            def make() -> Made:
                with self.reporter.stage(f"Certified optimum: {self.place}"):
                    found = solve(problem, tolerance=OPTIMUM)
                facts = {"status": found.status, "remedy": found.remedy, "dual": found.certificate.dual}
                return facts | {"seconds": found.seconds, "evaluations": found.evaluations}, flat(found.factors)

            facts, tensors = self.parts.get("optimum", {**self.key, "lambda": lam, "tolerance": OPTIMUM}, make)
            factors = unflat(tensors)
            certificate: Certificate = certify_point(problem, factors, facts["dual"]).certificate
            self._optima[lam] = Solution(
                factors, certificate, facts["status"], facts["remedy"], facts["evaluations"], facts["seconds"]
            )
        return self._optima[lam]

    # ---- what needs the network

    @cached_property
    def splits(self) -> Splits:
        samples = self.setting.data()
        names = samples.label_names
        if self.setting.classes is not None and names is not None:
            missing = [name for name in self.setting.classes if name not in names]
            if missing:
                raise DataError(f"{samples.source} has no class {missing[0]!r}; it has {', '.join(names[:10])}")
            kept = {names.index(name) for name in self.setting.classes}
            samples = samples.subset(index for index, label in enumerate(samples.labels) if label in kept)
            samples = samples.with_label_names(self.setting.classes)
        return split(samples, self.setting.n, self.setting.heldout, self.seed)

    @cached_property
    def task(self) -> Task[Any]:
        """The network, its head fitted on the training rows (or as it was fitted before)."""
        setting = self.setting
        train = self.splits.train
        task = load_task(setting.kind, setting.model(), train, seed=self.seed, device="cpu", **setting.options)
        if task.label_names is not None and task.label_names != train.label_names:
            # A trained head's own order of the classes.
            self.splits = Splits(*(part.with_label_names(task.label_names) for part in vars(self.splits).values()))
        task.model.eval().requires_grad_(False)
        if task.head is not None and task.head_is_new:
            stored = getattr(self, "_tensors", None)
            if stored is None:
                fit_new_head(task, train, LOSS)
            else:
                layer = task.model.get_submodule(task.head)
                layer.load_state_dict({key[5:]: value for key, value in stored.items() if key.startswith("head.")})
        return task

    @cached_property
    def targets(self) -> dict[str, nn.Module]:
        return self.task.targets(list(self.setting.modules), self.setting.layers)

    @cached_property
    def held_out(self) -> HeldOut:
        """The rows to report on, captured."""
        rows = self.splits.report
        with self.reporter.stage(f"Gradients of {len(rows)} held-out rows: {self.place}") as advance:
            return capture_rows(self.task, self.targets, rows, LOSS, progress=advance)

    def release(self) -> None:
        """Forget the network and the held-out rows; they are made again when needed."""
        for name in ("task", "targets", "splits", "held_out"):
            self.__dict__.pop(name, None)

    # ---- making it

    def _captured(self) -> Made:
        with self.reporter.stage(f"Reading data and model: {self.place}"):
            task = self.task
        with self.reporter.stage(f"Gradients of the training rows: {self.place}") as advance:
            found = capture_rows(task, self.targets, self.splits.train, LOSS, progress=advance)
        operator = cast(FactoredOperator, found.operator)  # what a capture gives
        tensors = {"base_logits": found.base_logits, "labels": found.labels}
        for index, group in enumerate(operator.groups):
            tensors |= {f"{index}.inputs": group.inputs, f"{index}.sample": group.sample}
            tensors |= {f"{index}.outputs.{name}": b for name, b in group.outputs.items()}
        if task.head is not None and task.head_is_new:
            state = task.model.get_submodule(task.head).state_dict()
            tensors |= {f"head.{name}": value for name, value in state.items()}
        train = self.splits.train
        facts = {
            "n_samples": operator.n_samples,
            "blocks": list(operator.shapes),
            "widths": [group.width for group in operator.groups],
            "lambda_max": lambda_max(found.problem()),
            "source": train.source,
            "sha256": train.sha256,
            "model": task.name,
            "label_names": task.label_names,
            "heldout": len(self.splits.report),
            "notes": [*train.notes, *task.notes, *task.remarks(train)],
        }
        return facts, tensors


def _operator(facts: dict[str, Any], tensors: dict[str, Tensor]) -> FactoredOperator:
    groups = []
    for index, width in enumerate(facts["widths"]):
        mark = f"{index}.outputs."
        outputs = {key.removeprefix(mark): tensors[key] for key in tensors if key.startswith(mark)}
        inputs = tensors[f"{index}.inputs"]
        groups.append(Group(inputs, width, tensors[f"{index}.sample"].to(torch.long), outputs))
    return FactoredOperator(groups, facts["n_samples"], facts["blocks"])
