"""What a plan is asked: every option, its default, and the checks that need no data or model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ranksure.errors import SettingError
from ranksure.losses import get_loss
from ranksure.network.targets import parse_layers
from ranksure.quantities import _UNITS, parse_memory, parse_share
from ranksure.tasks.load import check_kind

_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class PlanSettings:
    """Options of a plan; names and meanings follow PEFT and transformers where they have one.

    Attributes:
        task: ``text``, ``prompt``, ``image`` or ``speech``.
        text_column: column of texts.
        label_column: column of labels.
        text_pair_column: column of second texts, or None.
        image_column: column of images or their paths.
        audio_column: column of recordings or their paths.
        split: split of a Hub or saved data set.
        eval_data: labelled rows to report held-out figures on; by default rows of the data that chose nothing.
        eval_split: its split.
        target_modules: names, a regular expression, ``"all-linear"``, or None for PEFT's default for the model.
        layers_to_transform: ``"last"``, ``"all"``, ``"0-5"``, a number or a list.
        samples: training rows ``N``.
        heldout: most held-out rows.
        seed: seed of every random choice.
        weight_decay: the penalty ``lambda`` on factors of scale one, a share of lambda_max (``"10%"``), or
            ``"auto"``.
        ranks: uniform ranks to examine.
        captured: share of the possible gain that a recommended rank must capture.
        memory: memory budget, bytes or a string such as ``"8GB"``.
        loss: ``cross-entropy``, ``logistic`` or ``squared-error``.
        pooling: ``model`` or ``mean``.
        template: of prompts: text around ``{text}`` (and ``{pair}``).
        verbalizers: of prompts: a word per class, in the order of the labels or as ``label=word``.
        calibrate: of prompts: shift the classes' logits so that the training rows have the classes' shares; or the
            shifts themselves.
        image_size: of images: pixels per side.
        max_seconds: of speech: longer recordings are cut there.
        max_length: tokens per text.
        batch_size: inputs per batch.
        device: ``auto`` or a torch device.
        dtype: dtype of the model: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        capture_dtype: storage of the captured factors: ``float32`` or ``bfloat16``.
        revision: Hub revision of the model.
        trust_remote_code: allow the model repository's code to run.
        tolerance: relative gap of the final solution.
        random_starts: random starts per rank, or None to choose by size.
        uniform: write the adapter zero-padded to one rank.
        merged: write a merged checkpoint instead of an adapter.
    """

    task: str = "text"
    text_column: str = "text"
    label_column: str = "label"
    text_pair_column: str | None = None
    image_column: str = "image"
    audio_column: str = "audio"
    split: str | None = None
    eval_data: Any = None
    eval_split: str | None = None
    target_modules: str | Sequence[str] | None = None
    layers_to_transform: str | int | Sequence[int] | None = None
    samples: int = 64
    heldout: int = 512
    seed: int = 0
    weight_decay: float | str = "auto"
    ranks: Sequence[int] = (1, 2, 4, 8, 16)
    captured: float = 0.99
    memory: float | str = "8GB"
    loss: str = "cross-entropy"
    pooling: str = "model"
    template: str | None = None
    verbalizers: str | Sequence[str] | None = None
    calibrate: bool | Sequence[float] = True
    image_size: int | None = None
    max_seconds: float | None = None
    max_length: int | None = None
    batch_size: int = 32
    device: str = "auto"
    dtype: str = "auto"
    capture_dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    tolerance: float = 1e-6
    random_starts: int | None = None
    uniform: bool = False
    merged: bool = False

    def __post_init__(self) -> None:
        check_kind(self.task)
        get_loss(self.loss)
        parse_layers(self.layers_to_transform)
        parse_memory(self.memory)
        if self.samples < 4:
            raise SettingError(f"--samples {self.samples} is too few: use at least 4")
        if self.heldout < 0:
            raise SettingError(f"--heldout {self.heldout} is negative")
        if not 0 <= self.seed < 2**32:
            raise SettingError(f"--seed {self.seed} is out of range: use 0 to {2**32 - 1}")
        if self.batch_size < 1:
            raise SettingError(f"--batch-size {self.batch_size} must be at least 1")
        if not 0 < self.captured < 1:
            raise SettingError(f"--captured {self.captured} must lie between 0 and 1, such as 0.99")
        if not 1e-12 <= self.tolerance <= 1e-3:
            raise SettingError(f"tolerance {self.tolerance} must lie between 1e-12 and 1e-3")
        if self.capture_dtype not in ("float32", "bfloat16"):
            raise SettingError(f"unknown capture dtype {self.capture_dtype!r}: use float32 or bfloat16")
        if self.random_starts is not None and self.random_starts < 0:
            raise SettingError(f"--random-starts {self.random_starts} is negative")
        if self.uniform and self.merged:
            raise SettingError("--uniform and --merged exclude each other: a merged checkpoint has no adapter")
        if self.merged and self.task == "prompt":
            raise SettingError("--merged needs a head: a prompt's verbalizers are no part of a checkpoint")
        if self.merged and self.pooling == "mean":
            raise SettingError(
                "--merged needs --pooling model: a mean-pooled head is not part of the checkpoint's class"
            )
        if not self.ranks or min(self.ranks) < 1:
            raise SettingError(f"--ranks {','.join(map(str, self.ranks))}: give ranks of at least 1, such as 1,2,4,8")
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
