"""Records of the lab: a claim of the literature, and what was measured of it."""

from __future__ import annotations

from typing import Any, ClassVar

from msgspec import Struct

from ranksure.records.record import Record

Cell = str | int | float | bool | None


class Check(Struct, kw_only=True, frozen=True):
    """One part of a claim, what was measured of it, and whether it holds."""

    claim: str
    measured: str
    holds: bool


class Curve(Struct, kw_only=True, frozen=True):
    """Points of one line; ``spread`` is one standard deviation at each, ``group`` the panel."""

    label: str
    x: list[float]
    y: list[float | None]
    group: str | None = None
    spread: list[float | None] | None = None


class Reference(Struct, kw_only=True, frozen=True):
    """A level that curves are compared with, the same everywhere or by group."""

    label: str
    value: float | None = None
    per_group: dict[str, float | None] = {}


class Columns(Struct, kw_only=True, frozen=True):
    """A table."""

    columns: list[str]
    rows: list[list[Cell]]


class ClaimRecord(Record, kw_only=True):
    """What both kinds of claims say of themselves."""

    SCHEMA: ClassVar[int] = 1
    schema: int = SCHEMA
    name: str
    title: str
    claim: str
    verdict: str


class LabRecord(ClaimRecord, kw_only=True):
    """A claim of the theory; ``measured`` holds all its numbers."""

    checks: list[Check]
    source: str
    measured: dict[str, Any] = {}
    seed: int | None = None
    size: str | None = None
    seconds: float | None = None


class ReproductionRecord(ClaimRecord, kw_only=True):
    """An experiment of the paper; ``where`` says where in it."""

    where: str
    settings: dict[str, Any] = {}
    curves: list[Curve] = []
    axes: dict[str, str] = {}
    checks: list[Check] = []
    reference: Reference | None = None
    table: Columns | None = None
    summary: list[str] = []
    seed: Cell = None
