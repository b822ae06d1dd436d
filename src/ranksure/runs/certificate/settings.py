"""How a run's penalty and loss are read: what a certificate, a growth and a compression are asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ranksure.adapters.loaded import Adapter
from ranksure.errors import SettingError, settings_of
from ranksure.loss_terms import Weighting
from ranksure.losses import Kind
from ranksure.network.batches import STREAM_ROWS

TOLERANCE = 0.05
"""A possible gain below this share of the objective counts as none."""


_HALF = (
    "one matrix of each pair was frozen in training (MiCA, LoRA-FA), and a decay of the other alone is no nuclear "
    "norm: leave the weight decay out"
)


@dataclass(frozen=True)
class RunSettings:
    """The objective of a trained run.

    Attributes:
        weight_decay: L2 decay of PEFT's matrices A and B (SGD's ``weight_decay``, or Adam's with an L2 penalty):
            ``lambda_j = weight_decay / s_j``. AdamW's decoupled decay is none: leave it out.
        lam: one ``lambda`` for every module, in place of ``weight_decay``. With neither, a certificate's gaps are
            over the nuclear-norm ball of the update's own size.
        adapter: name of the adapter, where several are active.
        loss: ``cross-entropy``, ``logistic`` or ``squared-error``. By default what the model computes itself for
            such labels, which is checked on two rows. A loss that the Trainer puts in its place (label smoothing,
            class weights) cannot be seen.
        weighting: of a causal language model's tokens: every ``token`` or every ``sample`` alike.
        memory_bytes: most bytes of gradients held at a time; more passes are made instead. One module is examined
            at a time, which takes two copies of its gradient in float64 and two square matrices of its smaller side.
            Of ``compress``: the budget of ``data-exact``, which stores every row's gradients.

    Raises:
        SettingError: both penalties, or one that is negative or infinite.
    """

    weight_decay: float | None = None
    lam: float | None = None
    adapter: str | None = None
    loss: Kind | None = None
    weighting: Weighting = "token"
    memory_bytes: float = math.inf

    def __post_init__(self) -> None:
        if self.weight_decay is not None and self.lam is not None:
            raise SettingError("give the weight decay of PEFT's matrices or lambda, not both")
        for name, value in (("weight decay", self.weight_decay), ("lambda", self.lam)):
            if value is not None and not 0 <= value < math.inf:
                raise SettingError(f"the {name} must be at least 0 and finite, not {value}")

    @classmethod
    def of(cls, what: str, given: Mapping[str, Any]) -> Self:
        """From keyword arguments of ``what``.

        Raises:
            SettingError: one that it does not have, or as above.
        """
        return settings_of(cls, what, given)

    @property
    def of_pass(self) -> dict[str, Any]:
        """The objective and the memory, as :func:`ranksure.network.gradient.gradient_pass` is told them."""
        return {"kind": self.loss, "weighting": self.weighting, "memory_bytes": self.memory_bytes}

    def untested(self, read: Adapter) -> list[str]:
        """Why this objective of this run cannot be certified; empty when it can."""
        if read.frozen_half and self.weight_decay:
            return [*read.untested, _HALF]
        return read.untested

    def penalty(self, read: Adapter) -> dict[str, float] | None:
        """``lambda_j`` by module; None without a penalty."""
        if self.weight_decay:
            return read.penalties(self.weight_decay)
        return dict.fromkeys(read.blocks, self.lam) if self.lam else None


@dataclass(frozen=True)
class CertifySettings(RunSettings):
    """The objective of a trained run, and what counts as a gain.

    Attributes:
        tolerance: share of the objective below which a possible gain counts as none.
        stream_rows: an iterator, and data without a length, is read into a list of at most so many rows.

    Raises:
        SettingError: a tolerance outside (0, 1), no rows, or as :class:`RunSettings`.
    """

    tolerance: float = TOLERANCE
    stream_rows: int = STREAM_ROWS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tolerance < 1:
            raise SettingError(f"the tolerance is a share of the objective in (0, 1), not {self.tolerance}")
        if self.stream_rows < 1:
            raise SettingError(f"`stream_rows` must be at least 1, not {self.stream_rows}")
