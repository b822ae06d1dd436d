"""Tasks by name: read labelled inputs, and load a model for them.

A kind of task is a file and a row of :data:`KINDS`. Each is imported when it is asked for: reading images needs no
audio library, and the names alone need no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ranksure.errors import DataError, SettingError
from ranksure.tasks.options import Loading, ModelOptions, RowOptions, values_of

if TYPE_CHECKING:
    from ranksure.data.samples import Samples
    from ranksure.tasks.task import Task


@dataclass(frozen=True)
class Kind:
    """A kind of task; functions and classes as ``module:name``.

    Attributes:
        load: makes the task of a model and its rows.
        options: those of :class:`~ranksure.tasks.options.ModelOptions` that it takes beside ``Loading``'s.
        processor: what it calls its tokenizer or processor.
        read: reads the rows.
        rows: their class.
        columns: those of :class:`~ranksure.tasks.options.RowOptions` that name them.
    """

    load: str
    options: tuple[str, ...]
    processor: str
    read: str
    rows: str
    columns: tuple[str, ...]


_TEXTS = ("ranksure.data.texts:load_rows", "ranksure.data.texts:Rows", ("text_column", "text_pair_column"))
_IMAGES = ("ranksure.data.images:load_image_rows", "ranksure.data.images:ImageRows", ("image_column",))
_RECORDINGS = ("ranksure.data.recordings:load_speech_rows", "ranksure.data.recordings:SpeechRows", ("audio_column",))

KINDS = {
    "text": Kind("ranksure.tasks.text:load_text_task", ("loss", "pooling", "max_length"), "tokenizer", *_TEXTS),
    "prompt": Kind(
        "ranksure.tasks.prompt:load_prompt_task",
        ("template", "verbalizers", "calibrate", "max_length"),
        "tokenizer",
        *_TEXTS,
    ),
    "image": Kind("ranksure.tasks.image:load_image_task", ("image_size",), "processor", *_IMAGES),
    "speech": Kind("ranksure.tasks.speech:load_speech_task", ("max_seconds",), "processor", *_RECORDINGS),
}


def check_kind(kind: str) -> Kind:
    """The row of a kind of task; a ``SettingError`` where there is none."""
    if kind not in KINDS:
        *others, last = KINDS
        raise SettingError(f"unknown task {kind!r}: use {', '.join(others)} or {last}")
    return KINDS[kind]


def load_samples(kind: str, data: Any, *, regression: bool = False, **columns: Any) -> Samples:
    """Read labelled inputs; :class:`~ranksure.data.samples.Samples` in memory pass as they are.

    Args:
        kind: ``text``, ``prompt``, ``image`` or ``speech``.
        data: what the kind's loader reads, or a name of :data:`ranksure.bundled.names.DATA`.
        regression: read labels as floats (texts only).
        **columns: see :class:`~ranksure.tasks.options.RowOptions`.

    Raises:
        DataError: the source cannot be read, or a row cannot be used.
        SettingError: the arguments contradict each other.
    """
    from ranksure.bundled.names import named_data
    from ranksure.data.samples import Samples

    row = check_kind(kind)
    data = named_data(data)
    if isinstance(data, Samples):
        if not isinstance(data, (found := _named(row.rows))):
            raise DataError(f"{data.source} holds {data.noun}s, but the task {kind} needs {found.noun}s")
        return data
    if regression and "loss" not in row.options:
        raise SettingError("the squared error is for texts only: use cross-entropy")
    options = RowOptions(**columns)
    wanted = {name: getattr(options, name) for name in (*row.columns, "label_column", "split")}
    return _named(row.read)(data, **wanted, **({"regression": True} if regression else {}))


def load_task(kind: str, model: Any, samples: Samples, *, processor: Any = None, **options: Any) -> Task[Any]:
    """Load a checkpoint (or take a loaded model) for labelled inputs.

    Args:
        kind: ``text``, ``prompt``, ``image`` or ``speech``.
        model: folder, Hub id, a name of :data:`ranksure.bundled.names.MODELS`, or a model in memory.
        samples: the inputs; their classes give the number of logits.
        processor: tokenizer, image processor or feature extractor; needed with a model in memory.
        **options: see :class:`~ranksure.tasks.options.ModelOptions`; without ``loss``, the cross-entropy.

    Raises:
        ModelError: the model cannot be found, loaded or used for these labels.
        SettingError: an option has no meaning here.
    """
    from ranksure.bundled.names import named_model

    row = check_kind(kind)
    model = named_model(model)
    asked = ModelOptions(**options)
    _refuse_others(kind, asked)
    loading = {**values_of(asked, Loading), "batch_size": asked.rows_per_batch}
    own = {name: getattr(asked, name) for name in row.options}
    if own.get("loss", "") is None:
        del own["loss"]
    return _named(row.load)(model, samples, **{row.processor: processor}, **own, **loading)


def loss_for(kind: str, model: Any, asked: ModelOptions, notes: list[str]) -> str:
    """The loss of a task: the one asked for, else the one that transformers trains the model with.

    Args:
        kind: ``text``, ``prompt``, ``image`` or ``speech``.
        model: as for :func:`load_task`.
        asked: the loss, and how the model is loaded.
        notes: receives a sentence where the model decides for another loss than the cross-entropy.

    Raises:
        ModelError: the model has no configuration that can be read.
        SettingError: the model is trained with a loss that the task does not have.
    """
    from ranksure.losses import CrossEntropy, loss_meant

    row = check_kind(kind)
    if asked.loss is not None or kind == "prompt":
        return asked.loss or CrossEntropy.name
    from ranksure.bundled.names import named_model
    from ranksure.tasks.classifiers import config_of

    config = config_of(named_model(model), asked)
    stated, outputs = getattr(config, "problem_type", None), int(getattr(config, "num_labels", 2))
    loss = loss_meant(stated, outputs)
    if loss.name == CrossEntropy.name:
        return loss.name
    why = f"{'one output' if outputs == 1 else f'{outputs} outputs'}, problem_type {stated}"
    if "loss" not in row.options or outputs > 1:
        what = "labels or targets" if outputs > 1 else "target"
        raise SettingError(
            f"transformers trains {_shown(model)} with the {loss.name} loss, {outputs} {what} per row ({why}), which "
            f"is not read here: give `loss` {CrossEntropy.name} to train it for one class per row"
        )
    notes.append(
        f"The loss is {loss.name}, as transformers trains {_shown(model)} ({why}); `loss` {CrossEntropy.name} makes it "
        "a classifier with an output per class."
    )
    return loss.name


def _shown(model: Any) -> str:
    return model if isinstance(model, str) else type(model).__name__


def _refuse_others(kind: str, asked: ModelOptions) -> None:
    """Options of other kinds have to be at their defaults; flags, which are always there, may be anything."""
    for name, value in values_of(asked, ModelOptions).items():
        owners = [each for each, row in KINDS.items() if name in row.options]
        default = getattr(ModelOptions, name)
        if not owners or kind in owners or value == default or default is True:
            continue
        if name == "loss" and value == "cross-entropy":  # the one that all have
            continue
        shown = f"`{name}`" + (f" {value}" if default is not None or name == "loss" else "")
        raise SettingError(f"{shown} has no meaning for the task {kind}: it is for {' and '.join(owners)}")


def _named(place: str) -> Any:
    """What stands at ``module:name``."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
