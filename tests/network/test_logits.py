"""Running a network as a function, and leaving it as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, RwkvConfig, RwkvForCausalLM

from ranksure.network.logits import DoesNotRun, frozen, logits_of

SMALL = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2}


def test_no_cache_and_no_gradients_meanwhile() -> None:
    for use_cache in (True, False):
        config = LlamaConfig(**SMALL, num_attention_heads=2, intermediate_size=8, use_cache=use_cache)
        model = LlamaForCausalLM(config).train()
        model.lm_head.weight.requires_grad_(False)
        ids = torch.tensor([[1, 2, 3]])
        with frozen(model):
            assert model(ids).past_key_values is None and not model.training
            assert not any(p.requires_grad for p in model.parameters())
        assert model.config.use_cache is use_cache and model.training
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_gradients_through_a_recurrent_network_that_caches_in_place() -> None:
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(**SMALL, attention_hidden_size=8, intermediate_size=8)).double()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with frozen(model):
        embedded = model.get_input_embeddings()(ids).requires_grad_(True)
        (found,) = torch.autograd.grad(model(inputs_embeds=embedded).logits.square().sum(), embedded)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    loss = model.train()(inputs_embeds=embedded).logits.square().sum()  # in training it keeps no cache
    (expected,) = torch.autograd.grad(loss, embedded)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("error", [AttributeError("no 'dtype'\nat all"), KeyError("x"), RuntimeError("no 'dtype'")])
def test_a_network_that_fails_is_named_with_the_module(error: Exception) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Fails()))
    with pytest.raises(DoesNotRun) as caught:
        logits_of(model, {"input": torch.zeros(1, 2)})
    why = str(error).splitlines()[0]
    assert str(caught.value) == f"the network does not run on this batch: in 1.0, {type(error).__name__}: {why}"
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory"), KeyboardInterrupt()])
def test_want_of_memory_is_no_fault_of_the_network(error: BaseException) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    with pytest.raises(type(error)):
        logits_of(Fails(), {"x": torch.zeros(1, 2)})
