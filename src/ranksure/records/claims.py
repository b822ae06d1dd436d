"""Records of the lab: a claim of the literature, and what was measured of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from msgspec import Struct

from ranksure.records.record import Record

Cell = str | int | float | bool | None
Item = TypeVar("Item")


class Check(Struct, frozen=True):
    """One part of a claim, what was measured of it (a sentence with its numbers), and whether it holds."""

    claim: str
    measured: str
    holds: bool


class Curve(Struct, frozen=True, omit_defaults=True):
    """Points of one line; ``spread`` is one standard deviation at each over seeds, ``group`` the panel."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    group: str = ""
    spread: Sequence[float | None] | None = None


class Reference(Struct, frozen=True):
    """A level that curves are compared with, the same everywhere or by group."""

    label: str
    value: float | None = None
    per_group: dict[str, float | None] = {}


class Table(Struct, frozen=True):
    """Rows under named columns."""

    columns: list[str] = []
    rows: list[list[Cell]] = []

    @classmethod
    def of(cls, items: Iterable[Item], columns: Mapping[str, Callable[[Item], Any]]) -> Table:
        """One row for each item: what the function of every column says of it."""
        return cls(list(columns), [[value(item) for value in columns.values()] for item in items])


class _Claim(Record, kw_only=True):
    """What both kinds of claims say of themselves."""

    SCHEMA: ClassVar[int] = 1
    schema: int = SCHEMA
    name: str
    title: str
    claim: str
    verdict: str
    settings: dict[str, Any] = {}
    curves: list[Curve] = []
    axes: dict[str, str] = {}
    reference: Reference | None = None
    table: Table | None = None
    summary: list[str] = []
    seed: Cell = None
    size: str | None = None
    seconds: float | None = None
    parts: dict[str, int] = {}


class LabRecord(_Claim, kw_only=True):
    """A claim of the theory; ``source`` says whose, ``measured`` holds all its numbers."""

    kind: str = "lab"
    source: str
    where: str = ""
    checks: list[Check]
    measured: dict[str, Any] = {}


class ReproductionRecord(_Claim, kw_only=True):
    """An experiment of the paper; ``where`` says where in it, ``numbers`` is what the table does not hold."""

    kind: str = "reproduce"
    where: str
    source: str = ""
    checks: list[Check] = []
    numbers: dict[str, Any] = {}


ClaimRecord = LabRecord | ReproductionRecord
