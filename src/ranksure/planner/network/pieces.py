"""What a network's plan has finished so far: kept in a file, so that an interrupted one goes on from there."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ranksure.choices import Verdict
from ranksure.errors import SettingError
from ranksure.factors import Factors, ranks_of
from ranksure.files import write_file
from ranksure.records.plan import NetworkModule
from ranksure.relinearised import ModuleState
from ranksure.solvers.network_objective import NetworkPoint


@dataclass(frozen=True)
class Reached:
    """A point of the network that was reached, and what it took.

    Attributes:
        factors: balanced, float64.
        gap: what the model re-linearised there could still gain at any rank.
        tangent: the same within the factors' own directions.
        modules: spectral facts; empty where no gradient pass looked at the point.
        verdict: as certify's, a gain of less than the tolerance counting as none.
        start: what the descent started from.
    """

    factors: Factors
    objective: float
    loss: float
    gap: float = 0.0
    tangent: float = 0.0
    modules: dict[str, NetworkModule] = field(default_factory=dict)
    status: str = ""
    remedy: str = ""
    verdict: Verdict = "not-converged"
    start: str = ""
    gradients: int = 0
    forwards: int = 0
    captures: int = 0
    history: list[tuple[int, float, float]] = field(default_factory=list)

    @property
    def ranks(self) -> dict[str, int]:
        """By module."""
        return ranks_of(self.factors)

    @property
    def spectral_ratio(self) -> float | None:
        """``max_j ||g_j|| / lambda_j``."""
        return max((module.spectral_ratio for module in self.modules.values()), default=None)


def modules_of(states: dict[str, ModuleState], penalty: dict[str, float]) -> dict[str, NetworkModule]:
    """Spectral facts for the record."""
    return {
        name: NetworkModule(
            rank=state.rank,
            spectral_ratio=state.gradient_norm / penalty[name],
            stationarity=state.stationarity or 0.0,
            outside_norm=state.outside_norm,
        )
        for name, state in states.items()
    }


def reached_at(point: NetworkPoint, penalty: dict[str, float], **more: Any) -> Reached:
    """A point that a gradient pass looked at."""
    modules = modules_of(point.states, penalty)
    return Reached(point.factors, point.objective, point.loss, point.gap, point.tangent, modules, **more)


def check_unfinished(path: Path) -> None:
    """Refuse to write over a file that no plan left.

    Raises:
        SettingError: it is something else, or damaged.
    """
    if path.exists() and _metadata(path) is None:
        raise SettingError(
            f"{path} is where an unfinished plan is kept, and is none: move it away, or name another `out`"
        )


def _metadata(path: Path) -> dict[str, str] | None:
    """What an unfinished plan's file says; None for any other file."""
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return found if found.keys() >= {"request", "points"} else None


class Pieces:
    """Points by key, written to a file each time that one is added.

    Args:
        path: the file; nothing is kept without one.
        request: what the points depend on; those of another request are not taken up.
    """

    def __init__(self, path: Path | None, request: dict[str, Any]) -> None:
        self.path, self.request = path, json.dumps(request, sort_keys=True)
        self._points: dict[str, Reached] = {}
        if path is not None and path.is_file():
            self._points = self._read(path)

    def get(self, key: str) -> Reached | None:
        """The point of a key, if it was finished."""
        return self._points.get(key)

    def put(self, key: str, point: Reached) -> None:
        """Keep a finished point."""
        self._points[key] = point
        if self.path is not None:
            write_file(self.path, self._bytes())

    def _bytes(self) -> bytes:
        tensors: dict[str, Tensor] = {}
        told: dict[str, Any] = {}
        for key, point in self._points.items():
            plain = {each.name: getattr(point, each.name) for each in fields(point) if each.name != "factors"}
            told[key] = {**msgspec.to_builtins(plain), "names": list(point.factors)}
            for index, pair in enumerate(point.factors.values()):
                for side, part in zip("uv", pair, strict=True):
                    tensors[f"{len(told)}.{index}.{side}"] = part.detach().cpu().contiguous().clone()
        metadata = {"request": self.request, "points": json.dumps(told)}
        return save(tensors, metadata)

    def _read(self, path: Path) -> dict[str, Reached]:
        """The points of a file; none where it is damaged, or of another request."""
        metadata = _metadata(path)
        if metadata is None or metadata["request"] != self.request:
            return {}
        try:
            with safe_open(path, "pt") as file:
                told = json.loads(metadata["points"])
                out: dict[str, Reached] = {}
                for number, (key, content) in enumerate(told.items(), 1):
                    names = content.pop("names")
                    factors: Factors = {
                        name: (file.get_tensor(f"{number}.{i}.u"), file.get_tensor(f"{number}.{i}.v"))
                        for i, name in enumerate(names)
                    }
                    modules = msgspec.convert(content.pop("modules"), dict[str, NetworkModule])
                    history = [tuple(entry) for entry in content.pop("history")]
                    out[key] = Reached(factors, modules=modules, history=history, **content)
                return out
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return {}
