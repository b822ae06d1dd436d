"""Fields of a LoRA configuration: read and checked from a file, those no certificate covers, patterns that overlap.

What PEFT 0.21 does with what it does not expect, and so what is checked here: it drops a field that it does not know
(with a warning), takes the first of several pattern keys that match a module, and saves the keys sorted; so a run
whose keys overlap can load as another network than was trained.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from peft import LoraConfig, PeftConfig

from ranksure.errors import AdapterError, one_line, shown

# Fields that certificates were tested with, at any value.
_TESTED = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "runtime_config",
    "ensure_weight_tying",  # whether matrices are shared is seen on the network
    "eva_config",  # this and the next three are read at the initialisation alone
    "corda_config",
    "lora_ga_config",
    "loftq_config",
}
_INERT_WITHOUT = {"qalora_group_size": "use_qalora", "megatron_core": "megatron_config"}
_WHY = {
    "use_dora": "its update is not a product of two matrices",
    "target_parameters": "parameters that no linear layer holds",
}
_UNREAD = "_ranksure_unread"  # attribute of a configuration: what its file says that PEFT's object does not

PLAIN_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base weights as they are, in lower case."""
_CHANGING_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")

_MOST_RANK = 1 << 16  # above any module's smaller side: PEFT would make room for more
_MOST_PATH = 4096


class _Shape(msgspec.Struct):
    """Types of the fields that decide what PEFT loads; ranks are checked by themselves."""

    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    inference_mode: bool = False
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    lora_alpha: int | float = 8
    lora_dropout: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, int | float] | None = None


def read_config(path: Path) -> LoraConfig:
    """The configuration in ``adapter_config.json``; what PEFT would drop of it stays known to :func:`untested_fields`.

    Raises:
        AdapterError: no JSON, not a LoRA adapter, or a field of another type or without meaning.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: {one_line(error)}") from None
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if kind != "LORA":
        stated = "not stated" if kind is None else kind if isinstance(kind, str) else shown(kind)
        raise AdapterError(f"{path}: the adapter's type is {stated}; only LoRA adapters can be read")
    try:
        shape = msgspec.convert(content, _Shape)
    except msgspec.ValidationError as error:
        said, _, where = str(error).partition(" - at `$.")
        raise AdapterError(f"{path}: {where.rstrip('`')} {said[:1].lower()}{said[1:]}") from None
    _check_values(path, content.get("r", 8), shape)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each thing that PEFT would warn of here is told elsewhere
            config = PeftConfig.from_pretrained(str(path.parent))
    except Exception as error:  # fields of the wrong type fail in many ways
        raise AdapterError(f"{path} is not a configuration that PEFT reads: {one_line(error)}") from None
    assert isinstance(config, LoraConfig)
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    told = [
        f"{name}={shown(value)} is a field that the installed version of PEFT does not know, so what it does is "
        "missing: update PEFT"
        for name, value in sorted(content.items())
        if name not in known and value
    ]
    leave_unread(config, told)
    return config


def leave_unread(config: LoraConfig, reasons: list[str]) -> None:
    """Keep with a configuration why the network that PEFT makes of it is not the one that was trained."""
    setattr(config, _UNREAD, [*getattr(config, _UNREAD, []), *reasons])


def _check_values(path: Path, rank: Any, shape: _Shape) -> None:
    for name, value in {"r": rank, **(shape.rank_pattern or {})}.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_RANK:
            least = "it must be a whole number of at least 1"
            what = "no module is that large" if isinstance(value, int) and value > _MOST_RANK else least
            raise AdapterError(f"{path}: the rank of {_key(name)} is {shown(value)}; {what}")
    for name, value in {"lora_alpha": shape.lora_alpha, **(shape.alpha_pattern or {})}.items():
        if not -1e30 < value < 1e30:
            raise AdapterError(f"{path}: the alpha of {_key(name)} is {shown(value)}, which is no finite number")
    base = shape.base_model_name_or_path or ""
    if len(base) > _MOST_PATH or "\0" in base:
        raise AdapterError(f"{path}: base_model_name_or_path {shown(base)} is neither a folder nor a Hub id")
    patterns = [*(shape.rank_pattern or {}), *(shape.alpha_pattern or {})]
    patterns += [text for text in (shape.target_modules, shape.exclude_modules) if isinstance(text, str)]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(
                f"{path}: {shown(pattern)} is no regular expression ({one_line(error)}), which a pattern must be"
            ) from None


def _key(name: str) -> str:
    return name if name.isprintable() and len(name) < 100 else shown(name)


def untested_fields(config: LoraConfig) -> list[str]:
    """Why a run with this configuration is not certified: fields that no test covers; empty where none is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        defaults = LoraConfig()
    out = list(getattr(config, _UNREAD, []))
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name, None)
        default = getattr(defaults, name, None)
        if name == "init_lora_weights":
            out += _untested_start(value)
        elif (
            name in _TESTED
            or value == default
            or (name == "target_parameters" and not value)
            or (name in _INERT_WITHOUT and not getattr(config, _INERT_WITHOUT[name], None))
        ):
            continue
        else:
            why = f" ({_WHY[name]})" if name in _WHY else ""
            out.append(f"{name}={value!r} is not a tested configuration{why}")
    return out


