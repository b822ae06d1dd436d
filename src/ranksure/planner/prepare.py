"""From settings to a linearised problem: data, splits, model, head, capture, held-out rows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.capture import Progress, capture, estimate_bytes
from ranksure.certificate import lambda_max
from ranksure.data.samples import Samples
from ranksure.errors import DataError, SettingError, TargetError
from ranksure.losses import Loss, accuracy, get_loss
from ranksure.network.logits import device_of, frozen, logits_of, predict, to_device
from ranksure.network.targets import block_shape, select_targets
from ranksure.operators.factored import FactoredOperator
from ranksure.planner.settings import PlanSettings
from ranksure.problem import Problem, uniform_penalty
from ranksure.progress import Clock
from ranksure.tasks.head import HeadFit, fit_head, head_features, install_head
from ranksure.tasks.linearise import HeldOut
from ranksure.tasks.load import load_samples, load_task
from ranksure.tasks.task import Task

_SELECT_AT_LEAST = 16
# Settings of a plan that a task is loaded with.
_TASK_OPTIONS = ("loss", "pooling", "template", "verbalizers", "calibrate", "image_size", "max_seconds", "max_length")
_TASK_OPTIONS += ("batch_size", "revision", "dtype", "device", "trust_remote_code", "seed")
_WORKING_COPIES = 5.5  # float32 factors twice while they are packed, a float64 copy, what the allocator keeps
_OVERHEAD_BYTES = 1 << 30  # the libraries, and the chunks in which products are formed


@dataclass
class Split:
    """Disjoint rows: to solve on, to choose lambda on, to report on."""

    train: Samples
    select: Samples | None
    report: Samples | None
    total: int


@dataclass
class Prepared:
    """A task with its rows and targets, before any pass through the network."""

    settings: PlanSettings
    task: Task[Any]
    loss: Loss
    split: Split
    targets: dict[str, nn.Module]
    notes: list[str]


@dataclass
class Estimate:
    """What the work will take: bytes (an upper estimate) and seconds (rough)."""

    tokens: int
    factor_bytes: int
    total_bytes: int
    capture_seconds: float
    solve_seconds: float


@dataclass
class Linearised:
    """The linearised problem at ``lambda = 1`` (see ``Problem.with_penalty``) and what surrounds it."""

    prepared: Prepared
    problem: Problem
    select: HeldOut | None
    report: HeldOut | None
    head: HeadFit | None
    pooling_accuracy: dict[str, float | None] = field(default_factory=dict)
    lambda_max: float = 0.0


def prepare(model: Any, data: Any, settings: PlanSettings, tokenizer: Any, clock: Clock) -> Prepared:
    """Read the data, load the model, choose the targets and split the rows.

    Raises:
        RanksureError: whatever in the input cannot be used, in one line.
    """
    with clock.stage("load", "Reading data and model"):
        rows = read_samples(data, settings, settings.split)
        evaluation = (
            None if settings.eval_data is None else read_samples(settings.eval_data, settings, settings.eval_split)
        )
        if settings.samples > len(rows):
            raise SettingError(
                f"`samples` {settings.samples} is more than the {len(rows)} rows of {rows.source}; ask for fewer"
            )
        task = load_task(
            settings.task,
            model,
            rows.shuffled(settings.seed).subset(range(settings.samples)),  # all that calibration may look at
            processor=tokenizer,
            **{name: getattr(settings, name) for name in _TASK_OPTIONS},
        )
        if task.label_names is not None and rows.label_names != task.label_names:
            rows = rows.with_label_names(task.label_names)
        if evaluation is not None and rows.label_names is not None:
            evaluation = evaluation.with_label_names(rows.label_names)
        targets = _targets(task, settings)
        _check_ranks(targets, settings)
        split = _split(rows, evaluation, settings)
        notes = [*rows.notes, *(evaluation.notes if evaluation else []), *task.notes]
        notes.extend(_overlap(split))
        notes.extend(task.remarks(split.train))
        if split.train.label_names is not None:
            present = set(split.train.labels)
            if len(present) < 2:
                raise DataError(
                    f"the {settings.samples} sampled rows of {rows.source} hold one class only; raise `samples`"
                )
            absent = [name for i, name in enumerate(split.train.label_names) if i not in present]
            if absent:
                notes.append(f"The sampled rows hold no row of class {', '.join(absent)}; raise `samples`.")
    return Prepared(settings, task, get_loss(settings.loss), split, targets, notes)


def read_samples(data: Any, settings: PlanSettings, split: str | None) -> Samples:
    """Labelled inputs of the settings' task.

    Raises:
        RanksureError: whatever in them cannot be used, in one line.
    """
    columns = ("text_column", "text_pair_column", "image_column", "audio_column", "label_column")
    options = {name: getattr(settings, name) for name in columns}
    return load_samples(settings.task, data, split=split, regression=settings.loss == "squared-error", **options)


def _targets(task: Task[Any], settings: PlanSettings) -> dict[str, nn.Module]:
    wanted = settings.target_modules
    if wanted is None:
        wanted = task.default_targets()
    inside = [name for name, _ in task.adapted.named_modules()]
    heads = [*task.new_modules, *([task.head] if task.head else [])]
    exclude = [n for n in inside if any(n == new or n.startswith(new + ".") for new in heads)]
    return select_targets(task.adapted, wanted, settings.layers_to_transform, exclude)


def _check_ranks(targets: dict[str, nn.Module], settings: PlanSettings) -> None:
    largest = max(settings.ranks)
    for name, module in targets.items():
        m, n = block_shape(module)
        if largest > min(m, n):
            raise TargetError(
                f"rank {largest} is larger than module {name} ({m} x {n}, at most rank {min(m, n)}): lower it"
            )


def _split(rows: Samples, evaluation: Samples | None, settings: PlanSettings) -> Split:
    """Training prefix, then rows to select on, then rows to report on; nested and stratified by the shuffle."""
    shuffled = rows.shuffled(settings.seed)
    train = shuffled.subset(range(settings.samples))
    rest = list(range(settings.samples, len(rows)))[: settings.heldout]
    if evaluation is not None:
        held = evaluation.shuffled(settings.seed)
        held = held.subset(range(min(len(held), settings.heldout)))
        if len(rest) >= _SELECT_AT_LEAST:
            select, report = shuffled.subset(rest[: max(_SELECT_AT_LEAST, settings.heldout // 2)]), held
        else:
            half = len(held) // 2
            select, report = held.subset(range(half)), held.subset(range(half, len(held)))
    else:
        half = len(rest) // 2
        select, report = shuffled.subset(rest[:half]), shuffled.subset(rest[half:])
    if settings.weight_decay == "auto" and len(select) < _SELECT_AT_LEAST:
        raise SettingError(
            f"`weight_decay` auto needs at least {2 * _SELECT_AT_LEAST} held-out rows beside the {settings.samples} "
            f"samples of {rows.source}; give `eval_data`, fewer `samples`, or a number"
        )
    return Split(train, select if len(select) else None, report if len(report) else None, len(rows))


def _overlap(split: Split) -> list[str]:
    """Say how many held-out inputs the solver sees in training, if any."""
    known = set(split.train.identities())
    held = [rows for rows in (split.select, split.report) if rows is not None]
    twice = sum(identity in known for rows in held for identity in rows.identities())
    noun = split.train.noun
    return [f"{twice} held-out rows have the {noun} of a training row; their figures flatter."] if twice else []


def estimate(prepared: Prepared) -> Estimate:
    """Memory from the exact token counts, time from one forward and backward pass and a timed product."""
    task, settings = prepared.task, prepared.settings
    rows = [r for r in (prepared.split.train, prepared.split.select, prepared.split.report) if r is not None]
    batches = [task.batches(r) for r in rows]
    tokens = [sum(task.tokens(batch) for batch in group) for group in batches]
    contrasts = prepared.loss.effective_outputs(task.n_outputs)
    itemsize = 2 if settings.capture_dtype == "bfloat16" else 4
    sizes = [
        estimate_bytes(prepared.targets, len(r), count / len(r), contrasts, itemsize)
        for r, count in zip(rows, tokens, strict=True)
    ]
    weights = sum(p.numel() * p.element_size() for p in task.model.parameters())
    total = _OVERHEAD_BYTES + weights + int(_WORKING_COPIES * sizes[0]) + sum(sizes[1:])

    batch = to_device(batches[0][0], device_of(task.model))
    with frozen(task.model):
        logits_of(task.model, batch)
        began = time.perf_counter()
        logits_of(task.model, batch)
        forward = time.perf_counter() - began
    padded = sum(task.padded_tokens(b) for group in batches for b in group) / task.padded_tokens(batches[0][0])
    capture_seconds = forward * (1 + 2 * contrasts) * padded
    probe = torch.randn(1024, 1024, dtype=torch.float64)
    began = time.perf_counter()
    torch.matmul(probe, probe)
    rate = 2 * 1024**3 / (time.perf_counter() - began)
    per_rank = sum(4 * tokens[0] * (m * contrasts + n) for m, n in map(block_shape, prepared.targets.values()))
    # About 400 evaluations at a handful of columns for path, optimum, ranks and pattern together, memory-bound.
    solve_seconds = 400 * 8 * per_rank * (2 + len(settings.ranks)) / rate
    return Estimate(tokens[0], sizes[0], total, capture_seconds, solve_seconds)


def linearise(prepared: Prepared, clock: Clock) -> Linearised:
    """Fit the head where it is new, and capture training and held-out rows."""
    task, loss, settings = prepared.task, prepared.loss, prepared.settings
    head, pooling = None, {}
    if task.head_is_new:
        with clock.stage("head", "Fitting the new head") as advance:
            head = _fit(task, loss, prepared.split.train, advance)
            assert task.head is not None
            install_head(task.model, task.head, head)
    with clock.stage("capture", "Capturing gradients of the training rows") as advance:
        operator, base = _capture(prepared, prepared.split.train, advance)
    labels = task.labels(prepared.split.train)
    problem = Problem(operator, base, labels, loss, uniform_penalty(operator, 1.0))
    held: list[HeldOut | None] = []
    with clock.stage("capture", "Capturing gradients of the held-out rows") as advance:
        for rows in (prepared.split.select, prepared.split.report):
            held.append(
                None if rows is None else HeldOut(*_capture(prepared, rows, advance), task.labels(rows), loss, rows)
            )
    # Poolings are compared where lambda is chosen: a user who follows the comparison has not used up the report rows.
    judge = held[0] or held[1]
    if head is not None and judge is not None and settings.loss != "squared-error":
        with clock.stage("head", "Comparing poolings") as advance:
            pooling[task.pooling] = accuracy(judge.base_logits, judge.labels, loss)
            other = task.alternative()
            if other is not None:
                pooling[other.pooling] = _head_accuracy(other, loss, prepared.split.train, judge, advance)
    return Linearised(prepared, problem, held[0], held[1], head, pooling, lambda_max(problem))


def _fit(task: Task[Any], loss: Loss, rows: Samples, advance: Progress) -> HeadFit:
    assert task.head is not None
    batches, back = task.batches_by_length(rows)
    features = head_features(task.model, task.head, batches, task.n_outputs, advance)[back]
    layer = task.model.get_submodule(task.head)
    return fit_head(features, task.labels(rows), loss, task.n_outputs, bias=getattr(layer, "bias", None) is not None)


def _head_accuracy(task: Task[Any], loss: Loss, train: Samples, judge: HeldOut, advance: Progress) -> float | None:
    """Accuracy of a task's head before any adapter; a new head is fitted, and nothing is installed."""
    batches, back = task.batches_by_length(judge.rows)
    if not task.head_is_new:
        return accuracy(predict(task.model, batches).double()[back], judge.labels, loss)
    assert task.head is not None
    features = head_features(task.model, task.head, batches, task.n_outputs, advance)[back]
    return accuracy(_fit(task, loss, train, advance).logits(features), judge.labels, loss)


def _capture(prepared: Prepared, rows: Samples, advance: Progress) -> tuple[FactoredOperator, Tensor]:
    task = prepared.task
    dtype = torch.bfloat16 if prepared.settings.capture_dtype == "bfloat16" else torch.float32
    batches, back = task.batches_by_length(rows)
    captured = capture(
        task.model,
        batches,
        prepared.targets,
        prepared.loss.contrasts(task.n_outputs),
        dtype=dtype,
        progress=advance,
    )
    # Stored in bfloat16 where asked, worked on in float32.
    return captured.operator.to(torch.float32).select(back), captured.base_logits[back]
