"""``ranksure.certify()``: is this LoRA run done, is its rank the limit, and what comes next?

One gradient pass at the trained weights; a forward pass without the adapter and a few probes only where
the verdict needs them. What each verdict proves, and what it does not, is in docs/is-my-run-done.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ranksure.adapters.loaded import Adapter, read_adapter
from ranksure.adapters.merging import merged
from ranksure.network.batches import held
from ranksure.network.gradient import GradientPass, Progress, Underflow, gradient_pass
from ranksure.network.hooks import OtherMap
from ranksure.network.logits import Batch
from ranksure.network.row_losses import RowsInteract
from ranksure.records.certificate import RunCertificate
from ranksure.relinearised import Examiner, ModuleState, ball_gaps, penalised_gaps
from ranksure.runs.certificate.settings import TOLERANCE, CertifySettings
from ranksure.runs.certificate.start import first_slope
from ranksure.verdict import UNPROBED, Network, Point, judged

_POINT = "the adapter's update is zero (untrained?), and without a penalty its ball is a point: train first"
_OVERFLOW = (
    "the objective overflows float64 (loss {loss:.3g}, penalty {penalty:.3g}): labels or lambda of another scale"
)

__all__ = ["TOLERANCE", "certify", "certify_adapter"]


def certify(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    probe: bool = True,
    progress: Progress = lambda done: None,
    **settings: Any,
) -> RunCertificate:
    """Certify a trained LoRA run.

    Args:
        model: the trained network with its LoRA adapter active (a ``PeftModel``, as a rule).
        batches: all the training data, as batches with ``labels`` (a DataLoader or a list, in any order; an iterator,
            or what has no length, is read into a list first). A sample of it gives no verdict that means anything.
        probe: where the verdict may be rank-bound, measure on the network itself whether the present columns can
            turn towards a new direction, and what a new direction gives: three to seven forward passes. Without it
            such a run is ``not-checked``.
        progress: called after every batch of the gradient pass.
        **settings: ``weight_decay`` or ``lam``, ``adapter``, ``loss``, ``weighting``, ``tolerance``,
            ``memory_bytes``, ``stream_rows``: see :class:`~ranksure.runs.certificate.settings.CertifySettings`.

    Returns:
        The certificate; ``not-checked``, with reasons, for configurations that no test covers.

    Raises:
        AdapterError: no adapter, or one that is unusable.
        SettingError: settings without meaning, or a loss that is not the model's own.
        DataError: labels or logits that cannot be used, or more than ``stream_rows`` rows of a stream.
        CaptureError: the loss reaches no adapted module, or two passes over the data differ.
        MemoryBudgetError: one module's gradient alone is larger than the budget.
    """
    chosen = CertifySettings.of("certify", settings)
    return certify_adapter(model, read_adapter(model, chosen.adapter), batches, chosen, probe=probe, progress=progress)


def certify_adapter(
    model: nn.Module,
    read: Adapter,
    batches: Iterable[Batch],
    settings: CertifySettings,
    *,
    probe: bool = True,
    progress: Progress = lambda done: None,
    before: Sequence[RunCertificate] = (),
) -> RunCertificate:
    """:func:`certify` of an adapter read already; what certificates ``before`` know of W0 is not measured again."""
    began = time.perf_counter()
    if untested := settings.untested(read):
        return RunCertificate.not_checked(read.name, read.outside, untested, settings.tolerance, read.notes)
    penalty = settings.penalty(read)
    examine = _Timed(Examiner(read.factors, penalty))
    if penalty is None and not examine.examiner.threshold:
        return RunCertificate.not_checked(read.name, read.outside, [_POINT], settings.tolerance)
    batches = held(batches, settings.stream_rows)
    known = [earlier.first for earlier in before if earlier.first is not None]
    try:
        found = _gradients(model, read, batches, settings, examine, progress)
        first = first_slope(model, read, batches, settings, known) if penalty is None else None
    except (
        RowsInteract,
        OtherMap,
        Underflow,
    ) as error:  # no loss of the data's rows, no update of a weight, or no slope
        return RunCertificate.not_checked(read.name, read.outside, [str(error)], settings.tolerance, read.notes)
    states, terms = examine.states, found.terms
    gaps = ball_gaps(states, terms, first.length) if first else penalised_gaps(states, terms, penalty or {})
    point = Point(read, states, penalty, terms.mean, gaps, settings.tolerance)
    if not math.isfinite(point.objective + gaps.total):
        reason = _OVERFLOW.format(loss=point.loss, penalty=point.penalty_value)
        return RunCertificate.not_checked(read.name, read.outside, [reason], settings.tolerance, read.notes)
    network = Network(model, batches, terms.kind, settings.weighting)
    verdict, at_zero, probes = judged(point, network, found.weight, probe)
    return RunCertificate(
        verdict=verdict,
        modules={name: point.module_verdict(name, verdict, examine.seconds[name]) for name in states},
        loss=point.loss,
        penalty=point.penalty_value,
        imbalance=point.imbalance,
        objective_at_zero=at_zero,
        rank_gain_bound=gaps.total,
        training_gain_bound=gaps.tangent,
        radius=gaps.radius,
        inner=gaps.inner,
        first=first,
        tolerance=settings.tolerance,
        adapter=read.name,
        weight_decay=settings.weight_decay,
        lam=settings.lam,
        loss_kind=terms.kind,
        weighting=settings.weighting,
        n_samples=found.n_samples,
        n_terms=len(terms.losses),
        passes=found.passes,
        forward_passes=network.passes,
        probes=probes,
        outside=read.outside,
        notes=read.notes,
        unreached=found.unreached,
        reasons=[UNPROBED] if verdict == "not-checked" else [],
        seconds=time.perf_counter() - began,
    )


def _gradients(
    model: nn.Module,
    read: Adapter,
    batches: Iterable[Batch],
    settings: CertifySettings,
    examine: _Timed,
    progress: Progress,
) -> GradientPass:
    """The pass at the trained weights; every module's gradient is examined and dropped."""
    return gradient_pass(
        model, batches, read.modules, **settings.of_pass, consume=examine, progress=progress, around=merged
    )


class _Timed:
    """Examines each module's gradient when it comes, and keeps how long that took."""

    def __init__(self, examiner: Examiner) -> None:
        self.examiner = examiner
        self.states: dict[str, ModuleState] = {}
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, gradient: Tensor) -> None:
        start = time.perf_counter()
        self.states[name] = self.examiner(name, gradient)
        self.seconds[name] = time.perf_counter() - start
