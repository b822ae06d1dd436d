"""Training real PEFT adapters on the cached tail of a network, by one rule for every rank and method.

The objective is that of a plan, ``(1/N) sum of losses + lambda ||delta||_*``, reached as LoRA reaches it: by an L2
penalty on the factors. Every run is full batch and without dropout: Adam at each of a few learning rates, each from
its own start, until the objective stops improving; the best of them then goes on with L-BFGS.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.advice_tail import Store, Tail, remembering
from benchmarks.advice_whole import Whole, in_model
from ranksure.adapters.config import lora_config
from ranksure.data.samples import Samples
from ranksure.network.logits import logits_of, predict
from ranksure.tasks.task import Task
from ranksure.tasks.text import TextTask

ADAPTER = "default"


@dataclass(frozen=True)
class Rule:
    """When a run has converged.

    Attributes:
        learning_rates: of Adam; every rank tries all of them.
        steps: most steps of Adam.
        window: steps in which the objective must fall by ``tolerance`` of what the run has gained.
        tolerance: relative.
        polish: most blocks of ten L-BFGS iterations.
        polish_tolerance: a block that gains less than this share of the run's gain is the last.
    """

    learning_rates: tuple[float, ...] = (1e-2, 3e-2)
    steps: int = 120
    window: int = 20
    tolerance: float = 2e-3
    polish: int = 15
    polish_tolerance: float = 1e-4


@dataclass
class Outcome:
    """What one method reached.

    Attributes:
        name: the method.
        ranks: rank by module.
        parameters: trained parameters of these ranks.
        objective: ``loss + lambda ||delta||_*`` on the training rows.
        loss: its loss.
        heldout: loss of every held-out row.
        accuracy: on the held-out rows.
        seconds: processor time of all learning rates and the polish.
        evaluations: full-batch gradients.
        learning_rate: the best one.
        by_rate: objective that each learning rate reached before the polish.
        converged: whether the polish stopped by itself.
        tail_error: largest difference to the logits of the whole network, relative; None where not checked.
    """

    name: str
    ranks: dict[str, int]
    parameters: int
    objective: float
    loss: float
    heldout: list[float]
    accuracy: float
    seconds: float
    evaluations: int
    learning_rate: float
    by_rate: dict[str, float]
    converged: bool
    tail_error: float | None = None


class Bench:
    """One case's network, cached rows and objective.

    Args:
        task: the network, its head fitted.
        train: training rows.
        report: held-out rows that chose nothing.
        shapes: ``(m, n)`` of every target module.
        lam: the penalty.
        rule: when a run has converged.
        seed: of the starts.
        tail: follow what the head reads through the last layer only (texts, targets in that layer).
    """

    def __init__(
        self,
        task: Task[Any],
        train: Samples,
        report: Samples,
        shapes: Mapping[str, tuple[int, int]],
        lam: float,
        rule: Rule,
        seed: int,
        tail: bool = True,
    ) -> None:
        began = time.process_time()
        self.task, self.shapes, self.lam, self.rule, self.seed = task, dict(shapes), lam, rule, seed
        task.model.eval().requires_grad_(False)
        self.rows, self.report_rows = train, report
        self.store: Store = {}
        self.train, self.report = self._tails() if tail else self._wholes()
        with self.kept():
            self.base_loss = float(cross_entropy(self.train.all_logits(), self.train.labels()))
            self.report_labels = self.report.labels()
            self.base_heldout = cross_entropy(self.report.all_logits(), self.report_labels, reduction="none").tolist()
        self.prefix_seconds = time.process_time() - began

    def _tails(self) -> tuple[Tail, Tail]:
        task, layer = self.task, last_layer(list(self.shapes))
        assert isinstance(task, TextTask)
        rows: Any = self.rows
        report: Any = self.report_rows
        return Tail(task, layer, rows), Tail(task, layer, report, first_key=len(rows))

    def _wholes(self) -> tuple[Whole, Whole]:
        targets = in_model(self.task, self.shapes)
        train = Whole(self.task, targets, self.rows)
        return train, Whole(self.task, targets, self.report_rows, beside=train)

    def kept(self, copies: bool = False) -> AbstractContextManager[None]:
        """What is frozen is not computed again; see :func:`benchmarks.advice_tail.remembering` for ``copies``."""
        train = self.train
        return train.cached() if isinstance(train, Whole) else remembering(train.layer, self.store, copies)

    def parameters(self, ranks: Mapping[str, int]) -> int:
        return sum(rank * sum(self.shapes[name]) for name, rank in ranks.items())

    # -----------------------------------------------------------------------------------------------------------------
    # LoRA at given ranks

    def lora(self, name: str, ranks: Mapping[str, int], check: bool = False) -> Outcome:
        """LoRA at these ranks, scale one."""
        kept = {module: min(rank, *self.shapes[module]) for module, rank in ranks.items() if rank > 0}
        return self.best(name, lambda: lora_config(kept, model=self.task.adapted), None, check)

    # -----------------------------------------------------------------------------------------------------------------
    # one rule for all

    def best(
        self,
        name: str,
        config: Callable[[], PeftConfig],
        start: Callable[[PeftModel], None] | None,
        check: bool,
        after: Callable[[PeftModel], None] = lambda model: None,
    ) -> Outcome:
        """Train from every learning rate's start, polish the better one, and look at it; ``after`` sees it last."""
        began = time.process_time()
        evaluations = 0
        runs: list[tuple[float, float, dict[str, Tensor]]] = []
        rates = self.rule.learning_rates
        for index, rate in enumerate(rates):
            with self.adapted(config(), self.seed + index) as model:
                if start is not None:
                    start(model)
                with self.kept():
                    value, used = self._adam(model, rate)
                evaluations += used
                runs.append((value, rate, {key: p.detach().clone() for key, p in named_trained(model)}))
        value, rate, state = min(runs, key=lambda run: run[0])
        with self.adapted(config(), self.seed) as model:
            if start is not None:
                start(model)  # its ranks and scales; the values come next
            with torch.no_grad():
                for key, parameter in named_trained(model):
                    parameter.copy_(state[key])
            with self.kept():
                used, converged = self._polish(model)
                loss = self.mean_loss(backward=False)
                heldout = self.report.all_logits()
                logits = self.train.all_logits()
            layers = adapter_layers(self.task.adapted)
            ranks = {module: int(layer.r[ADAPTER]) for module, layer in layers.items()}
            with torch.no_grad():
                nuclear = sum(
                    layer.scaling[ADAPTER]
                    * float(nuclear_norm(layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight))
                    for layer in layers.values()
                )
            seconds = time.process_time() - began
            error = self._tail_error(logits) if check else None
            after(model)
        return Outcome(
            name,
            ranks,
            self.parameters(ranks),
            loss + self.lam * nuclear,
            loss,
            *self.held(heldout),
            seconds=seconds,
            evaluations=evaluations + used,
            learning_rate=rate,
            by_rate={f"{run[1]:g}": run[0] for run in runs},
            converged=converged,
            tail_error=error,
        )

    def held(self, logits: Tensor) -> tuple[list[float], float]:
        losses = cross_entropy(logits, self.report_labels, reduction="none")
        return losses.tolist(), float((logits.argmax(1) == self.report_labels).double().mean())

    def mean_loss(self, backward: bool) -> float:
        """Loss on the training rows; with ``backward``, its gradient is added to the parameters'."""
        total = 0.0
        with torch.set_grad_enabled(backward):
            for chunk in self.train.chunks:
                logits = self.train.logits(chunk)  # pyright: ignore[reportArgumentType]
                loss = cross_entropy(logits, chunk.labels, reduction="sum") / self.train.n
                if backward:
                    loss.backward()
                total += float(loss.detach())
        return total

    def _objective(self, model: PeftModel) -> float:
        """Objective on the factors, its gradient left in the parameters."""
        for parameter in trained(model):
            parameter.grad = None
        value = self.mean_loss(backward=True)
        for layer in adapter_layers(self.task.adapted).values():
            # u = sqrt(s) B and v = sqrt(s) A^T carry the penalty lambda / 2, whatever PEFT's scale s is.
            strength = 0.5 * self.lam * layer.scaling[ADAPTER]
            penalty = strength * sum(f[ADAPTER].weight.square().sum() for f in (layer.lora_A, layer.lora_B))
            penalty.backward()
            value += float(penalty.detach())
        return value

    def _adam(self, model: PeftModel, rate: float) -> tuple[float, int]:
        optimizer = torch.optim.Adam(trained(model), lr=rate)
        values: list[float] = []
        rule, best, kept = self.rule, float("inf"), None
        for _ in range(rule.steps):
            value = self._objective(model)
            values.append(value)
            if value < best:
                best, kept = value, [p.detach().clone() for p in trained(model)]
            if len(values) > rule.window:
                before = min(values[: -rule.window])
                if before - best < rule.tolerance * max(self.base_loss - best, 1e-3 * self.base_loss):
                    break
            optimizer.step()
        assert kept is not None
        with torch.no_grad():
            for parameter, value in zip(trained(model), kept, strict=True):
                parameter.copy_(value)
        return best, len(values)

    def _polish(self, model: PeftModel) -> tuple[int, bool]:
        rule = self.rule
        optimizer = torch.optim.LBFGS(
            trained(model), max_iter=10, history_size=20, line_search_fn="strong_wolfe", tolerance_change=0
        )
        count = 0

        def closure() -> float:
            nonlocal count
            count += 1
            return self._objective(model)

        before = self._objective(model)
        for _ in range(rule.polish):
            optimizer.step(closure)  # pyright: ignore[reportArgumentType]
            now = self._objective(model)
            count += 1
            if before - now < rule.polish_tolerance * max(self.base_loss - now, 1e-3 * self.base_loss):
                return count, True
            before = now
        return count, False

    @contextmanager
    def adapted(self, config: PeftConfig, seed: int) -> Iterator[PeftModel]:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(self.task.adapted, config)
        assert isinstance(model, PeftModel)
        try:
            yield model.eval()
        finally:
            model.unload()
            if hasattr(self.task.adapted, "peft_config"):
                del self.task.adapted.peft_config

    # -----------------------------------------------------------------------------------------------------------------
    # checks against the whole network

    def _tail_error(self, tail: Tensor) -> float:
        """Largest difference between the tail's logits and the whole network's, over the largest logit."""
        batches, back = self.task.batches_by_length(self.rows)
        whole = predict(self.task.model, batches)[back]
        return float((whole - tail).abs().max() / whole.abs().max())

    def full_step_seconds(self, rows: int = 32) -> float:
        """Processor seconds of one full-batch gradient of the whole network at rank 8, from a part of the rows."""
        part = self.rows.subset(range(min(rows, len(self.rows))))
        batches = list(self.task.batches_by_length(part)[0])
        ranks = {name: min(8, *shape) for name, shape in self.shapes.items()}
        with self.adapted(lora_config(ranks, model=self.task.adapted), self.seed):
            times = []
            for _ in range(2):
                began = time.process_time()
                for batch in batches:
                    logits_of(self.task.model, batch).sum().backward()
                times.append(time.process_time() - began)
        return min(times) * len(self.rows) / len(part)


def last_layer(names: Sequence[str]) -> str:
    """The common parent ``...layers.29`` of target modules that all sit in one layer."""
    parents = set()
    for name in names:
        parts = name.split(".")
        index = next(i for i, part in enumerate(parts) if part.isdigit())
        parents.add(".".join(parts[: index + 1]))
    if len(parents) != 1:
        raise ValueError(f"targets of one layer are expected, not of {sorted(parents)}")
    return parents.pop()


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's adapted layers by module name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def named_trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, p in named_trained(model)]


def nuclear_norm(left: Tensor, right: Tensor, middle: Tensor | None = None) -> Tensor:
    """``||left @ diag(middle) @ right||_*`` of ``(m, r)``, ``(r,)`` and ``(r, n)`` without forming the product."""
    first, last = torch.linalg.qr(left).R, torch.linalg.qr(right.T).R.T
    return torch.linalg.svdvals(first @ last if middle is None else (first * middle) @ last).sum()
