"""A plan's folder as a starting point of real training, and what the plan predicted of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ranksure.errors import AdapterError, SettingError
from ranksure.factors import Factors
from ranksure.records.fit import Prediction
from ranksure.records.plan import Plan
from ranksure.records.record import read

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PlanFolder:
    """What ``ranksure plan --out`` wrote.

    Attributes:
        folder: where.
        record: content of ``plan.json``.
    """

    folder: Path
    record: Plan

    @property
    def pattern(self) -> dict[str, int]:
        """The recommended ranks by module.

        Raises:
            SettingError: the plan's optimum is no update at all.
        """
        ranks = self.record.recommended.rank_pattern
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
            raise AdapterError(f"the plan in {self.folder} holds a merged checkpoint: plan again without `merged`")
        return {key.removeprefix(_PREFIX): value for key, value in _read(path).items()}

    def factors(self) -> Factors:
        """The solved update, ``(u, v)`` by module.

        Raises:
            AdapterError: as :meth:`tensors`.
        """
        tensors = self.tensors()
        out: Factors = {}
        for name in self.record.target_modules:
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
        if self.record.pooling == "mean":
            return _read(self.folder / "adapter" / "head.safetensors")
        return {key: value for key, value in self.tensors().items() if ".lora_" not in key}

    def prediction(self, rank: int | None, linear: bool) -> Prediction | None:
        """The linearised problem's figures for what is trained; None where the plan says nothing of this rank.

        Args:
            rank: a uniform rank on every target, or None for the recommended ranks.
            linear: the optimum's own ranks instead.
        """
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


def read_plan(folder: str | os.PathLike[str]) -> PlanFolder:
    """Read a plan's folder.

    Raises:
        SettingError: it holds no plan.
        DataError: it holds one that this version cannot read.
    """
    path = Path(folder)
    if not (path / "plan.json").is_file():
        raise SettingError(f"{path} holds no plan.json: `ranksure plan ... --out {path}` writes one")
    return PlanFolder(path, read(path / "plan.json", Plan))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