def leaves_base(config: LoraConfig) -> bool:
    """Whether its initialisation leaves the base weights as they are."""
    return str(config.init_lora_weights).lower() in PLAIN_STARTS


def trains_one_half(config: LoraConfig) -> bool:
    """Whether B stays as it was initialised (MiCA)."""
    return str(config.init_lora_weights).lower() == "mica"


def _untested_start(value: Any) -> list[str]:
    start = str(value).lower()
    if start in PLAIN_STARTS:
        return []
    if not start.startswith(_CHANGING_STARTS):
        return [f"init_lora_weights={value!r} is no initialisation that this version knows"]
    again = ""
    if start.startswith("pissa_niter"):
        again = ", by random draws that differ from load to load"
    remedy = "" if start == "loftq" else "; PEFT's `path_initial_model_for_weight_conversion` saves a plain LoRA"
    return [
        f"init_lora_weights={value!r} may change the base weights that the update is relative to: PEFT computes them "
        f"anew whenever the adapter is loaded{again}{remedy}"
    ]


def pattern_notes(config: LoraConfig, scales: Mapping[str, float]) -> list[str]:
    """Pattern keys that match nothing, and those that PEFT may have taken another way in training.

    Args:
        config: the configuration, its keys in the order of the file.
        scales: by adapted module, its name as PEFT matches it.
    """
    notes = []
    for field, default in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
        patterns: dict[str, Any] = getattr(config, field) or {}
        found = {name: list(_matching(patterns, name)) for name in scales}
        if unused := [key for key in patterns if not any(key in keys for keys in found.values())]:
            what = f"the default, {default}, holds"
            notes.append(f"{field}: {_listed(map(repr, unused))} matches no adapted module, so {what} in its place.")
        torn = {name: keys for name, keys in found.items() if len({patterns[key] for key in keys}) > 1}
        for name, keys in list(torn.items())[:_SHOWN]:
            also = _listed(f"{key!r} ({patterns[key]})" for key in keys[1:])
            notes.append(
                f"{field}: {name} loads with {patterns[keys[0]]}, of {keys[0]!r} (scale {scales[name]:g}); {also} "
                "matches it too. PEFT takes the first key, and saving sorts them, so the run may have been trained "
                "with another one."
            )
        if len(torn) > _SHOWN:
            notes.append(f"{field}: the same holds for {len(torn) - _SHOWN} more modules.")
    return notes


_SHOWN = 8  # modules named one by one


def ranks_of_module(config: LoraConfig, name: str) -> dict[str, int]:
    """The rank that PEFT gives a module, by the key of ``rank_pattern`` (or ``r``), and those of later keys."""
    patterns: dict[str, int] = config.rank_pattern or {}
    return {key: patterns[key] for key in _matching(patterns, name)} or {"r": config.r}


def _matching(patterns: Iterable[str], name: str) -> Iterable[str]:
    return (key for key in patterns if re.match(rf"(.*\.)?({key})$", name))


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
