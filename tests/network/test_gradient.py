"""Gradient passes against dense float64 autograd; streamed logits, memory groups, checkpointing, refusals."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BatchEncoding, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from ranksure import loss_terms
from ranksure.adapters.loaded import read_adapter
from ranksure.errors import CaptureError, DataError, MemoryBudgetError, SettingError
from ranksure.network import batch_losses
from ranksure.network.gradient import gradient_pass, mean_loss
from tests.adapters.test_loaded import TARGETS, kinds
from tests.runs.networks import errors, gradients, randomise, reference, small_run

TINY = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def language_model(kind=LlamaForCausalLM, config=LlamaConfig, targets=("q_proj", "down_proj"), **settings):
    torch.manual_seed(0)
    base = kind(config(**{**TINY, **settings})).double()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=list(targets)), autocast_adapter_dtype=False)
    randomise(model, 0.1)
    return model


def completions():
    """Right-padded batches of different lengths; the loss on the completions only; a row without any loss."""
    torch.manual_seed(1)
    out = []
    for lengths in ([7, 4, 9], [3, 5]):
        width = max(lengths)
        ids, mask = torch.zeros(len(lengths), width).long(), torch.zeros(len(lengths), width).long()
        labels = torch.full((len(lengths), width), -100)
        for row, length in enumerate(lengths):
            ids[row, :length], mask[row, :length] = torch.randint(1, 61, (length,)), 1
            labels[row, 2:length] = ids[row, 2:length]
        out.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    out[0]["labels"][1] = -100
    return out


def language_loss(batches, weighting: str):
    """Mean over tokens, or over samples of their means, by torch and without this package."""

    def loss(base):
        each, weights = [], []
        for batch in batches:
            logits = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            target = batch["labels"][:, 1:]
            losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none", ignore_index=-100)
            mask = (target != -100).double()
            counts = mask.sum(1, keepdim=True).clamp(min=1)
            each.append(losses[mask > 0])
            weights.append(((mask / counts) if weighting == "sample" else mask)[mask > 0])
        weights = torch.cat(weights)
        return (torch.cat(each) * weights).sum() / weights.sum()

    return loss


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"rank_pattern": {"first": 4}, "alpha_pattern": {"first": 1}}]
)
def test_a_nonlinear_network(config):
    model, batches, (x, y) = small_run(**config)
    loss, expected = reference(model, lambda base: F.cross_entropy(base(x), y))
    found = gradients(model, batches)
    assert found.terms.mean == pytest.approx(loss, rel=1e-10) and found.n_samples == 9
    assert mean_loss(model, batches) == pytest.approx(loss, rel=1e-10)
    assert max(errors(found.gradients, expected)) < 1e-10


@pytest.mark.parametrize("kind", ["logistic", "squared-error"])
def test_other_losses(kind):
    model, _, (x, _) = small_run(k=2)
    targets = torch.randint(2, (9, 2)).double() if kind == "logistic" else torch.randn(9, 2).double()
    function = F.binary_cross_entropy_with_logits if kind == "logistic" else F.mse_loss
    loss, expected = reference(model, lambda base: function(base(x), targets))
    batches = [{"x": x[:4], "labels": targets[:4]}, {"x": x[4:], "labels": targets[4:]}]
    found = gradients(model, batches, kind=kind)
    assert found.terms.mean == pytest.approx(loss, rel=1e-10) and len(found.terms.losses) == 18
    assert max(errors(found.gradients, expected)) < 1e-10


def test_every_kind_of_module_and_a_padding_row():
    model = kinds()
    ids, y = torch.randint(1, 11, (6, 5)), torch.randint(3, (6,))
    ids[0, 3:], ids[2, 1:] = 0, 0  # the padding row of the embedding takes part
    loss, expected = reference(model, lambda base: F.cross_entropy(base(ids), y))
    batches = [{"ids": ids[:4], "labels": y[:4]}, {"ids": ids[4:], "labels": y[4:]}]
    found = gradients(model, batches)
    assert set(found.gradients) == set(TARGETS) and found.terms.mean == pytest.approx(loss, rel=1e-10)
    assert float(expected["emb"][:, 0].abs().max()) == 0  # torch trains no padding row
    assert max(errors(found.gradients, expected)) < 1e-10


@pytest.mark.parametrize("weighting", ["token", "sample"])
@pytest.mark.parametrize("chunk", [2**23, 61 * 3])
def test_streamed_logits_of_a_language_model(weighting, chunk, monkeypatch):
    """The same as whole logits; and the vocabulary's layer never sees more rows than a part holds."""
    monkeypatch.setattr(batch_losses, "CHUNK_VALUES", chunk)
    model, batches = language_model(), completions()
    loss, expected = reference(model, language_loss(batches, weighting))
    rows = []
    head = model.get_base_model().lm_head
    head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1].numel()))
    found = gradients(model, batches, kind="cross-entropy", weighting=weighting)
    assert max(rows) <= max(3, chunk // 61) and sum(rows) < 2 * (
        20 + 9
    )  # labelled positions, one of each row, and these of rows again
    assert found.terms.mean == pytest.approx(loss, rel=1e-7)
    assert max(errors(found.gradients, expected)) < 1e-6  # the norm of these models rounds to float32 inside
    assert mean_loss(model, batches, weighting=weighting) == pytest.approx(loss, rel=1e-7)
    assert len(found.terms.losses) == sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    monkeypatch.setattr(batch_losses, "_output_embeddings", lambda base, targets: None)
    monkeypatch.setattr(loss_terms, "CHUNK_VALUES", chunk)
    whole = gradients(model, batches, weighting=weighting)
    assert max(errors(whole.gradients, expected)) < 1e-6 and torch.allclose(whole.terms.losses, found.terms.losses)


