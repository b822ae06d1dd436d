"""Layers that compute by code of their own: right where that is their weight times their input, else refused."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    FalconConfig,
    FalconForSequenceClassification,
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
)
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.pytorch_utils import Conv1D

from ranksure.adapters.loaded import read_adapter
from ranksure.capture import capture
from ranksure.errors import CaptureError
from ranksure.network.gradient import gradient_pass
from ranksure.network.hooks import OtherMap
from ranksure.network.side_path import applied
from ranksure.operators.dense import DenseOperator
from ranksure.operators.matrix_free import MatrixFreeOperator
from ranksure.runs.certificate.certify import certify
from tests.helpers import generator_of, randn, rounding
from tests.runs.networks import randomise, reference

EYE = torch.eye(2, dtype=torch.float64)
TINY = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
IDS = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9], [2, 9, 1, 1]])


class Written(nn.Linear):
    """A linear layer in other words, as Falcon's."""

    def forward(self, input: Tensor) -> Tensor:
        return (input @ self.weight.T) + self.bias


class Routed(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), input.argmax(-1)


class Normed(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return F.normalize(super().forward(input), dim=-1)


class Shifted(nn.Embedding):
    """Reads other rows than it is asked for, as BART's positions do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward((input + 2) % self.num_embeddings)


class Standardised(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.norm(), bias)


class Padded(nn.Conv2d):
    """Pads itself."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (1, 1, 1, 1)))


class Turned(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(1, -1)


class Around(nn.Module):
    """One layer between an input and logits ``(rows, 2)``."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = layer, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        h = (h[0] if isinstance(h, tuple) else h).tanh()
        return self.head(h.flatten(2).mean(2) if h.dim() == 4 else h.flatten(1, -2).mean(1))


def patched() -> nn.Module:
    layer = nn.Linear(4, 6)
    layer.forward = types.MethodType(lambda self, x: F.linear(2 * x, self.weight, self.bias), layer)
    return layer


OTHERS = {
    "routed": (Routed(4, 6), 6, (3, 4, 4)),
    "grouped": (DeepseekV4GroupedLinear(4, 6, 2), 3, (3, 4, 2, 4)),
    "normed": (Normed(9, 6), 6, None),
    "shifted": (Shifted(9, 6), 6, None),
    "conv": (Standardised(2, 6, 2), 6, (3, 2, 4, 4)),
    "bit": (WeightStandardizedConv2d(2, 6, 3), 6, (3, 2, 4, 4)),
    "padded": (Padded(2, 6, 3), 6, (3, 2, 4, 4)),
    "turned": (Turned(6, 4), 6, (3, 4, 4)),
    "patched": (patched(), 6, (3, 4, 4)),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_output_that_is_not_the_weight_times_the_input_is_refused(kind: str, dtype: torch.dtype) -> None:
    layer, width, shape = OTHERS[kind]
    model: Any = Around(layer, width).to(dtype)
    x = randn(*shape, generator=generator_of(0)).to(dtype) if shape else torch.randint(7, (3, 5))
    other = "which does not map one tensor to one" if kind == "routed" else "whose output is not its weight"
    with pytest.raises(OtherMap, match=f"layer is a {type(layer).__name__}, {other}"):
        capture(model, [{"x": x}], {"layer": model.layer}, EYE.to(dtype))
    with pytest.raises(OtherMap, match="leave it out"):
        gradient_pass(model, [{"x": x, "labels": torch.tensor([0, 1, 1])}], {"layer": model.layer})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_linear_layer_in_other_words(dtype: torch.dtype) -> None:
    model: Any = Around(Written(4, 6), 6).to(dtype)
    x = randn(3, 5, 4, generator=generator_of(0)).to(dtype)
    found = capture(model, [{"x": x}], {"layer": model.layer}, EYE.to(dtype), dtype=torch.float64)
    plain: Any = Around(nn.Linear(4, 6), 6).to(dtype)
    plain.load_state_dict(model.state_dict())
    expected = capture(plain, [{"x": x}], {"layer": plain.layer}, EYE.to(dtype), dtype=torch.float64)
    far = found.operator.apply_factors(ones := {"layer": (torch.ones(6, 1).double(), torch.ones(4, 1).double())})
    far = far - (right := expected.operator.apply_factors(ones))
    assert float(far.norm()) <= 64 * rounding(model) * float(right.norm())


def test_positions_that_are_counted_from_the_mask_are_no_indices() -> None:
    """OPT's: PEFT's adapter takes the mask itself for them."""
    torch.manual_seed(0)
    config = OPTConfig(**TINY, ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=16, num_labels=2)
    base = OPTForSequenceClassification(config).double()
    name = "model.decoder.embed_positions"
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with pytest.raises(OtherMap, match="OPTLearnedPositionalEmbedding"):
        capture(base, [batch], {name: base.get_submodule(name)}, EYE)
    run: Any = get_peft_model(base, LoraConfig(r=2, target_modules=[name]), autocast_adapter_dtype=False)
    randomise(run)
    found = certify(run, [{**batch, "labels": torch.tensor([0, 1, 1])}], lam=0.01)
    assert found.verdict == "not-checked" and "OPTLearnedPositionalEmbedding" in found.reasons[0]


def gemma() -> Any:
    torch.manual_seed(0)
    sizes = {**TINY, "head_dim": 4, "intermediate_size": 8, "num_key_value_heads": 1, "num_labels": 2}
    return Gemma3TextForSequenceClassification(Gemma3TextConfig(**sizes, initializer_range=0.3)).double().eval()


def test_an_embedding_that_scales_its_vectors() -> None:
    """An adapter's are scaled too: in the captured product, in the side path, and in PEFT."""
    model, name = gemma(), "model.embed_tokens"
    layer = model.get_submodule(name)
    assert float(layer.embed_scale) == pytest.approx(8**0.5)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    found = capture(model, [batch], {name: layer}, EYE, dtype=torch.float64)
    jacobian = DenseOperator.from_operator(found.operator).jacobians()[name]
    layer.weight.requires_grad_(True)
    z = model(**batch).logits
    rows = [[torch.autograd.grad(z[i, k], layer.weight, retain_graph=True)[0].T for k in (0, 1)] for i in range(3)]
    expected = torch.stack([torch.stack(row) for row in rows])
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=64 * rounding(model) * float(expected.abs().max()))
    u, v = randn(8, 2, generator=generator_of(1)), randn(12, 2, generator=generator_of(2))
    free = MatrixFreeOperator(model, [batch], {name: layer}, EYE).apply({name: u @ v.T})
    product = torch.einsum("nkij,ij->nk", expected, u @ v.T)
    torch.testing.assert_close(free, product, rtol=0, atol=64 * rounding(model) * float(product.abs().max()))
    with torch.no_grad(), applied({name: layer}, {name: (u, v)}):
        beside = model(**batch).logits
    adapted: Any = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=[name]))
    wrapper = adapted.get_base_model().get_submodule(name)
    wrapper.lora_embedding_A["default"].data, wrapper.lora_embedding_B["default"].data = v.T, u
    torch.testing.assert_close(beside, adapted.eval()(**batch).logits.detach(), rtol=1e-5, atol=1e-6)


