"""Running adapted layers merged: the same network, and every base weight back to its own bits."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ranksure.adapters import merging
from ranksure.adapters.merging import merged
from tests.runs.networks import gradients


class Network(nn.Module):
    """A linear layer, a transposed one, and one whose weight the output layer reads too."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.middle, self.tied = nn.Linear(6, 8), Conv1D(8, 8), nn.Linear(8, 5)
        self.again = nn.Linear(8, 5)
        self.again.weight = self.tied.weight
        self.to(dtype)

    def forward(self, x):
        h = torch.tanh(self.middle(torch.tanh(self.first(x))))
        return self.tied(h) + self.again(h.square())


def adapted(dtype=torch.float32):
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["first", "middle", "tied"], init_lora_weights=False)
    return get_peft_model(Network(dtype), config).eval()


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def wrapped(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def test_the_same_network_and_the_same_bits_afterwards():
    model, x = adapted(), torch.randn(4, 6)
    before, expected = weights(model), model(x)
    with merged(model, wrapped(model)) as count:
        assert count == 2  # what the output layer shares stays apart
        inside = model(x)
        name = "base_model.model.first.base_layer.weight"
        assert not torch.equal(weights(model)[name], before[name])
    assert torch.allclose(inside, expected, rtol=1e-5, atol=1e-6)
    after = weights(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(model(x), expected)
    assert not any(layer.merged for layer in wrapped(model))


def test_restored_after_an_error():
    model = adapted()
    before = weights(model)
    with pytest.raises(KeyboardInterrupt), merged(model, wrapped(model)):
        model(torch.randn(4, 6))
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("case", ["bfloat16", "budget", "limit", "disabled", "merged already"])
def test_left_as_they_are(case, monkeypatch):
    model = adapted(torch.bfloat16 if case == "bfloat16" else torch.float32)
    if case == "limit":
        monkeypatch.setattr(merging, "MERGE_LIMIT", 100)
    if case == "merged already":
        model.merge_adapter()
    if case == "disabled":
        model.disable_adapter_layers()
    before = weights(model)
    with merged(model, wrapped(model), 100 if case == "budget" else float("inf")) as count:
        assert count == 0
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_gradients_are_those_of_the_adapter_running_apart(monkeypatch):
    model = adapted(torch.float64)
    batches = [{"x": torch.randn(5, 6, dtype=torch.float64), "labels": torch.tensor([0, 1, 2, 3, 4])}]
    together = gradients(model, batches, kind="cross-entropy")
    monkeypatch.setattr(merging, "MERGE_LIMIT", 0)
    apart = gradients(model, batches, kind="cross-entropy")
    assert together.gradients.keys() == apart.gradients.keys()
    for name, g in apart.gradients.items():
        assert torch.allclose(together.gradients[name], g, rtol=1e-11, atol=1e-14)
        assert float(g.norm()) > 0


class Bypassing(nn.Module):
    """Reads the weight of one of its layers and never calls it, so that PEFT's adapter there does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return nn.functional.linear(torch.tanh(self.called(x)), self.read.weight)


def test_a_layer_whose_weight_is_read_past_the_adapter_is_not_merged():
    """Its adapter has no part in the network that PEFT runs, nor in the certificate's loss."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["called", "read"], init_lora_weights=False)
    model = get_peft_model(Bypassing(), config).eval()
    x, y = torch.randn(7, 6), torch.randint(5, (7,))
    expected = model(x)
    with merged(model, wrapped(model)):
        assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    found = gradients(model, [{"x": x, "labels": y}], kind="cross-entropy")
    assert found.unreached == ["read"]
    assert found.terms.mean == pytest.approx(float(nn.functional.cross_entropy(expected, y).detach()), rel=1e-5)
