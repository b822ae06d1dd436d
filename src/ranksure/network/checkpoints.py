"""What loading any Hugging Face checkpoint shares: folders, tokenizers, devices, limits, and silence."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ranksure.errors import ModelError, SettingError, exhausted, one_line
from ranksure.network.targets import base_layer

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


@contextmanager
def loading_as(noun: str, name: str) -> Iterator[None]:
    """Quietly; whatever a checkpoint fails by becomes one :class:`~ranksure.errors.ModelError`."""
    try:
        with quiet():
            yield
    except ModelError:
        raise
    except Exception as error:  # a damaged folder fails in ways of many libraries: safetensors, pickle, json, ...
        if exhausted(error):
            raise
        joined = "tensors that transformers joins into one (of experts, say) are missing, or not of one shape"
        reason = joined if "automatic conversion of the weights" in str(error) else one_line(error)
        raise ModelError(
            f"model {name} cannot be loaded as {noun}: {reason} (give a folder with config.json and "
            "model.safetensors, or a Hub id while online)"
        ) from None


def load_weights(
    auto: Any,
    noun: str,
    name: str,
    notes: list[str],
    *,
    head: bool = False,
    elsewhere: Collection[str] = (),
    seed: int = 0,
    **arguments: Any,
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """A checkpoint's model by ``auto.from_pretrained``, all of whose weights are those of the checkpoint.

    transformers draws what a checkpoint lacks, or holds in another shape, at random, and leaves out what has no place.
    Here that is an error, but for a head: modules behind the base model, and a pooler at its end.

    Args:
        auto: such as ``transformers.AutoModelForCausalLM``.
        noun: what it loads, for messages: "a causal language model".
        name: folder or Hub id.
        notes: receives a sentence where the weights are pickled.
        head: whether a head may be new.
        elsewhere: names of tensors that come from another file, and may be new too.
        seed: of what is new.
        **arguments: for ``from_pretrained``.

    Returns:
        The model, and the names of its new tensors: those that the weights lack, and those of an output layer that
        has another number of rows there.

    Raises:
        ModelError: it cannot be loaded, or weights and configuration are not of one model.
    """
    with loading_as(noun, name), torch.random.fork_rng():
        torch.manual_seed(seed)
        model, info = _from_pretrained(auto, name, notes, ignore_mismatched_sizes=True, **arguments)
    mismatched = {key: (tuple(given), tuple(needed)) for key, given, needed in info["mismatched_keys"]}
    missing, rows = sorted(info["missing_keys"]), getattr(model.config, "num_labels", None)
    allowed = {*elsewhere, *(key for key in [*missing, *mismatched] if head and _may_be_new(model, key))}
    outputs = [key for key, (given, needed) in mismatched.items() if given[1:] == needed[1:] and needed[0] == rows]
    if other := sorted(set(mismatched) - (allowed & {*elsewhere, *outputs})):
        given, needed = mismatched[other[0]]
        raise ModelError(
            f"the weights of {name} hold {_listed(other)} in other shapes than its config.json calls for ({given} in "
            f"place of {needed}): they are not of one model"
        )
    if lost := [key for key in missing if key not in allowed]:
        raise ModelError(
            f"the weights of {name} lack {_listed(lost)}, which {type(model).__name__} has by config.json, so they "
            f"would be random: give a checkpoint that holds them{'' if head else ', with its language-model head'}"
        )
    if left := [key for key in sorted(info["unexpected_keys"]) if _has_place(model, key)]:
        raise ModelError(
            f"the weights of {name} hold {_listed(left)}, which {type(model).__name__} has no place for by its "
            "config.json: they are not of one model"
        )
    return model, missing, sorted(mismatched)


def _from_pretrained(auto: Any, name: str, notes: list[str], **arguments: Any) -> tuple[PreTrainedModel, Any]:
    """From safetensors; from pickled weights where it has no others, which is told in ``notes``."""
    try:
        return auto.from_pretrained(name, use_safetensors=True, output_loading_info=True, **arguments)
    except OSError:
        if any(Path(name).glob("model*.safetensors*")):  # one of them is missing: no reason to read other weights
            raise
        loaded = auto.from_pretrained(name, use_safetensors=False, output_loading_info=True, **arguments)
    notes.append(f"The weights of {name} are pickled, not safetensors; they were read with weights_only.")
    return loaded


def base_children(model: PreTrainedModel) -> list[str]:
    """Names of the children that are the base model: where none has its name, all up to the largest."""
    children = dict(model.named_children())
    if model.base_model_prefix in children:
        return [model.base_model_prefix]
    last = max(children, key=lambda child: sum(p.numel() for p in children[child].parameters()), default="")
    return [name for index, name in enumerate(children) if last in list(children)[index:]]


def _may_be_new(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor is of a head: of a module behind the base model, or of a pooler at the end of it."""
    owner, _, _ = key.rpartition(".")
    return bool(owner) and (key.split(".", 1)[0] not in base_children(model) or "pooler" in owner.split("."))


def _has_place(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor that the model does not take belongs to its layers, blocks and matrices.

    A head of another task, a tower for another kind of input and a pooler that is not used do not, nor do buffers that
    earlier versions kept (masks, angles) and what a quantised matrix has beside its weight.
    """
    modules, buffers = dict(model.named_modules()), {name for name, _ in model.named_buffers()}
    roots, prefix, last = base_children(model), model.base_model_prefix + ".", key.rpartition(".")[2]
    for name in (key, prefix + key, key.removeprefix(prefix)):  # a base that was saved by itself has no prefix
        owner = parent = name.rpartition(".")[0]
        while owner not in modules:
            owner = owner.rpartition(".")[0]
        if owner.split(".")[0] in roots and owner not in roots:
            leaf = not any(True for _ in modules[owner].children())
            if owner != parent:  # of a module that is not there
                quantised = leaf and getattr(model.config, "quantization_config", None) is not None
                return last != "inv_freq" and not quantised
            return leaf and last in ("weight", "bias") and name not in buffers
    return False


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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


def with_embeddings(model: PreTrainedModel, rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """The tokenised rows, each of whose tokens the model has an embedding of.

    Raises:
        ModelError: it has none of some token, or of the padding.
    """
    sizes = {"token_type_ids": getattr(model.config, "type_vocab_size", None)}
    with suppress(NotImplementedError):
        embedding: Any = model.get_input_embeddings()
        embedding = base_layer(getattr(embedding, "original_module", embedding))  # as PEFT saves it
        sizes["input_ids"] = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None
    for key, size in sizes.items():
        found = [max(row[key]) for row in rows if row.get(key)]
        if key == "input_ids" and len({len(row[key]) for row in rows if key in row}) > 1:
            found.append(tokenizer.pad_token_id)
        if size and max(found, default=0) >= size:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} gives {key} up to {max(found)}, but {type(model).__name__} "
                f"has {size} embeddings of them: config.json, weights and tokenizer are not of one model"
            )
    return rows


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
