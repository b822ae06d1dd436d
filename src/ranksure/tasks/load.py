"""Tasks by name: read labelled inputs, and load a model for them.

Each kind lives in files of its own, imported when it is asked for: reading images needs no audio library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ranksure.bundled.names import named_data, named_model
from ranksure.data.samples import Samples
from ranksure.errors import DataError, SettingError
from ranksure.tasks.task import Task

KINDS = ("text", "prompt", "image", "speech")


def check_kind(kind: str) -> None:
    """Refuse an unknown task.

    Raises:
        SettingError: it is none of ``KINDS``.
    """
    if kind not in KINDS:
        raise SettingError(f"unknown task {kind!r}: use {', '.join(KINDS[:-1])} or {KINDS[-1]}")


def _samples_class(kind: str) -> type[Samples]:
    if kind == "image":
        from ranksure.data.images import ImageRows

        return ImageRows
    if kind == "speech":
        from ranksure.data.recordings import SpeechRows

        return SpeechRows
    from ranksure.data.texts import Rows

    return Rows


def load_samples(
    kind: str,
    data: Any,
    *,
    text_column: str = "text",
    text_pair_column: str | None = None,
    image_column: str = "image",
    audio_column: str = "audio",
    label_column: str = "label",
    split: str | None = None,
    regression: bool = False,
) -> Samples:
    """Read labelled inputs; :class:`~ranksure.data.samples.Samples` in memory pass as they are.

    Args:
        kind: ``text``, ``prompt``, ``image`` or ``speech``.
        data: what the kind's loader reads, or a name of :data:`ranksure.bundled.names.DATA`.
        text_column: column of texts.
        text_pair_column: column of second texts, or None.
        image_column: column of images or their paths.
        audio_column: column of recordings or their paths.
        label_column: column of labels.
        split: split of a Hub or saved data set.
        regression: read labels as floats (texts only).

    Raises:
        DataError: the source cannot be read, or a row cannot be used.
        SettingError: the arguments contradict each other.
    """
    check_kind(kind)
    data = named_data(data)
    if isinstance(data, Samples):
        if not isinstance(data, (found := _samples_class(kind))):
            raise DataError(f"{data.source} holds {data.noun}s, but the task {kind} needs {found.noun}s")
        return data
    if regression and kind != "text":
        raise SettingError("the squared error is for texts only: use cross-entropy")
    if kind == "image":
        from ranksure.data.images import load_image_rows

        return load_image_rows(data, image_column=image_column, label_column=label_column, split=split)
    if kind == "speech":
        from ranksure.data.recordings import load_speech_rows

        return load_speech_rows(data, audio_column=audio_column, label_column=label_column, split=split)
    from ranksure.data.texts import load_rows

    return load_rows(
        data,
        text_column=text_column,
        label_column=label_column,
        text_pair_column=text_pair_column,
        split=split,
        regression=regression,
    )


def load_task(
    kind: str,
    model: Any,
    samples: Samples,
    *,
    processor: Any = None,
    loss: str = "cross-entropy",
    pooling: str = "model",
    template: str | None = None,
    verbalizers: Any = None,
    calibrate: bool | Sequence[float] = True,
    image_size: int | None = None,
    max_seconds: float | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Task[Any]:
    """Load a checkpoint (or take a loaded model) for labelled inputs.

    Args:
        kind: ``text``, ``prompt``, ``image`` or ``speech``.
        model: folder, Hub id, a name of :data:`ranksure.bundled.names.MODELS`, or a model in memory.
        samples: the inputs; their classes give the number of logits.
        processor: tokenizer, image processor or feature extractor; needed with a model in memory.
        loss: ``cross-entropy``; for texts also ``logistic`` or ``squared-error``.
        pooling: of texts: ``model`` or ``mean``.
        template: of prompts: text around ``{text}`` (and ``{pair}``).
        verbalizers: of prompts: a word per class.
        calibrate: of prompts: shift the classes' logits so that the training rows have the classes' shares.
        image_size: of images: pixels per side.
        max_seconds: of speech: longer recordings are cut there.
        max_length: of texts and prompts: tokens per row.
        batch_size: inputs per batch.
        revision: Hub revision.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or another torch device.
        trust_remote_code: allow the repository's own code to run.
        seed: seed of whatever the checkpoint leaves to chance.

    Raises:
        ModelError: the model cannot be found, loaded or used for these labels.
        SettingError: an option has no meaning here.
    """
    check_kind(kind)
    model = named_model(model)
    for name, value, owners in (
        ("`template`", template, ("prompt",)),
        ("`verbalizers`", verbalizers, ("prompt",)),
        ("`image_size`", image_size, ("image",)),
        ("`max_seconds`", max_seconds, ("speech",)),
        ("`max_length`", max_length, ("text", "prompt")),
        ("`pooling` mean", pooling if pooling != "model" else None, ("text",)),
        (f"`loss` {loss}", loss if loss != "cross-entropy" else None, ("text",)),
    ):
        if value is not None and kind not in owners:
            raise SettingError(f"{name} has no meaning for the task {kind}: it is for {' and '.join(owners)}")
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "revision": revision,
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    loaded: Any = samples
    if kind == "prompt":
        from ranksure.tasks.prompt import load_prompt_task

        own = {"template": template, "verbalizers": verbalizers, "calibrate": calibrate, "max_length": max_length}
        return load_prompt_task(model, loaded, tokenizer=processor, **own, **common)
    if kind == "image":
        from ranksure.tasks.image import load_image_task

        return load_image_task(model, loaded, processor=processor, image_size=image_size, seed=seed, **common)
    if kind == "speech":
        from ranksure.tasks.speech import load_speech_task

        return load_speech_task(model, loaded, processor=processor, max_seconds=max_seconds, seed=seed, **common)
    from ranksure.tasks.text import load_text_task

    own = {"loss": loss, "pooling": pooling, "max_length": max_length, "seed": seed}
    return load_text_task(model, loaded, tokenizer=processor, **own, **common)
