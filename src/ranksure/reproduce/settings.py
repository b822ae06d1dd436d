"""What the experiments run on: a model, data, the modules that are fine-tuned, and how many rows.

The paper fine-tunes query and value projections of one attention layer on few rows, with prompts (RoBERTa-base, six
tasks of two labels, N = 32), images (ViT) and speech (wav2vec2). The settings here have the same shape on parts that
come from package registries; ``AUTHORS`` are the paper's kinds of model from the Hub, for users who are online.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ranksure.bundled.names import DATA, MODELS
from ranksure.data.samples import Samples
from ranksure.errors import SettingError
from ranksure.tasks.load import load_samples


@dataclass(frozen=True)
class Setting:
    """A task that experiments run on.

    Attributes:
        name: what the command line and file names call it.
        title: for figures.
        kind: ``text``, ``prompt``, ``image`` or ``speech``.
        model: gives the model's folder or Hub id; raises a one-line error where it is not installed.
        data: gives the labelled rows, likewise.
        model_name: for the record.
        data_name: for the record.
        n: training rows.
        heldout: rows to choose lambda on, and as many again to report on.
        modules: target modules.
        layers: which layers of them.
        classes: the classes that are kept, by name; None for all.
        options: further options of :func:`ranksure.tasks.load.load_task`.
    """

    name: str
    title: str
    kind: str
    model: Callable[[], Any]
    data: Callable[[], Samples]
    model_name: str
    data_name: str
    n: int = 32
    heldout: int = 256
    modules: Sequence[str] = ("query", "value")
    layers: str = "last"
    classes: Sequence[str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What decides the numbers, as plain JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "model": self.model_name,
            "data": self.data_name,
            "n": self.n,
            "heldout": self.heldout,
            "modules": list(self.modules),
            "layers": self.layers,
            "classes": None if self.classes is None else list(self.classes),
            "options": dict(self.options),
        }

    def with_samples(self, n: int) -> Setting:
        """The same setting on ``n`` training rows."""
        return replace(self, n=n)


_MINILM, _SMOLLM2 = "all-MiniLM-L6-v2 (22.7M)", "SmolLM2-135M"
_DINOV2, _WHISPER = "DINOv2-S/14 (22M)", "Whisper tiny.en, encoder (8M)"
_PROJECTIONS = ("q_proj", "v_proj")

SETTINGS: tuple[Setting, ...] = (
    Setting(
        "rotten-tomatoes",
        "Rotten Tomatoes, MiniLM",
        "text",
        MODELS["minilm"],
        DATA["rotten-tomatoes"][1],
        _MINILM,
        "Rotten Tomatoes (MR)",
        heldout=512,
    ),
    Setting(
        "spam-assassin",
        "SpamAssassin, MiniLM",
        "text",
        MODELS["minilm"],
        DATA["spam-assassin"][1],
        _MINILM,
        "SpamAssassin, no headers",
        options={"max_length": 64},
    ),
    Setting(
        "prompts",
        "Rotten Tomatoes, SmolLM2 prompts",
        "prompt",
        MODELS["smollm2"],
        DATA["rotten-tomatoes"][1],
        _SMOLLM2,
        "Rotten Tomatoes (MR)",
        heldout=128,
        modules=_PROJECTIONS,
        options={
            "template": "{text} All in all, the movie was",
            "verbalizers": {"negative": " terrible", "positive": " great"},
        },
    ),
    Setting(
        "fashion-mnist-2",
        "Fashion-MNIST, 2 classes, DINOv2",
        "image",
        MODELS["dinov2"],
        DATA["fashion-mnist"][1],
        _DINOV2,
        "Fashion-MNIST",
        modules=_PROJECTIONS,
        classes=("Pullover", "Shirt"),
        options={"image_size": 98},
    ),
    Setting(
        "fashion-mnist-10",
        "Fashion-MNIST, 10 classes, DINOv2",
        "image",
        MODELS["dinov2"],
        DATA["fashion-mnist"][1],
        _DINOV2,
        "Fashion-MNIST",
        n=40,
        modules=_PROJECTIONS,
        options={"image_size": 98},
    ),
    Setting(
        "spoken-language",
        "Spoken language, Whisper",
        "speech",
        MODELS["whisper"],
        DATA["asterisk"][1],
        _WHISPER,
        "Asterisk prompts",
        heldout=128,
        modules=_PROJECTIONS,
        options={"max_seconds": 2.0},
    ),
)
"""On parts from package registries."""


def _hub(kind: str, name: str, **columns: Any) -> Callable[[], Samples]:
    return lambda: load_samples(kind, name, **columns)


_SENTIMENT = {"template": "{text} It was", "verbalizers": {"0": " terrible", "1": " great"}}

AUTHORS: tuple[Setting, ...] = (
    Setting(
        "sst2-roberta",
        "SST-2, RoBERTa-base prompts",
        "prompt",
        lambda: "FacebookAI/roberta-base",
        _hub("prompt", "stanfordnlp/sst2", text_column="sentence", split="train"),
        "FacebookAI/roberta-base",
        "stanfordnlp/sst2",
        options={**_SENTIMENT, "template": "{text} It was {mask}."},
    ),
    Setting(
        "beans-vit",
        "Bean leaves, ViT-base",
        "image",
        lambda: "google/vit-base-patch16-224-in21k",
        _hub("image", "AI-Lab-Makerere/beans", label_column="labels", split="train"),
        "google/vit-base-patch16-224-in21k",
        "AI-Lab-Makerere/beans",
        n=48,
    ),
    Setting(
        "emotion-wav2vec2",
        "Emotions, wav2vec2-base",
        "speech",
        lambda: "facebook/wav2vec2-base",
        _hub("speech", "superb/superb-data-er", split="train"),
        "facebook/wav2vec2-base",
        "superb/superb-data-er",
        n=64,
        modules=_PROJECTIONS,
    ),
)
"""The paper's kinds of model, from the Hub."""


def setting_named(name: str) -> Setting:
    """A setting by its name.

    Raises:
        SettingError: there is none of that name.
    """
    known = {setting.name: setting for setting in (*SETTINGS, *AUTHORS)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise SettingError(f"there is no setting {name!r} to reproduce on: {hint}")
    return known[name]
