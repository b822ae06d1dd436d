r"""PEFT configurations whose scale is exactly 1 and that match exactly the modules they name.

How PEFT 0.21 reads a configuration, and what follows for the way it is written here:

- ``target_modules`` as a list also matches by ending ("q" takes "b.q"); as a string it is a regular
  expression that must match the whole name. So: one string, the escaped names. But in mixtures of experts that
  transformers 5 stores stacked (Mixtral, Qwen3-MoE and others) PEFT reduces such a string to the last parts of the
  names that it matches, in every layer, while full names in a list keep their meaning. So: a list there, and in both
  cases what PEFT wraps is compared with what is meant.
- a key of ``rank_pattern`` or ``alpha_pattern`` is searched as ``(.*\.)?(KEY)$``, first match wins,
  so a plain name also takes modules whose name ends with it. A key that starts with ``^`` can only
  match from the beginning. So: ``^`` and the escaped name.
- the scale is ``alpha / r`` with the two looked up apart, so ``rank_pattern`` alone changes the scale
  of what it names. So: ``alpha_pattern`` equal to it.
"""

from __future__ import annotations

import dataclasses
import enum
import pprint
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ranksure.adapters.aliasing import alias_model, quietly
from ranksure.errors import AdapterError

NOTHING_TO_EXPORT = "nothing to export: the optimum is zero (every module has rank 0)"


def kept_ranks(factors_or_ranks: Mapping[str, int | tuple[Tensor, Tensor]]) -> dict[str, int]:
    """Ranks of the modules that an adapter keeps: those of rank at least 1.

    Raises:
        AdapterError: every rank is zero, or one is no whole number.
    """
    ranks: dict[str, int] = {}
    for name, value in factors_or_ranks.items():
        rank = value[0].shape[1] if isinstance(value, tuple) else value
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise AdapterError(f"rank of {name} is {rank!r}: expected an integer of at least 0")
        if rank:
            ranks[name] = rank
    if not ranks:
        raise AdapterError(NOTHING_TO_EXPORT)
    return ranks


def exact_pattern(name: str) -> str:
    """A ``rank_pattern`` / ``alpha_pattern`` key that matches this module only."""
    return "^" + re.escape(name)


def exact_targets(names: Sequence[str], model: nn.Module | None = None) -> str | list[str]:
    """``target_modules`` that match these modules only: an expression; full names where PEFT would widen it.

    Raises:
        AdapterError: PEFT wraps other modules of ``model`` with either.
    """
    expression = "(?:" + "|".join(re.escape(name) for name in names) + ")"  # never equal to "all-linear"
    if model is None or not any(parameter.dim() == 3 for parameter in model.parameters()):  # no stacked experts
        return expression
    odd = ""
    for targets in (expression, list(names)):
        wrapped = _wrapped(model, targets)
        if wrapped == set(names):
            return targets
        odd = min(wrapped ^ set(names))
    raise AdapterError(
        f"PEFT does not adapt these modules of {type(model).__name__} alone: it takes the names of some for those of "
        f"its experts, and gets {odd} wrong; choose other `target_modules`"
    )


def _wrapped(model: nn.Module, targets: str | list[str]) -> set[str]:
    """The modules that PEFT wraps; none where it refuses the targets."""
    try:
        with quietly():
            trial: Any = get_peft_model(
                alias_model(model), LoraConfig(r=1, target_modules=targets), low_cpu_mem_usage=True
            )
    except (ValueError, KeyError, AttributeError, TypeError):
        return set()
    return {name for name, module in trial.get_base_model().named_modules() if isinstance(module, LoraLayer)}


