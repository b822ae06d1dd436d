"""Reading adapters: factors against merged weights, and what is refused, untested or outside."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertForSequenceClassification, BitsAndBytesConfig, FalconConfig, FalconForCausalLM
from transformers.pytorch_utils import Conv1D

from ranksure.adapters.loaded import read_adapter
from ranksure.errors import AdapterError
from ranksure.runs.certificate.certify import certify
from ranksure.runs.resizing.compress import compress
from ranksure.runs.resizing.grow import grow
from tests.helpers import rounding
from tests.runs.networks import Small, gradients, merged_copy, randomise, reference, small_run
from tests.tiny_text import save_bert_classifier


class Kinds(nn.Module):
    """Every kind of module that can be adapted."""

    def __init__(self, **convolution) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6, padding_idx=0)
        self.lin = nn.Linear(6, 5)
        self.conv1d = Conv1D(7, 5)
        self.conv = nn.Conv2d(1, 4, (3, 2), **(convolution or {"stride": (2, 1), "padding": (1, 2)}))
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        x = torch.tanh(self.conv1d(torch.tanh(self.lin(self.emb(ids)))))
        return self.head(self.conv(x.unsqueeze(1)).mean((2, 3)))


TARGETS = ["emb", "lin", "conv1d", "conv"]


def kinds(**config):
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS, **config}
    model = get_peft_model(Kinds().double(), LoraConfig(**settings), autocast_adapter_dtype=False)
    randomise(model)
    return model


CONFIGS = {
    "alpha over r": {},
    "rsLoRA": {"use_rslora": True, "r": 4},
    "patterns": {"rank_pattern": {"lin": 4, "conv": 1}, "alpha_pattern": {"emb": 1, "conv": 7}},
    "rsLoRA and patterns": {"use_rslora": True, "rank_pattern": {"lin": 4}, "alpha_pattern": {"emb": 1}},
    "biases": {"bias": "lora_only"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_factors_give_the_merged_weights(name):
    """``u v^T`` is what PEFT itself adds to the weights, and the L2 penalties agree."""
    model = kinds(**CONFIGS[name])
    read = read_adapter(model)
    assert set(read.blocks) == set(TARGETS) and not read.untested
    base, weights = merged_copy(model)
    model.merge_adapter()
    for name_, layer in read.modules.items():
        peft_weight = layer.base_layer.weight  # pyright: ignore
        assert torch.allclose(weights[name_].double(), peft_weight.double(), atol=1e-12)
        assert base.get_submodule(name_).weight.shape == peft_weight.shape
    model.unmerge_adapter()
    penalties = read.penalties(0.02)
    for name_, block in read.blocks.items():
        u, v = block.factors
        layer = block.module
        if name_ == "emb":
            a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]  # pyright: ignore
        else:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # pyright: ignore
        own = 0.5 * 0.02 * float(a.detach().square().sum() + b.detach().square().sum())
        assert 0.5 * penalties[name_] * float(u.square().sum() + v.square().sum()) == pytest.approx(own, rel=1e-12)
        assert block.rank == u.shape[1] == b.shape[1]


def test_without_the_adapter_is_exact_and_put_back():
    model = kinds()
    ids = torch.randint(11, (3, 5))
    model.eval()
    with_it = model(ids)
    with model.disable_adapter():
        plain = model(ids)
    read = read_adapter(model)
    with pytest.raises(ZeroDivisionError), read.without():
        assert torch.equal(model(ids), plain)
        raise ZeroDivisionError
    assert torch.equal(model(ids), with_it) and not torch.equal(with_it, plain)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "use_dora=True is not a tested configuration .its update is not a product"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' may change the base weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": [], "target_parameters": ["first.weight"]}, "target_parameters"),
    ],
)
def test_untested_configurations_are_named(config, reason):
    model, batches, _ = small_run(dtype=torch.float32, **config)
    found = certify(model, batches, lam=0.01)
    assert found.verdict == "not-checked" and not found.modules
    assert any(__import__("re").search(reason, text) for text in found.reasons)
    assert "Nothing was checked" in found.advice()[0]


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "orthogonal"},
        {"lora_dropout": 0.2},
        {"ensure_weight_tying": True},
    ],
)
def test_tested_values(config):
    assert read_adapter(small_run(**config)[0]).untested == []


def test_one_matrix_of_each_pair_frozen():
    """MiCA and LoRA-FA train A or B alone: a decay of that one is no nuclear norm, and a bound holds without it."""
    for half in ("lora_A", "lora_B"):
        model, batches, _ = small_run()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name and half not in name)
        assert read_adapter(model).frozen_half
        refused = certify(model, batches, weight_decay=0.01)
        assert refused.verdict == "not-checked" and "no nuclear norm" in refused.reasons[0]
        assert certify(model, batches, lam=0.01).modules and certify(model, batches).modules
    model, batches, _ = small_run(dtype=torch.float32, init_lora_weights="mica")
    model.requires_grad_(False)  # as a saved run is loaded
    assert certify(model, batches, weight_decay=0.01).verdict == "not-checked"
    assert not read_adapter(small_run()[0]).frozen_half


def test_modules_that_share_their_matrices_are_no_blocks_of_their_own():
    model, batches, _ = small_run()
    net = model.base_model.model
    net.second.lora_A["default"].weight = nn.Parameter(net.first.lora_B["default"].weight.detach().T)
    found = certify(model, batches, lam=0.01)
    assert found.verdict == "not-checked" and "second shares its matrices with first" in found.reasons[0]


def test_overlapping_patterns_are_told(tmp_path):
    """Trained at one scale, loaded at another: PEFT sorts the keys when it saves, and takes the first that matches."""
    patterns = {"alpha_pattern": {"second": 2, "s.*": 8}, "rank_pattern": {"third": 4}}
    model, batches, _ = small_run(**patterns)
    assert read_adapter(model).blocks["second"].scale == 1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Small().double(), tmp_path)
    found = certify(again, batches, lam=0.01)
    assert read_adapter(again).blocks["second"].scale == 4
    assert "second loads with 8, of 's.*' (scale 4); 'second' (2) matches it too" in found.notes[1]
    assert "'third' matches no adapted module" in found.notes[0]
    assert found.to_json()["notes"] == found.notes


class Quantised(nn.Linear):
    """As bitsandbytes makes them: a subclass of Linear from elsewhere."""


def test_quantised_bases_are_not_checked():
    net = Small()
    net.first = Quantised(5, 7)
    model = get_peft_model(net, LoraConfig(r=1, target_modules=["first", "second"]))
    found = certify(model, small_run(dtype=torch.float32)[1], lam=0.1)
    assert found.verdict == "not-checked" and "Quantised (quantised?)" in found.reasons[0]

    class Packed(torch.Tensor):  # as torchao's: a plain Linear with a subclass of Tensor for a weight
        pass

    model, _, _ = small_run()
    layer = model.base_model.model.second.base_layer
    weight = layer.weight.detach().as_subclass(Packed)
    del layer.weight
    layer.weight = weight
    assert any("second" in reason and "quantised?" in reason for reason in read_adapter(model).untested)


def test_a_network_that_is_quantised_elsewhere_is_not_checked():
    """Adapted modules are left in float often (heads); the rest still rounds what goes through it."""
    model, batches, _ = small_run()
    net = model.base_model.model
    net.packed = nn.Module()
    net.packed.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    found = certify(model, batches, lam=0.1)
    assert found.verdict == "not-checked"
    assert "the network is quantised (base_model.model.packed.weight is Parameter of int8)" in found.reasons[0]
    del net.packed.weight
    net.packed.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))
    assert "packed.qweight is Tensor of int32" in certify(model, batches, lam=0.1).reasons[0]
    del net.packed
    assert not certify(model, batches, lam=0.1).reasons


def test_a_models_own_linear_layers_are_taken_as_what_they_compute():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    net = FalconForCausalLM(FalconConfig(**sizes, max_position_embeddings=32)).double().eval()
    config = LoraConfig(r=2, target_modules=["query_key_value", "dense"])
    model = get_peft_model(net, config, autocast_adapter_dtype=False)
    randomise(model)
    ids = torch.randint(40, (3, 7))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]

    def loss(base):
        return nn.functional.cross_entropy(base(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    assert not read_adapter(model).untested
    found, (value, expected) = gradients(model, batches), reference(model, loss)
    bound = 1e4 * rounding(model)
    assert found.terms.mean == pytest.approx(value, rel=bound)
    for name, g in expected.items():
        assert float((found.gradients[name] - g).norm()) <= bound * float(g.norm())
    layer = net.transformer.h[0].self_attention.query_key_value.base_layer
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight)
    assert "whose output is not its weight times its input" in certify(model, batches, lam=0.1).reasons[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_networks_that_bitsandbytes_quantised_are_not_checked(bits, tmp_path):
    """On its CPU kernels. Beside the layers above, which stand for it where it is not installed."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    save_bert_classifier(tmp_path / "bert", ["a", "b", "c"])
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    net = BertForSequenceClassification.from_pretrained(tmp_path / "bert", quantization_config=config, device_map="cpu")
    ids = torch.randint(5, 20, (3, 6))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2])}]
    for targets, named in ((["query"], "quantised? its weight is"), (["word_embeddings"], "the network is quantised")):
        model = get_peft_model(copy.deepcopy(net), LoraConfig(r=2, target_modules=targets))
        randomise(model)
        found = certify(model, batches)
        assert found.verdict == "not-checked" and any(named in reason for reason in found.reasons)
        with pytest.raises(AdapterError, match="quantised"):
            compress(model, batches)
        with pytest.raises(AdapterError, match="quantised"):
            grow(model, batches, force=True)


