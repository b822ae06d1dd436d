"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747; MIT licence), from Debian's package of it.

60,000 training and 10,000 test images of 28 x 28 greyscale pixels in 10 balanced classes. The package is fetched once
(31 MB, see :mod:`ranksure.bundled.packages`), and every file is verified by checksum.
"""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranksure.bundled.packages import package_path
from ranksure.data.images import ImageRows
from ranksure.errors import DataError, SettingError
from ranksure.progress import Reporter

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
"""Names of the classes 0 to 9, as the authors give them."""

PACKAGE = "dataset-fashion-mnist"
FOLDER = Path("usr/share/datasets/fashion-mnist")
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
SHA256 = {
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
}


def fashion_mnist(split: str = "train", reporter: Reporter | None = None) -> ImageRows:
    """One split of Fashion-MNIST, in the authors' order.

    Args:
        split: ``train`` (60,000 images) or ``test`` (10,000 others).
        reporter: shown the download, where there is one; silent by default.

    Raises:
        DataError: the package can be neither found nor downloaded, or a file is not the one expected.
        SettingError: there is no such split.
    """
    if split not in FILES:
        raise SettingError(f"Fashion-MNIST has no split {split!r}: use {' or '.join(FILES)}")
    folder = package_path(PACKAGE, reporter) / FOLDER
    images, labels = (_read(folder / name) for name in FILES[split])
    return ImageRows(
        images=list(images),
        labels=labels.tolist(),
        label_names=list(CLASSES),
        source=f"Fashion-MNIST [{split}]",
        sha256=SHA256[FILES[split][0]],
        notes=[],
    )


def _read(path: Path) -> NDArray[Any]:
    """An array of a compressed IDX file: two zero bytes, 8 for uint8, the number of axes, then their sizes."""
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {_cure(path)}") from None
    expected = SHA256[path.name]
    if (found := hashlib.sha256(packed).hexdigest()) != expected:
        raise DataError(
            f"{path} is not Fashion-MNIST's (sha256 {found[:8]}..., expected {expected[:8]}...); {_cure(path)}"
        )
    raw = gzip.decompress(packed)
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def _cure(path: Path) -> str:
    folder = path.parents[len(FOLDER.parts)]
    if folder == Path("/"):
        return f"run: apt-get install --reinstall {PACKAGE}"
    return f"run: rm -r '{folder}', it is fetched again at the next call"
