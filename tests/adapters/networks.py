"""Tiny networks, random factors, and an independent W0 + delta for the adapter tests."""

import copy
import re
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    ResNetConfig,
    ResNetModel,
)
from transformers.pytorch_utils import Conv1D

LARGE = 0.15  # initial weights large enough that an update of any module shows in the logits


def save_bert(folder: Path, layers: int = 2, dtype: torch.dtype = torch.float32) -> str:
    """A headless random BERT checkpoint, so that a classifier on it has a new head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=LARGE,
    )
    BertModel(config).to(dtype).save_pretrained(folder)
    return str(folder)


def save_gpt2(folder: Path) -> str:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=LARGE)
    GPT2Model(config).save_pretrained(folder)
    return str(folder)


def save_resnet(folder: Path) -> str:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    return str(folder)


def with_new_head(base: str, head: str, **settings: object) -> nn.Module:
    """The classifier on a headless checkpoint, with a 'fitted' (random) head."""
    images = "resnet" in base
    auto = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    model = auto.from_pretrained(base, **settings).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.get_submodule(head).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def random_factors(model: nn.Module, ranks: dict[str, int], scale: float = 0.6) -> dict:
    """Float64 factors of the given ranks for modules of the network."""
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        shape = layer.weight.shape
        transposed = isinstance(layer, (Conv1D, nn.Embedding))
        m, n = (shape[1], shape[0]) if transposed else (shape[0], layer.weight[0].numel())
        u = torch.randn(m, rank, generator=generator, dtype=torch.float64) * scale
        v = torch.randn(n, rank, generator=generator, dtype=torch.float64) * scale
        factors[name] = (u, v)
    return factors


def edited(model: nn.Module, factors: dict) -> nn.Module:
    """A copy of the network with its weights set to W0 + u v^T directly, rounded once."""
    model = copy.deepcopy(model)
    for name, (u, v) in factors.items():
        layer = model.get_submodule(name)
        delta = torch.einsum("mr,nr->mn", u.double(), v.double())
        if isinstance(layer, (Conv1D, nn.Embedding)):
            delta = delta.T
        weight = layer.weight.double() + delta.reshape(layer.weight.shape)
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype))
    return model


def snapshot(model: nn.Module) -> dict:
    """All that an export must leave as it is."""
    config = getattr(model, "config", None)
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "modules": [
            (name, id(module), module.training, sorted(vars(module))) for name, module in model.named_modules()
        ],
        "parameters": [(name, id(p), p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "config": None if config is None else config.to_dict(),
        "random": torch.get_rng_state(),
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    assert before["state"].keys() == after["state"].keys()
    for key, value in before["state"].items():
        assert value.dtype == after["state"][key].dtype
        assert torch.equal(value, after["state"][key]), key
    assert torch.equal(before["random"], after["random"])
    for key in ("modules", "parameters", "hooks", "config"):
        assert before[key] == after[key], key


def first_snippet(readme: Path) -> str:
    found = re.search(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found[1]


class Suffixes(nn.Module):
    """Modules whose names are endings of one another, an embedding with padding, and a strided convolution."""

    def __init__(self, dilation: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6, padding_idx=0)
        self.q = nn.Linear(6, 6)
        self.xq = nn.Linear(6, 6)
        self.query = nn.Linear(6, 6)
        self.layer = nn.ModuleDict({"query": nn.Linear(6, 6), "q": nn.Linear(6, 6)})
        self.b = nn.ModuleDict({"layer": nn.ModuleDict({"query": nn.Linear(6, 6)}), "q": nn.Linear(6, 6)})
        self.conv = nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=dilation)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        for module in (self.q, self.xq, self.query, *self.layer.values(), self.b["layer"]["query"], self.b["q"]):
            x = x + torch.tanh(module(x))
        return self.head(self.conv(x.unsqueeze(1)).mean((2, 3)))
