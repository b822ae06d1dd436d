"""What ``ranksure.compress()`` returns: new factors, what they cost on the network itself, and how to write them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ranksure.adapters.rewrite import Rewritten, rewrite_adapter
from ranksure.factors import Factors
from ranksure.records.change import CompressRecord, Measured
from ranksure.records.record import encoded, plain

Level = Literal["lossless", "data-exact", "budget"]


@dataclass(frozen=True)
class Compression:
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

    level: Level
    adapter: str
    factors: Factors
    ranks_before: dict[str, int]
    ranks_after: dict[str, int]
    parameters_before: int
    parameters_after: int
    dtype: torch.dtype
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
        own["dtype"] = str(self.dtype).removeprefix("torch.")
        return plain(CompressRecord(**own | more))

    def save(
        self,
        model: nn.Module,
        out_dir: str | os.PathLike[str],
        *,
        source: str | os.PathLike[str] | None = None,
        prefix: str = "",
        extra: Mapping[str, Any] | None = None,
    ) -> Rewritten:
        """Write the compressed adapter and ``compress.json``, whole or not at all.

        Args:
            model: the model that was compressed, the adapter as it was.
            out_dir: the folder to create, or an earlier adapter's to replace.
            source: the folder that the adapter came from; see :func:`~ranksure.adapters.rewrite.rewrite_adapter`.
            prefix: of the names here, where ``model`` is inside the network that was compressed.
            extra: more fields of ``compress.json`` (where the data came from).

        Raises:
            AdapterError: as ``rewrite_adapter``.
        """

        def write(stage: Path) -> None:
            (stage / "compress.json").write_bytes(encoded(self.to_json(**(extra or {}))))

        text = f"Compressed ({self.level}): {self.parameters_before} numbers became {self.parameters_after}."
        if self.before is not None and self.after is not None:
            text += f" Mean loss on the rows measured: {self.before.loss:.6g} before, {self.after.loss:.6g} after."
        return rewrite_adapter(
            model,
            self.factors,
            out_dir,
            adapter=self.adapter,
            source=source,
            prefix=prefix,
            dtype=self.dtype,
            title="Compressed",
            text=text,
            write_more=write,
        )