def test_what_comes_after_the_output_embeddings_is_not_missed():
    """A soft cap: the logits stay whole, and are right."""
    model = language_model(Gemma2ForCausalLM, Gemma2Config, final_logit_softcapping=2.0, head_dim=8)
    batches = completions()
    loss, expected = reference(model, language_loss(batches, "token"))
    found = gradients(model, batches)
    assert found.terms.mean == pytest.approx(loss, rel=1e-7)
    assert max(errors(found.gradients, expected)) < 1e-6  # the norm of these models rounds to float32 inside


def test_an_adapted_output_layer_keeps_its_own_gradient():
    model, batches = language_model(targets=("q_proj", "lm_head")), completions()
    loss, expected = reference(model, language_loss(batches, "token"))
    found = gradients(model, batches)
    assert "lm_head" in found.gradients and found.terms.mean == pytest.approx(loss, rel=1e-7)
    assert max(errors(found.gradients, expected)) < 1e-6  # the norm of these models rounds to float32 inside


def test_groups_under_a_memory_budget():
    model, batches, _ = small_run()
    whole = gradients(model, batches)
    parts = gradients(model, batches, memory_bytes=7 * 7 * 8)
    assert whole.passes == 1 and parts.passes == 2
    for name, g in whole.gradients.items():  # under the budget the adapter is not merged: other rounding
        assert torch.allclose(parts.gradients[name], g, rtol=1e-12, atol=1e-15)
    taken = {}
    consumed = gradients(model, batches, memory_bytes=7 * 7 * 8, consume=taken.__setitem__)
    assert not consumed.gradients and all(torch.equal(taken[name], g) for name, g in parts.gradients.items())
    with pytest.raises(SettingError, match="several passes"):
        gradients(model, iter(batches), memory_bytes=7 * 7 * 8)
    with pytest.raises(MemoryBudgetError, match="second alone"):
        gradients(model, batches, memory_bytes=300)


class Checkpointed(nn.Module):
    """Two segments, recomputed in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.reentrant, self.cut = reentrant, False

    def forward(self, x):
        if not self.cut:
            x = x.clone().requires_grad_(True)
        h = checkpoint(lambda h: torch.tanh(self.first(h)), x, use_reentrant=self.reentrant)
        h = checkpoint(lambda h: torch.tanh(self.second(torch.tanh(self.second(h)))), h, use_reentrant=self.reentrant)
        return self.head(h)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    torch.manual_seed(0)
    net = Checkpointed(reentrant).double()
    config = LoraConfig(r=2, target_modules=["first", "second"])
    model = get_peft_model(net, config, autocast_adapter_dtype=False)
    randomise(model)
    x, y = torch.randn(8, 5).double(), torch.randint(3, (8,))
    batches = [{"x": x[:5], "labels": y[:5]}, {"x": x[5:], "labels": y[5:]}]

    def loss(base):  # autograd.grad does not see through a reentrant checkpoint
        base.reentrant = False
        return F.cross_entropy(base(x), y)

    _, expected = reference(model, loss)
    found = gradients(model, batches)
    assert max(errors(found.gradients, expected)) < 1e-10
    if reentrant:
        net.cut = True  # no input of the first segment asks for gradients
        with pytest.raises(CaptureError, match=r"first got no gradient.*enable_input_require_grads"):
            gradients(model, batches)


class Odd(nn.Module):
    """A module that the output does not depend on, one that is never used, an input changed in place, a mood."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.dead, self.absent = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.in_place = self.moody = False
        self.calls = 0

    def forward(self, x):
        x = 1.0 * x
        h = self.used(x)
        if self.in_place:
            x.add_(1)
        self.dead(h)
        self.calls += 1
        return torch.tanh(h) * (1 + 0.01 * self.calls if self.moody else 1)


