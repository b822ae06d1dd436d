"""Real models and data that come from package registries, by short names: what ``--model dinov2`` means.

A folder or file of the same name in the working directory has precedence.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranksure.data.samples import Samples


def _minilm() -> Path:
    from ranksure.bundled.minilm import minilm_path

    return minilm_path()


def _smollm2() -> Path:
    from ranksure.bundled.smollm import smollm2_path

    return smollm2_path()


def _dinov2() -> Path:
    from ranksure.bundled.dinov2 import dinov2_path

    return dinov2_path()


def _whisper() -> Path:
    from ranksure.bundled.whisper import whisper_path

    return whisper_path()


def _rotten_tomatoes() -> Samples:
    from ranksure.bundled.rotten_tomatoes import rotten_tomatoes

    return rotten_tomatoes()


def _spam_assassin() -> Samples:
    from ranksure.bundled.spam_assassin import spam_assassin

    return spam_assassin()


def _fashion_mnist() -> Samples:
    from ranksure.bundled.fashion_mnist import fashion_mnist

    return fashion_mnist()


def _asterisk() -> Samples:
    from ranksure.bundled.asterisk import asterisk_languages

    return asterisk_languages()


MODELS: dict[str, Callable[[], Path]] = {
    "minilm": _minilm,
    "smollm2": _smollm2,
    "dinov2": _dinov2,
    "whisper": _whisper,
}
"""all-MiniLM-L6-v2, SmolLM2-135M-Instruct, DINOv2-S/14, Whisper tiny.en: a function that gives each one's folder."""

DATA: dict[str, tuple[str, Callable[[], Samples]]] = {
    "rotten-tomatoes": ("text", _rotten_tomatoes),
    "spam-assassin": ("text", _spam_assassin),
    "fashion-mnist": ("image", _fashion_mnist),
    "asterisk": ("speech", _asterisk),
}
"""The kind of each data set's inputs, and a function that gives its rows; ``asterisk`` is English and Spanish."""


def named_model(model: Any) -> Any:
    """The folder of a model with a short name; anything else as it is.

    Raises:
        ModelError: its package is not installed, or cannot be had.
    """
    if isinstance(model, (str, os.PathLike)) and os.fspath(model) in MODELS and not Path(model).exists():
        return str(MODELS[os.fspath(model)]())
    return model


def named_data(data: Any) -> Any:
    """The rows of a data set with a short name; anything else as it is.

    Raises:
        DataError: its package is not installed, or cannot be had.
    """
    if isinstance(data, (str, os.PathLike)) and os.fspath(data) in DATA and not Path(data).exists():
        return DATA[os.fspath(data)][1]()
    return data
