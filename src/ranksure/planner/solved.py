"""The optimum of a plan whose update could not be written: kept in its folder, taken up by the same request."""

from __future__ import annotations

from collections.abc import Sequence
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
_LINEAR = "linear."  # before the names of the linearised optimum's tensors


def write_solved(folder: Path, factors: Factors, linear: Factors, task: Task[Any]) -> None:
    """Write the factors of the answer and of the linearised optimum, and what the plan itself has made (a new head)."""
    tensors = {
        f"{before}{side}.{name}": part
        for before, each in (("", factors), (_LINEAR, linear))
        for name, pair in each.items()
        for side, part in zip("uv", pair, strict=True)
    }
    for index, module in enumerate(_new(task)):
        tensors |= {f"new.{index}.{key}": value for key, value in module.state_dict().items()}
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, folder / SOLVED)


def read_solved(folder: Path, prepared: Prepared) -> tuple[Plan, Factors, Factors] | None:
    """A plan that was solved for the same model, rows and settings; what it made is put into the network.

    None where there is none, or one of another request.
    """
    try:
        record, tensors = read(folder / "plan.json", Plan), load_file(folder / SOLVED)
    except (OSError, SafetensorError, RanksureError):
        return None
    task = prepared.task
    request = request_of(prepared)
    if request["data"] is None or _requested(record) != request:
        return None
    for index, module in enumerate(_new(task)):
        start = f"new.{index}."
        module.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
    found = [
        {name: (tensors[f"{before}u.{name}"], tensors[f"{before}v.{name}"]) for name in record.target_modules}
        for before in ("", _LINEAR)
        if f"{before}u.{record.target_modules[0]}" in tensors
    ]
    return record, found[0], found[-1]


def request_of(prepared: Prepared, but: Sequence[str] = ()) -> dict[str, Any]:
    """What a plan's solution depends on, but for some of its settings."""
    task, train = prepared.task, prepared.split.train
    settings = {**plain(prepared.settings.to_json()), **dict.fromkeys((*_HOW_WRITTEN, *but))}
    model = [task.name, task.revision]
    return {"model": model, "data": train.sha256, "rows": prepared.split.total, "settings": settings}


def _requested(record: Plan) -> dict[str, Any]:
    settings = {**record.settings, **dict.fromkeys(_HOW_WRITTEN)}
    model = [record.model, record.revision]
    return {"model": model, "data": record.data.sha256, "rows": record.data.rows, "settings": settings}


def _new(task: Task[Any]) -> list[nn.Module]:
    """Modules whose values are no checkpoint's."""
    head = [task.model.get_submodule(task.head)] if task.head_is_new and task.head else []
    return [*head, *(task.adapted.get_submodule(name) for name in task.new_modules)]
