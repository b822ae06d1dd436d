"""A plan's folder as a starting point of real training, and what the plan predicted of it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ranksure.errors import AdapterError, SettingError
from ranksure.factors import Factors
from ranksure.losses import get_loss

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PlanFolder:
    """What ``ranksure plan --out`` wrote.

    Attributes:
        folder: where.
        data: content of ``plan.json``.
    """

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
        """The solved adapter's tensors by PEFT's names in the base network.

        Raises:
            AdapterError: there is none, or it cannot be read.
        """
        path = self.folder / "adapter" / "adapter_model.safetensors"
        if (self.folder / "merged").is_dir():
            raise AdapterError(f"the plan in {self.folder} holds a merged checkpoint: plan again without --merged")
        return {key.removeprefix(_PREFIX): value for key, value in _read(path).items()}

    def factors(self) -> Factors:
        """The solved update, ``(u, v)`` by module.

        Raises:
            AdapterError: as :meth:`tensors`.
        """
        tensors = self.tensors()
        out: Factors = {}
        for name in self.data["target_modules"]:
            linear, embedding = f"{name}.lora_A.weight", f"{name}.lora_embedding_A"
            key = linear if linear in tensors else embedding
            if key in tensors:
                a, b = tensors[key], tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
                out[name] = (b.flatten(1).double(), a.flatten(1).T.contiguous().double())
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
        return {key: value for key, value in self.tensors().items() if ".lora_" not in key}

    def prediction(self, rank: int | None, linear: bool) -> dict[str, Any] | None:
        """The linearised problem's figures for what is trained.

        Args:
            rank: a uniform rank on every target, or None for the recommended ranks.
            linear: the optimum's own ranks instead.

        Returns:
            ``of``, ``objective``, ``objective_at_zero``, ``optimum``, ``captured``, ``heldout_loss``,
            ``heldout_accuracy`` and ``linearity``; None where the plan says nothing of this rank.
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
        # Under squared error a plan without "mean_per" has a lambda of another scale.
        known = data["schema"] == 1 and ("mean_per" in data or get_loss(data["loss"]).term == "sample")
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


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
