"""Labelled images: read, decoded, checked, coded."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ranksure.data import media
from ranksure.data.samples import Samples
from ranksure.errors import DataError, one_line, shown
from ranksure.progress import Reporter

if TYPE_CHECKING:
    import datasets
    import pandas as pd

Pixels = NDArray[np.uint8]

MAX_BYTES = 4 * 2**30
"""Decoded images are held in memory; more than this is refused."""

_ALPHA = {"RGBA", "LA", "PA", "RGBa", "La"}
_COLOUR = {"RGB", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBA", "RGBa", "PA"}


@dataclass(frozen=True, kw_only=True)
class ImageRows(Samples):
    """Labelled images.

    Attributes:
        images: one uint8 array per row, ``(height, width)`` where all are greyscale, else ``(height, width, 3)``;
            sizes may differ.
    """

    columns: ClassVar[tuple[str, ...]] = ("images",)
    noun: ClassVar[str] = "image"

    images: list[Pixels]

    def identities(self) -> list[Hashable]:
        """A hash of each image's shape and pixels."""
        return [_digest(image) for image in self.images]


def load_image_rows(
    source: str | Path | pd.DataFrame | datasets.Dataset | datasets.DatasetDict,
    *,
    image_column: str = "image",
    label_column: str = "label",
    split: str | None = None,
    reporter: Reporter | None = None,
) -> ImageRows:
    """Read labelled images.

    Args:
        source: as :func:`ranksure.data.media.find_inputs` takes it, which raises what it cannot use.
        image_column: the column of images: paths, encoded bytes, PIL images, or uint8 arrays.
        label_column: the column of labels.
        split: which split, where there are several.
        reporter: shown the decoding; silent by default.

    Returns:
        The images in the source's order (folders and files by name), turned as their EXIF data says. If some are
        greyscale and some are not, all become RGB; other modes, transparency and 16 bits become 8-bit RGB or
        greyscale. ``notes`` tell either.

    Raises:
        DataError: an image cannot be used.
        MemoryBudgetError: the decoded images would take more than 4 GiB.
    """
    return _rows(media.find_inputs(source, _MEDIUM, image_column, label_column, split), reporter)


def image_rows(
    images: Sequence[Image.Image | NDArray[Any]],
    labels: Sequence[Any],
    *,
    label_names: Sequence[str] | None = None,
    source: str = "images in memory",
) -> ImageRows:
    """Images in memory as rows.

    Args:
        images: PIL images, or uint8 arrays ``(height, width)``, ``(height, width, 1)`` or ``(height, width, 3)``.
        labels: class ids where ``label_names`` are given, else labels as in a file.
        label_names: by class id.
        source: what messages call them.

    Raises:
        DataError: an image or label cannot be used, or the numbers of images and labels differ.
    """
    return _rows(media.inputs_in_memory(list(images), labels, label_names, source, _MEDIUM.noun), None)


# ---------------------------------------------------------------------------------------------------------------------
# decoding


def _is_image_name(path: Path) -> bool:
    # Pillow also writes formats that it does not read, such as PDF.
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


_MEDIUM = media.Medium("image", "image", "smaller", _is_image_name)


def _rows(found: media.Found, reporter: Reporter | None) -> ImageRows:
    images, notes = media.decode_inputs(found, _decoded, _MEDIUM, MAX_BYTES, reporter)
    grey = sum(image.ndim == 2 for image in images)
    if 0 < grey < len(images):
        images = [np.repeat(image[:, :, None], 3, 2) if image.ndim == 2 else image for image in images]
        notes.append(
            f"{found.source}: {grey} of {len(images)} images are greyscale and the others in colour; all are read as "
            "RGB."
        )
    sha256 = media.labelled_sha256([_digest(image) for image in images], found)
    return ImageRows(
        images=images, labels=found.labels, label_names=found.names, source=found.source, sha256=sha256, notes=notes
    )


def _digest(image: Pixels) -> bytes:
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()


def _decoded(value: Any, place: str, base: Path, seen: media.Seen) -> Pixels:
    """A path, encoded bytes, a PIL image or an array as 8-bit greyscale or RGB."""
    value = media.given(value, place, base, _MEDIUM.noun)
    if isinstance(value, np.ndarray):
        return _checked(value, place)
    if isinstance(value, list):  # how a data frame or a data set gives back an array
        array = np.asarray(value)
        whole = array.dtype.kind == "i" and array.size and array.min() >= 0 and array.max() <= 255
        return _checked(array.astype(np.uint8) if whole else array, place)
    if isinstance(value, Image.Image):
        return _pixels(value, place, seen)
    if not isinstance(value, (bytes, Path)):
        raise DataError(f"{place}: {shown(value)} is no image but of type {type(value).__name__}")
    file = io.BytesIO(value) if isinstance(value, bytes) else value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, which does not matter
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                image.load()
                return _pixels(image, place, seen)
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{place}: the image is too large ({one_line(error)}); make it smaller") from None
    except Exception as error:  # a damaged file fails in as many ways as there are formats
        reason = (
            "no image format that Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)
        )
        raise media.undecodable(place, _MEDIUM.noun, reason) from None


def _pixels(image: Image.Image, place: str, seen: media.Seen) -> Pixels:
    if getattr(image, "n_frames", 1) > 1:
        seen.converted["have several frames, of which the first is read"] += 1
    mode = image.mode
    if mode in ("I", "F"):
        raise DataError(f"{place}: pixels of 32 bits (mode {mode}) have no agreed white; save the image with 8 bits")
    if mode.startswith("I;16"):
        seen.converted["have 16 bits per pixel, of which the upper 8 are read"] += 1
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif mode in _ALPHA or "transparency" in image.info:
        seen.converted["are transparent in places, which is ignored"] += 1
    elif mode not in ("1", "L", "RGB", "P"):
        seen.converted[f"are {mode} and are read as RGB"] += 1
    image = ImageOps.exif_transpose(image).convert("RGB" if mode in _COLOUR else "L")
    return np.asarray(image, dtype=np.uint8).copy()


def _checked(array: NDArray[Any], place: str) -> Pixels:
    if array.dtype != np.uint8:
        raise DataError(f"{place}: pixels of type {array.dtype}; give uint8, from 0 to 255")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or 0 in array.shape:
        raise DataError(
            f"{place}: an array of shape {array.shape}; give (height, width) or (height, width, 3), channels last"
        )
    return np.ascontiguousarray(array)