def lora_config(
    factors_or_ranks: Mapping[str, int | tuple[Tensor, Tensor]],
    *,
    model: nn.Module | None = None,
    task_type: str | None = None,
    modules_to_save: Sequence[str] | None = None,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    uniform: bool = False,
    fan_in_fan_out: bool | None = None,
) -> LoraConfig:
    """Build the ``LoraConfig`` for these ranks, with scale exactly 1 in every module.

    Args:
        factors_or_ranks: rank, or the factors (u of shape (m, r), v of shape (n, r)), by qualified module name; modules
            of rank 0 are left out.
        model: the base network; if given, every name must be one of its modules.
        task_type: as PEFT's, such as ``"SEQ_CLS"``.
        modules_to_save: qualified names of new heads.
        base_model_name_or_path: recorded.
        revision: of the base model, recorded.
        uniform: one rank (the largest) for all and no patterns, for consumers that read only ``r`` and ``lora_alpha``;
            the factors must then be zero-padded to it.
        fan_in_fan_out: whether the targets store (in, out) weights, as GPT-2's Conv1D; read from ``model`` by default.
            PEFT decides per module whatever is set; where it warns of both kinds, it sets each one right.

    Returns:
        The configuration, ready for ``get_peft_model``.

    Raises:
        AdapterError: all ranks are zero, a rank is invalid, a name is not a module of ``model``, or one that PEFT
            cannot adapt without others.
    """
    ranks = kept_ranks(factors_or_ranks)
    if model is not None:
        modules = dict(model.named_modules())
        for name in ranks:
            if name not in modules:
                raise AdapterError(f"{name} is not a module of {type(model).__name__}")
        if fan_in_fan_out is None:
            first = next(module for name, module in modules.items() if name in ranks)
            fan_in_fan_out = isinstance(first, Conv1D)  # the first target's kind saves PEFT one warning
    largest = max(ranks.values())
    patterns = {} if uniform else {exact_pattern(name): rank for name, rank in ranks.items()}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=dict(patterns),
        alpha_pattern=dict(patterns),
        target_modules=exact_targets(list(ranks), model),
        modules_to_save=list(modules_to_save) if modules_to_save else None,
        task_type=task_type,  # pyright: ignore[reportArgumentType]  (PEFT takes the name as well)
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
        fan_in_fan_out=bool(fan_in_fan_out),
        lora_dropout=0.0,
        bias="none",
    )


def config_snippet(config: LoraConfig, variable: str = "lora_config") -> str:
    """Python source that runs on its own and rebuilds ``config`` as ``variable``: what differs from PEFT's defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        defaults = LoraConfig()
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        always = field.name in ("r", "lora_alpha")
        if not field.init or field.name in ("peft_type", "peft_version", "runtime_config"):
            continue
        if not always and value == getattr(defaults, field.name):
            continue
        if isinstance(value, enum.Enum):
            value = value.value
        if isinstance(value, set):
            value = sorted(value)
        text = pprint.pformat(value, width=96, sort_dicts=False).replace("\n", "\n    ")
        lines.append(f"    {field.name}={text},")
    return "\n".join(["from peft import LoraConfig", "", f"{variable} = LoraConfig(", *lines, ")", ""])


def axolotl_yaml(
    factors_or_ranks: Mapping[str, int | tuple[Tensor, Tensor]],
    *,
    weight_decay: float | None = None,
    modules_to_save: Sequence[str] | None = None,
    uniform: bool = False,
    model: nn.Module | None = None,
) -> str:
    """The adapter part of an axolotl configuration for these ranks (see :func:`lora_config`), as YAML.

    axolotl passes ``lora_rank_pattern`` and ``lora_alpha_pattern`` to PEFT since its pull request 3673 (May 2026);
    older versions have no such option, and train every module at ``lora_r``. ``weight_decay`` is L2 (lambda, the scale
    being 1), written with a note on AdamW.

    Raises:
        AdapterError: all ranks are zero, or a rank is invalid.
    """
    ranks = kept_ranks(factors_or_ranks)
    largest = max(ranks.values())
    text = "# lora_alpha is equal to lora_r: scale 1.\n" + _yaml(
        adapter="lora",
        lora_r=largest,
        lora_alpha=largest,
        lora_dropout=0.0,
        lora_target_modules=exact_targets(list(ranks), model),
    )
    if not uniform and len(set(ranks.values())) > 1:
        patterns = {exact_pattern(name): rank for name, rank in ranks.items()}
        text += (
            "# Per-module ranks need axolotl's pull request 3673 (May 2026) or newer. Older versions have no such\n"
            "# option: delete the two patterns there, and every module trains at lora_r.\n"
        ) + _yaml(lora_rank_pattern=patterns, lora_alpha_pattern=dict(patterns))  # one object would become an alias
    if modules_to_save:
        text += _yaml(lora_modules_to_save=list(modules_to_save))
    if weight_decay is not None:
        text += (
            "# This is the weight decay of an L2 penalty, as SGD applies it. AdamW's decoupled decay is another\n"
            "# thing: its strength depends on the learning rate, so this number does not carry over to it.\n"
        ) + _yaml(weight_decay=float(weight_decay))
    return text


def _yaml(**values: object) -> str:
    return yaml.safe_dump(values, sort_keys=False, width=float("inf"))
