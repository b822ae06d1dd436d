"""The last layer, pooling and head of a real network, run alone on what the frozen layers before it give.

Adapters sit in the last layer only, so everything before it is the same in every step of every run. It is run
once. In the last layer, only the token that the head reads is followed (all tokens under mean pooling), and what a
frozen projection makes of a frozen input is kept. All products are those of the model's own modules, PEFT's
included; the result is compared with the whole network in :func:`benchmarks.advice_training.tail_error`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ranksure.data.texts import Rows
from ranksure.network.logits import frozen, logits_of
from ranksure.tasks.text import TextTask

READERS = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "input_layernorm")
"""Modules of the last layer whose input is frozen."""

Store = dict[str, dict[int, Tensor]]
"""Outputs of frozen modules by module name and chunk, kept from run to run."""


class Remembered(nn.Module):
    """A frozen module that is evaluated once per chunk of rows.

    Args:
        inner: the module.
        kept: its outputs so far, by chunk.
        copies: hand out copies, for callers that add to the output in place (AdaLoRA does).
    """

    def __init__(self, inner: nn.Module, kept: dict[int, Tensor], copies: bool) -> None:
        super().__init__()
        self.inner, self.kept, self.copies = inner, kept, copies
        self.chunk = -1

    def forward(self, x: Tensor) -> Tensor:
        if self.chunk not in self.kept:
            with torch.no_grad():
                self.kept[self.chunk] = self.inner(x)
        out = self.kept[self.chunk]
        return out.clone() if self.copies else out


@dataclass(frozen=True)
class Chunk:
    """Rows of like length as the last layer sees them.

    Attributes:
        key: which chunk, for :class:`Remembered`.
        hidden: input of the last layer, ``(n, T, d)``.
        mask: real tokens, ``(n, T)``, bool.
        rotary: cosines and sines of the positions, or None.
        labels: ``(n,)``.
    """

    key: int
    hidden: Tensor
    mask: Tensor
    rotary: tuple[Tensor, Tensor] | None
    labels: Tensor


class Tail:
    """Logits of rows from the input of the last layer on.

    Args:
        task: model, tokenizer and head.
        layer: qualified name of the last layer in ``task.adapted``.
        first_key: number of the first chunk.
        rows: the rows.
        size: most rows per chunk.
    """

    def __init__(self, task: TextTask, layer: str, rows: Rows, first_key: int = 0, size: int = 32) -> None:
        self.task, self.layer = task, task.adapted.get_submodule(layer)
        size = min(size, 8) if task.pooling == "mean" else size  # there, padding costs as much as text
        lengths = torch.tensor([len(text) for text in rows.texts])
        self.order = torch.argsort(lengths, stable=True)
        self.n = len(rows)
        self.chunks: list[Chunk] = []
        for low in range(0, len(rows), size):
            part = rows.subset(self.order[low : low + size].tolist())
            self.chunks += [self._chunk(part, batch, first_key + low) for batch in self._batches(part, size)]

    def _batches(self, part: Rows, size: int) -> list[dict[str, Tensor]]:
        encoded = self.task.tokenizer(
            part.texts, padding=True, truncation=True, max_length=self.task.max_length, return_tensors="pt"
        )
        return [{key: value for key, value in encoded.items() if isinstance(value, Tensor)}]

    def _chunk(self, part: Rows, batch: dict[str, Tensor], key: int) -> Chunk:
        seen: dict[str, Any] = {}

        def look(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.update(named, hidden_states=arguments[0] if arguments else named["hidden_states"])

        handle = self.layer.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with frozen(self.task.model), torch.no_grad():
                logits_of(self.task.model, batch)
        finally:
            handle.remove()
        rotary = seen.get("position_embeddings")
        mask = batch["attention_mask"].bool()
        return Chunk(key, seen["hidden_states"].detach(), mask, rotary, self.task.labels(part))

    def logits(self, chunk: Chunk) -> Tensor:
        """Logits ``(n, K)`` of a chunk, in its order."""
        for module in self.layer.modules():
            if isinstance(module, Remembered):
                module.chunk = chunk.key
        if chunk.rotary is not None:
            return self._llama(chunk)
        return self._bert(chunk)

    def all_logits(self) -> Tensor:
        """Logits ``(N, K)`` in the order of the rows, without gradients."""
        with torch.no_grad():
            return torch.cat([self.logits(chunk) for chunk in self.chunks])[torch.argsort(self.order)]

    def labels(self) -> Tensor:
        """Labels in the order of the rows."""
        return torch.cat([chunk.labels for chunk in self.chunks])[torch.argsort(self.order)]

    def _bert(self, chunk: Chunk) -> Tensor:
        layer: Any = self.layer
        attention, mean = layer.attention.self, self.task.pooling == "mean"
        read = chunk.hidden if mean else chunk.hidden[:, :1]
        q, k, v = (
            _heads(project(x), attention.num_attention_heads)
            for project, x in ((attention.query, read), (attention.key, chunk.hidden), (attention.value, chunk.hidden))
        )
        context = scaled_dot_product_attention(q, k, v, chunk.mask[:, None, None], scale=attention.scaling)
        out = layer.feed_forward_chunk(layer.attention.output(_joined(context), read))
        model: Any = self.task.model
        if mean:
            weight = chunk.mask.unsqueeze(-1).to(out.dtype)
            return model.head((out * weight).sum(1) / weight.sum(1))
        return model.classifier(model.dropout(model.get_submodule(model.base_model_prefix).pooler(out)))

    def _llama(self, chunk: Chunk) -> Tensor:
        layer: Any = self.layer
        attention = layer.self_attn
        assert chunk.rotary is not None
        last = (torch.arange(chunk.mask.shape[1]) * chunk.mask).argmax(1)  # the token that the head reads
        rows = torch.arange(len(last))
        normed = layer.input_layernorm(chunk.hidden)
        read = chunk.hidden[rows, last][:, None]
        cos, sin = (part.expand(len(last), -1, -1) for part in chunk.rotary)
        heads = attention.config.num_attention_heads
        few = attention.config.num_key_value_heads
        q = _heads(attention.q_proj(normed[rows, last][:, None]), heads)
        k, v = _heads(attention.k_proj(normed), few), _heads(attention.v_proj(normed), few)
        q = apply_rotary_pos_emb(q, q, cos[rows, last][:, None], sin[rows, last][:, None])[0]
        k = apply_rotary_pos_emb(k, k, cos, sin)[1]
        context = scaled_dot_product_attention(
            q, k, v, chunk.mask[:, None, None], scale=attention.scaling, enable_gqa=True
        )
        out = read + attention.o_proj(_joined(context))
        out = out + layer.mlp(layer.post_attention_layernorm(out))
        model: Any = self.task.model
        return model.score(model.get_submodule(model.base_model_prefix).norm(out))[:, 0]


@contextmanager
def remembering(layer: nn.Module, store: Store, copies: bool = False) -> Iterator[None]:
    """Take the outputs of the frozen modules of ``layer`` from ``store`` while the context lasts."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for name, module in list(layer.named_modules()):
        if name.rsplit(".", 1)[-1] not in READERS:
            continue
        if hasattr(module, "base_layer"):
            owner, attribute = module, "base_layer"
        else:
            parent, _, attribute = name.rpartition(".")
            owner = layer.get_submodule(parent)
        inner = getattr(owner, attribute)
        setattr(owner, attribute, Remembered(inner, store.setdefault(name, {}), copies))
        replaced.append((owner, attribute, inner))
    try:
        yield
    finally:
        for owner, attribute, inner in replaced:
            setattr(owner, attribute, inner)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)
