"""An adapter with other ranks, and how it is written beside a record of what was done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ranksure.adapters.readme import uneven
from ranksure.adapters.rewrite import Rewritten, rewrite_adapter
from ranksure.factors import Factors, ranks_of
from ranksure.losses import Kind
from ranksure.records.record import encoded
from ranksure.records.task import carry_loss


class Resized:
    """New factors for every module of an adapter; nothing is written yet, and the model is as it was."""

    record: ClassVar[str]
    """Name of the file beside the adapter."""

    factors: Factors
    loss: Kind | None
    """The loss that was asked for; None where it is the model's own."""

    @property
    def uneven(self) -> list[str]:
        """Who will read the new adapter wrongly, where its ranks differ."""
        return uneven(ranks_of(self.factors))

    def to_json(self, **more: Any) -> dict[str, Any]:
        """What the record holds, with further fields."""
        raise NotImplementedError

    def told(self) -> dict[str, Any]:
        """What ``rewrite_adapter`` is told: ``adapter``, ``title``, ``text``, and ``dtype`` if it is to change."""
        raise NotImplementedError

    def save(
        self,
        model: nn.Module,
        out_dir: str | os.PathLike[str],
        *,
        source: str | os.PathLike[str] | None = None,
        prefix: str = "",
        extra: Mapping[str, Any] | None = None,
    ) -> Rewritten:
        """Write the new adapter and the record, whole or not at all.

        Args:
            model: the model as it was, the adapter active.
            out_dir: the folder to create, or an earlier adapter's to replace.
            source: the folder that the adapter came from; see :func:`~ranksure.adapters.rewrite.rewrite_adapter`.
            prefix: of the names here, where ``model`` is inside the network that was measured.
            extra: more fields of the record (where the data came from).

        Raises:
            AdapterError: as ``rewrite_adapter``.
        """

        def write(stage: Path) -> None:
            (stage / self.record).write_bytes(encoded(self.to_json(**(extra or {}))))
            carry_loss(stage, self.loss)

        return rewrite_adapter(
            model,
            self.factors,
            out_dir,
            source=source,
            prefix=prefix,
            write_more=write,
            **self.told(),
        )
