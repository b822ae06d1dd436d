"""What an adapter folder holds, read and checked before any model is loaded.

PEFT only warns of tensors that an adapter's file lacks, and leaves them as they were initialised: a truncated
or mixed-up run then looks like an untrained one. Here a file that does not fit is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftConfig
from safetensors import safe_open
from torch import Tensor

from ranksure.adapters.matrices import PREFIX, is_a, is_factor
from ranksure.errors import AdapterError, one_line
from ranksure.files import file_sha256

CONFIG, SAFE, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
HEADER = {"format": "pt", "transformers": transformers.__version__}
"""Of the weights that are written: the version says whose names of modules they go by."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as saved: its weights by PEFT's names, on the CPU, and the sha256 of their file.

    ``transformers`` is the version whose names of modules they go by, where the file says so.
    """

    folder: Path
    config: LoraConfig
    tensors: dict[str, Tensor]
    sha256: str
    notes: list[str]
    transformers: str | None = None

    @property
    def head(self) -> dict[str, Tensor]:
        """What was saved beside the low-rank matrices, by name in the base network: heads, biases, embeddings."""
        return {name.removeprefix(PREFIX): tensor for name, tensor in self.tensors.items() if not is_factor(name)}


def read_files(folder: Path, adapter: str | None = None) -> AdapterFiles:
    """Read an adapter's configuration and weights.

    Args:
        folder: holds ``adapter_config.json``, or one folder per adapter, as PEFT saves several.
        adapter: which of several.

    Raises:
        AdapterError: no adapter there, not a LoRA adapter, a damaged file, or a value that is not finite.
    """
    folder = _folder(folder, adapter)
    config = _config(folder)
    notes: list[str] = []
    tensors, path = _tensors(folder, notes)
    if not any(map(is_factor, tensors)):
        raise AdapterError(f"{path} holds no LoRA matrix (no tensor named lora_A or lora_B)")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise AdapterError(f"{path}: {name} is a {type(tensor).__name__}, not a tensor")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{path}: {name} holds a value that is not finite (NaN or infinity)")
    return AdapterFiles(folder, config, tensors, file_sha256(path), notes, _written_by(path))


def _written_by(path: Path) -> str | None:
    """The version of transformers in a file's header."""
    if path.name != SAFE:
        return None
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("transformers")


def _folder(folder: Path, adapter: str | None) -> Path:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise AdapterError(f"adapter folder {folder} {what}; give the folder that holds {CONFIG}")
    if adapter is not None and (folder / adapter / CONFIG).is_file():
        return folder / adapter
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if (folder / CONFIG).is_file() and adapter in (None, "default"):
        return folder
    if adapter is not None:
        raise AdapterError(f"{folder} has no adapter {adapter!r}; it has {', '.join(inner) or 'one without a name'}")
    if inner:
        raise AdapterError(
            f"{folder} holds no {CONFIG} itself, but several folders do ({', '.join(inner[:5])}): give one of those, "
            "or its name with `adapter`"
        )
    if (folder / "config.json").is_file():
        raise AdapterError(f"{folder} is a whole model (config.json), not an adapter: there is no {CONFIG}")
    raise AdapterError(f"{folder} is no adapter: it holds no {CONFIG}")


def _config(folder: Path) -> LoraConfig:
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {one_line(error)}") from None
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if kind != "LORA":
        raise AdapterError(f"{path}: the adapter's type is {kind or 'not stated'}; only LoRA adapters can be read")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # fields of the wrong type fail in many ways
        raise AdapterError(f"{path} is not a configuration that PEFT reads: {one_line(error)}") from None
    assert isinstance(config, LoraConfig)
    for name, rank in {"r": config.r, **(config.rank_pattern or {})}.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise AdapterError(f"{path}: the rank of {name} is {rank!r}; it must be a whole number of at least 1")
    return config


def _tensors(folder: Path, notes: list[str]) -> tuple[dict[str, Tensor], Path]:
    path = folder / SAFE
    try:
        if path.is_file():
            from safetensors.torch import load_file

            return load_file(path), path
        path = folder / PICKLED
        if path.is_file():
            notes.append(f"{path} is pickled, not safetensors; it was read with weights_only.")
            found = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(found, Mapping):
                raise AdapterError(f"{path} holds a {type(found).__name__}, not tensors by name")
            return dict(found), path
    except AdapterError:
        raise
    except Exception as error:  # safetensors and pickle each have their own errors for a damaged file
        raise AdapterError(f"{path} is damaged or incomplete: {one_line(error)}") from None
    raise AdapterError(f"{folder} holds neither {SAFE} nor {PICKLED}: the adapter's weights are missing")


def check_fit(files: AdapterFiles, expected: Mapping[str, Tensor], optional: Mapping[str, Tensor], base: str) -> None:
    """Every tensor that the configuration and the base model call for is in the file, in its shape, and none else.

    Args:
        files: what was read.
        expected: what PEFT would save of the model that the configuration makes; ``optional``: the same with
            embeddings, which PEFT saves at times.
        optional: see above.
        base: the base model's name.

    Raises:
        AdapterError: names the first tensor that does not fit, and what disagrees: configuration, base or file.
    """
    where = files.folder
    if missing := sorted(set(expected) - set(files.tensors)):
        raise AdapterError(
            f"{where}: the weights lack {missing[0]}{_more(missing)}, which {CONFIG} and {base} call for; the file is "
            "not whole, or the configuration or the base model is another run's"
        )
    if extra := sorted(set(files.tensors) - set(optional)):
        raise AdapterError(
            f"{where}: the weights hold {extra[0]}{_more(extra)}, which has no place by {CONFIG} in {base}; the "
            "configuration or the base model is another run's"
        )
    for name, tensor in files.tensors.items():
        shape, given = tuple(optional[name].shape), tuple(tensor.shape)
        if shape == given:
            continue
        inner = 0 if is_a(name) else 1
        if is_factor(name) and len(shape) == len(given) and shape[inner] != given[inner]:
            raise AdapterError(
                f"{where}: {name} has rank {given[inner]} (shape {given}), but {CONFIG} says {shape[inner]}; the "
                "configuration and the weights are not of one run"
            )
        raise AdapterError(
            f"{where}: {name} has shape {given}, but {base} needs {shape}; this is not the base model that the adapter "
            "was trained on (name it with `base`)"
        )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
