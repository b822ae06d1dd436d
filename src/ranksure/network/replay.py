"""Modules that hand out what they gave in an earlier pass, found by the content of the network's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.errors import CaptureError
from ranksure.network.below import mapped, multiplies
from ranksure.network.kept import Kept
from ranksure.network.keys import Keys

IN_PLACE = "the network changes hidden states in place: its frozen layers cannot be left out"


class CannotSkipError(Exception):
    """Why everything runs."""


@dataclass(frozen=True)
class Made:
    """A tensor that a module gives: the number of the one that is kept, or none where it is not needed."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    number: int | None


class Replay:
    """What modules give, by batch, and which of it is handed out now."""

    def __init__(self, model: nn.Module, below: Mapping[str, nn.Module], targets: Mapping[str, nn.Module]) -> None:
        self.model, self.below, self.targets = model, below, targets
        self.paused = False
        self.cheap = {name for name, module in below.items() if not multiplies(module)}
        self.idle: set[tuple[str, int]] = set()  # module and which of its tensors
        self.kept = Kept(float("inf"), 0)
        self.given: tuple[dict[str, Any], list[Tensor], list[int]] | None = None
        self.seen: dict[str, Any] | None = None
        self.begun, self.calls = False, 0
        self.entries: dict[bytes, int] = {}
        self.made: list[dict[str, Any]] = []
        self.versions: list[list[int]] = []
        self.keys = Keys()
        self._nan: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._last: float = float("inf")
        self._weights = [
            (".".join(filter(None, (name, inner, own))), module, own, p, p._version, p.data_ptr())
            for name, top in below.items()
            for inner, module in top.named_modules()
            for own, p in module.named_parameters(recurse=False)
        ]

    def choose(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the network runs: what is handed out for these inputs."""
        self.given = None
        key = self.keys.of(kwargs) if not (self.paused or args) else None
        index = self.entries.get(key) if key is not None else None
        if index is None:
            return
        if index <= self._last:  # a new pass
            self._check_weights()
        self._last = index
        self.given = self.made[index], self.kept.lists[index], self.versions[index]

    def forget(self, *_: Any) -> None:
        """After the network ran: its parts run as always."""
        self.given = None

    def _check_weights(self) -> None:
        for name, module, own, p, version, place in self._weights:
            if getattr(module, own, None) is not p or p._version != version or p.data_ptr() != place:
                raise CaptureError(f"{name} changed, but lies below the adapted modules, where all ran only once")

    @contextmanager
    def standing_in(self, name: str) -> Iterator[None]:
        """The module hands out what is given, or runs and is recorded."""
        module: Any = self.below[name]
        own, before = module.forward, vars(module).get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.given is not None and name in self.given[0]:
                return mapped(self.given[0][name], self._tensor, Made)
            output = own(*args, **kwargs)
            if self.seen is not None and self.given is None:
                if name in self.seen or self.begun:
                    raise CannotSkipError(f"{name} does not run exactly once before the adapted modules")
                self.seen[name] = mapped(output, lambda x: x.detach().clone())
            return output

        module.forward = forward
        try:
            yield
        finally:
            if before is None:
                del module.forward
            else:
                module.forward = before

    def _tensor(self, made: Made) -> Tensor:
        assert self.given is not None
        _, tensors, versions = self.given
        if made.number is None:
            return self._nothing(made)
        found = tensors[made.number]
        if found._version != versions[made.number]:
            raise CaptureError(IN_PLACE)
        return found.to(made.device)

    def _nothing(self, made: Made) -> Tensor:
        """NaN, of a tensor's shape: always the same memory."""
        count, kind = made.shape.numel(), (made.dtype, made.device)
        if kind not in self._nan or self._nan[kind].numel() < count:
            self._nan[kind] = torch.full((count,), float("nan"), dtype=made.dtype, device=made.device)
        return self._nan[kind][:count].view(made.shape)

    def close(self) -> None:
        """Give everything back."""
        self.given, self._nan = None, {}
        self.kept.close()
