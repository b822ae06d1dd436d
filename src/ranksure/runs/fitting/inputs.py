"""What a fit trains: a network, its rows and its targets, before an adapter is on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ranksure.adapters.config import exact_pattern, lora_config
from ranksure.adapters.loaded import Adapter
from ranksure.adapters.matrices import adapted_layers, matrices, to_matrices
from ranksure.choices import Weighting
from ranksure.errors import AdapterError
from ranksure.factors import Factors
from ranksure.losses import Kind
from ranksure.network.batches import Batches
from ranksure.records.task import TaskRecord
from ranksure.runs.saved.base import LoadedRun
from ranksure.tasks.task import Task


@dataclass(frozen=True)
class SavedStart:
    """An adapter that a fit starts from.

    Attributes:
        run: as it was loaded; nothing in it changes.
        read: its factors, by name in the network.
        weighting: of a causal language model's tokens.
    """

    run: LoadedRun
    read: Adapter
    weighting: Weighting

    @property
    def scale(self) -> float | None:
        """Of all its modules; None where they differ."""
        scales = {block.scale for block in self.read.blocks.values()}
        return scales.pop() if len(scales) == 1 else None


@dataclass
class Setup:
    """What a fit trains, before an adapter is on it.

    Attributes:
        base: the network that PEFT wraps, its head in place.
        prefix: what the names of modules in a plan and in an adapter on disk need in front to be names in ``base``.
        heads: qualified names in ``base`` of what is saved beside the factors.
        task_type: PEFT's, or None.
        features: tokenised training rows with ``labels``, in order; ``held``: held-out ones, or None.
        shapes: of every target, by its name on disk.
        pooling: ``model`` or ``mean``; None for a causal language model, as are ``task`` and ``n_outputs``.
        same_data: whether the rows are those of the plan.
        record: what is written beside the adapter.
        saved: the adapter that it starts from, in whose place the result is written.
        own_length: padding is felt, so rows of several lengths share no batch.
        notes: what the user should be told, in sentences.
    """

    base: nn.Module
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
    record: TaskRecord = field(default_factory=TaskRecord)
    saved: SavedStart | None = None
    own_length: bool = False
    notes: list[str] = field(default_factory=list)

    def batches(self, features: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Rows as batches in a fixed order, rows of like length together."""
        return Batches(features, self.batch_size, self.collator, own_length=self.own_length, by_length=True)

    def named_as_planned(self, factors: Factors) -> Factors:
        """Factors of ``base`` by their names on disk."""
        return {name.removeprefix(self.prefix): pair for name, pair in factors.items()}

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
    layers = adapted_layers(model)
    with torch.no_grad():
        for name, (u, v) in factors.items():
            if (layer := layers.get(prefix + name)) is None:
                raise AdapterError(f"there are factors for {name}, which carries no adapter")
            a, b = matrices(layer, "default")
            if a.numel() != v.numel() or b.numel() != u.numel():
                raise AdapterError(
                    f"factors of {name} have shapes {tuple(u.shape)} and {tuple(v.shape)}: not the adapter's"
                )
            for parameter, value in zip((a, b), to_matrices(layer, u, v, layer.scaling["default"]), strict=True):
                parameter.copy_(value)
