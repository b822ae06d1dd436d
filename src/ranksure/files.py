"""Files and folders that are there whole or not at all, the user's cache, and checksums."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ranksure.errors import AdapterError, RanksureError, one_line


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


def write_or_refuse(path: Path, content: bytes, kind: type[RanksureError], what: str = "") -> None:
    """:func:`write_file`.

    Raises:
        kind: ``what``, by default the file, cannot be written.
    """
    try:
        write_file(path, content)
    except OSError as error:
        raise kind(f"{what or path} cannot be written: {error.strerror or error}") from None


def try_to_write(place: Path) -> None:
    """Make a folder where ``place`` is to be, or in the nearest folder around it that there is, and drop it.

    Raises:
        OSError: nothing can be written there.
    """
    parent = next((folder for folder in [place, *place.parents] if folder.exists()), place)
    with tempfile.TemporaryDirectory(prefix=".ranksure-", dir=parent):
        pass


def cache_folder() -> Path:
    """Where unpacked models are kept: ``RANKSURE_CACHE``, or ``ranksure`` in the user's cache folder."""
    if own := os.environ.get("RANKSURE_CACHE"):
        return Path(own)
    import platformdirs  # only here, as everything imports this module

    return platformdirs.user_cache_path("ranksure", appauthor=False)


def made_once(folder: Path, make: Callable[[Path], None], refusal: str, kind: type[RanksureError]) -> Path:
    """A folder that is made where it is missing, and appears whole or not at all.

    Args:
        folder: its place; the folders around it are made.
        make: creates and fills the path that it is given, in a temporary folder beside the place.
        refusal: the beginning of the message where the disk does not take it.
        kind: of that error.

    Raises:
        kind: it cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            stage = Path(aside, "new")
            make(stage)
            stage.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster
            reason = error.strerror or one_line(error)
            raise kind(f"{refusal}: {reason}; set RANKSURE_CACHE to a folder with room") from None
    return folder


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, sha256: str, expected: str, cure: str, kind: type[RanksureError]) -> None:
    """Refuse a file that is not the one ``expected``, which completes "is not".

    Raises:
        kind: it cannot be read, or its checksum is another one; ends with the ``cure``.
    """
    try:
        found = file_sha256(path)
    except OSError as error:
        raise kind(f"{path} cannot be read ({error.strerror}); {cure}") from None
    if found != sha256:
        raise kind(f"{path} is not {expected} (sha256 {found[:8]}..., expected {sha256[:8]}...); {cure}")


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
