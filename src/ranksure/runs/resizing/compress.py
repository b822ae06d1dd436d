"""``ranksure.compress()``: the same adapter with fewer ranks, at three levels, with the true loss before and after.

``lossless`` drops directions that rounding the factors moves anyway. ``data-exact`` applies the rank reduction of
:mod:`ranksure.theory.rank_reduction` to the network linearised at the trained weights: the same predictions on these
rows to first order. ``budget`` drops singular directions, the least harmful first, as long as the true loss allows.
What each level keeps, and what it costs, is in docs/grow-and-compress.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.adapters.loaded import Adapter, read_adapter
from ranksure.adapters.placed import merged, placed
from ranksure.adapters.rewrite import stored_dtype
from ranksure.capture import capture, check_memory
from ranksure.errors import AdapterError, SettingError
from ranksure.factors import Factors, nuclear_norms, ranks_of, thin_svd
from ranksure.loss_terms import kind_of
from ranksure.losses import get_loss
from ranksure.network.batches import has_length
from ranksure.network.gradient import mean_loss
from ranksure.network.logits import Batch, batch_rows, predict, unlabelled
from ranksure.network.targets import base_layer
from ranksure.records.change import Measured
from ranksure.runs.certificate.settings import RunSettings
from ranksure.runs.resizing.compress_result import Compression, Level
from ranksure.runs.resizing.directions import (
    Direction,
    by_value,
    most_within,
    null_directions,
    ranked_directions,
    without,
)
from ranksure.runs.resizing.measured import largest_changes, tied_modules
from ranksure.theory.rank_reduction import reduce_factors

_WORK = 4  # float64 copies of what is captured, while it is reduced


def compress(
    model: nn.Module,
    batches: Sequence[Batch] | None = None,
    *,
    level: Level = "lossless",
    captured: float | None = None,
    max_loss_increase: float | None = None,
    source: str | os.PathLike[str] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Compression:
    """Lower the ranks of a trained LoRA adapter.

    Args:
        model: the network with its adapter active; it stays as it is.
        batches: data with ``labels``, as a list; needed for all but ``lossless``, and to measure a loss at all.
        level: ``lossless``, ``data-exact`` or ``budget``.
        captured: budget: share of ``F(0) - F`` to keep, in (0, 1); ``F`` is the objective, ``F(0)`` that without
            the adapter.
        max_loss_increase: or budget: most that the mean loss may rise, in its own units; positive.
        source: the folder that the adapter came from: its dtype is what the result is rounded to.
        seed: of the rank reduction.
        **settings: ``weight_decay`` or ``lam``, for an objective with a penalty; ``adapter``, ``loss``, ``weighting``,
            ``memory_bytes``: see :class:`~ranksure.runs.certificate.settings.RunSettings`.

    Raises:
        SettingError: a budget without data, one that has no meaning, or a level that this model does not have.
        AdapterError: an adapter that is no plain LoRA, whose update is zero, or that the budget makes superfluous.
        DataError, CaptureError, MemoryBudgetError: as for the certificate and the capture.
    """
    _check_level(level, captured, max_loss_increase, has_data=batches is not None)
    chosen = RunSettings.of("compress", settings)
    if batches is not None and (iter(batches) is batches or not has_length(batches)):
        raise SettingError("the data is gone through several times: pass a list or a DataLoader, with a length")
    read = read_adapter(model, chosen.adapter)
    if untested := chosen.untested(read):
        raise AdapterError(f"this adapter cannot be compressed: {untested[0]}")
    if not any(bool(thin_svd(u, v)[1].any()) for u, v in read.factors.values()):
        raise AdapterError("the adapter's update is zero in every module: the base network alone does the same")
    dtype = stored_dtype(model, read.name, source)
    run = _Run(model, batches, read, chosen.penalty(read), chosen, dtype)
    facts: dict[str, Any] = {}
    if level == "lossless":
        factors = without(read.factors, null_directions(read.factors, run.dtype))
    elif level == "data-exact":
        factors, facts["exact"] = _data_exact(run, seed)
    else:
        factors, facts["at_zero"] = _to_budget(run, captured, max_loss_increase)
    return _measured(run, level, factors, facts)


@dataclass
class _Run:
    """A run and how its loss is measured."""

    model: nn.Module
    batches: Sequence[Batch] | None
    read: Adapter
    penalty: dict[str, float] | None
    settings: RunSettings
    dtype: torch.dtype
    passes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> Sequence[Batch]:
        assert self.batches is not None
        return self.batches

    def measure(self, factors: Factors | None = None) -> Measured:
        """The network with other factors, as a file would hold them; with its own by default."""
        self.passes += 1
        with nullcontext() if factors is None else placed(self.read, factors, self.dtype):
            value = mean_loss(self.model, self.rows, kind=self.settings.loss, weighting=self.settings.weighting)
        norms = nuclear_norms(self.read.factors if factors is None else factors)
        penalty = sum(self.penalty[n] * norm for n, norm in norms.items()) if self.penalty else 0.0
        return Measured(loss=value, penalty=penalty, objective=value + penalty)


def _data_exact(run: _Run, seed: int) -> tuple[Factors, dict[str, Any]]:
    """Same predictions of the network linearised at the trained weights, on these rows, by theorem 3.1.

    Null directions go first: the rank reduction is exact in float64, and counts them.
    """
    first = run.rows[0]
    labels = first.get("labels")
    if not isinstance(labels, Tensor) or (labels.dim() > 1 and not labels.is_floating_point()):
        raise SettingError(
            "data-exact compression stores every row's gradient of every logit, so it is for classifiers and "
            "regressors only: for a language model use `captured` or `max_loss_increase`"
        )
    inputs = list(map(unlabelled, run.rows))
    logits = predict(run.model, inputs[:1])
    kind, memory_bytes = run.settings.loss, run.settings.memory_bytes
    kind = kind or kind_of(getattr(run.model, "config", None), labels, logits)
    contrasts = get_loss(kind).contrasts(logits.shape[1])
    shapes = [(u.shape[0], v.shape[0], u.shape[1]) for u, v in run.read.factors.values()]
    unknowns = sum(r * (r + 1) // 2 for _, _, r in shapes)
    equations = sum(batch_rows(batch) for batch in inputs) * contrasts.shape[1]
    check_memory(8.0 * equations * min(unknowns, 2 * equations + 256), memory_bytes, "the rank reduction's equations")
    start = without(run.read.factors, null_directions(run.read.factors, run.dtype))
    found = capture(run.model, inputs, run.read.modules, contrasts, memory_bytes=memory_bytes / _WORK)
    run.notes += found.notes
    reduced = reduce_factors(found.operator, start, run.penalty or 1.0, seed=seed)
    keys = ("equations", "independent", "count_before", "count_after", "change", "relative_change", "seconds")
    return reduced.factors, {key: getattr(reduced, key) for key in keys}


def _to_budget(run: _Run, captured: float | None, max_loss_increase: float | None) -> tuple[Factors, Measured]:
    before = run.measure()
    at_zero = run.measure({name: (u[:, :0], v[:, :0]) for name, (u, v) in run.read.factors.items()})
    if captured is not None:
        gain = at_zero.objective - before.objective
        if gain <= 0:
            raise SettingError(
                f"the adapter gains nothing on these rows: objective {before.objective:.6g}, and "
                f"{at_zero.objective:.6g} without it; there is no share to keep (use `max_loss_increase`)"
            )
        most = at_zero.objective - captured * gain
        within: Callable[[Measured], bool] = lambda point: point.objective <= most  # noqa: E731
    else:
        most = before.loss + (max_loss_increase or 0.0)
        within = lambda point: point.loss <= most  # noqa: E731
    known: dict[frozenset[Direction], bool] = {}

    def allowed(removed: Sequence[Direction]) -> bool:
        key = frozenset(removed)
        if key not in known:
            known[key] = within(run.measure(without(run.read.factors, removed)))
        return known[key]

    kind, weighting = run.settings.loss, run.settings.weighting
    order = ranked_directions(run.model, run.rows, run.read, kind=kind, weighting=weighting)
    found = [most_within(tried, allowed) for tried in (order, by_value(order))]
    best = max(found, key=lambda removed: sum(direction.parameters for direction in removed))
    return without(run.read.factors, best), at_zero


def _measured(run: _Run, level: Level, factors: Factors, facts: dict[str, Any]) -> Compression:
    """What the compressed adapter costs, in ranks, in updates, and on the network itself."""
    read, notes = run.read, run.notes
    if run.batches is not None:
        facts["before"], facts["after"] = run.measure(), run.measure(factors)
        variants: dict[str, Callable[[], Any]] = {
            "compressed": lambda: nullcontext(),
            "stored_bfloat16": lambda: placed(read, factors, torch.bfloat16),
        }
        if tied := tied_modules(run.model, read):
            notes.append(f"{tied[0]} is tied to another module: merging would change that too, and was not measured")
        else:
            variants["merged"] = lambda: merged(read, factors)
            variants["merged_bfloat16"] = lambda: merged(read, factors, torch.bfloat16)
        reference = lambda: placed(read, factors, run.dtype)  # noqa: E731
        facts["logit_changes"], facts["largest_logit"] = largest_changes(run.model, run.rows, reference, variants)
    else:
        notes.append("no data was given: no loss was measured")
    if any(base_layer(block.module).weight.dtype == torch.bfloat16 for block in read.blocks.values()):
        notes.append("the base network is in bfloat16: differences of logits below its rounding mean nothing")
    ranks = {name: block.rank for name, block in read.blocks.items()}
    widths = {name: u.shape[0] + v.shape[0] for name, (u, v) in factors.items()}
    after = ranks_of(factors)
    return Compression(
        level=level,
        adapter=read.name,
        factors=factors,
        ranks_before=ranks,
        ranks_after=after,
        parameters_before=sum(ranks[name] * width for name, width in widths.items()),
        parameters_after=sum(after[name] * width for name, width in widths.items()),
        dtype=run.dtype,
        loss=run.settings.loss,
        update_change=_update_change(read.factors, factors),
        passes=run.passes,
        notes=notes,
        **facts,
    )


def _update_change(before: Factors, after: Factors) -> float:
    apart = size = 0.0
    for name, (u, v) in before.items():
        p, q = after[name]
        apart += float(thin_svd(torch.cat([u, -p], 1), torch.cat([v, q], 1))[1].square().sum())
        size += float(thin_svd(u, v)[1].square().sum())
    return math.sqrt(apart / size)


def check_settings(
    level: str,
    captured: float | None,
    max_loss_increase: float | None,
    weight_decay: float | None,
    lam: float | None,
    *,
    has_data: bool,
) -> None:
    """Refuse settings of :func:`compress` that have no meaning.

    Raises:
        SettingError: as ``compress``.
    """
    _check_level(level, captured, max_loss_increase, has_data=has_data)
    RunSettings(weight_decay=weight_decay, lam=lam)


def _check_level(level: str, captured: float | None, max_loss_increase: float | None, *, has_data: bool) -> None:
    if level not in ("lossless", "data-exact", "budget"):
        raise SettingError(f"unknown level {level!r}: use lossless, data-exact or budget")
    if (level == "budget") != (captured is not None or max_loss_increase is not None):
        raise SettingError("the budget level, and no other, takes `captured` or `max_loss_increase`")
    if captured is not None and max_loss_increase is not None:
        raise SettingError("give one budget: `captured` or `max_loss_increase`")
    if captured is not None and not 0 < captured < 1:
        raise SettingError(f"`captured` {captured} must be a share in (0, 1), such as 0.99")
    if max_loss_increase is not None and not 0 < max_loss_increase < math.inf:
        raise SettingError(f"`max_loss_increase` {max_loss_increase} must be positive (for none, use lossless)")
    if level != "lossless" and not has_data:
        raise SettingError(f"the level {level} needs data: give `data`")
