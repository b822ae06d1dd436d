"""Parameter groups and optimizers with true L2 decay: against the gradient of the penalty, written out."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import ranksure
from ranksure.adapters.loaded import read_adapter
from ranksure.errors import AdapterError, SettingError
from ranksure.runs.fitting.optimizer import l2_optimizer, parameter_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 5)
        self.first = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.second = nn.Linear(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.second(self.norm(torch.tanh(self.first(self.words(ids).mean(1)))))))


def adapted(**config):
    settings = {
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {"second": 3},
        "alpha_pattern": {"second": 12},
        "target_modules": ["words", "first", "second"],
        **config,
    }
    model = get_peft_model(Net().double(), LoraConfig(**settings), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def penalty(model, lam):
    """``sum_j (lambda_j / 2)(||u_j||^2 + ||v_j||^2)`` from PEFT's own matrices and scales."""
    total = torch.zeros((), dtype=torch.float64)
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "scaling"):
            one = lam[name] if isinstance(lam, dict) else lam
            for holder in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
                for part in holder.values():
                    weight = part if isinstance(part, nn.Parameter) else part.weight
                    total = total + 0.5 * one * layer.scaling["default"] * weight.square().sum()
    return total


@pytest.mark.parametrize("lam", [0.3, {"words": 0.1, "first": 0.2, "second": 0.5}])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_step_is_that_of_the_penalised_objective(kind, lam):
    """One optimizer with decay against the same without, on the loss plus the penalty by autograd."""
    first, second = adapted(modules_to_save=["head"]), adapted(modules_to_save=["head"])
    second.load_state_dict(first.state_dict())
    ids, y = torch.randint(11, (6, 4)), torch.randint(3, (6,))
    ours = l2_optimizer(first, lam=lam, lr=0.05, kind=kind)
    plain = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[kind](
        [p for p in second.parameters() if p.requires_grad], lr=0.05
    )
    for _ in range(4):
        ours.zero_grad()
        nn.functional.cross_entropy(first(ids), y).backward()
        ours.step()
        plain.zero_grad()
        (nn.functional.cross_entropy(second(ids), y) + penalty(second, lam)).backward()
        plain.step()
    moved = 0
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), name
        moved += a.requires_grad
    assert moved == 8  # three pairs, and the head's weight and bias


def test_the_penalty_is_that_of_the_certificate():
    """With lambda on factors of scale one, and the other way round with the decay of PEFT's matrices."""
    model = adapted()
    read = read_adapter(model)
    by_hand = sum(
        0.15 * float(u.square().sum() + v.square().sum()) for u, v in (b.factors for b in read.blocks.values())
    )
    assert float(penalty(model, 0.3).detach()) == pytest.approx(by_hand, rel=1e-12)
    decays = [group["weight_decay"] for group in parameter_groups(model, lam=0.3)]
    assert decays == pytest.approx([0.3 * 1.5, 0.3 * 4])
    assert [group["weight_decay"] for group in parameter_groups(model, weight_decay=0.3)] == [0.3]
    assert read.penalties(0.3) == pytest.approx({"words": 0.2, "first": 0.2, "second": 0.075})


def test_nothing_else_decays():
    model = adapted(modules_to_save=["head"], bias="lora_only", target_modules=["first", "second"])
    model.base_model.model.norm.weight.requires_grad_(True)
    groups = parameter_groups(model, lam=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    still = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert decaying and all(".lora_A." in name or ".lora_B." in name for name in decaying)
    assert {name.rsplit("model.", 1)[1] for name in still} == {
        "first.base_layer.bias",
        "norm.weight",
        "second.base_layer.bias",
        "head.modules_to_save.default.weight",
        "head.modules_to_save.default.bias",
    }
    assert decaying | still == {name for name, p in model.named_parameters() if p.requires_grad}


def test_zero_is_a_penalty_too():
    groups = parameter_groups(adapted(), lam=0.0)
    assert [group["weight_decay"] for group in groups] == [0.0]


def test_one_adapter_of_two():
    model = adapted()
    model.add_adapter("other", LoraConfig(r=1, lora_alpha=1, target_modules=["first"]))
    with pytest.raises(AdapterError, match="frozen"):
        parameter_groups(model, lam=0.1, adapter="other")
    model.set_adapter("other")
    (group,) = parameter_groups(model, lam=0.1)
    assert len(group["params"]) == 2 and group["weight_decay"] == pytest.approx(0.1)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(AdapterError, match="several adapters are active"):
        parameter_groups(model, lam=0.1)


def test_what_is_refused():
    model = adapted()
    with pytest.raises(SettingError, match="give either lambda"):
        l2_optimizer(model)
    with pytest.raises(SettingError, match="give either lambda"):
        l2_optimizer(model, lam=0.1, weight_decay=0.1)
    with pytest.raises(SettingError, match="at least 0"):
        l2_optimizer(model, lam=-1.0)
    with pytest.raises(SettingError, match="at least 0"):
        l2_optimizer(model, lam=math.inf)
    with pytest.raises(SettingError, match="see first"):
        l2_optimizer(model, lam={"words": 0.1, "second": 0.1})
    with pytest.raises(SettingError, match="decoupled"):
        l2_optimizer(model, lam=0.1, kind="adamw")
    with pytest.raises(SettingError, match="decoupled"):
        l2_optimizer(model, lam=0.1, decoupled_weight_decay=True)
    with pytest.raises(SettingError, match="Adam refuses"):
        l2_optimizer(model, lam=0.1, momentum=0.9)
    with pytest.raises(AdapterError, match="no LoRA adapter"):
        l2_optimizer(Net(), lam=0.1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(AdapterError, match="frozen"):
        l2_optimizer(model, lam=0.1)


def test_it_is_public():
    assert ranksure.l2_optimizer is l2_optimizer and ranksure.parameter_groups is parameter_groups
