"""Options about data and model that plan, fit, certify and the command line share: each once, with its default.

Nothing here loads torch, so that a command line can be made from these classes quickly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How labelled rows are read.

    Attributes:
        text_column: column of texts.
        label_column: column of labels.
        text_pair_column: column of second texts, or None.
        image_column: column of images or their paths.
        audio_column: column of recordings or their paths.
        split: split of a Hub or saved data set.
    """

    text_column: str = "text"
    label_column: str = "label"
    text_pair_column: str | None = None
    image_column: str = "image"
    audio_column: str = "audio"
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How any checkpoint is loaded.

    Attributes:
        batch_size: inputs per batch; None for 32.
        revision: Hub revision of the model.
        dtype: of the model: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or another torch device.
        trust_remote_code: allow the model repository's own code to run.
        seed: of every random choice, such as of the weights that a checkpoint lacks.
    """

    batch_size: int | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    seed: int = 0

    @property
    def rows_per_batch(self) -> int:
        """The batch size, its default filled in."""
        return self.batch_size or 32


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Loading):
    """How a model is made a task; some options are for some kinds of task only.

    Attributes:
        loss: ``cross-entropy``; for texts also ``logistic`` (two classes, one logit) or ``squared-error``.
        pooling: of texts: ``model`` for its own head input, or ``mean`` of the last hidden states.
        template: of prompts: text around ``{text}`` (and ``{pair}``; ``{mask}`` for masked models).
        verbalizers: of prompts: a word per class, in the order of the labels or as ``label=word``.
        calibrate: of prompts: shift the classes' logits so that the training rows have the classes' shares; or the
            shifts themselves.
        image_size: of images: pixels per side; by default the processor's own.
        max_seconds: of speech: longer recordings are cut there.
        max_length: of texts and prompts: tokens per row; by default the model's limit, at most 256.
    """

    loss: str = "cross-entropy"
    pooling: str = "model"
    template: str | None = None
    verbalizers: str | Sequence[str] | Mapping[str, str] | None = None
    calibrate: bool | Sequence[float] = True
    image_size: int | None = None
    max_seconds: float | None = None
    max_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class TaskOptions(RowOptions, ModelOptions):
    """What a plan and a fit ask alike of rows, model and targets.

    Names and meanings follow PEFT and transformers where they have one.

    Attributes:
        task: ``text``, ``prompt``, ``image`` or ``speech``.
        eval_data: labelled rows to report held-out figures on; by default rows of the data that chose nothing.
        eval_split: its split.
        target_modules: names, a regular expression, ``"all-linear"``, or None for PEFT's default for the model.
        layers_to_transform: ``"last"``, ``"all"``, ``"0-5"``, a number or a list.
        heldout: most held-out rows.
    """

    task: str = "text"
    eval_data: Any = None
    eval_split: str | None = None
    target_modules: str | Sequence[str] | None = None
    layers_to_transform: str | int | Sequence[int] | None = None
    heldout: int = 512


def values_of(settings: Any, options: type, *but: str) -> dict[str, Any]:
    """The values of settings by the names of a class of options, some left out."""
    return {each.name: getattr(settings, each.name) for each in fields(options) if each.name not in but}
