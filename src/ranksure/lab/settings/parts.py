"""Finished parts of an experiment on disk: written whole, found again by their settings, never by their age."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ranksure.errors import SettingError
from ranksure.factors import Factors
from ranksure.files import write_or_refuse
from ranksure.records.record import encoded, plain

Made = tuple[dict[str, Any], dict[str, Tensor]]
"""What a part gives: plain JSON, and tensors beside it (often none)."""

SCHEMA = 2  # of the parts: raise it when what they mean changes


@dataclass
class Parts:
    """A folder of finished parts."""

    folder: Path  # where they lie, each as `KIND-HASH.json`, with `KIND-HASH.safetensors` if it has tensors
    # kinds and keys of the parts that this process computed
    made: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    found: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # those that were there

    def get(self, kind: str, key: dict[str, Any], make: Callable[[], Made]) -> Made:
        """The part of this kind and key, made if it is not there.

        The key is all that it depends on, as plain JSON; versions are added.

        Raises:
            SettingError: the folder cannot be written.
        """
        full = {"schema": SCHEMA, "kind": kind, **key, "versions": versions()}
        text = json.dumps(full, sort_keys=True)
        path = self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        there = _read(path, text)
        if there is not None:
            self.found.append((kind, key))
            return there
        result, tensors = make()
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        where = f"`out` {self.folder}"
        if tensors:
            write_or_refuse(path.with_suffix(".safetensors"), save(tensors), SettingError, where)
        record = {"key": full, "tensors": sorted(tensors), "result": plain(result)}
        # Last: where the JSON is, the part is whole.
        write_or_refuse(path, encoded(record), SettingError, where)
        self.made.append((kind, key))
        return record["result"], tensors


def versions() -> dict[str, str]:
    """What a number can depend on beside its settings."""
    return {name: version(name) for name in ("ranksure", "torch", "transformers")}


def flat(factors: Factors) -> dict[str, Tensor]:
    """Factors as named tensors."""
    return {f"{side}:{name}": t for name, pair in factors.items() for side, t in zip("uv", pair, strict=True)}


def unflat(tensors: dict[str, Tensor]) -> Factors:
    """The inverse of :func:`flat`; other tensors are left out."""
    names = [key[2:] for key in tensors if key.startswith("u:")]
    return {name: (tensors[f"u:{name}"], tensors[f"v:{name}"]) for name in names}


def _read(path: Path, key: str) -> Made | None:
    """A finished part; None for one that is missing, damaged or of another key."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if json.dumps(record["key"], sort_keys=True) != key:
            return None
        tensors = load_file(path.with_suffix(".safetensors")) if record["tensors"] else {}
        return (record["result"], tensors) if sorted(tensors) == record["tensors"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        return None
