"""Loading a classifier of any modality: its checkpoint, what the checkpoint lacks, its head, and its processor.

The head of an image or audio classifier is as new or as trained as a text classifier's; only the auto class differs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ranksure.data.samples import Samples, matched, value_of
from ranksure.errors import ModelError, SettingError, one_line
from ranksure.losses import CrossEntropy, Loss
from ranksure.network.checkpoints import (
    base_children,
    check_checkpoint,
    device_named,
    load_weights,
    loading_as,
    quiet,
)
from ranksure.tasks.options import Loading


@dataclass
class Classifier:
    """A loaded classifier.

    Attributes:
        model: the network.
        head: qualified name of the linear layer that gives the logits.
        new_modules: modules that the checkpoint does not hold.
        notes: sentences for the user.
        name: folder or Hub id.
        processor: what prepares its inputs.
        below: those of them that the head reads through, which stay as they were drawn.
    """

    model: PreTrainedModel
    head: str
    new_modules: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    name: str = ""
    processor: Any = None
    below: list[str] = field(default_factory=list)

    @property
    def head_is_new(self) -> bool:
        """Whether the head must be fitted first."""
        return any(self.head == name or self.head.startswith(name + ".") for name in self.new_modules)

    def task_fields(self, rows: Samples, n_outputs: int, loading: Loading, own_head: bool = True) -> dict[str, Any]:
        """What a :class:`~ranksure.tasks.task.Task` of this classifier holds, its own order of the classes included."""
        known = own_head and not self.head_is_new
        if own_head and self.below:
            self.notes.append(
                f"The weights of {self.name} lack {' and '.join(self.below)}, which the head reads through: drawn at "
                f"random (`seed` {loading.seed}), and saved with the adapter."
            )
        return {
            "model": self.model,
            "adapted": self.model,
            "processor": self.processor,
            "head": self.head,
            "new_modules": self.new_modules,
            "head_is_new": self.head_is_new,
            "n_outputs": n_outputs,
            "name": self.name,
            "revision": loading.revision,
            "batch_size": loading.rows_per_batch,
            "label_names": own_label_order(self.model, rows, self.notes) if known else rows.label_names,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Modality:
    """What classifiers of one kind of input are loaded by.

    Attributes:
        auto_class: such as ``transformers.AutoModelForImageClassification``.
        noun: what they are called in messages, such as "an image classifier".
        processor: what their processor is called, such as "image processor".
        argument: the argument that takes it.
        load_processor: called with name, revision and ``trust_remote_code``.
    """

    auto_class: Any
    noun: str
    processor: str
    argument: str
    load_processor: Callable[[str, str | None, bool], Any]

    def open(
        self, model: Any, processor: Any, n_outputs: int, loading: Loading, loss: type[Loss] = CrossEntropy
    ) -> Classifier:
        """A classifier in memory, or one of a folder or Hub id, with its processor, on its device.

        Raises:
            ModelError: the checkpoint or its processor cannot be found or loaded, or has no linear head.
            SettingError: a model in memory without a processor, or an unknown dtype or device.
        """
        if isinstance(model, PreTrainedModel):
            name = name_in_memory(model, processor, self.processor, self.argument)
            found = Classifier(model, head_name(model, n_outputs), name=name, processor=processor)
        else:
            found = load_classifier(self.auto_class, self.noun, os.fspath(model), n_outputs, loading, loss)
            given = (found.name, loading.revision, loading.trust_remote_code)
            found.processor = processor or self.load_processor(*given)
        found.model.to(device_named(loading.device))  # pyright: ignore[reportArgumentType]
        return found


def name_in_memory(model: PreTrainedModel, processor: Any, noun: str, argument: str) -> str:
    """What a model in memory is called; a ``SettingError`` where it comes without its tokenizer or processor."""
    if processor is None:
        raise SettingError(f"a model in memory needs its {noun}: pass {argument}=")
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def config_of(model: Any, loading: Loading) -> Any:
    """The configuration of a model in memory, or of a folder or Hub id.

    Raises:
        ModelError: it cannot be read.
    """
    if not isinstance(model, (str, os.PathLike)):
        return getattr(model, "config", None)
    name = os.fspath(model)
    check_checkpoint(name, loading.dtype)
    with loading_as("a model of transformers", name):
        return AutoConfig.from_pretrained(name, revision=loading.revision, trust_remote_code=loading.trust_remote_code)


def load_processor(auto_class: Any, noun: str, remedy: str, **options: Any) -> Callable[[str, str | None, bool], Any]:
    """A function that loads what lies beside a checkpoint, or raises a ``ModelError``; :class:`Modality` needs it."""

    def load(name: str, revision: str | None, trust_remote_code: bool) -> Any:
        try:
            with quiet():
                return auto_class.from_pretrained(
                    name, revision=revision, trust_remote_code=trust_remote_code, **options
                )
        except Exception as error:  # as for the model
            raise ModelError(
                f"the {noun} of {name} cannot be loaded: {one_line(error)} (save {remedy} beside the model, or pass "
                "processor=)"
            ) from None

    return load


def load_classifier(
    auto_class: Any, noun: str, name: str, n_outputs: int, loading: Loading, loss: type[Loss] = CrossEntropy
) -> Classifier:
    """Load a checkpoint as a classifier with ``n_outputs`` logits; a head of another size is made anew.

    Its configuration then names the loss, whatever another one it was trained with before.
    """
    check_checkpoint(name, loading.dtype)
    common = {"revision": loading.revision, "trust_remote_code": loading.trust_remote_code}
    notes: list[str] = []
    with loading_as(noun, name):
        stated = {"num_labels": n_outputs, "problem_type": loss.problem_type}
        config = AutoConfig.from_pretrained(name, **stated, **common)
    model, missing, reshaped = load_weights(
        auto_class, noun, name, notes, head=True, seed=loading.seed, config=config, dtype=loading.dtype, **common
    )
    head = head_name(model, n_outputs)
    if reshaped:
        notes.append(
            f"The head of {name} has another number of outputs than the data's {n_outputs}; a new one is fitted."
        )
    new = sorted({_owner(model, key) for key in [*missing, *reshaped]})
    below = sorted({key.rpartition(".")[0] for key in missing if not key.startswith(head + ".")})
    return Classifier(model, head, new, notes, name, below=below)


def head_name(model: PreTrainedModel, n_outputs: int) -> str:
    """The last linear layer with ``n_outputs`` outputs outside the base model; a ``ModelError`` where there is none."""
    prefix = model.base_model_prefix + "."
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == n_outputs and not name.startswith(prefix)
    ]
    if not found:
        raise ModelError(f"{type(model).__name__} has no linear layer with {n_outputs} outputs outside its base model")
    return found[-1]


def own_label_order(model: PreTrainedModel, samples: Samples, notes: list[str]) -> list[str] | None:
    """A trained head's own class order, where the data's labels are its names; else the data's, with a note."""
    if samples.label_names is None or len(samples.label_names) != model.config.num_labels:
        return samples.label_names
    own = model_label_names(model)
    numbers = [str(i) for i in range(len(own))]
    for names in (own, numbers):  # such as LABEL_0, where the data has the class numbers
        if (places := matched(samples.label_names, names, str, str.casefold, value_of)) is not None:
            return [samples.label_names[places.index(i)] for i in range(len(names))]
    pairs = ", ".join(f"{name} as {other}" for name, other in list(zip(samples.label_names, own, strict=True))[:10])
    notes.append(
        f"The trained head's classes are not named as the data's labels, so these are taken in their order: {pairs}"
        "; if that is wrong, rename the labels."
    )
    return samples.label_names


def model_label_names(model: PreTrainedModel) -> list[str]:
    """The names of a model's classes, in the order of its outputs."""
    return [str(name) for _, name in sorted(cast("dict[int, str]", model.config.id2label).items())]


def _owner(model: PreTrainedModel, key: str) -> str:
    """The child of the model (outside its base) or the module of its base that holds a missing key."""
    first = key.split(".", 1)[0]
    return key.rsplit(".", 1)[0] if first in base_children(model) else first
