"""Loading a classifier of any modality: its checkpoint, what the checkpoint lacks, and its head.

The head of an image or audio classifier is as new or as trained as a text classifier's; only the auto class differs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ranksure.data.samples import Samples
from ranksure.errors import ModelError, one_line
from ranksure.network.checkpoints import check_checkpoint, load_weights, quiet


@dataclass
class Classifier:
    """A loaded classifier.

    Attributes:
        model: the network.
        head: qualified name of the linear layer that gives the logits.
        new_modules: modules that the checkpoint does not hold.
        notes: sentences for the user.
    """

    model: PreTrainedModel
    head: str
    new_modules: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def head_is_new(self) -> bool:
        """Whether the head must be fitted first."""
        return any(self.head == name or self.head.startswith(name + ".") for name in self.new_modules)


def load_classifier(
    auto_class: Any,
    noun: str,
    name: str,
    n_outputs: int,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Classifier:
    """Load a checkpoint as a classifier with ``n_outputs`` logits; a head of another size is made anew.

    Args:
        auto_class: such as ``transformers.AutoModelForImageClassification``.
        noun: what it is called in messages, such as "an image classifier".
        name: folder or Hub id.
        n_outputs: number of logits.
        revision: Hub revision.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: allow the repository's own code to run.
        seed: of the parameters that the checkpoint lacks.

    Raises:
        ModelError: the checkpoint cannot be found or loaded, or has no linear head.
        SettingError: an unknown dtype.
    """
    check_checkpoint(name, dtype)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    notes: list[str] = []

    try:
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(seed)  # parameters that the checkpoint lacks are drawn at random
            config = AutoConfig.from_pretrained(name, num_labels=n_outputs, **common)
            model, info = load_weights(
                auto_class, name, notes, config=config, dtype=dtype, ignore_mismatched_sizes=True, **common
            )
    except Exception as error:  # a damaged folder fails in ways of many libraries: safetensors, pickle, json, ...
        raise ModelError(
            f"model {name} cannot be loaded as {noun}: {one_line(error)} (give a folder with config.json and "
            "model.safetensors, or a Hub id while online)"
        ) from None
    mismatched = [entry[0] if isinstance(entry, (tuple, list)) else entry for entry in info["mismatched_keys"]]
    if mismatched:
        notes.append(
            f"The head of {name} has another number of outputs than the data's {n_outputs}; a new one is fitted."
        )
    new = sorted({_owner(model, key) for key in [*info["missing_keys"], *mismatched]})
    return Classifier(model, head_name(model, n_outputs), new, notes)


def head_name(model: PreTrainedModel, n_outputs: int) -> str:
    """The qualified name of the last linear layer with ``n_outputs`` outputs outside the base model.

    Raises:
        ModelError: there is none.
    """
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
    id2label = cast("dict[int, str]", model.config.id2label)
    names = [str(id2label[i]) for i in range(len(samples.label_names))]
    lower = {name.lower(): name for name in samples.label_names}
    if sorted(lower) == sorted(name.lower() for name in names):
        return [lower[name.lower()] for name in names]
    if samples.label_names != [str(i) for i in range(len(names))]:  # such labels are the class numbers
        pairs = ", ".join(f"{own} as {name}" for own, name in list(zip(samples.label_names, names, strict=True))[:10])
        notes.append(
            f"The trained head's classes are not named as the data's labels, so these are taken in their order: {pairs}"
            "; if that is wrong, rename the labels."
        )
    return samples.label_names


def _owner(model: PreTrainedModel, key: str) -> str:
    """The child of the model (outside its base) or the module of its base that holds a missing key."""
    first = key.split(".", 1)[0]
    return key.rsplit(".", 1)[0] if first == model.base_model_prefix else first
