"""Speech and audio classification as a task: any ``AutoModelForAudioClassification`` on labelled recordings.

Whisper's encoder always reads a whole window, 30 s as released: 1,500 positions for a prompt of two seconds. A shorter
window keeps its first positions and leaves every other weight as it is; see :func:`shorten_window`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, PreTrainedModel

from ranksure.data.recordings import SpeechRows, Waveform, resampled
from ranksure.errors import ModelError, SettingError, one_line
from ranksure.tasks.classifiers import Classifier, Modality, load_processor
from ranksure.tasks.options import Loading
from ranksure.tasks.task import Task

DEFAULT_SECONDS = 5.0
"""Window of a task whose head is new; a trained head keeps the window that it was trained with."""


@dataclass(kw_only=True)
class SpeechTask(Task[SpeechRows]):
    """An audio classifier on recordings.

    Attributes:
        max_seconds: of a recording that the model is given; the rest is cut.
        window: positions of Whisper's encoder, all of which every row takes; None for a model whose rows take as many
            positions as they are long.
    """

    kind: ClassVar[str] = "speech"

    max_seconds: float
    window: int | None = None

    @property
    def sampling_rate(self) -> int:
        """What the model reads, in Hz."""
        return int(self.processor.sampling_rate)

    @property
    def max_samples(self) -> int:
        """Samples of a recording that the model is given."""
        return round(self.max_seconds * self.sampling_rate)

    def prepare(self, samples: SpeechRows) -> list[dict[str, Any]]:
        """As the feature extractor gives each alone: to the window, or as long as the recording."""
        rows = [self._encoded([self._cut(waveform, samples.sampling_rate)]) for waveform in samples.waveforms]
        return [{key: value[0] for key, value in row.items()} for row in rows]

    def lengths(self, samples: SpeechRows) -> list[int]:
        return [len(waveform) for waveform in samples.waveforms]

    @property
    def collator(self) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        def collate(rows: list[dict[str, Any]]) -> Mapping[str, Any]:
            labels = {"labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else {}
            inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
            if self._padded_to_window:
                return {**{key: torch.stack([row[key] for row in inputs]) for key in inputs[0]}, **labels}
            return {**self.processor.pad(inputs, padding=True, return_tensors="pt"), **labels}

        return collate

    def remarks(self, samples: SpeechRows) -> list[str]:
        out = []
        if samples.sampling_rate != self.sampling_rate:
            out.append(f"The recordings are resampled from {samples.sampling_rate} to {self.sampling_rate} Hz.")
        cut = sum(seconds > self.max_seconds for seconds in samples.seconds)
        if cut:
            out.append(
                f"{cut} of the {len(samples)} training recordings are longer than {self.max_seconds:g} s and are cut "
                "there; raise `max_seconds` to keep more."
            )
        return out

    def tokens(self, batch: Mapping[str, Any]) -> int:
        mask = batch.get("attention_mask")
        lengths = getattr(self.adapted, "_get_feat_extract_output_lengths", None)
        if self.window is None and isinstance(mask, Tensor) and "input_values" in batch and lengths is not None:
            return int(lengths(mask.sum(-1)).sum())
        return self.padded_tokens(batch)

    def padded_tokens(self, batch: Mapping[str, Any]) -> int:
        inputs: Tensor = batch["input_features"] if "input_features" in batch else batch["input_values"]
        rows = len(inputs)
        if self.window is not None:
            return rows * self.window
        lengths = getattr(self.adapted, "_get_feat_extract_output_lengths", None)
        if inputs.ndim == 2 and lengths is not None:  # raw samples, through a front of convolutions
            return rows * int(lengths(torch.tensor(inputs.shape[1])))
        return rows * inputs.shape[1]  # frames; a model that pools them into patches has fewer positions

    def default_targets(self) -> str | list[str]:
        return self.queries_and_values(("q_proj", "v_proj"), ("query", "value"), ("linear_q", "linear_v"))

    def usage(self) -> str:
        text = (
            f"Recordings: mono, {self.sampling_rate} Hz, at most {self.max_seconds:g} s, through this model's feature "
            "extractor"
        )
        if not self._padded_to_window:
            return f"{text} with `padding=True`."
        text += f" with `padding='max_length', max_length={self.max_samples}, truncation=True`."
        if self.window is None:
            return text
        return (
            f"{text} The encoder was cut to its first "
            f"{self.window} positions ({self.max_seconds:g} s); on a model of the whole window do the same first: "
            "`from ranksure.tasks.speech import shorten_window`, `shorten_window(model, "
            f"{self.window})`."
        )

    def record(self) -> dict[str, Any]:
        return {"kind": self.kind, "max_seconds": self.max_seconds}

    @property
    def _padded_to_window(self) -> bool:
        """Whether all rows are padded to the window: without a mask, a row's logits would depend on its batch."""
        return self.window is not None or not getattr(self.processor, "return_attention_mask", False)

    def _cut(self, waveform: Waveform, rate: int) -> Waveform:
        """A recording at the model's rate, cut; the filter sees one second more than is kept."""
        if rate != self.sampling_rate:
            waveform = resampled(waveform[: int((self.max_seconds + 1) * rate)], rate, self.sampling_rate)
        return waveform[: self.max_samples]

    def _encoded(self, waveforms: list[Waveform]) -> dict[str, Tensor]:
        fixed = {"padding": "max_length", "max_length": self.max_samples, "truncation": True}
        how = fixed if self._padded_to_window else {"padding": True}
        try:
            encoded = self.processor(
                [np.asarray(waveform) for waveform in waveforms],
                sampling_rate=self.sampling_rate,
                return_tensors="pt",
                **how,
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"the feature extractor of {self.name} ({type(self.processor).__name__}) cannot read these recordings: "
                f"{one_line(error)}"
            ) from None
        return {key: value for key, value in encoded.items() if isinstance(value, Tensor)}


