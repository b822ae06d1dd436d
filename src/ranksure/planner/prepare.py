"""From settings to a linearised problem: data, splits, model, head, capture, held-out rows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ranksure.adapters.export import check_exportable
from ranksure.capture import estimate_bytes
from ranksure.certificate import lambda_max
from ranksure.data.samples import Samples
from ranksure.errors import DataError, SettingError, TargetError, one_line
from ranksure.losses import Loss, accuracy, get_loss
from ranksure.network.logits import device_of, frozen, logits_of, to_device
from ranksure.network.targets import block_shape
from ranksure.planner.settings import PlanSettings
from ranksure.problem import Problem
from ranksure.progress import Clock
from ranksure.tasks.head import HeadFit
from ranksure.tasks.linearise import HeldOut, accuracy_of_head
from ranksure.tasks.linearise import linearise as linearise_task
from ranksure.tasks.load import load_samples, load_task, loss_for
from ranksure.tasks.options import ModelOptions, RowOptions, values_of
from ranksure.tasks.task import Task

_SELECT_AT_LEAST = 16
_WORKING_COPIES = 5.5  # float32 factors twice while they are packed, a float64 copy, what the allocator keeps
_NETWORK_PASSES = 300  # forward and back over the training rows, as a rule
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

    @property
    def chooses(self) -> bool:
        """Whether lambda is to be chosen by held-out loss, and can be."""
        return self.prepared.settings.weight_decay == "auto" and self.lambda_max > 0 and self.select is not None


def prepare(model: Any, data: Any, settings: PlanSettings, tokenizer: Any, clock: Clock) -> Prepared:
    """Read the data, load the model, choose the targets and split the rows.

    Raises:
        RanksureError: whatever in the input cannot be used, in one line.
    """
    with clock.stage("load", "Reading data and model"):
        said: list[str] = []
        name = loss_for(settings.task, model, settings, said)
        settings, loss = replace(settings, loss=name), get_loss(name)
        rows, evaluation = read_samples(data, settings, settings.split), None
        if settings.eval_data is not None:
            evaluation = read_samples(settings.eval_data, settings, settings.eval_split)
        if settings.samples > len(rows):
            raise SettingError(
                f"`samples` {settings.samples} is more than the {len(rows)} rows of {rows.source}; ask for fewer"
            )
        shuffled = rows.shuffled(settings.seed)
        train = shuffled.subset(range(settings.samples))  # all that calibration may look at
        options = {**values_of(settings, ModelOptions), "processor": tokenizer}
        task = load_task(settings.task, model, train, **options)
        if task.label_names is not None and rows.label_names != task.label_names:
            rows = rows.with_label_names(task.label_names)
            shuffled = rows.shuffled(settings.seed)  # by class, so in another order
            train = shuffled.subset(range(settings.samples))
        if evaluation is not None and rows.label_names is not None:
            evaluation = evaluation.with_label_names(rows.label_names)
        task.settle_padding(train)
        targets = task.targets(settings.target_modules, settings.layers_to_transform)
        _check_ranks(targets, settings)
        if not settings.merged:
            check_exportable(task.adapted, list(targets), head=task.saved_modules, task_type=task.peft_task_type)
        split = _split(shuffled, train, evaluation, settings)
        notes = [*rows.notes, *(evaluation.notes if evaluation else []), *said, *task.notes]
        notes += [*_overlap(split), *task.remarks(train), *_absent_classes(train)]
    return Prepared(settings, task, loss, split, targets, notes)


def _absent_classes(train: Samples) -> list[str]:
    """Classes that the sampled rows do not hold.

    Raises:
        DataError: they hold one class only.
    """
    if train.label_names is None:
        return []
    present = set(train.labels)
    if len(present) < 2:
        raise DataError(f"the {len(train)} sampled rows of {train.source} hold one class only; raise `samples`")
    absent = [name for i, name in enumerate(train.label_names) if i not in present]
    return [f"The sampled rows hold no row of class {', '.join(absent)}; raise `samples`."] if absent else []


def read_samples(data: Any, settings: PlanSettings, split: str | None) -> Samples:
    """Labelled inputs of the settings' task; its loss, which must be settled, says what labels are.

    Raises:
        RanksureError: whatever in them cannot be used, in one line.
    """
    assert settings.loss is not None
    options = {**values_of(settings, RowOptions), "split": split}
    return load_samples(settings.task, data, regression=not get_loss(settings.loss).of_classes, **options)


def _check_ranks(targets: dict[str, nn.Module], settings: PlanSettings) -> None:
    largest = max(settings.ranks)
    for name, module in targets.items():
        m, n = block_shape(module)
        if largest > min(m, n):
            raise TargetError(
                f"rank {largest} is larger than module {name} ({m} x {n}, at most rank {min(m, n)}): lower it"
            )


def _split(shuffled: Samples, train: Samples, evaluation: Samples | None, settings: PlanSettings) -> Split:
    """After the training prefix rows to select on, then rows to report on; nested and stratified by the shuffle."""
    rest = list(range(settings.samples, len(shuffled)))[: settings.heldout]
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
            f"samples of {shuffled.source}; give `eval_data`, fewer `samples`, or a number"
        )
    return Split(train, select if len(select) else None, report if len(report) else None, len(shuffled))


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
    batches = [task.batches_by_length(r)[0] for r in rows]
    tokens = [sum(map(task.tokens, group)) for group in batches]
    contrasts = prepared.loss.effective_outputs(task.n_outputs)
    sizes = [
        estimate_bytes(prepared.targets, len(r), count / len(r), contrasts)
        for r, count in zip(rows, tokens, strict=True)
    ]
    weights = sum(p.numel() * p.element_size() for p in task.model.parameters())
    total = _OVERHEAD_BYTES + weights + int(_WORKING_COPIES * sizes[0]) + sum(sizes[1:])

    middle = batches[0][len(batches[0]) // 2]
    batch = to_device(middle, device_of(task.model))
    with frozen(task.model):
        logits_of(task.model, batch)
        began = time.perf_counter()
        logits_of(task.model, batch)
        forward = time.perf_counter() - began
    padded = [sum(map(task.padded_tokens, group)) / task.padded_tokens(middle) for group in batches]
    capture_seconds = forward * (1 + 2 * contrasts) * sum(padded)
    probe = torch.randn(1024, 1024, dtype=torch.float64)
    began = time.perf_counter()
    torch.matmul(probe, probe)
    rate = 2 * 1024**3 / (time.perf_counter() - began)
    per_rank = sum(4 * tokens[0] * (m * contrasts + n) for m, n in map(block_shape, prepared.targets.values()))
    # About 400 evaluations at a handful of columns for path, optimum, ranks and pattern together, memory-bound.
    solve_seconds = 400 * 8 * per_rank * (2 + len(settings.ranks)) / rate
    if not settings.linearised:  # passes through the network, less where frozen layers lie below the targets
        solve_seconds += _NETWORK_PASSES * 3 * forward * padded[0]
    return Estimate(tokens[0], sizes[0], total, capture_seconds, solve_seconds)


def linearise(prepared: Prepared, clock: Clock) -> Linearised:
    """Fit the head where it is new, and capture training and held-out rows."""
    task, loss, split = prepared.task, prepared.loss, prepared.split
    held = (split.select, split.report)
    found = linearise_task(task, prepared.targets, split.train, loss, held_out=held, clock=clock)
    prepared.notes += found.notes
    select, report = found.held_out
    # Poolings are compared where lambda is chosen: a user who follows the comparison has not used up the report rows.
    judge = select or report
    compared = found.head is not None and judge is not None and loss.of_classes
    pooling = _poolings(prepared, judge, clock) if compared and judge is not None else {}
    return Linearised(prepared, found.problem, select, report, found.head, pooling, lambda_max(found.problem))


def _poolings(prepared: Prepared, judge: HeldOut, clock: Clock) -> dict[str, float | None]:
    """Accuracy before any adapter by pooling; one that this network cannot have is named in the plan's notes."""
    task = prepared.task
    out = {task.pooling: accuracy(judge.base_logits, judge.labels, judge.loss)}
    with clock.stage("head", "Comparing poolings") as advance:
        try:
            if (other := task.alternative()) is not None:
                out[other.pooling] = accuracy_of_head(other, prepared.split.train, judge, advance)
        except Exception as error:  # of any library: the plan needs none of this
            prepared.notes.append(f"The other pooling was not compared: {one_line(error)}")
    return out
