import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from ranksure.errors import AdapterError, TargetError
from ranksure.network.side_path import applied
from ranksure.network.targets import select_targets
from tests.adapters.networks import (
    Suffixes,
    assert_unchanged,
    edited,
    random_factors,
    save_bert,
    snapshot,
    with_new_head,
)

IDS = torch.tensor([[0, 3, 5, 1, 0], [2, 2, 9, 10, 4]])


def targets_of(model: nn.Module, factors: dict) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in factors}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_hooks_equal_edited_weights_in_every_kind_of_module(dtype, tolerance):
    torch.manual_seed(0)
    model = Suffixes(dilation=(1, 2)).to(dtype)
    factors = random_factors(model, {"emb": 2, "q": 1, "layer.query": 3, "b.layer.query": 0, "conv": 2, "head": 1})
    before = snapshot(model)
    plain = model(IDS)
    with applied(targets_of(model, factors), factors):
        adapted = model(IDS)
    assert close(adapted, edited(model, factors)(IDS), tolerance)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    assert torch.equal(model(IDS), plain)
    assert_unchanged(model, before)


@pytest.mark.parametrize("padding", ["same", "valid", (2, 1), 0])
def test_convolution_padding_and_unbatched_input(padding):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, (3, 2), padding=padding, dilation=(1, 2))).double()
    factors = random_factors(model, {"0": 4})
    for x in (torch.randn(2, 3, 9, 8).double(), torch.randn(3, 9, 8).double()):
        with applied(targets_of(model, factors), factors):
            adapted = model(x)
        assert close(adapted, edited(model, factors)(x), 1e-13)


def test_conv1d_and_keyword_input():
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, pad_token_id=0)
    )
    model = model.double().eval()
    factors = random_factors(model, {"transformer.h.0.attn.c_attn": 3, "transformer.h.1.mlp.c_proj": 1})
    ids = torch.randint(1, 50, (3, 7))
    with applied(targets_of(model, factors), factors):
        adapted = model(ids).logits
    assert close(adapted, edited(model, factors)(ids).logits, 1e-13)

    linear = nn.Linear(3, 2)
    u, v = torch.randn(2, 1), torch.randn(3, 1)
    x = torch.randn(4, 3)
    with applied({"": linear}, {"": (u, v)}):
        by_name = linear(input=x)
    assert torch.allclose(by_name, linear(x) + (x @ v) @ u.T, atol=1e-6)


def test_tied_embedding_is_adapted_in_its_own_use_only():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)).double().eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    factors = random_factors(model, {"transformer.wte": 2})
    ids = torch.randint(0, 20, (2, 5))
    untied = edited(model, factors)  # a new parameter in wte: the head keeps the old one
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    with applied(targets_of(model, factors), factors):
        adapted = model(ids).logits
    assert close(adapted, untied(ids).logits, 1e-13)


@pytest.mark.parametrize(
    "dtype,tolerance",
    [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)],
)
def test_equals_peft_itself_to_rounding(tmp_path, dtype, tolerance):
    model = with_new_head(save_bert(tmp_path / "bert"), "classifier", num_labels=2, dtype=dtype)
    names = ["bert.encoder.layer.0.attention.self.query", "bert.embeddings.word_embeddings"]
    factors = random_factors(model, dict.fromkeys(names, 2))
    # PEFT computes in float32 for half precision: the factors as it would hold them.
    held = torch.promote_types(dtype, torch.float32)
    factors = {name: (u.to(held), v.to(held)) for name, (u, v) in factors.items()}
    ids = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), applied(targets_of(model, factors), factors):
        ours = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=names))
    with torch.no_grad():
        for name, (u, v) in factors.items():
            layer = adapted.get_base_model().get_submodule(name)
            if "embeddings" in name:
                layer.lora_embedding_A["default"].copy_(v.T)
                layer.lora_embedding_B["default"].copy_(u)
            else:
                layer.lora_A["default"].weight.copy_(v.T)
                layer.lora_B["default"].weight.copy_(u)
        theirs = adapted.eval()(ids).logits
    assert ours.dtype == theirs.dtype
    assert close(ours, theirs, tolerance)


def test_on_top_of_a_peft_wrapper(tmp_path):
    model = with_new_head(save_bert(tmp_path / "bert", dtype=torch.float64), "classifier", dtype=torch.float64)
    ids = torch.randint(1, 50, (3, 6))
    config = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    base = adapted.get_base_model()
    targets = select_targets(base, ["query", "value"])
    factors = {name: random_factors(module, {"base_layer": 3})["base_layer"] for name, module in targets.items()}
    with applied(targets, factors):
        ours = base(ids).logits
    merged = adapted.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert close(ours, edited(merged, factors)(ids).logits, 1e-13)


def test_gradients_reach_factors_and_input_and_skip_the_padding_row():
    torch.manual_seed(0)
    model = Suffixes().double().requires_grad_(False)
    factors = random_factors(model, {"emb": 2, "q": 1})
    factors = {name: (u.requires_grad_(), v.requires_grad_()) for name, (u, v) in factors.items()}
    with applied(targets_of(model, factors), factors):
        model(IDS).square().sum().backward()
    for u, v in factors.values():
        assert u.grad is not None and v.grad is not None and u.grad.abs().max() > 0
    assert factors["emb"][1].grad[0].abs().max() == 0  # padding_idx: added in the forward pass, no gradient


def test_hooks_are_removed_when_the_block_fails():
    model = Suffixes()
    factors = random_factors(model, {"q": 1})
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), applied(targets_of(model, factors), factors):
        raise KeyboardInterrupt
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "name,u,v,message",
    [
        ("nope", torch.zeros(6, 1), torch.zeros(6, 1), "nope, which is not a module"),
        ("q", torch.zeros(6, 1), torch.zeros(5, 1), r"factors of q have shapes \(6, 1\) and \(5, 1\)"),
        ("q", torch.zeros(6, 2), torch.zeros(6, 1), "factors of q"),
        ("q", torch.full((6, 1), float("nan")), torch.zeros(6, 1), "not finite"),
    ],
)
def test_factors_that_do_not_fit(name, u, v, message):
    model = Suffixes()
    with pytest.raises(AdapterError, match=message), applied({"q": model.q}, {name: (u, v)}):
        pass


def test_unsupported_module():
    with pytest.raises(TargetError), applied({"n": nn.LayerNorm(3)}, {"n": (torch.zeros(3, 1), torch.zeros(1, 1))}):
        pass
