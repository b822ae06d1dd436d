"""What a fit trains: a network, its rows and its targets, before an adapter is on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from ranksure.adapters.config import exact_pattern, lora_config
from ranksure.errors import AdapterError
from ranksure.factors import Factors
from ranksure.losses import Kind
from ranksure.tasks.collate import in_batches
from ranksure.tasks.task import Task


@dataclass
class Setup:
    """What a fit trains, before an adapter is on it.

    Attributes:
        base: the network that PEFT wraps, its head in place.
        adapted: the model whose module names a plan and an adapter on disk use (the encoder under mean pooling).
        prefix: what those names need in front to be names in ``base``.
        heads: qualified names in ``base`` of what is saved beside the factors.
        task_type: PEFT's, or None.
        kind: which loss.
        features: tokenised training rows with ``labels``, in order.
        held: tokenised held-out rows, or None.
        collator: pads rows into a batch.
        shapes: of every target, by its name in ``adapted``.
        name: model folder or Hub id.
        revision: of the model.
        pooling: ``model`` or ``mean``; None for a causal language model.
        task: what reads the rows; None for a causal language model.
        n_outputs: logits per row; None for a causal language model.
        label_names: of the classes, or None.
        batch_size: rows per batch.
        source: where the rows come from.
        sha256: of the source.
        same_data: whether the rows are those of the plan.
        notes: what the user should be told, in sentences.
    """

    base: nn.Module
    adapted: PreTrainedModel
    prefix: str
    heads: list[str]
    task_type: str | None
    kind: Kind
    features: list[dict[str, Any]]
    held: list[dict[str, Any]] | None
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    shapes: dict[str, tuple[int, int]]
    name: str
    revision: str | None
    pooling: str | None
    n_outputs: int | None
    label_names: list[str] | None
    batch_size: int
    source: str
    sha256: str
    same_data: bool
    task: Task[Any] | None = None
    notes: list[str] = field(default_factory=list)

    def batches(self, features: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows as batches in a fixed order, rows of like length together."""
        return [dict(self.collator(part)) for part in in_batches(features, self.batch_size, by_length=True)]

    def ranks(self, rank: int) -> dict[str, int]:
        """A uniform rank on every target, clipped to its size."""
        return {name: min(rank, *shape) for name, shape in self.shapes.items()}

    def wrap(self, ranks: Mapping[str, int], scale: float, dropout: float, seed: int) -> PeftModel:
        """Put a fresh adapter on the network (in place), with ``scale`` in every module.

        Raises:
            AdapterError: a name that is no module.
        """
        config = lora_config(
            {self.prefix + name: rank for name, rank in ranks.items()},
            model=self.base,
            task_type=self.task_type,
            modules_to_save=self.heads or None,
            base_model_name_or_path=self.name,
            revision=self.revision,
        )
        config.lora_dropout = dropout
        config.alpha_pattern = {exact_pattern(self.prefix + name): scale * rank for name, rank in ranks.items()}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = get_peft_model(self.base, config)
        assert isinstance(model, PeftModel)
        return model


def place_factors(model: PeftModel, factors: Factors, prefix: str) -> None:
    """Write ``(u, v)`` by module into the adapter's matrices, ``B = u / sqrt(s)`` and ``A = v^T / sqrt(s)``.

    Raises:
        AdapterError: factors that do not fit.
    """
    modules = dict(model.get_base_model().named_modules())
    with torch.no_grad():
        for name, (u, v) in factors.items():
            layer: Any = modules.get(prefix + name)
            if layer is None or not _carries_adapter(layer):
                raise AdapterError(f"there are factors for {name}, which carries no adapter")
            root = math.sqrt(float(layer.scaling["default"]))
            if "default" in layer.lora_embedding_A:
                a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
            else:
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if a.numel() != v.numel() or b.numel() != u.numel():
                raise AdapterError(
                    f"factors of {name} have shapes {tuple(u.shape)} and {tuple(v.shape)}: not the adapter's"
                )
            a.copy_((v.T / root).reshape(a.shape))
            b.copy_((u / root).reshape(b.shape))


def _carries_adapter(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer)