_MODALITY = Modality(
    AutoModelForAudioClassification,
    "an audio classifier",
    "feature extractor",
    "processor",
    load_processor(AutoFeatureExtractor, "feature extractor", "preprocessor_config.json"),
)


def load_speech_task(
    model: str | os.PathLike[str] | PreTrainedModel,
    rows: SpeechRows,
    *,
    processor: Any = None,
    max_seconds: float | None = None,
    **loading: Any,
) -> SpeechTask:
    """Load a checkpoint (or take a loaded model) for labelled recordings.

    Args:
        model: folder, Hub id, or an audio-classification model in memory. Of a speech recognition checkpoint (Whisper,
            Wav2Vec2) the encoder is used, with a new projection and head.
        rows: the data; its classes give the number of logits.
        processor: feature extractor; needed with a model in memory, else loaded beside the model.
        max_seconds: of each recording; the rest is cut. By default 5 where the head is new, else the model's window
            (Whisper), else 30. For Whisper a whole number, whose window the encoder is cut to.
        **loading: see :class:`~ranksure.tasks.options.Loading`; 16 recordings per batch by default.

    Raises:
        ModelError: the model cannot be found, loaded or used for these labels.
        SettingError: an option has no meaning here.
    """
    options = Loading(**{"batch_size": 16, **loading})
    if rows.label_names is None:
        raise SettingError("speech needs class labels")
    found = _MODALITY.open(model, processor, len(rows.label_names), options)
    extractor = found.processor
    if not isinstance(rate := getattr(extractor, "sampling_rate", None), int):
        raise ModelError(f"the feature extractor of {found.name} ({type(extractor).__name__}) names no sampling rate")
    seconds, window = _window(found, max_seconds, rate, int(getattr(extractor, "hop_length", 0)))
    if window is not None:
        found.processor = _shorter(extractor, int(seconds))
    return SpeechTask(**found.task_fields(rows, len(rows.label_names), options), max_seconds=seconds, window=window)


def shorten_window(model: PreTrainedModel, positions: int) -> None:
    """Cut a Whisper encoder's window to its first positions, in place.

    Whisper adds a fixed embedding per position (20 ms of 30 s) and otherwise treats all alike, so the first
    positions are a model of the same architecture for shorter recordings. The configuration's
    ``max_source_positions`` follows, so that a saved copy loads like any other Whisper. Outputs are not those of
    the whole window: there, attention and the average also see the silence that pads a recording to 30 s.

    Args:
        model: ``WhisperForAudioClassification``, or another model with an ``encoder`` of Whisper.
        positions: how many are kept, 50 per second.

    Raises:
        SettingError: more positions than there are, or none.
        ModelError: not a Whisper encoder.
    """
    encoder = whisper_encoder(model)
    if encoder is None:
        raise ModelError(f"{type(model).__name__} has no Whisper encoder whose window could be shortened")
    embedding = encoder.embed_positions
    assert isinstance(embedding, nn.Embedding)
    if not 1 <= positions <= embedding.num_embeddings:
        raise SettingError(f"{positions} positions asked of a window of {embedding.num_embeddings}")
    if positions < embedding.num_embeddings:
        kept = embedding.weight.detach()[:positions].clone()
        encoder.embed_positions = nn.Embedding.from_pretrained(kept, freeze=not embedding.weight.requires_grad)
    encoder.max_source_positions = model.config.max_source_positions = positions


def whisper_encoder(model: PreTrainedModel) -> Any:
    """The Whisper encoder inside a model, or None."""
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return next((module for module in model.modules() if isinstance(module, WhisperEncoder)), None)


def _window(loaded: Classifier, asked: float | None, rate: int, hop: int) -> tuple[float, int | None]:
    """Seconds per recording; for Whisper also positions, to which the model is cut."""
    if asked is not None and not 0.1 <= asked <= 120:
        raise SettingError(f"max_seconds {asked:g} is out of range: use 0.1 to 120")
    encoder = whisper_encoder(loaded.model)
    if encoder is None:
        return asked or (DEFAULT_SECONDS if loaded.head_is_new else 30.0), None
    stride = encoder.conv1.stride[0] * encoder.conv2.stride[0]
    whole = encoder.embed_positions.num_embeddings
    limit = whole * stride * hop / rate
    seconds = asked or (min(DEFAULT_SECONDS, limit) if loaded.head_is_new else limit)
    if seconds > limit or seconds != int(seconds):
        raise SettingError(
            f"max_seconds {seconds:g}: Whisper's window is a whole number of seconds, for this model at most {limit:g}"
        )
    positions = round(seconds * rate / hop / stride)
    if positions < whole:
        shorten_window(loaded.model, positions)
        loaded.notes.append(
            f"Whisper's encoder is cut to its first {positions} of {whole} positions ({seconds:g} of {limit:g} s)."
        )
    return seconds, positions


def _shorter(processor: Any, seconds: int) -> Any:
    """A feature extractor that pads to the window by default; saved beside a merged model."""
    if getattr(processor, "chunk_length", seconds) == seconds:
        return processor
    return type(processor)(**{**processor.to_dict(), "chunk_length": seconds})
