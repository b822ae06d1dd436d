import copy
import dataclasses
import re

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import MixtralForCausalLM, Qwen2MoeForCausalLM, Qwen3MoeForCausalLM
from transformers.pytorch_utils import Conv1D

from ranksure.adapters.export import axolotl_yaml, check_exportable, config_snippet, lora_config
from ranksure.errors import AdapterError
from tests.adapters.networks import Suffixes
from tests.refusals import refusal


def wrapped(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, float]]:
    base = get_peft_model(model, config).get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    return {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}


@pytest.mark.parametrize(
    "ranks",
    [
        {"q": 2, "layer.query": 3},
        {"layer.query": 1, "b.layer.query": 4, "query": 0},
        {"query": 2, "xq": 2},
        {"b.q": 3, "q": 1, "layer.q": 2, "xq": 5},
        {"emb": 2, "conv": 3},
    ],
)
def test_exactly_the_named_modules_at_scale_one(ranks):
    expected = {name: (rank, 1.0) for name, rank in ranks.items() if rank}
    assert wrapped(Suffixes(), lora_config(ranks)) == expected
    largest = max(ranks.values())
    assert wrapped(Suffixes(), lora_config(ranks, uniform=True)) == dict.fromkeys(expected, (largest, 1.0))


NAMES = ["q", "xq", "query", "layer.query", "layer.q", "b.layer.query", "b.q"]


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), st.integers(0, 6), min_size=1).filter(lambda r: any(r.values())))
def test_any_ranks_on_names_that_end_with_each_other(ranks):
    assert wrapped(Suffixes(), lora_config(ranks)) == {n: (r, 1.0) for n, r in ranks.items() if r}


def mixture(kind, **more):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = kind.config_class(vocab_size=9, num_key_value_heads=1, pad_token_id=0, **sizes, **more)
    return kind(config)


QWEN = {"moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1}
MIXTURES = {
    "Mixtral": lambda: mixture(MixtralForCausalLM, num_local_experts=2, num_experts_per_tok=1),
    "Qwen3-MoE": lambda: mixture(Qwen3MoeForCausalLM, head_dim=4, **QWEN),
    "Qwen2-MoE": lambda: mixture(Qwen2MoeForCausalLM, shared_expert_intermediate_size=8, **QWEN),
}
QUERIES = {f"model.layers.{i}.self_attn.q_proj": i + 1 for i in range(2)}


@pytest.mark.parametrize("name", MIXTURES)
def test_exactly_the_named_modules_of_a_mixture(name):
    """PEFT reduces an expression to the last part of each name there, in every layer."""
    model = MIXTURES[name]()
    one = {"model.layers.1.self_attn.q_proj": 2}
    for ranks in (one, QUERIES, {**one, "model.layers.0.self_attn.o_proj": 1}):
        config = lora_config(ranks, model=model)
        scope: dict = {}
        exec(config_snippet(config), scope)
        read = yaml.safe_load(axolotl_yaml(ranks, model=model))
        named = {"target_modules": read["lora_target_modules"], "r": read["lora_r"], "lora_alpha": read["lora_r"]}
        patterns = {key: read.get(f"lora_{key}", {}) for key in ("rank_pattern", "alpha_pattern")}
        for again in (config, scope["lora_config"], LoraConfig(**named, **patterns)):
            assert wrapped(copy.deepcopy(model), again) == {name: (rank, 1.0) for name, rank in ranks.items()}
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def test_modules_of_a_mixture_that_peft_cannot_adapt_alone():
    """Such as those of a layer without experts, which have the names of the experts' parts."""
    model = mixture(Qwen3MoeForCausalLM, head_dim=4, mlp_only_layers=[1], **QWEN)
    dense = "model.layers.1.mlp.down_proj"
    message = refusal(AdapterError, ["Qwen3MoeForCausalLM", "experts"], lora_config, {dense: 1}, model=model)
    assert "target_modules" in message
    with pytest.raises(AdapterError, match="experts"):
        check_exportable(model, [*QUERIES, dense], task_type="CAUSAL_LM")
    check_exportable(model, list(QUERIES), task_type="CAUSAL_LM")


def test_layer_1_is_not_layer_11_and_special_characters_are_literal():
    def network():
        model = nn.Module()
        model.layers = nn.ModuleList(nn.ModuleDict({"query": nn.Linear(3, 3)}) for _ in range(12))
        model.add_module("a+b(c)", nn.Linear(3, 3))
        model.add_module("layersx1", nn.ModuleDict({"query": nn.Linear(3, 3)}))
        model.forward = lambda x: x
        return model

    ranks = {"layers.1.query": 1, "layers.11.query": 3}
    assert wrapped(network(), lora_config(ranks)) == {n: (r, 1.0) for n, r in ranks.items()}
    assert wrapped(network(), lora_config({"layers.1.query": 2})) == {"layers.1.query": (2, 1.0)}
    assert wrapped(network(), lora_config({"a+b(c)": 2})) == {"a+b(c)": (2, 1.0)}


def test_plain_names_would_have_matched_by_ending():
    """The trap that the anchored patterns avoid, in PEFT itself."""
    plain = LoraConfig(r=8, lora_alpha=8, target_modules=["q"], rank_pattern={"q": 2})
    assert wrapped(Suffixes(), plain) == {"q": (2, 4.0), "layer.q": (2, 4.0), "b.q": (2, 4.0)}


def test_conv1d_and_mixed_targets(recwarn):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.conv = nn.Linear(4, 5), Conv1D(3, 5)

        def forward(self, x):
            return self.conv(self.linear(x))

    config = lora_config({"conv": 2}, model=Mixed())
    assert config.fan_in_fan_out is True
    assert wrapped(Mixed(), config) == {"conv": (2, 1.0)}
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]
    both = lora_config({"conv": 2, "linear": 1}, model=Mixed())
    assert both.fan_in_fan_out is False  # the first target's kind; PEFT warns and sets the other right
    model = get_peft_model(Mixed(), both).get_base_model()
    assert (model.linear.fan_in_fan_out, model.conv.fan_in_fan_out) == (False, True)


