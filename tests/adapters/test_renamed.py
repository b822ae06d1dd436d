"""Adapters whose modules have another name here: the two versions, the old name and the new one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ranksure.adapters.export import export_adapter
from ranksure.adapters.saved import CONFIG, HEADER, SAFE, read_files
from ranksure.errors import AdapterError
from ranksure.network.renamed import renamed
from ranksure.runs.saved.base import with_adapter
from tests.families.networks import build, families
from tests.refusals import refusal

# A query projection before the version, and the part of its name by which an adapter's configuration named it.
MOVED = {
    "vit": ("image", "vit.encoder.layer.0.attention.attention.query", "5.9"),
    "beit": ("image", "beit.encoder.layer.0.attention.attention.query", "5.9"),
    "swin": ("image", "swin.encoder.layers.0.blocks.0.attention.self.query", "5.9"),
    "segformer": ("image", "segformer.encoder.block.0.0.attention.self.query", "5.9"),
    "audio-spectrogram-transformer": (
        "speech",
        "audio_spectrogram_transformer.encoder.layer.0.attention.attention.query",
        "5.9",
    ),
    "dinov2": ("image", "dinov2.encoder.layer.0.attention.attention.query", "5.18"),
}


def network(model_type: str) -> nn.Module:
    return build(next(family for family in families(MOVED[model_type][0]) if family.model_type == model_type))


def saved(folder: Path, model: nn.Module, target: str, name: str | None = None, header: Any = None) -> Path:
    """A saved adapter on one module, under the ``name`` that the module had."""
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    adapted.save_pretrained(folder)
    adapted.unload()
    if name is not None:
        config = json.loads((folder / CONFIG).read_text())
        config["target_modules"] = [name.rpartition(".")[2]]
        (folder / CONFIG).write_text(json.dumps(config))
    tensors = {key.replace(target, name or target): value for key, value in load_file(folder / SAFE).items()}
    save_file(tensors, folder / SAFE, metadata=header or {"format": "pt"})
    return folder


@pytest.mark.parametrize("model_type", MOVED)
def test_the_name_before_and_the_name_now(tmp_path: Path, model_type: str) -> None:
    _, old, since = MOVED[model_type]
    model = network(model_type)
    present = dict(model.named_modules())
    if old in present:  # an older transformers: the name fits
        run = with_adapter(model, read_files(saved(tmp_path / "a", model, old)), "base", False)  # pyright: ignore
        assert renamed(model, old) == old and run is not None
        return
    new = renamed(model, old)
    assert isinstance(present[new], nn.Linear)
    files = read_files(saved(tmp_path / "a", model, new, old))
    here = transformers.__version__
    parts = [old, f"transformers before {since}", f"transformers {here} calls it {new}"]
    refusal(AdapterError, parts, with_adapter, model, files, "base", False)
    # with the version in the file, whatever it is
    header = {**HEADER, "transformers": "4.57.1"}
    files = read_files(saved(tmp_path / "b", model, new, old, header))
    parts = [old, "a name of transformers 4.57.1", f"transformers {here} calls it {new}"]
    refusal(AdapterError, parts, with_adapter, model, files, "base", False)
    # the names of here fit
    with_adapter(model, read_files(saved(tmp_path / "c", model, new)), "base", False)  # pyright: ignore


def test_names_of_a_version_to_come_and_names_of_no_version(tmp_path: Path) -> None:
    model = network("vit")
    target = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    header = {**HEADER, "transformers": "9.1.0"}
    files = read_files(saved(tmp_path / "a", model, target, "vit.blocks.0.attention.qkv", header))
    parts = ["vit.blocks.0.attention.qkv, a name of transformers 9.1.0", "load it with that version"]
    refusal(AdapterError, parts, with_adapter, model, files, "base", False)
    files = read_files(saved(tmp_path / "b", model, target, "vit.blocks.0.attention.qkv", HEADER))
    assert "transformers" not in refusal(AdapterError, ["does not fit"], with_adapter, model, files, "base", False)


def test_what_is_written_says_whose_names_it_has(tmp_path: Path) -> None:
    model: Any = network("vit").float()
    target = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    m, n = model.get_submodule(target).weight.shape
    export_adapter(model, {target: (torch.randn(m, 1), torch.randn(n, 1))}, tmp_path / "a", head="classifier")
    with safe_open(tmp_path / "a" / SAFE, "pt") as file:
        assert file.metadata()["transformers"] == transformers.__version__
    assert read_files(tmp_path / "a").transformers == transformers.__version__
    readme = (tmp_path / "a" / "README.md").read_text()
    assert f"Names of modules: those of transformers {transformers.__version__}." in readme


def test_the_source_knows_neither_name() -> None:
    """The names come from transformers, or from the model at hand."""
    names = re.compile(r"attention[./](attention|self)[./]|[\"'.]attention\.[qkv]_proj")
    sources = Path(__file__).parents[2].glob("src/ranksure/**/*.py")
    found = [path for path in sources if names.search(path.read_text(encoding="utf-8"))]
    assert not found
