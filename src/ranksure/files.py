"""A file that is there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ranksure.errors import AdapterError


def write_file(path: Path, content: bytes) -> None:
    """Write a file under another name beside its place, then rename it; folders around it are made.

    An earlier file stays as it was where this fails, Ctrl-C included.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def cache_folder() -> Path:
    """Where unpacked models are kept: ``RANKSURE_CACHE``, or ``ranksure`` in the user's cache folder."""
    if own := os.environ.get("RANKSURE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ranksure"


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def staged_folder(out_dir: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """Write into a temporary sibling folder that takes ``out_dir``'s place only if the block succeeds.

    An existing folder is moved aside, replaced and then deleted; if anything fails, Ctrl-C
    included, it is put back and everything written is removed. (Between the two renames a reader
    finds no folder; it never finds a half-written one.)

    Args:
        out_dir: the folder to create or replace.
        marker: a file that an existing, non-empty folder must hold to be replaced
            (``adapter_config.json``), so that a mistyped path does not delete someone's files.

    Yields:
        The temporary folder to write into.

    Raises:
        AdapterError: ``out_dir`` is a file or holds something else, or cannot be written.
    """
    out = Path(out_dir).resolve()
    if out.exists() and not out.is_dir():
        raise AdapterError(f"{out} is a file: name a folder to write to")
    if out.is_dir() and any(out.iterdir()) and not (out / marker).is_file():
        raise AdapterError(f"{out} is not empty and holds no {marker}: name a new folder, or empty this one")
    tag = uuid.uuid4().hex[:8]
    stage, aside = out.parent / f".{out.name}.{tag}.tmp", out.parent / f".{out.name}.{tag}.old"
    new_parents = [parent for parent in out.parents if not parent.exists()]
    try:
        stage.mkdir(parents=True)
        yield stage
        if out.exists():
            os.rename(out, aside)
        os.rename(stage, out)
    except BaseException as error:
        if aside.exists() and not out.exists():
            os.rename(aside, out)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(stage, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise AdapterError(f"cannot write {out}: {error.strerror or error}") from error
        raise
    shutil.rmtree(aside, ignore_errors=True)
