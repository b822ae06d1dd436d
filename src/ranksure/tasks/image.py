"""Image classification as a task: any ``AutoModelForImageClassification`` with its own image processor.

The processor runs on Pillow rather than torchvision, whichever is installed, so that the same image gives the same
numbers on every machine.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from ranksure.data.images import ImageRows, Pixels
from ranksure.errors import ModelError, SettingError, one_line
from ranksure.tasks.classifiers import Modality, load_processor
from ranksure.tasks.options import Loading
from ranksure.tasks.task import Task


@dataclass(kw_only=True)
class ImageTask(Task[ImageRows]):
    """An image classifier.

    Attributes:
        height: of the network's input, in pixels.
        width: likewise.
        image_size: pixels per side, where the user asked for a size; None for the processor's own.
        options: what ``model`` is called with beside ``pixel_values``.
    """

    kind: ClassVar[str] = "image"

    height: int
    width: int
    image_size: int | None
    options: dict[str, Any]

    @property
    def collator(self) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        return _Collator(self.options)

    def prepare(self, samples: ImageRows) -> list[dict[str, Any]]:
        """A row each with ``pixel_values``, ``(channels, height, width)``."""
        size = self.batch_size
        starts = range(0, len(samples), size)
        return [{"pixel_values": x} for low in starts for x in self._pixel_values(samples.images[low : low + size])]

    def _pixel_values(self, images: list[Pixels]) -> Tensor:
        mode = "L" if _channels(self.adapted) == 1 else "RGB"
        pictures = [Image.fromarray(image).convert(mode) for image in images]
        return _processed(self.processor, pictures, mode).to(self.adapted.dtype)

    def remarks(self, samples: ImageRows) -> list[str]:
        out = []
        grey = sum(image.ndim == 2 for image in samples.images)
        if grey and _channels(self.adapted) == 3:
            out.append(f"{grey} of the {len(samples)} training images are greyscale; the network gets them as RGB.")
        if len(grey_out := [image for image in samples.images if image.ndim == 3]) and _channels(self.adapted) == 1:
            out.append(f"{len(grey_out)} of the {len(samples)} training images are in colour; the network reads grey.")
        small = sum(image.shape[0] < self.height and image.shape[1] < self.width for image in samples.images)
        if small:
            out.append(
                f"{small} of the {len(samples)} training images are smaller than the network's "
                f"{self.width} x {self.height} pixels and are enlarged."
            )
        return out

    def tokens(self, batch: Mapping[str, Any]) -> int:
        return self.padded_tokens(batch)

    def padded_tokens(self, batch: Mapping[str, Any]) -> int:
        """Patches and class tokens: exact for a plain vision transformer, its finest stage for others."""
        rows, _, height, width = batch["pixel_values"].shape
        patch = getattr(self.adapted.config, "patch_size", 4)
        vertical, horizontal = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        extra = 2 + int(getattr(self.adapted.config, "num_register_tokens", 0) or 0)  # a class token, DeiT's second
        return rows * ((height // vertical) * (width // horizontal) + extra)

    def default_targets(self) -> str | list[str]:
        """As transformers names them before and after version 5."""
        return self.queries_and_values(("q_proj", "v_proj"), ("query", "value"))

    def usage(self) -> str:
        arguments = ['backend="pil"']
        if self.image_size is not None:  # the processor that lies beside the model has another size
            settings = self.processor.to_dict()
            sizes = {key: dict(settings[key]) for key in ("size", "crop_size") if settings.get(key)}
            arguments += [f"{key}={value}" for key, value in sizes.items()]
        text = (
            f"Images, as {'RGB' if _channels(self.adapted) == 3 else 'greyscale'}: "
            f"`AutoImageProcessor.from_pretrained({self.name!r}, {', '.join(arguments)})`, which gives "
            f"{self.width} x {self.height} pixels."
        )
        if self.options:
            text += f" Call the model with `{', '.join(f'{key}={value}' for key, value in self.options.items())}`."
        return text

    def record(self) -> dict[str, Any]:
        return {"kind": self.kind, "image_size": self.image_size}


@dataclass(frozen=True)
class _Collator:
    """Stacks rows, and adds what the model is called with."""

    options: Mapping[str, Any]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), **self.options}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


load_image_processor = load_processor(AutoImageProcessor, "image processor", "one", backend="pil")
"""The image processor beside a checkpoint, on Pillow."""
_MODALITY = Modality(
    AutoModelForImageClassification, "an image classifier", "image processor", "processor", load_image_processor
)


def load_image_task(
    model: str | os.PathLike[str] | PreTrainedModel,
    rows: ImageRows,
    *,
    processor: Any = None,
    image_size: int | None = None,
    **loading: Any,
) -> ImageTask:
    """Load a checkpoint (or take a loaded model) for labelled images.

    Args:
        model: folder, Hub id, or an image-classification model in memory.
        rows: the data; its classes give the number of logits.
        processor: needed with a model in memory, else loaded beside the model.
        image_size: pixels per side of the network's input; by default the processor's own. A smaller one is
            faster; vision transformers interpolate their position embeddings to it.
        **loading: see :class:`~ranksure.tasks.options.Loading`.

    Raises:
        ModelError: the model or its processor cannot be found, loaded or used for these labels.
        SettingError: an option has no meaning here.
    """
    options = Loading(**loading)
    if rows.label_names is None:
        raise SettingError("images are classified: they need class labels")
    found = _MODALITY.open(model, processor, len(rows.label_names), options)
    network, name = found.model, found.name
    if _channels(network) not in (1, 3):
        raise ModelError(
            f"{name} reads images of {_channels(network)} channels; greyscale (1) and RGB (3) are supported"
        )
    if image_size is not None:
        found.processor = _resized(found.processor, network, image_size, name)
    height, width = _input_size(found.processor, network, name)
    return ImageTask(
        **found.task_fields(rows, len(rows.label_names), options),
        height=height,
        width=width,
        image_size=image_size,
        options=_call_options(network, height, width, name),
    )


# ---------------------------------------------------------------------------------------------------------------------
# sizes


def _channels(model: nn.Module) -> int:
    return int(getattr(model.config, "num_channels", 3))


def _processed(processor: Any, pictures: list[Image.Image], mode: str) -> Tensor:
    if mode == "L":  # some processors cannot tell where the channels of one are
        import numpy as np

        images: list[Any] = [np.asarray(picture)[:, :, None] for picture in pictures]
        return processor(images=images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    return processor(images=pictures, return_tensors="pt")["pixel_values"]


def _resized(processor: Any, model: PreTrainedModel, size: int, name: str) -> Any:
    """A copy of the processor that gives ``size x size`` pixels; refused where model or processor have no such size."""
    patch = getattr(model.config, "patch_size", 1)
    patch = max(patch) if isinstance(patch, (list, tuple)) else int(patch)
    if size < 2 * patch or size % patch:
        low = max(2, size // patch) * patch
        raise SettingError(
            f"image size {size} does not divide into at least 2 x 2 patches of {patch} x {patch} pixels, as {name} "
            f"needs: use {low} or {low + patch}"
        )
    before = processor.to_dict()
    resized, crop = dict(before.get("size") or {}), dict(before.get("crop_size") or {})
    square = {"height": size, "width": size}
    if before.get("do_center_crop") and crop:
        if "shortest_edge" in resized:  # the share that is cropped stays as it is
            resized = {"shortest_edge": round(size * resized["shortest_edge"] / min(crop.values()))}
        else:
            resized = square
        crop = square
    elif "height" in resized:
        resized = square
    else:
        resized = {"shortest_edge": size}
    after = type(processor).from_dict({**before, "size": resized, **({"crop_size": crop} if crop else {})})
    if (found := _input_size(after, model, name)) != (size, size):
        raise SettingError(
            f"the image processor of {name} ({type(processor).__name__}) keeps to {found[1]} x {found[0]} pixels: "
            "leave the image size out"
        )
    return after


def _input_size(processor: Any, model: PreTrainedModel, name: str) -> tuple[int, int]:
    """Height and width that the processor gives; refused where those of images of different forms differ."""
    mode = "L" if _channels(model) == 1 else "RGB"
    found = set()
    for form in ((64, 64), (64, 96), (96, 64)):
        try:
            pixels = _processed(processor, [Image.new(mode, form)], mode)
        except Exception as error:  # processors check little
            raise ModelError(
                f"the image processor of {name} ({type(processor).__name__}) fails: {one_line(error)}"
            ) from None
        if not isinstance(pixels, Tensor) or pixels.dim() != 4:
            raise ModelError(f"the image processor of {name} ({type(processor).__name__}) gives no batch of images")
        found.add((int(pixels.shape[2]), int(pixels.shape[3])))
    if len(found) > 1:
        raise ModelError(
            f"the image processor of {name} gives images of different forms different sizes ({sorted(found)}), so they "
            "do not fit into one batch: give it a fixed size or do_center_crop"
        )
    return found.pop()


def _call_options(model: PreTrainedModel, height: int, width: int, name: str) -> dict[str, Any]:
    """What the model must be called with at this size; refused where it does not take it."""
    options: dict[str, Any] = {}
    own = getattr(model.config, "image_size", None)
    own = tuple(own) if isinstance(own, (list, tuple)) else (own, own)
    if own != (height, width) and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        options["interpolate_pos_encoding"] = True
    pixels = torch.zeros(1, _channels(model), height, width, device=model.device, dtype=model.dtype)
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(pixel_values=pixels, **options)
    except Exception as error:
        raise ModelError(f"{name} does not take images of {width} x {height} pixels: {one_line(error)}") from None
    finally:
        model.train(training)
    return options
