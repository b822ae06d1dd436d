"""What an adapter folder holds, read and checked before any model is loaded.

PEFT only warns of tensors that an adapter's file lacks, and leaves them as they were initialised: a truncated
or mixed-up run then looks like an untrained one. Here a file that does not fit is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor

from ranksure.adapters.fields import leave_unread, ranks_of_module, read_config
from ranksure.adapters.matrices import PREFIX, is_a, is_factor, module_of
from ranksure.errors import AdapterError, one_line
from ranksure.files import file_sha256

_QUANTISED = "The following `bitsandbytes` quantization config was used during training:"  # of PEFT's model cards
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
    config = read_config(folder / CONFIG)
    leave_unread(config, _quantised(folder))
    notes: list[str] = []
    tensors, path = _tensors(folder, notes)
    if not any(map(is_factor, tensors)):
        raise AdapterError(f"{path} holds no LoRA matrix (no tensor named lora_A or lora_B)")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise AdapterError(f"{path}: {name} is a {type(tensor).__name__}, not a tensor")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{path}: {name} holds a value that is not finite (NaN or infinity)")
    _check_ranks(folder, config, tensors)
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
        if path.name == PICKLED:  # torch would go on to advise loading it with whatever code it holds
            raise AdapterError(
                f"{path} is a pickle, and not one of tensors alone: it may run code when it is loaded, so it is not; "
                f"save the adapter as {SAFE}"
            ) from None
        raise AdapterError(f"{path} is damaged or incomplete: {one_line(error)}") from None
    raise AdapterError(f"{folder} holds neither {SAFE} nor {PICKLED}: the adapter's weights are missing")


def _quantised(folder: Path) -> list[str]:
    """What the model card says of a base that was quantised in training, which no configuration records."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = re.search(_QUANTISED + r"((?:\n+- .*)*)", card)
    if found is None:
        return []
    bits = re.search(r"load_in_([48])bit: True", found[1])
    kind = f"{bits[1]} bits" if bits else "fewer bits"
    return [f"the base was quantised to {kind} in training, by README.md: certificates of such runs were not tested"]


def _check_ranks(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Refuse ranks that the weights do not have, before PEFT makes room for them."""
    if config.target_parameters:  # PEFT stores several parameters' matrices as one
        return
    for name, tensor in tensors.items():
        if not is_a(name) or tensor.dim() < 2:
            continue
        ranks, given = ranks_of_module(config, module_of(name)), tensor.shape[0]
        key, stated = next(iter(ranks.items()))
        if stated != given and given in ranks.values():
            later = next(other for other, rank in ranks.items() if rank == given)
            raise AdapterError(
                f"{folder}: {module_of(name)} was trained at rank {given}, by the rank_pattern key {later!r}, but "
                f"{CONFIG} gives it {stated}, by {key!r}: PEFT takes the first key that matches, and saving sorted "
                "them; let only one key match it"
            )
        if stated != given:
            raise _other_rank(folder, name, tensor, given, stated)


def _other_rank(folder: Path, name: str, tensor: Tensor, given: int, stated: int) -> AdapterError:
    return AdapterError(
        f"{folder}: {name} has rank {given} (shape {tuple(tensor.shape)}), but {CONFIG} says {stated}; the "
        "configuration and the weights are not of one run"
    )


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
            raise _other_rank(where, name, tensor, given[inner], shape[inner])
        raise AdapterError(
            f"{where}: {name} has shape {given}, but {base} needs {shape}; this is not the base model that the adapter "
            "was trained on (name it with `base`)"
        )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
