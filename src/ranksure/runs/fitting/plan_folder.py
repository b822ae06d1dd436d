"""A plan's folder as a starting point of real training, and what the plan predicted of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import torch
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ranksure.adapters.matrices import PREFIX, file_factors, is_factor
from ranksure.errors import AdapterError, DataError, SettingError, one_line
from ranksure.factors import Factors
from ranksure.files import put_back
from ranksure.network.targets import base_network
from ranksure.planner.settings import PlanSettings
from ranksure.planner.solved import SOLVED
from ranksure.records.fit import Prediction
from ranksure.records.plan import NetworkPlan, Plan
from ranksure.records.record import read


@dataclass(frozen=True)
class PlanFolder:
    """What ``ranksure plan --out`` wrote; ``record`` is the content of ``plan.json``."""

    folder: Path
    record: Plan

    @property
    def pattern(self) -> dict[str, int]:
        """The recommended ranks by module.

        Raises:
            SettingError: the plan's optimum is no update at all.
        """
        self._refuse_zero()
        return self.record.recommended.rank_pattern

    @property
    def weight_decay(self) -> float:
        """The recommended lambda."""
        return self.record.recommended.weight_decay or self.record.weight_decay

    def _refuse_zero(self) -> None:
        if not self.record.recommended.rank_pattern:
            raise SettingError(
                f"the plan in {self.folder} needs no adapter: at its weight decay the optimum is no update at all, "
                "so there is nothing to train"
            )

    def asked(self) -> dict[str, Any]:
        """The options of the plan but for data that was in memory.

        Raises:
            DataError: one of another type.
        """
        types, given = get_type_hints(PlanSettings), self.record.settings
        known = {name: value for name, value in given.items() if name in types and not isinstance(value, dict)}
        return {name: self._of_type(types[name], value, f"settings.{name}") for name, value in known.items()}

    def offsets(self) -> tuple[float, ...] | None:
        """What is added to the logit of each class; None where the task adds nothing.

        Raises:
            DataError: another type.
        """
        return self._of_type(tuple[float, ...] | None, self.record.task.get("offsets"), "task.offsets")

    def _of_type(self, kind: Any, value: Any, where: str) -> Any:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            reason = f"{where}: {one_line(error)}"
            raise DataError(f"{self.folder / 'plan.json'} is damaged: {reason}; make it again") from None

    def tensors(self) -> dict[str, Tensor]:
        """The solved adapter's tensors by PEFT's names.

        Raises:
            AdapterError: there is none, or it cannot be read.
            SettingError: the plan's optimum is no update at all.
        """
        self._refuse_zero()
        path = self.folder / "adapter" / "adapter_model.safetensors"
        if (self.folder / "merged").is_dir():
            raise AdapterError(f"the plan in {self.folder} holds a merged checkpoint: plan again without `merged`")
        if (self.folder / SOLVED).is_file():
            raise AdapterError(f"the plan in {self.folder} is solved, but its update is not written: ask it again")
        return _read(path)

    def factors(self) -> Factors:
        """The solved update, ``(u, v)`` by module.

        Raises:
            AdapterError: as :meth:`tensors`.
        """
        tensors = self.tensors()
        found = {name: file_factors(tensors, name) for name in self.record.target_modules}
        out: Factors = {name: pair for name, pair in found.items() if pair is not None}
        if not out:
            raise AdapterError(f"the adapter in {self.folder} holds none of the plan's modules")
        return out

    def head(self) -> dict[str, Tensor]:
        """The fitted head's tensors: of a mean-pooled head ``weight`` and ``bias``, else by name in the network.

        Raises:
            AdapterError: as :meth:`tensors`.
        """
        if self.record.pooling == "mean":
            return _read(self.folder / "adapter" / "head.safetensors")
        return {key.removeprefix(PREFIX): value for key, value in self.tensors().items() if not is_factor(key)}

    def prediction(self, rank: int | None, linear: bool) -> Prediction | None:
        """The plan's figures for what is trained; None where it says nothing of this rank.

        Of the network itself where the plan solved it, else of the linearised problem.

        Args:
            rank: a uniform rank on every target, or None for the recommended ranks.
            linear: the solution's own ranks instead.
        """
        if self.record.network is not None:
            return self._of_network(self.record.network, rank, linear)
        record, optimum = self.record, self.record.optimum
        zero, dual = optimum.objective_at_zero, optimum.dual
        wanted = record.recommended.r if rank is None else rank
        row = next((row for row in record.ranks if row.rank == wanted), None)
        loss = accuracy = None
        if linear:
            of, objective = "the optimum", optimum.objective
            loss = record.linearity.heldout_linear_loss
        else:
            if rank is None:
                captured = record.recommended.captured_uniform or 0.0
                of, objective = "the recommended rank", zero - captured * (zero - dual)
            elif row is None and rank < optimum.largest_rank:
                return None
            else:
                of, objective = f"rank {rank}", optimum.objective if row is None else row.objective
            if row is not None:
                loss, accuracy = row.heldout_loss, row.heldout_accuracy
        return Prediction(
            of=of,
            objective=objective,
            objective_at_zero=zero,
            optimum=optimum.objective,
            captured=(zero - objective) / (zero - dual) if zero > dual else 1.0,
            heldout_loss=loss,
            heldout_accuracy=accuracy,
            linearity=record.linearity.train,
        )

    def _of_network(self, found: NetworkPlan, rank: int | None, solution: bool) -> Prediction | None:
        zero, best = (
            found.optimum.objective_at_zero,
            min([found.optimum.objective, *(r.objective for r in found.ranks)]),
        )
        row = next((row for row in found.ranks if row.rank == (found.r if rank is None else rank)), None)
        if solution or (row is None and rank is not None and rank >= max(found.optimum.ranks.values(), default=0)):
            of = "the planned solution" if solution else f"rank {rank}"
            objective, held = found.optimum.objective, found.heldout
            loss, accuracy = (held.loss, held.accuracy) if held else (None, None)
        elif row is None:
            return None
        else:
            of = "the recommended rank" if rank is None else f"rank {rank}"
            objective, loss, accuracy = row.objective, row.heldout_loss, row.heldout_accuracy
        return Prediction(
            of=of,
            objective=objective,
            objective_at_zero=zero,
            optimum=best,
            captured=(zero - objective) / (zero - best) if zero > best else 1.0,
            heldout_loss=loss,
            heldout_accuracy=accuracy,
        )


def read_plan(folder: str | os.PathLike[str]) -> PlanFolder:
    """Read a plan's folder.

    Raises:
        SettingError: it holds no plan.
        DataError: it holds one that this version cannot read.
    """
    path = Path(folder)
    put_back(path)
    if not (path / "plan.json").is_file():
        raise SettingError(f"{path} holds no plan.json: `ranksure plan ... --out {path}` writes one")
    return PlanFolder(path, read(path / "plan.json", Plan))


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
    if found.record.pooling == "mean":
        raise AdapterError(
            f"the plan in {found.folder} has a head on averaged states, which is no part of this model: it lies in "
            "adapter/head.safetensors"
        )
    if not found.record.head.new and not (found.folder / "adapter").is_dir():
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