def test_kinds_of_networks_and_modules_that_were_not_tested():
    model, batches, _ = small_run()
    model.base_model.model.config = type("Config", (), {"is_encoder_decoder": True})()
    assert not certify(model, batches, lam=1.0).reasons  # such as a classifier on Whisper's encoder
    model.base_model.model.decoder = nn.Identity()
    assert "encoder-decoder" in certify(model, batches, lam=1.0).reasons[0]
    dilated = get_peft_model(Kinds(dilation=(1, 2)), LoraConfig(r=1, target_modules=["conv"]))
    assert "dilated" in read_adapter(dilated).untested[0]
    grouped = nn.Sequential(nn.Conv1d(4, 4, 1))
    model = get_peft_model(grouped, LoraConfig(r=1, target_modules=["0"]))
    assert "Conv1d, which is not a tested kind" in read_adapter(model).untested[0]


def test_what_was_trained_beside_the_adapter():
    assert read_adapter(small_run()[0]).outside == []
    model, _, _ = small_run(bias="lora_only", modules_to_save=["head"])
    assert read_adapter(model).outside == ["biases trained with bias='lora_only'", "modules_to_save (head)"]
    model, batches, _ = small_run()
    model.base_model.model.head.weight.requires_grad_(True)
    found = certify(model, batches, lam=0.01)
    assert found.outside == ["parameters that require gradients (base_model.model.head.weight)"]
    assert "as if they were fixed" in " ".join(found.advice())


