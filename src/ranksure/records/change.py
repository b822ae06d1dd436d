"""``grow.json`` and ``compress.json``: an adapter whose ranks were changed."""

from __future__ import annotations

from typing import Any, ClassVar

from msgspec import Struct

from ranksure.records.certificate import RunCertificate
from ranksure.records.record import SCHEMA, Count, DataSource, Ranks, Record, RunSource


class GrownModule(Struct, kw_only=True, frozen=True):
    """One module; ``slopes`` and ``sizes`` of its new columns."""

    rank_before: Count
    rank_after: Count
    slopes: list[float]
    sizes: list[float] = []


class GrowRecord(Record, kw_only=True):
    """The content of ``grow.json``.

    Attributes:
        verdict: of the run before.
        forced: grown whatever the verdict.
        penalty_added: what the new columns add to the trained penalty.
        certificate: of the run before.
    """

    SCHEMA: ClassVar[int] = SCHEMA
    schema: int = SCHEMA
    verdict: str
    forced: bool
    modules: dict[str, GrownModule]
    rank_before: Count
    rank_after: Count
    certificate: RunCertificate
    penalty_added: float = 0.0
    run: RunSource | None = None
    data: DataSource | None = None
    ranksure_version: str | None = None


class Measured(Struct, kw_only=True, frozen=True):
    """The network on the rows given, at one point.

    Attributes:
        loss: mean loss.
        penalty: ``sum_j lambda_j ||delta_j||_*``; 0 without a penalty.
        objective: their sum.
    """

    loss: float
    penalty: float
    objective: float


class CompressRecord(Record, kw_only=True):
    """The content of ``compress.json``; see :class:`ranksure.runs.resizing.compress_result.Compression`."""

    SCHEMA: ClassVar[int] = SCHEMA
    schema: int = SCHEMA
    level: str
    ranks_before: Ranks
    ranks_after: Ranks
    parameters_before: Count
    parameters_after: Count
    adapter: str = "default"
    dtype: str | None = None
    before: Measured | None = None
    after: Measured | None = None
    at_zero: Measured | None = None
    captured: float | None = None
    update_change: float | None = None
    logit_changes: dict[str, float] = {}
    largest_logit: float | None = None
    exact: dict[str, Any] = {}
    passes: Count = 0
    run: RunSource | None = None
    data: DataSource | None = None
    ranksure_version: str | None = None