def test_certificates_of_layers_of_their_own() -> None:
    torch.manual_seed(0)
    falcon = FalconForSequenceClassification(FalconConfig(**TINY, num_labels=2, initializer_range=0.3)).double()
    for base, names in ((falcon, ["query_key_value"]), (gemma(), ["embed_tokens", "q_proj"])):
        run: Any = get_peft_model(base, LoraConfig(r=2, target_modules=names), autocast_adapter_dtype=False)
        randomise(run, 0.2)
        inputs, labels = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, torch.tensor([0, 1, 1])
        found = gradient_pass(run, [{**inputs, "labels": labels}], _adapted(run))
        loss, expected = reference(run, lambda net, i=inputs, y=labels: F.cross_entropy(net(**i).logits, y))
        assert found.terms.mean == pytest.approx(loss, rel=64 * rounding(base))
        for name, gradient in expected.items():
            assert float((found.gradients[name] - gradient).norm()) <= 256 * rounding(base) * float(gradient.norm())
        assert certify(run, [{**inputs, "labels": labels}], lam=0.01).verdict != "not-checked"


def _adapted(run: Any) -> dict[str, nn.Module]:
    read = read_adapter(run)
    assert not read.untested
    return read.modules


def test_a_module_that_gives_no_tensor_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"layer is a Routed"):
        model: Any = Around(Routed(4, 6), 6).double()
        run = get_peft_model(model, LoraConfig(r=2, target_modules=["layer"]), autocast_adapter_dtype=False)
        base: Any = run.base_model.model
        capture(base, [{"x": randn(3, 4, 4, generator=generator_of(0))}], {"layer": base.layer}, EYE)
