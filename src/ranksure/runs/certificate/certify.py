"""``ranksure.certify()``: is this LoRA run done, is its rank the limit, and what comes next?

One gradient pass at the trained weights; a forward pass without the adapter and a few probes only where
the verdict needs them. What each verdict proves, and what it does not, is in docs/is-my-run-done.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from torch import Tensor, nn

from ranksure.adapters.loaded import Adapter, read_adapter
from ranksure.errors import SettingError
from ranksure.losses import Kind
from ranksure.network.batch_losses import Weighting
from ranksure.network.gradient import Progress, gradient_pass
from ranksure.network.logits import Batch
from ranksure.records.certificate import Probe, RunCertificate, Verdict
from ranksure.relinearised import Examiner, ModuleState, ball_gaps, penalised_gaps
from ranksure.runs.certificate.verdict import WORSE, Network, Point, rank_or_saddle

TOLERANCE = 0.05
"""A possible gain below this share of the objective counts as none."""


def certify(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    weight_decay: float | None = None,
    lam: float | None = None,
    adapter: str | None = None,
    loss: Kind | None = None,
    weighting: Weighting = "token",
    tolerance: float = TOLERANCE,
    memory_bytes: float = math.inf,
    probe: bool = True,
    progress: Progress | None = None,
) -> RunCertificate:
    """Certify a trained LoRA run.

    Args:
        model: the trained network with its LoRA adapter active (a ``PeftModel``, as a rule).
        batches: all the training data, as batches with ``labels`` (a DataLoader or a list, in any order; an
            iterator is read into a list first). A sample of it gives no verdict that means anything.
        weight_decay: L2 decay of PEFT's matrices A and B (SGD's ``weight_decay``, or Adam's with an L2 penalty):
            ``lambda_j = weight_decay / s_j``. AdamW's decoupled decay is none: leave it out.
        lam: one ``lambda`` for every module, in place of ``weight_decay``. With neither, the gaps are over the
            nuclear-norm ball of the update's own size.
        adapter: name of the adapter, where several are active.
        loss: ``cross-entropy``, ``logistic`` or ``squared-error``. By default what the model computes itself for
            such labels, which is checked on two rows. A loss that the Trainer puts in its place (label smoothing,
            class weights) cannot be seen.
        weighting: of a causal language model's tokens: every ``token`` or every ``sample`` alike.
        tolerance: share of the objective below which a possible gain counts as none.
        memory_bytes: most bytes of gradients held at a time; more passes are made instead. One module is examined
            at a time, which takes two copies of its gradient in float64 and two square matrices of its smaller side.
        probe: where the verdict may be rank-bound, measure on the network itself whether the present columns can
            turn towards a new direction, and what a new direction gives: three to seven forward passes.
        progress: called after every batch of the gradient pass.

    Returns:
        The certificate; ``not-checked``, with reasons, for configurations that no test covers.

    Raises:
        AdapterError: no adapter, or one that is unusable.
        SettingError: both or negative penalties, a tolerance outside (0, 1), or a loss that is not the model's own.
        DataError: labels or logits that cannot be used.
        CaptureError: the loss reaches no adapted module, or two passes over the data differ.
        MemoryBudgetError: one module's gradient alone is larger than the budget.
    """
    began = time.perf_counter()
    _check_settings(weight_decay, lam, tolerance)
    read = read_adapter(model, adapter)
    if read.untested:
        return RunCertificate.not_checked(read.name, read.outside, read.untested, tolerance)
    penalty = _penalty(read, weight_decay, lam)
    examine = Examiner(read.factors, penalty)
    if penalty is None and not examine.threshold:
        reason = "the adapter's update is zero (untrained?), and without a penalty its ball is a point: train first"
        return RunCertificate.not_checked(read.name, read.outside, [reason], tolerance)
    if iter(batches) is batches:
        batches = list(batches)
    states: dict[str, ModuleState] = {}
    seconds: dict[str, float] = {}

    def consume(name: str, gradient: Tensor) -> None:
        start = time.perf_counter()
        states[name] = examine(name, gradient)
        seconds[name] = time.perf_counter() - start

    found = gradient_pass(
        model,
        batches,
        read.modules,
        kind=loss,
        weighting=weighting,
        memory_bytes=memory_bytes,
        consume=consume,
        progress=progress,
    )
    gaps = penalised_gaps(states, found.terms, penalty) if penalty is not None else ball_gaps(states)
    point = Point(read, states, penalty, found.terms.mean, gaps, tolerance)
    network = Network(model, batches, found.terms.kind, weighting)
    at_zero: float | None = None
    probes: list[Probe] = []
    verdict: Verdict = "not-converged"
    if point.stationary:
        at_zero = network.without_adapter(point, found.weight)
        if point.objective > at_zero * (1 + WORSE):
            verdict = "failed-loudly"
        elif gaps.total <= point.allowed:
            verdict = "first-order-optimal"
        else:
            verdict, probes = rank_or_saddle(point, network, probe)
    return RunCertificate(
        verdict=verdict,
        modules={name: point.module_verdict(name, verdict, seconds[name]) for name in states},
        loss=point.loss,
        penalty=point.penalty_value,
        imbalance=point.imbalance,
        objective_at_zero=at_zero,
        rank_gain_bound=gaps.total,
        training_gain_bound=gaps.tangent,
        radius=gaps.radius,
        tolerance=tolerance,
        adapter=read.name,
        weight_decay=weight_decay,
        lam=lam,
        loss_kind=found.terms.kind,
        weighting=weighting,
        n_samples=found.n_samples,
        n_terms=len(found.terms.losses),
        passes=found.passes,
        forward_passes=network.passes,
        probes=probes,
        outside=read.outside,
        unreached=found.unreached,
        reasons=[],
        seconds=time.perf_counter() - began,
    )


def _penalty(read: Adapter, weight_decay: float | None, lam: float | None) -> dict[str, float] | None:
    if weight_decay:
        return read.penalties(weight_decay)
    return dict.fromkeys(read.blocks, lam) if lam else None


def _check_settings(weight_decay: float | None, lam: float | None, tolerance: float) -> None:
    if weight_decay is not None and lam is not None:
        raise SettingError("give the weight decay of PEFT's matrices or lambda, not both")
    for name, value in (("weight decay", weight_decay), ("lambda", lam)):
        if value is not None and not 0 <= value < math.inf:
            raise SettingError(f"the {name} must be at least 0 and finite, not {value}")
    if not 0 < tolerance < 1:
        raise SettingError(f"the tolerance is a share of the objective in (0, 1), not {tolerance}")