def odd_run():
    torch.manual_seed(0)
    config = LoraConfig(r=1, target_modules=["used", "dead", "absent"])
    model = get_peft_model(Odd(), config)
    randomise(model)
    return model, [{"x": torch.randn(4, 5), "labels": torch.randint(5, (4,))}]


def test_modules_that_the_loss_does_not_depend_on():
    model, batches = odd_run()
    found = gradients(model, batches)
    assert found.unreached == ["dead", "absent"]
    assert float(found.gradients["dead"].abs().max()) == 0 < float(found.gradients["used"].abs().max())
    read = read_adapter(model).modules
    with pytest.raises(CaptureError, match="does nothing"):
        gradient_pass(model, batches, {name: read[name] for name in ("dead", "absent")})


def test_a_network_that_changes_is_refused():
    model, batches = odd_run()
    model.base_model.model.in_place = True
    with pytest.raises(CaptureError, match="changed in place"):
        gradients(model, batches)
    model, batches = odd_run()
    model.base_model.model.moody = True
    with pytest.raises(CaptureError, match="not deterministic"):
        gradients(model, batches, memory_bytes=100)


class OwnLoss(nn.Module):
    """A network that computes its own loss, as transformers' do: here with label smoothing."""

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.layer, self.smoothing = nn.Linear(5, 3), smoothing

    def forward(self, x, labels=None):
        z = self.layer(x)
        loss = None if labels is None else F.cross_entropy(z, labels, label_smoothing=self.smoothing)
        return SimpleNamespace(logits=z, loss=loss)


def test_the_loss_is_that_of_the_model():
    batches = [{"x": torch.randn(6, 5), "labels": torch.randint(3, (6,))}]
    plain, smooth = (get_peft_model(OwnLoss(s), LoraConfig(r=1, target_modules=["layer"])) for s in (0.0, 0.2))
    assert gradients(plain, batches).terms.mean > 0
    with pytest.raises(SettingError, match="it trains with another loss"):
        gradients(smooth, batches)
    assert gradients(smooth, batches, kind="cross-entropy").terms.mean > 0


def test_batches_of_every_make():
    """A BatchEncoding, labels named ``label``, shuffled and unequal batches: the same mean and gradients."""
    model, batches, (x, y) = small_run()
    expected = gradients(model, batches)
    order = torch.randperm(9)
    x, y = x[order], y[order]
    parts = [slice(0, 1), slice(1, 7), slice(7, 9)]
    encoded = [BatchEncoding({"x": x[p], "label": y[p], "note": "no tensor"}) for p in parts]
    for batch in encoded:
        del batch["note"]
    found = gradients(model, encoded)
    assert found.terms.mean == pytest.approx(expected.terms.mean, rel=1e-12)
    assert max(errors(found.gradients, expected.gradients)) < 1e-12
    with pytest.raises(DataError, match="mapping of tensors with 'labels', not a tuple"):
        gradients(model, [(x, y)])
    with pytest.raises(DataError, match="no 'labels'"):
        gradients(model, [{"x": x}])
    with pytest.raises(DataError, match="no label"):
        gradients(model, [])
    with pytest.raises(DataError, match="no label"):
        gradients(model, [{"x": x, "labels": torch.full((9,), -100)}])
    with pytest.raises(SettingError, match="weighting"):
        gradients(model, batches, weighting="word")  # pyright: ignore


def test_a_loss_above_a_value_is_proved_early():
    model, batches, _ = small_run()
    whole = mean_loss(model, batches)
    seen = []

    def counted():
        for batch in batches:
            seen.append(1)
            yield batch

    proved = mean_loss(model, counted(), enough=(0.1 * whole, 9.0))
    assert 0.1 * whole < proved < whole and len(seen) == 1
    assert mean_loss(model, batches, enough=(whole, 9.0)) == pytest.approx(whole)


def test_the_network_is_left_as_it_was():
    model, batches, _ = small_run(lora_dropout=0.3)
    model.train()
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    hooks = copy.deepcopy([len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()])
    first, second = (gradients(model, batches) for _ in range(2))
    assert torch.equal(first.gradients["first"], second.gradients["first"])  # evaluation mode: no dropout
    assert model.training
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1] and p.grad is None
