"""Real models and data that come from package registries, by short names: what ``--model dinov2`` means.

A folder or file of the same name in the working directory has precedence.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ranksure.data.samples import Samples


def _part(module: str, function: str) -> Callable[[], Any]:
    """A function of this package, imported when it is called."""
    return lambda: getattr(importlib.import_module(f"ranksure.bundled.{module}"), function)()


MODELS: dict[str, Callable[[], Path]] = {
    "minilm": _part("minilm", "minilm_path"),
    "smollm2": _part("smollm", "smollm2_path"),
    "dinov2": _part("dinov2", "dinov2_path"),
    "whisper": _part("whisper", "whisper_path"),
}
"""all-MiniLM-L6-v2, SmolLM2-135M-Instruct, DINOv2-S/14, Whisper tiny.en: a function that gives each one's folder."""

DATA: dict[str, tuple[str, Callable[[], Samples]]] = {
    "rotten-tomatoes": ("text", _part("rotten_tomatoes", "rotten_tomatoes")),
    "spam-assassin": ("text", _part("spam_assassin", "spam_assassin")),
    "fashion-mnist": ("image", _part("fashion_mnist", "fashion_mnist")),
    "asterisk": ("speech", _part("asterisk", "asterisk_languages")),
}
"""The kind of each data set's inputs, and a function that gives its rows; ``asterisk`` is English and Spanish."""


def _named(value: Any, known: Mapping[str, Any]) -> str | None:
    named = isinstance(value, (str, os.PathLike)) and os.fspath(value) in known and not Path(value).exists()
    return os.fspath(value) if named else None


def named_model(model: Any) -> Any:
    """The folder of a model with a short name; anything else as it is.

    Raises:
        ModelError: its package is not installed, or cannot be had.
    """
    name = _named(model, MODELS)
    return model if name is None else str(MODELS[name]())


def named_data(data: Any) -> Any:
    """The rows of a data set with a short name; anything else as it is.

    Raises:
        DataError: its package is not installed, or cannot be had.
    """
    name = _named(data, DATA)
    return data if name is None else DATA[name][1]()
