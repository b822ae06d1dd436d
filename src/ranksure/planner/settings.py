"""What a plan is asked: every option, its default, and the checks that need no data or model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ranksure.errors import SettingError
from ranksure.quantities import _UNITS, parse_memory, parse_share
from ranksure.tasks.load import check_kind
from ranksure.tasks.options import TaskOptions

_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True, kw_only=True)
class PlanSettings(TaskOptions):
    """Options of a plan; those of :class:`~ranksure.tasks.options.TaskOptions`, and its own.

    Attributes:
        samples: training rows ``N``.
        batch_size: inputs per batch.
        weight_decay: the penalty ``lambda`` on factors of scale one, a share of lambda_max (``"10%"``), or
            ``"auto"``.
        ranks: uniform ranks to examine.
        captured: share of the possible gain that a recommended rank must capture.
        memory: memory budget, bytes or a string such as ``"8GB"``.
        capture_dtype: storage of the captured factors: ``float32`` or ``bfloat16``.
        tolerance: relative gap of the final solution.
        random_starts: random starts per rank, or None to choose by size.
        uniform: write the adapter zero-padded to one rank.
        merged: write a merged checkpoint instead of an adapter.
    """

    samples: int = 64
    batch_size: int = 32
    weight_decay: float | str = "auto"
    ranks: Sequence[int] = (1, 2, 4, 8, 16)
    captured: float = 0.99
    memory: float | str = "8GB"
    capture_dtype: str = "float32"
    tolerance: float = 1e-6
    random_starts: int | None = None
    uniform: bool = False
    merged: bool = False

    def __post_init__(self) -> None:
        from ranksure.losses import get_loss  # with torch: not for a command line that only shows its help
        from ranksure.network.targets import parse_layers

        check_kind(self.task)
        get_loss(self.loss)
        parse_layers(self.layers_to_transform)
        parse_memory(self.memory)
        ranks, merged, headless = ",".join(map(str, self.ranks)), self.merged, self.task == "prompt"
        dtypes = ("float32", "bfloat16")
        refused = [
            (self.samples < 4, f"--samples {self.samples} is too few: use at least 4"),
            (self.heldout < 0, f"--heldout {self.heldout} is negative"),
            (not 0 <= self.seed < 2**32, f"--seed {self.seed} is out of range: use 0 to {2**32 - 1}"),
            (self.batch_size < 1, f"--batch-size {self.batch_size} must be at least 1"),
            (not 0 < self.captured < 1, f"--captured {self.captured} must lie between 0 and 1, such as 0.99"),
            (not 1e-12 <= self.tolerance <= 1e-3, f"tolerance {self.tolerance} must lie between 1e-12 and 1e-3"),
            (
                self.capture_dtype not in dtypes,
                f"unknown capture dtype {self.capture_dtype!r}: use float32 or bfloat16",
            ),
            ((self.random_starts or 0) < 0, f"--random-starts {self.random_starts} is negative"),
            (merged and self.uniform, "--uniform and --merged exclude each other: a merged checkpoint has no adapter"),
            (merged and headless, "--merged needs a head: a prompt's verbalizers are no part of a checkpoint"),
            (
                merged and self.pooling == "mean",
                "--merged needs --pooling model: a mean-pooled head is not part of the checkpoint's class",
            ),
            (min(self.ranks, default=0) < 1, f"--ranks {ranks}: give ranks of at least 1, such as 1,2,4,8"),
        ]
        if message := next((message for wrong, message in refused if wrong), None):
            raise SettingError(message)
        self._check_weight_decay()

    def _check_weight_decay(self) -> None:
        if isinstance(self.weight_decay, str):
            if self.weight_decay != "auto" and parse_share(self.weight_decay) is None:
                raise SettingError(
                    f"--weight-decay {self.weight_decay!r} is neither auto, nor a number, nor a share such as 10%"
                )
        elif not math.isfinite(self.weight_decay) or self.weight_decay < 0:
            raise SettingError(f"--weight-decay {self.weight_decay} must be a positive number, or auto")
        elif self.weight_decay == 0:
            raise SettingError(
                "--weight-decay 0 is refused: without a penalty the dual is trivial, cross-entropy may have no "
                "minimiser, and no rank can be certified; use auto or a small positive number"
            )

    @property
    def memory_bytes(self) -> int:
        """The memory budget in bytes."""
        return parse_memory(self.memory)

    def to_json(self) -> dict[str, Any]:
        """Every option, for ``plan.json``; data in memory as ``{"in_memory": type}``."""

        def plain(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [plain(entry) for entry in value]
            known = value is None or isinstance(value, (str, int, float))
            return value if known else {"in_memory": type(value).__name__}

        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}


def parse_ranks(text: str) -> list[int]:
    """``1,2,4,8`` as integers.

    Raises:
        SettingError: an entry is not a whole number.
    """
    try:
        return sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise SettingError(f"--ranks {text!r} is not understood: write whole numbers such as 1,2,4,8") from None
