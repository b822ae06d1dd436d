"""What ``ranksure.compress()`` returns: new factors, and what they cost on the network itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from ranksure.factors import Factors
from ranksure.losses import Kind
from ranksure.records.change import CompressRecord, Measured
from ranksure.records.record import plain
from ranksure.runs.resizing.resized import Resized

Level = Literal["lossless", "data-exact", "budget"]


@dataclass(frozen=True)
class Compression(Resized):
    """A compressed adapter; nothing is written yet, and the model is as it was.

    Attributes:
        level: ``lossless``, ``data-exact`` or ``budget``.
        adapter: the adapter's name.
        factors: balanced factors of every module, float64.
        ranks_before: rank given, by module.
        ranks_after: rank now; 0 for modules that leave the adapter.
        parameters_before: numbers in all factors.
        parameters_after: the same now.
        dtype: of the stored factors; everything measured below includes rounding to it.
        before: the network with the adapter as it was; None without data.
        after: with the adapter as it will be stored.
        at_zero: without the adapter; measured for a budget only.
        update_change: ``||delta' - delta||_F / ||delta||_F`` over all modules.
        logit_changes: largest absolute change of a logit: ``compressed`` against the adapter as it was; against the
            compressed adapter ``merged`` (into weights of the base's dtype), ``merged_bfloat16`` and
            ``stored_bfloat16`` (its factors).
        largest_logit: largest absolute logit, for comparison.
        exact: what the rank reduction measured on the linearised network.
        passes: forward passes over the data that measured a loss.
        notes: sentences for the reader.
    """

    record: ClassVar[str] = "compress.json"

    level: Level
    adapter: str
    factors: Factors
    ranks_before: dict[str, int]
    ranks_after: dict[str, int]
    parameters_before: int
    parameters_after: int
    dtype: torch.dtype
    loss: Kind | None = None
    before: Measured | None = None
    after: Measured | None = None
    at_zero: Measured | None = None
    update_change: float = 0.0
    logit_changes: dict[str, float] = field(default_factory=dict)
    largest_logit: float = 0.0
    exact: dict[str, Any] = field(default_factory=dict)
    passes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def captured(self) -> float | None:
        """``(F(0) - F') / (F(0) - F)``; None where there is no gain, or ``F(0)`` was not measured."""
        if self.at_zero is None or self.before is None or self.after is None:
            return None
        gain = self.at_zero.objective - self.before.objective
        return (self.at_zero.objective - self.after.objective) / gain if gain > 0 else None

    def to_json(self, **more: Any) -> dict[str, Any]:
        """What ``compress.json`` holds."""
        own = {name: getattr(self, name) for name in CompressRecord.__struct_fields__ if hasattr(self, name)}
        own["notes"] = [*self.notes, *self.uneven]
        own["dtype"] = str(self.dtype).removeprefix("torch.")
        return plain(CompressRecord(**own | more))

    def told(self) -> dict[str, Any]:
        """As :class:`~ranksure.runs.resizing.resized.Resized`."""
        text = f"Compressed ({self.level}): {self.parameters_before} numbers became {self.parameters_after}."
        if self.before is not None and self.after is not None:
            text += f" Mean loss on the rows measured: {self.before.loss:.6g} before, {self.after.loss:.6g} after."
        return {"adapter": self.adapter, "title": "Compressed", "text": text, "dtype": self.dtype}
