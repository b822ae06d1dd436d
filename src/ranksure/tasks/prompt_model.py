"""A language model as a classifier: one position per row, one token per class, whatever the architecture."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
)

from ranksure.errors import ModelError
from ranksure.network.checkpoints import load_weights, loading_as
from ranksure.network.logits import device_of, frozen
from ranksure.tasks.collate import Collator
from ranksure.tasks.options import Loading
from ranksure.tasks.prompt_encoder import Architecture


class Verbalized(nn.Module):
    """A language model read at one position per row and at one token per class.

    The logits are those of the model's own forward pass, with whatever it does before and after its output layer
    (final transformations, scaling, soft caps); the output layer sees one position per row only, so logits of the
    vocabulary are ``(rows, 1, V)``, never ``(rows, L, V)``.

    Args:
        lm: a masked or causal language model.
        tokens: token of every class, ``K`` different ones.
        mask_id: the mask token's id for a masked model, whose rows have exactly one; None for a causal one.

    Attributes:
        offset: ``(K,)`` float64 buffer that is added to the logits (calibration); zero at first.
    """

    offset: Tensor
    tokens: Tensor

    def __init__(self, lm: PreTrainedModel, tokens: Sequence[int], mask_id: int | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.mask_id = mask_id
        self.register_buffer("tokens", torch.tensor(tokens, device=lm.device))
        self.register_buffer("offset", torch.zeros(len(tokens), dtype=torch.float64, device=lm.device))
        self._inputs = set(inspect.signature(lm.forward).parameters)
        # RoBERTa and its kin number positions themselves, from the padding token's id on.
        self._own_positions = any(
            name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None
            for name, module in lm.named_modules()
        )

    def forward(self, **batch: Any) -> Tensor:
        """Logits ``(rows, K)`` of a batch with ``input_ids`` (and ``attention_mask``, where rows are padded)."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        rows = torch.arange(ids.shape[0], device=ids.device)
        if self.mask_id is not None:
            at = (ids == self.mask_id).int().argmax(1)
        elif mask is None:
            at = torch.full_like(rows, ids.shape[1] - 1)
        else:
            at = ids.shape[1] - 1 - mask.flip(1).int().argmax(1)  # the last real token, on whichever side the padding
        counted = "position_ids" in batch or "position_ids" not in self._inputs or self._own_positions
        if mask is not None and not counted and not bool(mask[:, 0].all()):
            # Padded on the left: real tokens are counted as if the padding were not there.
            batch["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        if "use_cache" in self._inputs:
            batch["use_cache"] = False
        with self._output_layer_at(rows, at, ids.shape):
            logits = self.lm(**batch).logits
        if logits.shape[1] != 1:  # no output layer that could be told to look at one position
            logits = logits[rows, at][:, None]
        chosen = logits[:, 0, self.tokens]
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        return chosen + self.offset.to(chosen.dtype)

    @contextmanager
    def _output_layer_at(self, rows: Tensor, at: Tensor, shape: torch.Size) -> Iterator[None]:
        layer = self.lm.get_output_embeddings()

        def restrict(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if args and isinstance(args[0], Tensor) and args[0].dim() == 3 and args[0].shape[:2] == shape:
                return (args[0][rows, at][:, None], *args[1:])
            return None

        handle = layer.register_forward_pre_hook(restrict) if isinstance(layer, nn.Module) else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()


def check_same_as_full(model: nn.Module, features: Sequence[Mapping[str, Any]], collator: Collator) -> None:
    """The logits of rows, read at one position, are those of the whole language model.

    Raises:
        ModelError: they differ, so this model cannot be read that way.
    """
    assert isinstance(model, Verbalized)
    device = device_of(model)
    with frozen(model), torch.no_grad():
        read, whole = [], []
        for row in features:
            read.append(model(**{key: value.to(device) for key, value in collator([row]).items()})[0])
            ids = row["input_ids"]
            at = len(ids) - 1 if model.mask_id is None else ids.index(model.mask_id)
            logits = model.lm(**{key: torch.tensor([value], device=device) for key, value in row.items()}).logits
            whole.append(logits[0, at, model.tokens].to(read[0].dtype) + model.offset.to(read[0].dtype))
    z, expected = torch.stack(read), torch.stack(whole)
    if not bool(torch.isfinite(expected).all()):
        raise ModelError(f"{type(model.lm).__name__}: the verbalisers' logits are not finite (NaN or infinity)")
    dtype = next(parameter.dtype for parameter in model.lm.parameters())
    single = torch.finfo(torch.float32).eps  # of norms and rotary angles, whatever the weights are in
    eps = max(256 * single, 8 * torch.finfo(dtype).eps * (torch.finfo(dtype).bits < 32))
    allowed = eps * (1 + float(expected.abs().max()))
    if (difference := float((z - expected).abs().max())) > allowed:
        raise ModelError(
            f"{type(model.lm).__name__} gives other logits for prompts read at one position than for whole ones "
            f"(they differ by {difference:.2g}), so its verbalisers cannot be used"
        )


def architecture_of(config: Any, tokenizer: Any, name: str, own: str | None = None) -> Architecture:
    """Masked or causal, by the checkpoint's architecture (``own`` is the class of a model in memory); else by the mask.

    Raises:
        ModelError: it is neither.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; prompts need a masked or a causal language model")
    for each in [own] if own else getattr(config, "architectures", None) or []:
        if each.endswith(("ForMaskedLM", "ForPreTraining", "WithLMHeadModel")):
            return "masked"
        if each.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal"
    known = (MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None), MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None))
    masked, causal = (each is not None and own in (None, getattr(each, "__name__", None)) for each in known)
    if not (masked or causal):
        raise ModelError(
            f"{name} ({own or getattr(config, 'model_type', type(config).__name__)}) is no masked or causal language "
            "model: load it with AutoModelForMaskedLM or AutoModelForCausalLM"
        )
    return "masked" if masked and (not causal or getattr(tokenizer, "mask_token", None) is not None) else "causal"


def load_language_model(name: str, tokenizer: Any, loading: Loading) -> tuple[PreTrainedModel, Architecture, list[str]]:
    """A checkpoint with the head that it was trained with, its architecture, and sentences for the user.

    Raises:
        ModelError: it cannot be loaded, is no language model, or lacks weights.
    """
    notes: list[str] = []
    common = {"revision": loading.revision, "trust_remote_code": loading.trust_remote_code}
    with loading_as("a language model", name):
        config = AutoConfig.from_pretrained(name, **common)
        architecture = architecture_of(config, tokenizer, name)
    auto: Any = AutoModelForMaskedLM if architecture == "masked" else AutoModelForCausalLM
    loaded, _, _ = load_weights(auto, "a language model", name, notes, config=config, dtype=loading.dtype, **common)
    return loaded, architecture, notes
