"""Tensors kept from pass to pass: in memory as long as they fit, beyond it in a mapped file.

The file has no name (:func:`tempfile.TemporaryFile`): the system takes it away with the last handle, however the
process ends, kill -9 included; nothing is left for a later run to clean.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from ranksure.errors import MemoryBudgetError

_ALIGNED = 64
_SPARE = 64 * 2**20  # bytes of the disk that are left to others


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file."""

    offset: int
    count: int
    shape: torch.Size
    dtype: torch.dtype


class Kept:
    """Lists of tensors, one a batch, written once and then read.

    Args:
        memory_bytes: most bytes in memory; all go to the file where more are expected.
        total: how many lists there will be.
    """

    def __init__(self, memory_bytes: float, total: int) -> None:
        self.memory_bytes, self.total = memory_bytes, total
        self.lists: list[list[Tensor]] = []
        self._places: list[list[_Place]] = []
        self.nbytes = 0
        self._file: IO[bytes] | None = None
        self._map: mmap.mmap | None = None

    @property
    def in_file(self) -> bool:
        """Whether they lie in a file."""
        return self._file is not None

    def add(self, tensors: list[Tensor]) -> None:
        """Keep one more list; its tensors must not change afterwards.

        Raises:
            MemoryBudgetError: neither the memory nor the disk has room for as many as are expected.
        """
        self.nbytes += sum(x.numel() * x.element_size() for x in tensors)
        self.lists.append(tensors)
        expected = self.nbytes * self.total / (len(self._places) + len(self.lists))
        if self._file is None and expected <= self.memory_bytes:
            return
        self._check_disk(expected)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="ranksure-")  # noqa: SIM115 (open until close)
            self._places += [[self._written(x) for x in each] for each in self.lists]
            self.lists = []
        except OSError as error:
            raise MemoryBudgetError(self._refusal(expected, error.strerror or str(error))) from None

    def _check_disk(self, expected: float) -> None:
        written = self._file.tell() if self._file is not None else 0
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if expected - written + _SPARE > free:
            raise MemoryBudgetError(self._refusal(expected, f"{free / 2**20:.0f} MiB are free"))

    def _refusal(self, expected: float, why: str) -> str:
        return (
            f"what the frozen layers give, {expected / 2**20:.3g} MiB, does not fit the memory of "
            f"{self.memory_bytes / 2**20:.3g} MiB, nor the disk of {tempfile.gettempdir()} ({why}): raise `memory`, or "
            "set TMPDIR to a folder with room"
        )

    def _written(self, x: Tensor) -> _Place:
        assert self._file is not None
        self._file.write(bytes(-self._file.tell() % _ALIGNED))
        place = _Place(self._file.tell(), x.numel(), x.shape, x.dtype)
        if x.numel():
            self._file.write(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return place

    def written(self) -> None:
        """All lists are there: from now on they are read, those of the file on the CPU.

        Raises:
            MemoryBudgetError: the disk is full.
        """
        if self._file is None:
            return
        try:
            self._file.flush()
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise MemoryBudgetError(self._refusal(self.nbytes, error.strerror or str(error))) from None
        self.lists = [[self._read(place) for place in each] for each in self._places]

    def _read(self, place: _Place) -> Tensor:
        if not place.count:
            return torch.empty(place.shape, dtype=place.dtype)
        assert self._map is not None
        flat = torch.frombuffer(self._map, dtype=place.dtype, count=place.count, offset=place.offset)
        return flat.view(place.shape)

    def close(self) -> None:
        """Give memory and file back."""
        self.lists = []
        if self._map is not None:
            with suppress(BufferError):  # someone still holds a tensor of it: it goes with that
                self._map.close()
            self._map = None
        if self._file is not None:
            self._file.close()
            self._file = None
