"""The optimum of a plan whose update could not be written: kept in its folder, taken up by the same request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ranksure.errors import RanksureError
from ranksure.factors import Factors
from ranksure.records.plan import Plan
from ranksure.records.record import plain, read
from ranksure.tasks.task import Task

if TYPE_CHECKING:
    from ranksure.planner.prepare import Prepared

SOLVED = "solved.safetensors"
_HOW_WRITTEN = ("merged", "uniform")  # settings that the solution does not depend on


def write_solved(folder: Path, factors: Factors, task: Task[Any]) -> None:
    """Write the optimum's factors, and what of the network the plan itself has made (a new head)."""
    tensors = {f"{side}.{name}": part for name, pair in factors.items() for side, part in zip("uv", pair, strict=True)}
    for index, module in enumerate(_new(task)):
        tensors |= {f"new.{index}.{key}": value for key, value in module.state_dict().items()}
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, folder / SOLVED)


def read_solved(folder: Path, prepared: Prepared) -> tuple[Plan, Factors] | None:
    """A plan that was solved for the same model, rows and settings; what it made is put into the network.

    None where there is none, or one of another request.
    """
    try:
        record, tensors = read(folder / "plan.json", Plan), load_file(folder / SOLVED)
    except (OSError, SafetensorError, RanksureError):
        return None
    task, train = prepared.task, prepared.split.train
    if train.sha256 is None or _request(record) != (
        (task.name, task.revision),
        (train.sha256, prepared.split.total),
        {**plain(prepared.settings.to_json()), **dict.fromkeys(_HOW_WRITTEN)},
    ):
        return None
    for index, module in enumerate(_new(task)):
        start = f"new.{index}."
        module.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
    return record, {name: (tensors[f"u.{name}"], tensors[f"v.{name}"]) for name in record.target_modules}


def _request(record: Plan) -> tuple[Any, ...]:
    settings = {**record.settings, **dict.fromkeys(_HOW_WRITTEN)}
    return (record.model, record.revision), (record.data.sha256, record.data.rows), settings


def _new(task: Task[Any]) -> list[nn.Module]:
    """Modules whose values are no checkpoint's."""
    head = [task.model.get_submodule(task.head)] if task.head_is_new and task.head else []
    return [*head, *(task.adapted.get_submodule(name) for name in task.new_modules)]
