"""Options about rows, model and targets that plan, fit, certify and the command line share: each once.

Nothing here loads torch, so that a command line can be made from these classes quickly.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from ranksure.options import COMMON, DATA, MODEL, SEED, TARGETS, TRAINING, Option, Settings, names, whole

TASKS = ("text", "prompt", "image", "speech")
"""Kinds of task."""


def parse_target_modules(text: str | None) -> str | list[str] | None:
    """``query,value`` as names; ``all-linear`` and anything with regular-expression signs as they are."""
    if text is None or text == "all-linear" or not re.fullmatch(r"[\w.,\- ]+", text):
        return text
    return names(text)


def _known_loss(value: str) -> None:
    from ranksure.losses import get_loss

    get_loss(value)


def loss_option(default: str) -> Option:
    """The option that names a loss; ``default`` is what holds without it."""
    words = ("cross-entropy", "logistic", "squared-error")
    text = f"cross-entropy, logistic (two classes, one output) or squared-error (default: {default})."
    return Option(text, MODEL, words=words, check=_known_loss)


TargetModules = Annotated[
    str | Sequence[str] | None,
    Option(
        "Names (query,value), a regular expression, or all-linear. Default: PEFT's for the model.",
        COMMON,
        parse=parse_target_modules,
    ),
]
Layers = Annotated[str | int | Sequence[int] | None, Option("last, all, 0-5, or 0,2,4.", TARGETS, parse=str)]


@dataclass(frozen=True, kw_only=True)
class RowOptions(Settings):
    """How labelled rows are read."""

    text_column: Annotated[str, Option("Column of texts.", DATA)] = "text"
    label_column: Annotated[str, Option("Column of labels.", DATA)] = "label"
    text_pair_column: Annotated[str | None, Option("Column of second texts.", DATA)] = None
    image_column: Annotated[str, Option("Column of images or their paths (task image).", DATA)] = "image"
    audio_column: Annotated[str, Option("Column of recordings or their paths (task speech).", DATA)] = "audio"
    split: Annotated[str | None, Option("Split of a Hub or saved data set.", DATA)] = None


@dataclass(frozen=True, kw_only=True)
class Loading(Settings):
    """How any checkpoint is loaded."""

    batch_size: Annotated[int | None, Option("Rows per batch (default: 32).", TRAINING, check=whole(1))] = None
    revision: Annotated[str | None, Option("Hub revision of the model.", MODEL)] = None
    dtype: Annotated[str, Option("Model dtype: auto, float32, bfloat16, float16.", MODEL)] = "auto"
    device: Annotated[str, Option("auto, cpu, cuda.", MODEL)] = "auto"
    trust_remote_code: Annotated[bool, Option("Run code from the model repository.", MODEL)] = False
    seed: Annotated[int, Option("Seed of everything random.", TRAINING, check=SEED)] = 0

    @property
    def rows_per_batch(self) -> int:
        """The batch size, its default filled in."""
        return self.batch_size or 32


@dataclass(frozen=True, kw_only=True)
class KindOptions(Settings):
    """What a model of one kind of task is told, and the others are not."""

    template: Annotated[
        str | None, Option("Prompt around {text} (and {pair}); {mask} for masked models (task prompt).", MODEL)
    ] = None
    verbalizers: Annotated[
        str | Sequence[str] | Mapping[str, str] | None,
        Option("A word per class: label=word,label=word (task prompt).", MODEL, parse=str),
    ] = None
    image_size: Annotated[int | None, Option("Pixels per side; smaller is faster (task image).", MODEL)] = None
    max_seconds: Annotated[float | None, Option("Longer recordings are cut there (task speech).", MODEL)] = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions(KindOptions, Loading):
    """How a model is made a task; some options are for some kinds of task only."""

    loss: Annotated[
        str | None,
        loss_option("what transformers trains the model with, by its problem_type and outputs"),
    ] = None
    pooling: Annotated[
        str,
        Option("model (its own head input) or mean (of the last hidden states).", MODEL, words=("model", "mean")),
    ] = "model"
    calibrate: Annotated[
        bool | Sequence[float],
        Option("Shift the classes' logits so that the training rows have the classes' shares (task prompt).", MODEL),
    ] = True
    max_length: Annotated[int | None, Option("Tokens per text (default: the model's limit, at most 256).", DATA)] = None


@dataclass(frozen=True, kw_only=True)
class TaskOptions(RowOptions, ModelOptions):
    """What a plan and a fit ask alike of rows, model and targets.

    Names and meanings follow PEFT and transformers where they have one.
    """

    task: Annotated[
        str,
        Option(
            "text (a classifier with a head), prompt (a language model with a word per class), image or speech.",
            COMMON,
            words=TASKS,
        ),
    ] = "text"
    eval_data: Annotated[Any, Option("Rows to report held-out figures on.", DATA)] = None
    eval_split: Annotated[str | None, Option("Split of the evaluation data.", DATA)] = None
    target_modules: TargetModules = None
    layers_to_transform: Layers = None
    heldout: Annotated[int, Option("Most held-out rows.", DATA, check=whole(0))] = 512


def values_of(settings: Any, options: type, *but: str) -> dict[str, Any]:
    """The values of settings by the names of a class of options, some left out."""
    return {each.name: getattr(settings, each.name) for each in fields(options) if each.name not in but}
