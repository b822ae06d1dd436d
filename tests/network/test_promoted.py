"""A half-precision network's tail in float32, against a float32 copy of the network that is given the same inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ranksure.network.logits import frozen, logits_of, predict
from ranksure.network.prefix import cached_prefix
from ranksure.network.promoted import promoted
from ranksure.network.targets import select_targets
from tests.network.test_prefix import MAKERS, TEXT, inputs_of, model_for, slopes

STACKS = {"bert": "bert.encoder.layer.2", "gpt2": "transformer.h.2", "llama": "model.layers.2", "vit": "vit.layers.2"}
STACKS |= {"dinov2": "dinov2.encoder.layer.2", "whisper": "encoder.layers.2"}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def wide_tail(model: nn.Module, kind: str, batches):
    """A float32 copy whose last layer is given what the half-precision network gives it, and its rotary angles."""
    names = [STACKS[kind], *[name for name, _ in model.named_modules() if name.endswith("rotary_emb")]]
    found: dict[str, list] = {name: [] for name in names}
    handles = [
        model.get_submodule(names[0]).register_forward_pre_hook(lambda _, args: found[names[0]].append(args[0])),
        *[
            model.get_submodule(n).register_forward_hook(lambda _, args, out: found[names[1]].append(out))
            for n in names[1:]
        ],
    ]
    with frozen(model), torch.no_grad():
        for batch in batches:
            logits_of(model, batch)
    for handle in handles:
        handle.remove()
    wide, taken = copy.deepcopy(model).float(), {name: iter(2 * values) for name, values in found.items()}
    wide.get_submodule(names[0]).register_forward_pre_hook(lambda _, args: (next(taken[names[0]]).float(), *args[1:]))
    for name in names[1:]:
        wide.get_submodule(name).register_forward_hook(
            lambda _, args, out: tuple(x.float() for x in next(taken[names[1]]))
        )
    return wide


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


@DTYPES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", list(STACKS))
def test_the_tail_is_computed_in_float32(kind, attention, dtype):
    model = model_for(kind, dtype)
    model.set_attn_implementation(attention)
    batches, targets = inputs_of(kind, dtype), select_targets(model, "all-linear", "last")
    own, before, parameters = predict(model, batches), bits(model), dict(model.named_parameters())
    wide = wide_tail(model, kind, batches)
    expected = slopes(
        wide,
        [{k: x.float() if x.is_floating_point() else x for k, x in b.items()} for b in batches],
        select_targets(wide, "all-linear", "last"),
    )
    with promoted(model, targets, batches[0]) as names:
        assert f"{STACKS[kind]}." in " ".join(names) and not any(n.startswith(STACKS[kind][:-1] + "0") for n in names)
        found = slopes(model, batches, targets)
        with cached_prefix(model, batches, targets) as prefix:
            assert len(prefix.skipped) == 2
            assert all(x.dtype == dtype for each in prefix._cache.kept.lists for x in each)
            again = slopes(model, batches, targets)
    assert found[0].dtype == torch.float32
    for a, b, c in zip([expected[0], *expected[1]], [found[0], *found[1]], [again[0], *again[1]], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=2e-5 * float(a.abs().max()))
        torch.testing.assert_close(c, b, rtol=0, atol=2e-6 * float(a.abs().max()))
    assert float((expected[0] - own).abs().max()) > 0 or kind == "none"
    assert all(p is parameters[name] for name, p in model.named_parameters())
    after = bits(model)
    assert all(x.dtype == before[name].dtype and torch.equal(x, before[name]) for name, x in after.items())
    assert torch.equal(predict(model, batches), own)


def test_a_tied_weight_is_widened_in_the_tail_alone_and_all_is_restored_after_an_error():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TEXT, "tie_word_embeddings": True})).bfloat16().eval()
    batches = inputs_of("llama", torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    targets = select_targets(model, ["q_proj"], "last")
    before = bits(model)
    with pytest.raises(KeyboardInterrupt), promoted(model, targets, batches[0]) as names:
        assert "lm_head.weight" in names and model.lm_head.weight.dtype == torch.float32
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16
        with frozen(model), torch.no_grad():
            logits = model(**batches[0]).logits
        assert logits.dtype == torch.float32
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        raise KeyboardInterrupt
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(x, before[name]) for name, x in bits(model).items())
    with frozen(model), torch.no_grad():
        assert model(**batches[0]).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_a_network_in_single_precision_stays_as_it_is(kind):
    model = MAKERS[kind]().eval()
    batches, parameters = inputs_of(kind, torch.float32), list(model.parameters())
    with promoted(model, select_targets(model, ["query"]), batches[0]) as names:
        assert names == [] and all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_where_nothing_lies_below_all_is_widened():
    model = model_for("albert", torch.bfloat16)
    batches, targets = inputs_of("albert", torch.bfloat16), select_targets(model, ["query"])
    wide = copy.deepcopy(model).float()
    expected = slopes(wide, batches, select_targets(wide, ["query"]))
    with promoted(model, targets, batches[0]):
        found = slopes(model, batches, targets)
    scale = float(expected[0].abs().max())
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0.05 * scale)  # its embeddings stay as they were
