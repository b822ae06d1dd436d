"""Files and folders that are there whole or not at all, the user's cache, and checksums."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ranksure.errors import AdapterError, RanksureError, SettingError, exhausted, one_line


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


_LEFT = re.compile(r"\..+\.(?:[0-9a-f]{8}\.(?:tmp|old|new)|lock)|\.lock")
"""Names of what a kill leaves: unfinished, moved aside, or finished and not yet in its place; and of locks."""


def is_left(name: str) -> bool:
    """Whether a file or folder of this name is what a killed run left, or a run's lock."""
    return _LEFT.fullmatch(name) is not None


@contextmanager
def writing(folder: str | os.PathLike[str], kind: type[RanksureError] = SettingError) -> Iterator[None]:
    """While the block runs, no other process writes this folder; what an earlier kill left of it is put right first.

    The lock is ``flock``'s, on a file beside the folder (inside it, where nothing can be made beside it): it ends with
    its process, however that ends. It holds between processes of one machine, and between machines on a network file
    system that passes such locks on (NFS on Linux does). Blocks of one thread may be nested.

    Args:
        folder: an output folder, which need not exist; folders around it are made, and taken away again if they
            stay empty.
        kind: of the errors.

    Raises:
        kind: another process is writing it, or it cannot be written.
    """
    from filelock import FileLock, Timeout  # only here, as everything imports this module

    out = Path(folder).resolve()
    new_parents = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = os.access(out.parent, os.W_OK)
        lock = FileLock(out.parent / f".{out.name}.lock" if beside else out / ".lock", timeout=0, is_singleton=True)
        outermost = not lock.is_locked
        lock.acquire()
    except Timeout as error:
        raise kind(
            f"another run is writing {out} (it holds {error.lock_file}): wait until it ends, or name another folder"
        ) from None
    except OSError as error:
        raise kind(f"`out` {out} cannot be written: {error.strerror or error}") from None
    try:
        if outermost:
            _put_right(out)
        yield
    finally:
        if outermost:  # while it is held, so that no other process holds a lock on a file without a name
            with suppress(OSError):
                os.unlink(lock.lock_file)
        lock.release()
        for parent in new_parents:
            with suppress(OSError):
                parent.rmdir()


def put_back(folder: str | os.PathLike[str]) -> None:
    """Put right what a killed run left of a folder that is about to be read, unless a run is writing it."""
    out = Path(folder).resolve()
    if out.parent.is_dir() and (not out.exists() or any(path.suffix == ".new" for path in _left_in(out))):
        with suppress(RanksureError), writing(out):
            pass


def _left_in(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if is_left(path.name)]
    except OSError:
        return []


def _put_right(out: Path) -> None:
    """The last finished result in its place, and nothing beside it that a kill left."""
    aside = [path for path in _left_in(out.parent) if path.name[: -len(".01234567.tmp")] == f".{out.name}"]
    older = sorted((path for path in aside if path.suffix == ".old"), key=lambda path: path.stat().st_mtime)
    if older and not out.exists():
        os.rename(older.pop(), out)
    for path in [*aside, *_left_in(out)]:
        if path.suffix == ".new":
            _move_up(path)
        elif not path.name.endswith(".lock"):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)


def write_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files that belong together: where the last one is, the others are those that were written with it.

    One rename makes them the result; a kill before it leaves the older one as it was, and after it the next
    :func:`writing` of the folder (or :func:`put_back`) moves the rest to their places.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stage = folder / f".{list(files)[-1]}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        stage.mkdir()
        for name, content in files.items():
            write_file(stage / name, content)
        done = stage.with_suffix(".new")
        os.rename(stage, done)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    _move_up(done)


def _move_up(done: Path) -> None:
    """Move finished files from their folder to the one around it, the one that it is named for last."""
    last = done.name[1 : -len(".01234567.new")]
    if (done / last).exists():
        (done.parent / last).unlink(missing_ok=True)  # else it would stand beside others than its own
        for path in sorted(done.iterdir(), key=lambda path: path.name == last):
            os.replace(path, done.parent / path.name)
    shutil.rmtree(done, ignore_errors=True)


@contextmanager
def staged_folder(out_dir: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """Write into a temporary sibling folder that takes ``out_dir``'s place only if the block succeeds.

    An existing folder is moved aside, replaced and then deleted; if anything fails, Ctrl-C
    included, it is put back and everything written is removed. (Between the two renames a reader
    finds no folder; it never finds a half-written one. After a kill there, the next run puts the older one back.)

    Args:
        out_dir: the folder to create or replace.
        marker: a file that an existing, non-empty folder must hold to be replaced
            (``adapter_config.json``), so that a mistyped path does not delete someone's files.

    Yields:
        The temporary folder to write into.

    Raises:
        AdapterError: ``out_dir`` is a file or holds something else, cannot be written, or another process writes it.
    """
    out = Path(out_dir).resolve()
    if out.exists() and not out.is_dir():
        raise AdapterError(f"{out} is a file: name a folder to write to")
    with writing(out, AdapterError):
        if out.is_dir() and any(out.iterdir()) and not (out / marker).is_file():
            raise AdapterError(f"{out} is not empty and holds no {marker}: name a new folder, or empty this one")
        tag = uuid.uuid4().hex[:8]
        stage, aside = out.parent / f".{out.name}.{tag}.tmp", out.parent / f".{out.name}.{tag}.old"
        try:
            stage.mkdir()
            yield stage
            if out.exists():
                os.rename(out, aside)
            os.rename(stage, out)
        except BaseException as error:
            if aside.exists() and not out.exists():
                os.rename(aside, out)
            shutil.rmtree(stage, ignore_errors=True)
            if isinstance(error, OSError) or exhausted(error) == "disk":
                raise AdapterError(
                    f"cannot write {out}: {getattr(error, 'strerror', None) or one_line(error)}"
                ) from error
            raise
        finally:
            if out.exists():
                shutil.rmtree(aside, ignore_errors=True)
