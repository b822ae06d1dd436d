"""A plan's folder as a starting point of real training, and what the plan predicted of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ranksure.adapters.matrices import PREFIX, file_factors, is_factor
from ranksure.errors import AdapterError, SettingError
from ranksure.factors import Factors
from ranksure.network.targets import base_network


@dataclass(frozen=True)
class PlanFolder:
    """What ``ranksure plan --out`` wrote; ``data`` is the content of ``plan.json``."""

    folder: Path
    data: dict[str, Any]

    @property
    def lam(self) -> float:
        """The penalty that was solved for."""
        return float(self.data["weight_decay"])

    @property
    def pattern(self) -> dict[str, int]:
        """The recommended ranks by module.

        Raises:
            SettingError: the plan's optimum is no update at all.
        """
        ranks = {name: int(rank) for name, rank in self.data["recommended"]["rank_pattern"].items()}
        if not ranks:
            raise SettingError(
                f"the plan in {self.folder} needs no adapter: at its weight decay the optimum is no update at all, "
                "so there is nothing to train"
            )
        return ranks

    def tensors(self) -> dict[str, Tensor]:
        """The solved adapter's tensors by PEFT's names.

        Raises:
            AdapterError: there is none, or it cannot be read.
        """
        path = self.folder / "adapter" / "adapter_model.safetensors"
        if (self.folder / "merged").is_dir():
            raise AdapterError(f"the plan in {self.folder} holds a merged checkpoint: plan again without --merged")
        return _read(path)

    def factors(self) -> Factors:
        """The solved update, ``(u, v)`` by module.

        Raises:
            AdapterError: as :meth:`tensors`.
        """
        tensors = self.tensors()
        found = {name: file_factors(tensors, name) for name in self.data["target_modules"]}
        out: Factors = {name: pair for name, pair in found.items() if pair is not None}
        if not out:
            raise AdapterError(f"the adapter in {self.folder} holds none of the plan's modules")
        return out

    def head(self) -> dict[str, Tensor]:
        """The fitted head's tensors: of a mean-pooled head ``weight`` and ``bias``, else by name in the network.

        Raises:
            AdapterError: as :meth:`tensors`.
        """
        if self.data["pooling"] == "mean":
            return _read(self.folder / "adapter" / "head.safetensors")
        return {key.removeprefix(PREFIX): value for key, value in self.tensors().items() if not is_factor(key)}

    def prediction(self, rank: int | None, linear: bool) -> dict[str, Any] | None:
        """The linearised problem's figures for what is trained; None where the plan says nothing of this rank.

        Args:
            rank: a uniform rank on every target, or None for the recommended ranks.
            linear: the optimum's own ranks instead.
        """
        optimum, rows = self.data["optimum"], self.data["ranks"]
        zero, dual = optimum["objective_at_zero"], optimum["dual"]
        largest = max(optimum["ranks"].values(), default=0)
        held: dict[str, Any] | None = None
        if linear:
            of, objective = "the optimum", optimum["objective"]
            held = {
                "heldout_loss": self.data["linearity"].get("heldout_linear_loss"),
                "heldout_accuracy": None,
            }
        elif rank is None:
            captured = self.data["recommended"]["captured_uniform"]
            of, objective = "the recommended rank", zero - captured * (zero - dual)
            held = next((row for row in rows if row["rank"] == self.data["recommended"]["r"]), None)
        else:
            held = next((row for row in rows if row["rank"] == rank), None)
            if held is None and rank < largest:
                return None
            of, objective = f"rank {rank}", optimum["objective"] if held is None else held["objective"]
        held = held or {}
        return {
            "of": of,
            "objective": objective,
            "objective_at_zero": zero,
            "optimum": optimum["objective"],
            "captured": (zero - objective) / (zero - dual) if zero > dual else 1.0,
            "heldout_loss": held.get("heldout_loss"),
            "heldout_accuracy": held.get("heldout_accuracy"),
            "linearity": self.data["linearity"].get("train"),
        }


def read_plan(folder: str | os.PathLike[str]) -> PlanFolder:
    """Read a plan's folder.

    Raises:
        SettingError: it holds no plan, or one that this version cannot read.
    """
    path = Path(folder)
    try:
        data = json.loads((path / "plan.json").read_text(encoding="utf-8"))
        known = data["schema"] == 1
        for key in ("recommended", "optimum", "ranks", "weight_decay", "target_modules", "pooling", "loss", "data"):
            data[key]
        sound = math.isfinite(float(data["weight_decay"])) and isinstance(data["recommended"]["rank_pattern"], dict)
    except FileNotFoundError:
        raise SettingError(f"{path} holds no plan.json: `ranksure plan ... --out {path}` writes one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(f"{path / 'plan.json'} is no readable plan: {type(error).__name__} {error}") from None
    if not known or not sound:
        raise SettingError(f"{path / 'plan.json'} was written by another version of ranksure: plan again")
    return PlanFolder(path, data)


def install_planned_head(model: nn.Module, plan: str | os.PathLike[str]) -> list[str]:
    """Put a plan's fitted head into a model for a Trainer of one's own, and freeze it there.

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
    if found.data["pooling"] == "mean":
        raise AdapterError(
            f"the plan in {found.folder} has a head on averaged states, which is no part of this model: it lies in "
            "adapter/head.safetensors"
        )
    if not found.data["head"]["new"]:
        return []
    base = base_network(model)
    modules = dict(base.named_modules())
    done: dict[str, None] = {}
    for name, value in found.head().items():
        owner, _, key = name.rpartition(".")
        parameters = [p for holder in _holders(modules, owner) if (p := getattr(holder, key, None)) is not None]
        if not parameters or any(p.shape != value.shape for p in parameters):
            raise AdapterError(f"{name} of the plan in {found.folder} does not fit {type(base).__name__}")
        for parameter in parameters:
            with torch.no_grad():
                parameter.copy_(value)
            parameter.requires_grad_(False)
        done[owner] = None
    return list(done)


def _holders(modules: Mapping[str, nn.Module], owner: str) -> list[nn.Module]:
    """The modules of a name: PEFT keeps the original of a saved module beside the copy that it trains."""
    inside = owner
    while inside and not isinstance(modules.get(inside), ModulesToSaveWrapper):
        inside = inside.rpartition(".")[0]
    wrapper = modules.get(inside)
    if not isinstance(wrapper, ModulesToSaveWrapper):
        return [modules[owner]] if owner in modules else []
    rest = owner[len(inside) :].removeprefix(".")
    return [holder.get_submodule(rest) for holder in (wrapper.original_module, *wrapper.modules_to_save.values())]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
