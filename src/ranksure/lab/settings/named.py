"""What the experiments run on: a model, data, the modules that are fine-tuned, and how many rows.

The paper fine-tunes query and value projections of one attention layer on few rows, with prompts (RoBERTa-base, six
tasks of two labels, N = 32), images (ViT) and speech (wav2vec2). The settings here have the same shape on parts that
come from package registries; ``AUTHORS`` are the paper's kinds of model from the Hub, for users who are online.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ranksure.errors import SettingError
from ranksure.lab.run import near

if TYPE_CHECKING:
    from ranksure.data.samples import Samples


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
        kept = {name: value for name, value in vars(self).items() if name not in ("title", "model_name", "data_name")}
        return kept | {"model": self.model_name, "data": self.data_name}

    def with_samples(self, n: int) -> Setting:
        """The same setting on ``n`` training rows."""
        return replace(self, n=n)


_MODELS = {
    "minilm": "all-MiniLM-L6-v2 (22.7M)",
    "smollm2": "SmolLM2-135M",
    "dinov2": "DINOv2-S/14 (22M)",
    "whisper": "Whisper tiny.en, encoder (8M)",
}
_DATA = {
    "rotten-tomatoes": "Rotten Tomatoes (MR)",
    "spam-assassin": "SpamAssassin, no headers",
    "fashion-mnist": "Fashion-MNIST",
    "asterisk": "Asterisk prompts",
}
_PROJECTIONS = ("q_proj", "v_proj")


def _registry(name: str, title: str, kind: str, model: str, data: str, **more: Any) -> Setting:
    """A setting on parts from package registries, by their short names."""

    def model_path() -> Any:
        from ranksure.bundled.names import MODELS

        return MODELS[model]()

    def samples() -> Samples:
        from ranksure.bundled.names import DATA

        return DATA[data][1]()

    return Setting(name, title, kind, model_path, samples, _MODELS[model], _DATA[data], **more)


def _hub(name: str, title: str, kind: str, model: str, data: str, columns: Mapping[str, Any], **more: Any) -> Setting:
    """A setting on a model and data from the Hub."""

    def samples() -> Samples:
        from ranksure.tasks.load import load_samples

        return load_samples(kind, data, split="train", **columns)

    return Setting(name, title, kind, lambda: model, samples, model, data, **more)


_PROMPTS: dict[str, Any] = {
    "modules": _PROJECTIONS,
    "options": {
        "template": "{text} All in all, the movie was",
        "verbalizers": {"negative": " terrible", "positive": " great"},
    },
}
_IMAGES: dict[str, Any] = {"modules": _PROJECTIONS, "options": {"image_size": 98}}
_SPEECH: dict[str, Any] = {"modules": _PROJECTIONS, "options": {"max_seconds": 2.0}}
_SHORT, _TWO = {"max_length": 64}, ("Pullover", "Shirt")
_FASHION = ("image", "dinov2", "fashion-mnist")

SETTINGS: tuple[Setting, ...] = (
    _registry("rotten-tomatoes", "Rotten Tomatoes, MiniLM", "text", "minilm", "rotten-tomatoes", heldout=512),
    _registry("spam-assassin", "SpamAssassin, MiniLM", "text", "minilm", "spam-assassin", options=_SHORT),
    _registry(
        "prompts", "Rotten Tomatoes, SmolLM2 prompts", "prompt", "smollm2", "rotten-tomatoes", heldout=128, **_PROMPTS
    ),
    _registry("fashion-mnist-2", "Fashion-MNIST, 2 classes, DINOv2", *_FASHION, classes=_TWO, **_IMAGES),
    _registry("fashion-mnist-10", "Fashion-MNIST, 10 classes, DINOv2", *_FASHION, n=40, **_IMAGES),
    _registry("spoken-language", "Spoken language, Whisper", "speech", "whisper", "asterisk", heldout=128, **_SPEECH),
)
"""On parts from package registries."""

_SENTIMENT = {"template": "{text} It was {mask}.", "verbalizers": {"0": " terrible", "1": " great"}}
_SST2, _ROBERTA = "stanfordnlp/sst2", "FacebookAI/roberta-base"
_BEANS, _VIT = "AI-Lab-Makerere/beans", "google/vit-base-patch16-224-in21k"
_SUPERB, _WAV2VEC2 = "superb/superb-data-er", "facebook/wav2vec2-base"
_SENTENCE, _LABELS = {"text_column": "sentence"}, {"label_column": "labels"}

AUTHORS: tuple[Setting, ...] = (
    _hub("sst2-roberta", "SST-2, RoBERTa-base prompts", "prompt", _ROBERTA, _SST2, _SENTENCE, options=_SENTIMENT),
    _hub("beans-vit", "Bean leaves, ViT-base", "image", _VIT, _BEANS, _LABELS, n=48),
    _hub("emotion-wav2vec2", "Emotions, wav2vec2-base", "speech", _WAV2VEC2, _SUPERB, {}, n=64, modules=_PROJECTIONS),
)
"""The paper's kinds of model, from the Hub."""


def setting_named(name: str) -> Setting:
    """A setting by its name.

    Raises:
        SettingError: there is none of that name.
    """
    known = {setting.name: setting for setting in (*SETTINGS, *AUTHORS)}
    if name not in known:
        raise SettingError(f"there is no setting {name!r} to reproduce on: {near(name, list(known))}")
    return known[name]
