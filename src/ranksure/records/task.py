"""``task.json`` beside an adapter: the task and the loss that it was trained for, wherever its folder goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from msgspec import Struct
from msgspec.structs import replace

from ranksure.choices import LossOn, Weighting
from ranksure.errors import AdapterError, DataError, SettingError
from ranksure.files import write_file
from ranksure.losses import get_loss
from ranksure.records.record import encoded, plain, read

if TYPE_CHECKING:
    from ranksure.tasks.task import Task

TASK_FILE = "task.json"


class TaskRecord(Struct, kw_only=True, frozen=True):
    """The content of ``task.json``; what has no meaning for a task is left out.

    Attributes:
        kind: of :data:`ranksure.tasks.load.KINDS`, or ``CAUSAL_LM``; None where only the loss is known.
        loss: which one; files of schema 1 do not say.
        labels: class names by id; None for numbers.
        weighting: of a causal language model's tokens; ``loss_on`` which of them have a loss.
        offsets: of the verbalisers' logits.
    """

    SCHEMA: ClassVar[int] = 2
    schema: int = SCHEMA
    kind: str | None = None
    loss: str | None = None
    labels: list[str] | None = None
    weighting: Weighting | None = None
    loss_on: LossOn | None = None
    pooling: Literal["model", "mean"] | None = None
    max_length: int | None = None
    architecture: str | None = None
    template: str | None = None
    verbalizers: dict[str, str] | None = None
    verbalizer_ids: list[int] | None = None
    offsets: list[float] | None = None
    truncation_side: str | None = None
    image_size: int | None = None
    max_seconds: float | None = None


def task_record(task: Task[Any], loss: str) -> TaskRecord:
    """What a task and a loss are told by."""
    return TaskRecord(loss=loss, labels=task.label_names, **task.record())


def read_task(folder: Path) -> TaskRecord | None:
    """The record in an adapter's folder; None where there is none.

    Raises:
        AdapterError: the file is damaged.
    """
    path = folder / TASK_FILE
    if not path.exists():
        return None
    try:
        found = read(path, TaskRecord)
        if found.loss is not None:
            get_loss(found.loss)
    except (DataError, SettingError) as error:
        cure = "restore it, or remove it and name `task` and `loss`"
        raise AdapterError(f"{path} cannot be read ({error}): {cure}") from None
    return found


def write_task(folder: Path, record: TaskRecord) -> None:
    """Write the record into an adapter's folder."""
    content = {name: value for name, value in plain(record).items() if value is not None or name == "labels"}
    write_file(folder / TASK_FILE, encoded(content))


def carry_loss(folder: Path, loss: str | None) -> None:
    """Have the folder of an adapter say the loss that was given for it, where it does not say one itself."""
    found = read_task(folder) or TaskRecord()
    if loss is not None and found.loss is None:
        write_task(folder, replace(found, loss=loss))
