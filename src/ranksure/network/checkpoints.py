"""What loading any Hugging Face checkpoint shares: folders, tokenizers, devices, limits, and silence."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ranksure.errors import ModelError, SettingError, one_line

DTYPES = ("auto", "float32", "bfloat16", "float16")


@contextmanager
def quiet() -> Iterator[None]:
    """Silences loading reports, progress bars and the Hub client's retries."""
    verbosity = transformers_logging.get_verbosity()
    progress = transformers_logging.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        hub.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()


def looks_local(name: str) -> bool:
    """Whether a model's name is a folder rather than a Hub id."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def check_checkpoint(name: str, dtype: str) -> None:
    """Refuse what cannot be a checkpoint before anything is loaded.

    Raises:
        ModelError: a folder that does not exist or holds no ``config.json``.
        SettingError: an unknown dtype.
    """
    if dtype not in DTYPES:
        raise SettingError(f"unknown dtype {dtype!r}: use auto, float32, bfloat16 or float16")
    if not looks_local(name):
        return
    if not Path(name).is_dir():
        raise ModelError(
            f"model folder {name} does not exist" if not Path(name).exists() else f"{name} is not a folder"
        )
    if not (Path(name) / "config.json").is_file():
        raise ModelError(f"{name} holds no config.json, so it is not a Hugging Face model folder")


def load_weights(auto: Any, name: str, notes: list[str], **arguments: Any) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A checkpoint's model by ``auto.from_pretrained``, and transformers' loading information.

    From safetensors; from pickled weights where it has no others, which is told in ``notes``. Raises whatever
    ``from_pretrained`` does: of a damaged folder these are errors of many libraries.
    """
    with quiet():
        try:
            return auto.from_pretrained(name, use_safetensors=True, output_loading_info=True, **arguments)
        except OSError:
            loaded = auto.from_pretrained(name, use_safetensors=False, output_loading_info=True, **arguments)
    notes.append(f"The weights of {name} are pickled, not safetensors; they were read with weights_only.")
    return loaded


def load_tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer beside a checkpoint.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # as for the model
        raise ModelError(f"the tokenizer of {name} cannot be loaded: {one_line(error)}") from None
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes of a folder without one
        raise ModelError(f"the tokenizer of {name} has no vocabulary: save it beside the model, or pass tokenizer=")
    return tokenizer


def settle_padding(model: PreTrainedModel, tokenizer: Any, name: str) -> None:
    """Give tokenizer and model a padding token: the end token, where they have none.

    Raises:
        ModelError: the tokenizer has no end token either.
    """
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {name} has neither a padding token nor an end token: set pad_token in it")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id


def token_limit(model: nn.Module, tokenizer: Any, asked: int | None, most: int = 256) -> int:
    """Tokens per row: what is asked, else the model's limit, at most ``most``.

    Raises:
        SettingError: fewer than 4 tokens, or more than the model can take.
    """
    limits = [getattr(getattr(model, "config", None), "max_position_embeddings", None), tokenizer.model_max_length]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)  # RoBERTa counts from there
    limit = min([int(value) for value in limits if value is not None and 0 < value < 10**6], default=2 * most)
    if asked is not None and asked < 4:
        raise SettingError(f"max_length {asked} is too short: use at least 4 tokens")
    if asked is not None and asked > limit:
        raise SettingError(f"max_length {asked} is more than the model's limit of {limit} tokens")
    return asked if asked is not None else min(limit, most)


def device_named(name: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one.

    Raises:
        SettingError: it cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingError(f"device {name!r} cannot be used: {one_line(error)}") from None
    return device


def peft_targets(model: PreTrainedModel) -> str | list[str]:
    """The modules that PEFT adapts in such a model where the user names none; else all linear layers."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    return DEFAULTS.get(str(getattr(model.config, "model_type", "")), "all-linear")
