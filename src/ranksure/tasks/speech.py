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
from ranksure.network.checkpoints import device_named, quiet
from ranksure.tasks.classifiers import Classifier, head_name, load_classifier, own_label_order
from ranksure.tasks.task import Task

DEFAULT_SECONDS = 5.0
"""Window of a task whose head is new; a trained head keeps the window that it was trained with."""

_ATTENTION = (("q_proj", "v_proj"), ("query", "value"), ("linear_q", "linear_v"))


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

    def batches(self, samples: SpeechRows) -> list[dict[str, Tensor]]:
        """Features in the order of the rows; padded to the longest of the batch under a mask, else to the window."""
        waveforms, size = samples.waveforms, self.batch_size
        return [
            self._encoded([self._cut(waveform, samples.sampling_rate) for waveform in waveforms[low : low + size]])
            for low in range(0, len(samples), size)
        ]

    def batches_by_length(self, samples: SpeechRows) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Batches of recordings of like length, and the way back: ``outputs[back]`` is in the order of the rows."""
        order = torch.argsort(torch.tensor([len(waveform) for waveform in samples.waveforms]), stable=True)
        return self.batches(samples.subset(order.tolist())), torch.argsort(order)

    def features(self, samples: SpeechRows) -> list[dict[str, Any]]:
        labels = self.labels(samples).tolist()
        out = []
        for waveform, label in zip(samples.waveforms, labels, strict=True):
            encoded = self._encoded([self._cut(waveform, samples.sampling_rate)])
            out.append({**{key: value[0] for key, value in encoded.items()}, "labels": label})
        return out

    @property
    def collator(self) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        def collate(rows: list[dict[str, Any]]) -> Mapping[str, Any]:
            labels = torch.tensor([row["labels"] for row in rows])
            inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
            if self._padded_to_window:
                return {**{key: torch.stack([row[key] for row in inputs]) for key in inputs[0]}, "labels": labels}
            return {**self.processor.pad(inputs, padding=True, return_tensors="pt"), "labels": labels}

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

    def default_targets(self) -> str | tuple[str, ...]:
        """Queries and values of attention, the choice of the LoRA paper; all linear layers where none is found."""
        present = {name.rsplit(".", 1)[-1] for name, _ in self.adapted.named_modules()}
        return next((pair for pair in _ATTENTION if present.issuperset(pair)), "all-linear")

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


def load_speech_task(
    model: str | os.PathLike[str] | PreTrainedModel,
    rows: SpeechRows,
    *,
    processor: Any = None,
    max_seconds: float | None = None,
    batch_size: int = 16,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    seed: int = 0,
) -> SpeechTask:
    """Load a checkpoint (or take a loaded model) for labelled recordings.

    Args:
        model: folder, Hub id, or an audio-classification model in memory. Of a speech recognition checkpoint (Whisper,
            Wav2Vec2) the encoder is used, with a new projection and head.
        rows: the data; its classes give the number of logits.
        processor: feature extractor; needed with a model in memory, else loaded beside the model.
        max_seconds: of each recording; the rest is cut. By default 5 where the head is new, else the model's window
            (Whisper), else 30. For Whisper a whole number, whose window the encoder is cut to.
        batch_size: recordings per batch.
        revision: Hub revision.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or another torch device.
        trust_remote_code: allow the repository's own code to run.
        seed: seed of whatever the checkpoint leaves to chance.

    Raises:
        ModelError: the model cannot be found, loaded or used for these labels.
        SettingError: an option has no meaning here.
    """
    if rows.label_names is None:
        raise SettingError("speech needs class labels")
    n_outputs = len(rows.label_names)
    if isinstance(model, PreTrainedModel):
        if processor is None:
            raise SettingError("a model in memory needs its feature extractor: pass processor=")
        loaded = Classifier(model, head_name(model, n_outputs))
        name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    else:
        name = os.fspath(model)
        loaded = load_classifier(
            AutoModelForAudioClassification,
            "an audio classifier",
            name,
            n_outputs,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            seed=seed,
        )
        processor = processor or _load_processor(name, revision, trust_remote_code)
    if not isinstance(rate := getattr(processor, "sampling_rate", None), int):
        raise ModelError(f"the feature extractor of {name} ({type(processor).__name__}) names no sampling rate")
    loaded.model.to(device_named(device))  # pyright: ignore[reportArgumentType]
    notes = list(loaded.notes)
    seconds, window = _window(loaded, max_seconds, rate, int(getattr(processor, "hop_length", 0)), notes)
    if window is not None:
        processor = _shorter(processor, int(seconds))
    task = SpeechTask(
        model=loaded.model,
        adapted=loaded.model,
        processor=processor,
        name=name,
        revision=revision,
        n_outputs=n_outputs,
        label_names=rows.label_names,
        head=loaded.head,
        new_modules=loaded.new_modules,
        head_is_new=loaded.head_is_new,
        batch_size=batch_size,
        notes=notes,
        max_seconds=seconds,
        window=window,
    )
    if not task.head_is_new:
        task.label_names = own_label_order(loaded.model, rows, task.notes)
    return task


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


def _window(loaded: Classifier, asked: float | None, rate: int, hop: int, notes: list[str]) -> tuple[float, int | None]:
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
        notes.append(
            f"Whisper's encoder is cut to its first {positions} of {whole} positions ({seconds:g} of {limit:g} s)."
        )
    return seconds, positions


def _shorter(processor: Any, seconds: int) -> Any:
    """A feature extractor that pads to the window by default; saved beside a merged model."""
    if getattr(processor, "chunk_length", seconds) == seconds:
        return processor
    return type(processor)(**{**processor.to_dict(), "chunk_length": seconds})


def _load_processor(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    try:
        with quiet():
            return AutoFeatureExtractor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # as for the model
        raise ModelError(
            f"the feature extractor of {name} cannot be loaded: {one_line(error)} (save preprocessor_config.json "
            "beside the model, or pass processor=)"
        ) from None
