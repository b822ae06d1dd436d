"""The folder of a fit while it runs: what was asked, checkpoints by stage, and the finished adapter.

``run.json`` says what was asked and which stages are done; ``stage-K.safetensors`` holds the factors that stage
K starts from, where they are not the plain initialisation; ``checkpoints/stage-K`` is the Trainer's, or holds the last
round of the network's own solver;
``runs/stage-K`` is TensorBoard's, where that is asked for, and stays; ``adapter`` appears in one rename when all is
done. So a kill at any point leaves a folder to go on from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ranksure.errors import RanksureError, SettingError, one_line
from ranksure.factors import Factors
from ranksure.files import is_left, write_file
from ranksure.records.fit import Stage
from ranksure.records.record import plain
from ranksure.solvers.network import Checkpoint

ADAPTER, RUN = "adapter", "run.json"
_OWN = {RUN, ADAPTER, "checkpoints", "plan", "runs", "report.html"}


class Workspace:
    """The folder of one fit; made if it is missing.

    Attributes:
        stages: what is known of the finished stages, oldest first.

    Raises:
        SettingError: a file, a folder that holds something else, or one that cannot be written.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.out = Path(out)
        self.stages: list[Stage] = []
        self._asked: dict[str, Any] = {}
        if self.out.exists() and not self.out.is_dir():
            raise SettingError(f"`out` {self.out} is a file; name a folder")
        foreign = sorted(path.name for path in self._entries() if not _own(path.name))
        if foreign:
            raise SettingError(
                f"`out` {self.out} is not empty and holds {foreign[0]}, which no fit wrote; name a new folder, or "
                "empty this one"
            )
        if any(path.name == ADAPTER for path in self._entries()) and not (self.adapter / "fit.json").is_file():
            raise SettingError(f"`out` {self.out} holds an adapter that no fit wrote; name a new folder")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            probe = self.out / f".{RUN}.00000000.tmp"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise SettingError(f"`out` {self.out} cannot be written: {error.strerror or error}") from None

    @property
    def adapter(self) -> Path:
        """Where the finished adapter appears."""
        return self.out / ADAPTER

    @property
    def finished(self) -> bool:
        """Whether the run is done."""
        return self.adapter.is_dir()

    def checkpoints(self, stage: int) -> Path:
        """The Trainer's folder of a stage."""
        return self.out / "checkpoints" / f"stage-{stage}"

    def open(self, asked: Mapping[str, Any], restart: bool = False) -> bool:
        """Start a run, or take up an unfinished (or finished) one of the same settings; whether there was such a run.

        ``asked`` is all that the result depends on, compared by its JSON. ``restart`` throws an unfinished run away;
        one that has made no checkpoint yet is thrown away where settings differ.

        Raises:
            SettingError: the folder holds a run of other settings, or one that cannot be read.
        """
        self._asked = json.loads(json.dumps(dict(asked)))
        path = self.out / RUN
        if not path.exists():
            if self.finished:
                raise SettingError(f"`out` {self.out} holds an adapter without its {RUN}; name a new folder")
            self._write()
            return False
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known, self.stages = content["asked"], msgspec.convert(content["stages"], list[Stage])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # ValidationError is a ValueError
            raise SettingError(f"{path} cannot be read; name a new folder, or delete {self.out}") from None
        if not self.finished and (restart or (known != self._asked and not self._begun())):
            self.tidy(keep_checkpoints=False)
            shutil.rmtree(self.out / "runs", ignore_errors=True)
            self.stages = []
            self._write()
            return False
        for key in [*self._asked, *known]:
            if known.get(key) != self._asked.get(key):
                state = "a finished" if self.finished else "an unfinished"
                raise SettingError(
                    f"`out` {self.out} holds {state} run with another {key} ({known.get(key)!r}, now "
                    f"{self._asked.get(key)!r}); repeat its settings to go on with it, or name a new folder"
                    + ("" if self.finished else ", or use `restart`")
                )
        return True

    def close_stage(self, stage: Stage, factors: Factors) -> None:
        """Record a finished stage, and the factors that the next one starts from."""
        write_file(self.out / f"stage-{len(self.stages) + 1}.safetensors", save(_named(factors)))
        self.stages.append(stage)
        self._write()  # last: only now does the next stage count as begun

    def factors(self) -> Factors | None:
        """Factors that the current stage starts from; None where it is the first.

        Raises:
            SettingError: their file cannot be read.
        """
        if not self.stages:
            return None
        path = self.out / f"stage-{len(self.stages)}.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise SettingError(f"{path} cannot be read: {error}; start again in a new folder") from None
        return _paired(tensors)

    def save_round(self, reached: Checkpoint) -> None:
        """Keep a round of the network's own solver in place of the one before it."""
        state = {each.name: getattr(reached, each.name) for each in fields(reached) if each.name != "factors"}
        write_file(self._round, save(_named(reached.factors), {"state": json.dumps(state)}))

    def last_round(self) -> Checkpoint | None:
        """The last round of the network's own solver; None where there is none.

        Raises:
            SettingError: its file cannot be read.
        """
        if not self._round.is_file():
            return None
        try:
            with safe_open(self._round, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
                state = json.loads(file.metadata()["state"])
            state["history"] = [tuple(entry) for entry in state["history"]]
            return Checkpoint(_paired(tensors), **{**state, "counts": tuple(state["counts"])})
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise SettingError(f"{self._round} cannot be read ({one_line(error)}): use `restart`") from None

    @property
    def _round(self) -> Path:
        return self.checkpoints(0) / "checkpoint-round.safetensors"

    def tidy(self, keep_checkpoints: bool) -> None:
        """Delete what a finished run needs no more."""
        if not keep_checkpoints:
            shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
            for path in self.out.glob("stage-*.safetensors"):
                path.unlink(missing_ok=True)

    def _begun(self) -> bool:
        return bool(self.stages) or any(self.out.glob("checkpoints/stage-*/checkpoint-*"))

    def _entries(self) -> list[Path]:
        return list(self.out.iterdir()) if self.out.is_dir() else []

    def _write(self) -> None:
        content = {"schema": 1, "asked": self._asked, "stages": plain(self.stages)}
        write_file(self.out / RUN, (json.dumps(content, indent=1) + "\n").encode())


@contextmanager
def left_as_found(out: str | os.PathLike[str]) -> Iterator[Workspace]:
    """The folder; after an error before anything was written, one that was made for the run goes again."""
    new = not Path(out).exists()
    work = Workspace(out)
    try:
        yield work
    except RanksureError:
        if new and not any(work.out.iterdir()):
            work.out.rmdir()
        raise


def _named(factors: Factors) -> dict[str, Tensor]:
    """Factors as a file holds them."""
    pairs = ((f"{name}.{side}", x) for name, pair in factors.items() for side, x in zip("uv", pair, strict=True))
    return {key: x.cpu().contiguous() for key, x in pairs}


def _paired(tensors: Mapping[str, Tensor]) -> Factors:
    names = [key.removesuffix(".u") for key in tensors if key.endswith(".u")]
    return {name: (tensors[f"{name}.u"], tensors[f"{name}.v"]) for name in names}


def _own(name: str) -> bool:
    return name in _OWN or (name.startswith("stage-") and name.endswith(".safetensors")) or is_left(name)
