"""A model folder that is made once from a package's file and verified ever after."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranksure.bundled.packages import InstalledFile, installed_path
from ranksure.errors import ModelError, one_line
from ranksure.files import cache_folder, file_sha256, made_once

if TYPE_CHECKING:
    from torch import Tensor

_RECORD = "ranksure-checksums.json"


def converted_folder(name: str, source: InstalledFile, write: Callable[[Path, Path], None], megabytes: int) -> Path:
    """The cached folder of a converted model; written where it is missing, verified once per process.

    ``write`` is called with the source and the folder to create, which it fills and checks. Another source makes
    another folder; ``megabytes`` is for the message where there is no room.

    Raises:
        ModelError: no source, a file that is not the one that was written, or a folder that cannot be written.
    """
    folder = cache_folder() / f"{name}-{source.sha256[:8]}"

    def make(stage: Path) -> None:
        path = installed_path(source)  # first: without it nothing need be loaded
        from ranksure.network.checkpoints import quiet

        with quiet():
            write(path, stage)
        files = {entry.name: file_sha256(entry) for entry in sorted(stage.iterdir())}
        record = {"source": source.sha256, "files": files}
        (stage / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    made_once(folder, make, f"{name} cannot be written to {folder} ({megabytes} MB)", ModelError)
    _verify(folder, source.sha256)
    return folder


@functools.lru_cache(maxsize=8)  # hashing half a gigabyte takes half a second
def _verify(folder: Path, source_sha256: str) -> None:
    remake = f"run: rm -r '{folder}', it is made again at the next call"
    try:
        recorded = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        wrong = [name for name, sha256 in recorded["files"].items() if file_sha256(folder / name) != sha256]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{folder} is not whole ({one_line(error)}); {remake}") from None
    if wrong or recorded.get("source") != source_sha256 or "model.safetensors" not in recorded["files"]:
        raise ModelError(f"{folder / (wrong or [_RECORD])[0]} is not the file that was written; {remake}")


def check_written(stage: Path, kind: Any, weights: Mapping[str, Tensor], model: str) -> None:
    """What was written loads as an ordinary model (an ``AutoModel`` of this kind) with the very weights of the source.

    Raises:
        ModelError: names the first that differs.
    """
    written = kind.from_pretrained(stage, local_files_only=True).state_dict()
    different = [name for name in weights if name not in written or not written[name].equal(weights[name])]
    if different or set(written) != set(weights):
        raise ModelError(f"the written weights of {model} differ from the package's at {different[:1]}")
