"""The cases of ``benchmarks.advice``: model, rows, target modules, weight decay."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.advice_rows import SOURCES
from ranksure.bundled.names import MODELS
from ranksure.data.samples import Samples

BERT = {
    "qv": ["query", "value"],
    "qkvo": ["query", "key", "value", "attention.output.dense"],
    "all-linear": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
}
LLAMA = {
    "qv": ["q_proj", "v_proj"],
    "qkvo": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        model: a key of ``ranksure.bundled.names.MODELS``.
        data: a key of ``SOURCES``.
        samples: training rows N.
        targets: ``qv``, ``qkvo`` or ``all-linear``.
        weight_decay: as ``ranksure plan --weight-decay``: ``auto`` or a share of lambda_max.
        pooling: ``model`` or ``mean``.
        seed: of rows and starts.
        scored: whether the case judges the advice; the others choose the linearity threshold.
        heldout: held-out rows; half choose lambda, half are reported on.
        max_length: tokens per text.
        prompt: whether a language model answers a prompt, rather than a new head on it.
        layers: ``last`` or ``all``.
    """

    model: str
    data: str
    samples: int
    targets: str
    weight_decay: str
    pooling: str = "model"
    seed: int = 0
    scored: bool = True
    heldout: int = 160
    max_length: int = 48
    prompt: bool = False
    layers: str = "last"

    @property
    def name(self) -> str:
        mean = "-mean" if self.pooling == "mean" else ""
        prompt = "-prompt" if self.prompt else ""
        every = "-every-layer" if self.layers == "all" else ""
        seed = f"-seed{self.seed}" if self.seed else ""
        decay = self.weight_decay.replace("%", "pc")
        return f"{self.model}{prompt}{mean}-{self.data}-{self.samples}-{self.targets}{every}-{decay}{seed}"

    @property
    def task(self) -> str:
        return {"dinov2": "image", "whisper": "speech"}.get(self.model, "prompt" if self.prompt else "text")

    @property
    def has_tail(self) -> bool:
        """Whether :mod:`benchmarks.advice_tail` follows the one token that is read, rather than all."""
        return self.task == "text" and self.layers == "last"

    @property
    def has_rivals(self) -> bool:
        """Whether EVA and AdaLoRA are trained, too: on some cases, for EVA takes minutes to start on more modules."""
        return self.scored and self.has_tail and self.samples <= 64 and self.targets == "qv" and self.model == "minilm"

    @property
    def has_bounds(self) -> bool:
        """Whether the linearised pattern and the paper's bound are trained, too: on the first cases, of two classes."""
        return self.has_tail and self.data in ("reviews", "tweets", "spam", "imdb") and self.samples <= 256

    @property
    def module_names(self) -> list[str]:
        return (BERT if self.model == "minilm" else LLAMA)[self.targets]

    @property
    def options(self) -> dict[str, Any]:
        """Settings of a plan that are this kind of task's own."""
        if self.task == "image":
            return {"image_size": 56}  # of 28 x 28 pixels
        if self.task == "speech":
            return {"max_seconds": 2.0}
        return {"max_length": self.max_length, "pooling": self.pooling}

    def model_path(self) -> Path:
        return MODELS[self.model]()

    def rows(self) -> Samples:
        return SOURCES[self.data]()

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


SCORED = [
    Case("minilm", "reviews", 32, "qv", "10%"),
    Case("minilm", "tweets", 64, "qkvo", "auto"),
    Case("minilm", "spam", 64, "qv", "3%"),
    Case("minilm", "imdb", 32, "all-linear", "10%"),
    Case("minilm", "reviews", 64, "qkvo", "3%"),
    Case("smollm2", "reviews", 32, "qv", "10%", heldout=64, max_length=32),
    Case("minilm", "tweets", 128, "all-linear", "10%"),
    Case("minilm", "reviews", 256, "qv", "10%"),
    Case("minilm", "spam", 128, "all-linear", "auto"),
    Case("minilm", "reviews", 32, "qv", "10%", pooling="mean", max_length=32),
    Case("smollm2", "tweets", 32, "qkvo", "3%", heldout=64, max_length=32),
]
UNSCORED = [
    Case("minilm", "reviews", 32, "qv", "3%", seed=1, scored=False, heldout=320, max_length=64),
    Case("minilm", "tweets", 32, "all-linear", "1%", seed=1, scored=False, heldout=320, max_length=64),
    Case("minilm", "spam", 32, "qv", "10%", seed=1, scored=False, heldout=320, max_length=64),
    Case("minilm", "imdb", 32, "qkvo", "auto", seed=1, scored=False),
    Case("minilm", "imdb", 32, "qv", "1%", seed=1, scored=False),
    Case("smollm2", "reviews", 32, "qv", "10%", seed=1, scored=False, heldout=64, max_length=32),
    Case("minilm", "reviews", 32, "qv", "10%", pooling="mean", seed=1, scored=False, max_length=32),
]
WIDER = [
    Case("minilm", "tweets5", 64, "qv", "10%"),
    Case("minilm", "genres8", 64, "qkvo", "10%"),
    Case("minilm", "reviews", 512, "qv", "10%", max_length=32),
    Case("dinov2", "fashion10", 40, "qv", "10%"),
    Case("minilm", "reviews", 32, "qv", "10%", max_length=32, layers="all"),
    Case("minilm", "tweets5", 32, "qv", "10%", max_length=32, layers="all"),
    Case("smollm2", "reviews", 16, "qv", "10%", heldout=64, max_length=24, prompt=True),
    Case("whisper", "languages5", 20, "qv", "10%", heldout=80),
]
"""Scored cases in which the rank can matter: more classes, every layer, other tasks, more rows."""
CASES = [*UNSCORED[:6], *SCORED, *UNSCORED[6:], *WIDER]  # the slowest of the first two lists last