def test_factors_and_ranks_give_the_same_configuration():
    factors = {"q": (torch.zeros(6, 2), torch.zeros(6, 2)), "xq": (torch.zeros(6, 0), torch.zeros(6, 0))}
    assert lora_config(factors).to_dict() == lora_config({"q": 2, "xq": 0}).to_dict()


@pytest.mark.parametrize(
    "ranks,message",
    [
        ({"q": 0, "xq": 0}, "nothing to export: the optimum is zero"),
        ({}, "nothing to export"),
        ({"q": -1}, "rank of q is -1"),
        ({"q": 1.5}, "rank of q is 1.5"),
        ({"q": True}, "rank of q is True"),
        ({"nope": 1}, "nope is not a module of Suffixes"),
    ],
)
def test_bad_ranks(ranks, message):
    with pytest.raises(AdapterError, match=re.escape(message)):
        lora_config(ranks, model=Suffixes())


@pytest.mark.parametrize(
    "config",
    [
        lora_config({"b.layer.query": 4, "q": 1}, task_type="SEQ_CLS", modules_to_save=["head"], revision="abc"),
        lora_config({"q": 3}, base_model_name_or_path="some where/with 'quotes'", uniform=True),
        lora_config({f"encoder.layer.{i}.attention.self.query": i + 1 for i in range(30)}),
        LoraConfig(target_modules=["b", "a"], lora_dropout=0.1, use_rslora=True, task_type="CAUSAL_LM"),
    ],
)
def test_config_snippet_rebuilds_the_configuration(config):
    scope: dict = {}
    exec(config_snippet(config), scope)
    rebuilt = scope["lora_config"]
    assert type(rebuilt) is LoraConfig
    assert dataclasses.asdict(rebuilt) == dataclasses.asdict(config)
    assert "lora_alpha=" in config_snippet(config)


def test_axolotl_yaml_means_the_same_to_peft():
    ranks = {"b.layer.query": 4, "layer.query": 2, "q": 0}
    text = axolotl_yaml(ranks, weight_decay=1e-05, modules_to_save=["head"])
    read = yaml.safe_load(text)
    assert read["adapter"] == "lora"
    assert read["weight_decay"] == 1e-05
    assert read["lora_modules_to_save"] == ["head"]
    assert "3673" in text and "AdamW" in text
    config = LoraConfig(
        r=read["lora_r"],
        lora_alpha=read["lora_alpha"],
        target_modules=read["lora_target_modules"],
        rank_pattern=read["lora_rank_pattern"],
        alpha_pattern=read["lora_alpha_pattern"],
    )
    assert wrapped(Suffixes(), config) == {"b.layer.query": (4, 1.0), "layer.query": (2, 1.0)}
    for one_rank in (axolotl_yaml(ranks, uniform=True), axolotl_yaml({"q": 4, "xq": 4})):
        read = yaml.safe_load(one_rank)
        assert (read["lora_r"], read["lora_alpha"]) == (4, 4)
        assert "lora_rank_pattern" not in read
    with pytest.raises(AdapterError, match="nothing to export"):
        axolotl_yaml({"q": 0})