def test_several_adapters():
    model, batches, _ = small_run()
    model.add_adapter("second", LoraConfig(r=1, lora_alpha=1, target_modules=["first"]))
    assert set(certify(model, batches, lam=0.01).modules) == {"first", "second"}
    with pytest.raises(AdapterError, match="not active"):
        certify(model, batches, adapter="second")
    model.set_adapter("second")
    found = certify(model, batches, lam=0.01)
    assert found.adapter == "second" and set(found.modules) == {"first"}
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match="several adapters are active"):
        certify(model, batches, lam=0.01)
    both = certify(model, batches, lam=0.01, adapter="default")
    assert both.adapter == "default" and both.objective != found.objective
    assert any("other active adapters (second)" in text for text in both.outside)


def test_what_is_refused():
    model, batches, _ = small_run()
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        certify(model, batches, adapter="other")
    with pytest.raises(AdapterError, match="no PEFT adapter"):
        certify(Small(), batches)
    with pytest.raises(AdapterError, match="IA3 adapter"):
        certify(get_peft_model(Small(), IA3Config(target_modules=["first"], feedforward_modules=[])), batches)
    with model.disable_adapter(), pytest.raises(AdapterError, match="disabled"):
        certify(model, batches, lam=0.1)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged"):
        certify(model, batches)
    model.unmerge_adapter()
    first = model.base_model.model.first
    first.scaling["default"] = 0.0
    with pytest.raises(AdapterError, match="scale for first is 0"):
        certify(model, batches)
    first.scaling["default"] = 1.0
    with torch.no_grad():
        first.lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(AdapterError, match="first hold a value that is not finite"):
        certify(model, batches)
