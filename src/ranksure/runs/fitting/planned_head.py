"""The head that a plan was made with, put into a model for a Trainer of one's own."""

from __future__ import annotations

import os

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ranksure.errors import AdapterError
from ranksure.runs.fitting.plan_folder import read_plan


def install_planned_head(model: nn.Module, plan: str | os.PathLike[str]) -> list[str]:
    """Put a plan's fitted head into a model, and freeze it there.

    A plan fits a new head first and linearises the network around it. Training that begins with a random head, or
    that trains the head too, is another problem than the planned one.

    Args:
        model: the network that the plan's ``LoraConfig`` wraps, with or without it (changed in place).
        plan: the plan's folder.

    Returns:
        Names of the modules that were set, in the base network; empty where the plan brought no head of its own.

    Raises:
        SettingError: the folder holds no plan.
        AdapterError: the plan's head was averaged over tokens (``--pooling mean``), which is no part of such a model,
            or does not fit.
    """
    found = read_plan(plan)
    if found.record.pooling == "mean":
        raise AdapterError(
            f"the plan in {found.folder} has a head on averaged states, which is no part of this model: it lies in "
            "adapter/head.safetensors"
        )
    if not found.record.head.new:
        return []
    unwrap = getattr(model, "get_base_model", None)
    base = unwrap() if callable(unwrap) else model
    assert isinstance(base, nn.Module)
    modules = dict(base.named_modules())
    done: dict[str, None] = {}
    for name, value in found.head().items():
        owner, _, key = name.rpartition(".")
        inside = owner
        while inside and not isinstance(modules.get(inside), ModulesToSaveWrapper):
            inside = inside.rpartition(".")[0]
        wrapper = modules.get(inside) if inside else None
        rest = owner[len(inside) :].removeprefix(".")
        if isinstance(wrapper, ModulesToSaveWrapper):  # PEFT keeps the original beside the copy that it saves
            holders = [wrapper.original_module, *wrapper.modules_to_save.values()]
            holders = [holder.get_submodule(rest) for holder in holders]
        else:
            holders = [modules[owner]] if owner in modules else []
        parameters = [p for holder in holders if (p := getattr(holder, key, None)) is not None]
        if not parameters or any(p.shape != value.shape for p in parameters):
            raise AdapterError(f"{name} of the plan in {found.folder} does not fit {type(base).__name__}")
        for parameter in parameters:
            with torch.no_grad():
                parameter.copy_(value)
            parameter.requires_grad_(False)
        done[owner] = None
    return list(done)
