"""PEFT's matrices: where they are, and the way to factors and files and back."""

from __future__ import annotations

import pytest
import torch

from ranksure.adapters import matrices
from ranksure.adapters.loaded import read_adapter
from ranksure.errors import AdapterError
from tests.adapters.test_loaded import TARGETS, kinds


@pytest.mark.parametrize("name", TARGETS)
def test_there_and_back(name):
    model = kinds()
    layer = matrices.adapted_layers(model)[name]
    a, b = matrices.matrices(layer, "default")
    u, v = matrices.to_factors(a, b, 1.5)
    assert torch.allclose(u @ v.T, 1.5 * (b.flatten(1) @ a.flatten(1)), rtol=1e-14)
    again = matrices.to_matrices(layer, u, v, 1.5)
    for own, found in zip((a, b), again, strict=True):
        assert found.shape == own.shape and torch.allclose(found, own, rtol=1e-15)


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_holds_what_peft_calls_it(name, tmp_path):
    """At scale one, the tensors of a file by PEFT's own names and shapes."""
    model = kinds(lora_alpha=2)
    block = read_adapter(model).blocks[name]
    stored = matrices.stored(block.module, name, *block.factors, 1.0, torch.float64)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 2 and all(torch.equal(saved[key], value) for key, value in stored.items())
    assert [matrices.is_a(key) for key in stored] == [True, False] and all(map(matrices.is_factor, stored))
    found = matrices.file_factors(saved, name)
    assert found is not None and all(torch.equal(x, y) for x, y in zip(found, block.factors, strict=True))
    assert matrices.file_factors(saved, "head") is None
    with pytest.raises(AdapterError, match=rf"factors of {name} overflow torch\.float16"):
        matrices.stored(block.module, name, 1e6 * block.factors[0], block.factors[1], 1.0, torch.float16)
