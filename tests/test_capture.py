"""Captured factors against per-sample automatic differentiation, finite differences, and every known trap."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from ranksure.capture import capture, check_memory, estimate_bytes
from ranksure.errors import CaptureError, MemoryBudgetError
from ranksure.losses import get_loss
from ranksure.network.logits import batch_rows, logits_of, predict
from ranksure.network.targets import base_layer, select_targets, to_weight_shape
from ranksure.operators.dense import DenseOperator
from tests.helpers import generator_of, randn, updates

EYE2 = torch.eye(2, dtype=torch.float64)


# ---- independent oracles


def per_sample_jacobians(model, batches, targets, contrasts):
    """Per-sample ``torch.autograd.grad`` of each contrast, one sample in the batch at a time."""
    weights = [base_layer(module).weight for module in targets.values()]
    before = [weight.requires_grad for weight in weights]
    model.eval()
    for weight in weights:
        weight.requires_grad_(True)
    rows = {name: [] for name in targets}
    for batch in batches:
        for i in range(batch_rows(batch)):
            z = logits_of(model, {key: value[i : i + 1] for key, value in batch.items()})[0]
            for c in range(contrasts.shape[1]):
                grads = torch.autograd.grad(z @ contrasts[:, c].to(z), weights, retain_graph=True)
                for (name, module), grad in zip(targets.items(), grads, strict=True):
                    rows[name].append(as_block(module, grad))
    for weight, flag in zip(weights, before, strict=True):
        weight.requires_grad_(flag)
    n = sum(batch_rows(batch) for batch in batches)
    return {name: torch.stack(grads).unflatten(0, (n, -1)) for name, grads in rows.items()}


def as_block(module, grad):
    """A gradient in the weight's own layout as ``out x in``."""
    if isinstance(base_layer(module), (Conv1D, nn.Embedding)):
        return grad.T
    return grad.reshape(grad.shape[0], -1)


def assert_captured(model, batches, targets, contrasts, rtol=1e-9, atol=1e-12):
    before = {
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "weights": [p.detach().clone() for p in model.parameters()],
    }
    captured = capture(model, batches, targets, contrasts, dtype=torch.float64)
    assert [module.training for module in model.modules()] == before["training"]
    assert [p.requires_grad for p in model.parameters()] == before["requires_grad"]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    assert hooks == before["hooks"]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before["weights"], strict=True))
    expected = per_sample_jacobians(model, batches, targets, contrasts)
    found = DenseOperator.from_operator(captured.operator).jacobians()
    assert list(found) == list(targets)
    for name in targets:
        assert float(expected[name].abs().max()) > 0, f"the oracle sees nothing at {name}"
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(captured.base_logits, predict(model, batches).double(), rtol=1e-6, atol=1e-7)
    return captured


def assert_finite_differences(model, batches, targets, captured, contrasts):
    """Move the real weights, both ways."""
    g = generator_of(3)
    delta = {name: randn(*captured.operator.shapes[name], generator=g) for name in targets}
    step = 1e-6
    moved = []
    for sign in (1, -1):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name in targets:
                weight = base_layer(other.get_submodule(name)).weight
                weight += sign * step * to_weight_shape(other.get_submodule(name), delta[name])
        moved.append(predict(other, batches))
    slope = (moved[0] - moved[1]) / (2 * step) @ contrasts
    torch.testing.assert_close(captured.operator.apply(delta), slope, rtol=1e-6, atol=1e-7)


# ---- Hugging Face models


def text_batches(vocabulary=30, sizes=(3, 2), length=6):
    g = generator_of(0)
    batches = []
    for size in sizes:
        ids = torch.randint(2, vocabulary, (size, length), generator=g)
        mask = torch.ones_like(ids)
        for row in range(size):
            pad = (2 * row) % (length - 1)
            if pad:
                mask[row, length - pad :] = 0
                ids[row, length - pad :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def tiny_bert(attention="eager", labels=3, **settings):
    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        num_labels=labels, max_position_embeddings=16, attn_implementation=attention, initializer_range=0.4, **settings,
    )  # fmt: skip
    return BertForSequenceClassification(config).double()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert_with_padding(attention):
    model = tiny_bert(attention).train()
    batches = text_batches()
    targets = select_targets(model, ["query", "key", "value", "dense"])
    assert len(targets) == 2 * 6 + 1
    contrasts = get_loss("cross-entropy").contrasts(3)
    captured = assert_captured(model, batches, targets, contrasts)
    assert_finite_differences(model, batches, targets, captured, contrasts)
    assert captured.operator.n_outputs == 2
    assert captured.base_logits.shape == (5, 3)


def test_padding_is_never_stored_and_shared_inputs_once():
    model = tiny_bert(labels=2)
    batches = text_batches()
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    samples = 5
    first = select_targets(model, r"bert\.encoder\.layer\.0\.attention\.self\.(query|key|value)")
    one = capture(model, batches, first, get_loss("cross-entropy").contrasts(2), dtype=torch.float64).operator
    # one copy of the input and three of the gradients, for real tokens only
    assert one.nbytes == 8 * real * (8 + 3 * 8)
    assert len(one.groups) == 1
    # In the last layer only the first token's query matters; key and value are read at every real token.
    last = select_targets(model, ["query", "key", "value"], "last")
    two = capture(model, batches, last, get_loss("cross-entropy").contrasts(2), dtype=torch.float64).operator
    by_block = {name: group.n_tokens for group in two.groups for name in group.outputs}
    assert by_block == {
        "bert.encoder.layer.1.attention.self.query": samples,
        "bert.encoder.layer.1.attention.self.key": real,
        "bert.encoder.layer.1.attention.self.value": real,
    }
    assert two.nbytes == 8 * (samples * (8 + 8) + real * (8 + 2 * 8))


def test_albert_layers_add_over_uses():
    config = AlbertConfig(
        vocab_size=30, embedding_size=4, hidden_size=8, num_hidden_layers=3, num_hidden_groups=1,
        num_attention_heads=2, intermediate_size=12, num_labels=2, initializer_range=0.4, max_position_embeddings=16,
    )  # fmt: skip
    model = AlbertForSequenceClassification(config).double()
    targets = select_targets(model, "all-linear", exclude=["classifier"])
    batches = text_batches()
    captured = assert_captured(model, batches, targets, EYE2)
    assert_finite_differences(model, batches, targets, captured, EYE2)


def test_gpt2_conv1d():
    config = GPT2Config(vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=16, num_labels=2, pad_token_id=0,
                        initializer_range=0.4)  # fmt: skip
    model = GPT2ForSequenceClassification(config).double()
    targets = select_targets(model, ["c_attn", "c_proj", "c_fc", "wte"])
    batches = text_batches()
    captured = assert_captured(model, batches, targets, EYE2)
    assert captured.operator.shapes["transformer.h.0.attn.c_attn"] == (24, 8)
    assert_finite_differences(model, batches, targets, captured, EYE2)


def test_vit():
    config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8,
                       patch_size=4, num_labels=3, initializer_range=0.4)  # fmt: skip
    model = ViTForImageClassification(config).double()
    conv = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    targets = {**conv, **select_targets(model, "all-linear")}
    batches = [{"pixel_values": randn(size, 3, 8, 8, generator=generator_of(size))} for size in (3, 2)]
    contrasts = get_loss("cross-entropy").contrasts(3)
    captured = assert_captured(model, batches, targets, contrasts)
    assert_finite_differences(model, batches, targets, captured, contrasts)


# ---- small networks


class Convolutions(nn.Module):
    def __init__(self, padding=(1, 0)) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2))
        self.second = nn.Conv2d(4, 3, (2, 3), padding=padding)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = self.relu(self.first(x))
        x = self.relu(self.second(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("padding", [(1, 0), "same", "valid"])
def test_convolutions(padding):
    model = Convolutions(padding).double()
    batches = [{"x": randn(size, 2, 7, 6, generator=generator_of(size))} for size in (3, 1)]
    targets = {name: model.get_submodule(name) for name in ("first", "second", "head")}
    captured = assert_captured(model, batches, targets, EYE2)
    assert_finite_differences(model, batches, targets, captured, EYE2)


class Bag(nn.Module):
    """Two embeddings of different sizes read the same indices; one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Embedding(9, 4), nn.Embedding(12, 5)
        self.head = nn.Linear(13, 2)

    def forward(self, ids):
        small = self.small(ids).tanh().sum(1)
        again = self.small(ids.flip(1)[:, :2]).sin().sum(1)
        return self.head(torch.cat([small, again, self.large(ids).tanh().sum(1)], 1))


def test_embeddings_of_different_sizes_share_their_indices():
    model = Bag().double()
    batches = [{"ids": torch.randint(9, (size, 5), generator=generator_of(size))} for size in (3, 2)]
    targets = {name: model.get_submodule(name) for name in ("small", "large", "head")}
    captured = assert_captured(model, batches, targets, EYE2)
    assert captured.operator.shapes["large"] == (5, 12)
    assert_finite_differences(model, batches, targets, captured, EYE2)


class Net(nn.Module):
    """Two linear maps on a sequence; the readers below say what happens to their outputs."""

    def __init__(self, reader=None, width=4) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.unused = nn.Linear(width, width)
        self.head = nn.Linear(width, 2)
        self.reader = reader or (lambda self, x: self.head(self.second(self.first(x).tanh()).tanh().mean(1)))
        self.double()

    def forward(self, x):
        return self.reader(self, x)


def net_targets(model, *names):
    return {name: model.get_submodule(name) for name in names or ("first", "second")}


def sequences(*sizes, length=3, width=4):
    return [{"x": randn(size, length, width, generator=generator_of(size))} for size in sizes]


READERS = {
    "plain": None,
    "sum of tokens (an expanded gradient)": lambda s, x: s.head(s.second(s.first(x).tanh()).sum(1)),
    "transposed": lambda s, x: s.head(s.second(s.first(x).transpose(1, 2).tanh().transpose(1, 2)).tanh().mean(1)),
    "same module twice on one input": lambda s, x: s.head((s.first(x).tanh() * s.first(x).sin() + s.second(x)).mean(1)),
    "same module twice in a row": lambda s, x: s.head(s.first(s.second(s.first(x).tanh()).tanh()).mean(1)),
    "keyword input": lambda s, x: s.head(s.second(input=s.first(input=x).tanh()).mean(1)),
    "output changed in place": lambda s, x: s.head(s.second(s.first(x).mul_(2).tanh_()).relu_().mean(1)),
    "one token only": lambda s, x: s.head(s.second(s.first(x)[:, 0].tanh()).tanh()),
    "disjoint tokens of one input": lambda s, x: s.head(s.first(x)[:, 0].tanh() + s.second(x)[:, 1].sin()),
    "token first": lambda s, x: s.head(s.second(s.first(x.transpose(0, 1)).tanh()).sin().mean(0)),
    "tuple output": lambda s, x: (s.head(s.second(s.first(x).tanh()).mean(1)), x),
    "one output": lambda s, x: s.head(s.second(s.first(x).tanh()).mean(1))[:, 0],
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("sizes", [(3, 2), (1, 1, 1), (4,)])
def test_small_networks(reader, sizes):
    model = Net(READERS[reader])
    contrasts = torch.ones(1, 1).double() if reader == "one output" else EYE2
    batches, targets = sequences(*sizes), net_targets(model)
    captured = assert_captured(model, batches, targets, contrasts)
    assert_finite_differences(model, batches, targets, captured, contrasts)


def test_modules_that_read_one_input_differently_by_batch():
    """The second module's tokens agree with the first's in one batch and not in the next."""

    def reader(s, x):
        far = (x[:, :1, :1] > 0).to(x)  # by batch: all tokens, or the first only
        return s.head(
            (s.first(x).tanh() + s.second(x).sin() * torch.cat([far * 0 + 1, far.expand(-1, 2, 1)], 1)).mean(1)
        )

    model = Net(reader)
    batches = [{"x": sign * sequences(2)[0]["x"].abs()} for sign in (1, -1, 1)]
    assert_captured(model, batches, net_targets(model), EYE2)


@pytest.mark.parametrize("trainable", [False, True])
def test_frozen_base_and_training_mode(trainable):
    model = Net().train()
    model.second.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(trainable)
    model.head.weight.requires_grad_(not trainable)
    assert_captured(model, sequences(3), net_targets(model), EYE2)


def test_an_input_that_requires_grad_is_left_clean():
    model = Net()
    batch = {"x": sequences(2)[0]["x"].requires_grad_()}
    capture(model, [batch], net_targets(model), EYE2)
    assert batch["x"].grad is None


def test_state_is_restored_after_an_error():
    model = Net().train()
    with pytest.raises(CaptureError):
        capture(model, sequences(2), net_targets(model, "first", "unused"), EYE2)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def adapted(model, **settings):
    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=5, **settings))
    g = generator_of(4)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = 0.5 * randn(*parameter.shape, generator=g)
    return peft


def test_a_model_that_carries_an_adapter():
    """Hooks on the wrapper, first layer included; the point of linearisation is the adapted network."""
    model = adapted(tiny_bert(labels=2), target_modules=["query", "value"], lora_dropout=0.1)
    targets = select_targets(model, ["query", "value", "intermediate.dense"])
    assert all("base_layer" not in name and "lora_" not in name for name in targets)
    batches = text_batches()
    captured = assert_captured(model, batches, targets, EYE2)
    plain = capture(model.unload(), batches, select_targets(model.get_base_model(), ["query"]), EYE2)
    assert float((captured.base_logits - plain.base_logits).abs().max()) > 1e-3


def test_adapted_convolution_and_embedding():
    model = adapted(Convolutions().double(), target_modules=["second"])  # PEFT has no dilated convolutions
    targets = select_targets(model, ["first", "second"])
    assert_captured(model, [{"x": randn(3, 2, 7, 6, generator=generator_of(1))}], targets, EYE2)
    model = adapted(Bag().double(), target_modules=["small", "large"])
    batches = [{"ids": torch.randint(9, (3, 5), generator=generator_of(1))}]
    assert_captured(model, batches, select_targets(model, ["small", "large"]), EYE2)


def test_tied_embeddings_count_this_use_only():
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8, initializer_range=0.4)
    inner = GPT2LMHeadModel(config).double()
    assert inner.lm_head.weight is inner.transformer.wte.weight

    class LastToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids):
            return self.inner(input_ids=ids).logits[:, -1, :2]

    model = LastToken()
    batches = [{"ids": torch.randint(11, (3, 4), generator=generator_of(0))}]
    targets = {name: model.get_submodule(name) for name in ("inner.transformer.wte", "inner.lm_head")}
    captured = capture(model, batches, targets, EYE2, dtype=torch.float64)
    g = generator_of(1)
    for name, (m, n) in captured.operator.shapes.items():
        delta = {name: randn(m, n, generator=g)}
        moved = []
        for sign in (1, -1):  # untie, then move one side only
            other = copy.deepcopy(model)
            layer = other.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight.detach() + sign * 1e-6 * to_weight_shape(layer, delta[name]))
            moved.append(predict(other, batches))
        slope = (moved[0] - moved[1]) / 2e-6
        torch.testing.assert_close(captured.operator.apply(delta), slope, rtol=1e-6, atol=1e-7)


# ---- gradient checkpointing


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, grad_input: bool, shared: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(1 if shared else 3))
        self.order = [0, 0, 0] if shared else [0, 1, 2]
        self.head = nn.Linear(4, 2)
        self.reentrant, self.grad_input = reentrant, grad_input
        self.double()

    def forward(self, x):
        if self.grad_input:  # what enable_input_require_grads does
            x = x.detach().requires_grad_()
        for index in self.order:
            segment = lambda y, layer=self.layers[index]: layer(layer(y).tanh()).sin() + y  # noqa: E731
            if torch.is_grad_enabled():
                x = checkpoint(segment, x, use_reentrant=self.reentrant)
            else:
                x = segment(x)
        return self.head(x.mean(1))


class NoCheckpoint(Checkpointed):
    """The same network without checkpointing, for the oracle."""

    def forward(self, x):
        for index in self.order:
            layer = self.layers[index]
            x = layer(layer(x).tanh()).sin() + x
        return self.head(x.mean(1))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("reentrant", "grad_input"), [(False, False), (False, True), (True, True)])
def test_gradient_checkpointing(reentrant, grad_input, shared):
    model = Checkpointed(reentrant, grad_input, shared)
    plain = NoCheckpoint(reentrant, grad_input, shared)
    plain.load_state_dict(model.state_dict())
    batches = sequences(3, 2)
    names = [f"layers.{i}" for i in range(len(model.layers))] + ["head"]
    captured = capture(model, batches, net_targets(model, *names), EYE2, dtype=torch.float64)
    expected = per_sample_jacobians(plain, batches, net_targets(plain, *names), EYE2)
    for name, found in DenseOperator.from_operator(captured.operator).jacobians().items():
        torch.testing.assert_close(found, expected[name], rtol=1e-10, atol=1e-13)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("names", [("layers.0",), ("layers.2", "head"), ("layers.0", "layers.1", "layers.2")])
def test_a_reentrant_checkpoint_that_cuts_targets_off_is_an_error(names):
    model = Checkpointed(True, grad_input=False)
    with pytest.raises(CaptureError, match=r"checkpoint|reaches the logits"):
        capture(model, sequences(2), net_targets(model, *names), EYE2)


def test_a_checkpoint_that_cuts_everything_off_is_named():
    model = Checkpointed(True, grad_input=False)
    with pytest.raises(CaptureError, match="checkpoint"):
        capture(model, sequences(2), net_targets(model, "layers.0"), EYE2)


# ---- refusals


def test_unused_target():
    model = Net()
    with pytest.raises(CaptureError, match="unused was never used"):
        capture(model, sequences(2), net_targets(model, "first", "unused"), EYE2)


def test_target_that_does_not_reach_the_logits():
    def reader(s, x):
        s.unused(x)
        return s.head(s.first(x).mean(1))

    model = Net(reader)
    with pytest.raises(CaptureError, match="unused got 0 gradients"):
        capture(model, sequences(2), net_targets(model, "first", "unused"), EYE2)
    with pytest.raises(CaptureError, match="reaches the logits"):
        capture(model, sequences(2), net_targets(model, "unused"), EYE2)


def test_a_use_that_does_not_reach_the_logits_is_an_error():
    def reader(s, x):
        s.first(2 * x)
        return s.head(s.first(x).mean(1))

    model = Net(reader)
    with pytest.raises(CaptureError, match="first got 0 gradients"):
        capture(model, sequences(2), net_targets(model, "first"), EYE2)


def test_a_use_without_gradients_is_an_error():
    """Its contribution to the logits could not be seen."""

    def reader(s, x):
        with torch.no_grad():
            gate = s.first(x).sigmoid()
        return s.head((gate * s.first(x)).mean(1))

    model = Net(reader)
    with pytest.raises(CaptureError, match="first was run 2 times forward but 0 times again"):
        capture(model, sequences(2), net_targets(model, "first"), EYE2)


def test_network_that_is_not_deterministic():
    model = Net(lambda s, x: s.head(F.dropout(s.first(x), 0.5, training=True).mean(1)))
    for sizes in ((2,), (1, 2), (1, 1)):  # one row at a time is checked too
        with pytest.raises(CaptureError, match="not deterministic"):
            capture(model, sequences(*sizes), net_targets(model, "first"), EYE2)


INTERACTING = {
    "batch statistics": lambda s, x: s.head(_centred(s.first(x).tanh()).tanh().mean(1)),
    "softmax over the batch": lambda s, x: s.head(s.first(x).mean(1).softmax(0)),
}


def _centred(x):
    return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize("reader", INTERACTING)
@pytest.mark.parametrize("sizes", [(3,), (3, 3), (1, 3)])
def test_samples_that_interact(reader, sizes):
    model = Net(INTERACTING[reader])
    with pytest.raises(CaptureError, match="samples interact"):
        capture(model, sequences(*sizes, length=3), net_targets(model, "first"), EYE2)


def test_input_modified_in_place():
    def reader(s, x):
        h = s.first(x).tanh()
        out = s.second(h)
        h.data.numpy()  # reading is allowed
        with torch.no_grad():
            h.mul_(3.0)
        return s.head(out.mean(1))

    model = Net(reader)
    with pytest.raises(CaptureError, match="second is changed in place"):
        capture(model, sequences(2), net_targets(model, "second"), EYE2)


def test_values_that_are_not_finite():
    model = Net()
    bad = sequences(3, 2)
    bad[0]["x"][1] = float("nan")
    with pytest.raises(CaptureError, match="not finite"):
        capture(model, bad, net_targets(model), EYE2)
    late = sequences(3, 2)
    late[1]["x"][1] = float("inf")
    with pytest.raises(CaptureError, match="not finite"):
        capture(model, late, net_targets(model), EYE2)
    with pytest.raises(CaptureError, match="sample 4 are not finite"):
        broken = Net(lambda s, x: s.head(s.first(torch.ones_like(x)).mean(1)) + x.mean((1, 2))[:, None])
        capture(broken, late, net_targets(broken, "first"), EYE2)


def test_bad_requests():
    model = Net()
    with pytest.raises(CaptureError, match="no batch"):
        capture(model, [], net_targets(model), EYE2)
    with pytest.raises(CaptureError, match="2 logits, but the loss expects 3"):
        capture(model, sequences(2), net_targets(model), torch.eye(3).double())
    with pytest.raises(CaptureError, match="leading size"):
        capture(model, [{"x": torch.zeros(2, 3, 4), "y": torch.zeros(3)}], net_targets(model), EYE2)
    three = Net(lambda s, x: s.head(s.first(x)))
    with pytest.raises(CaptureError, match="one row of K outputs"):
        capture(three, sequences(2), net_targets(three, "first"), EYE2)
    nothing = Net(lambda s, x: {"hidden": s.first(x)})
    with pytest.raises(CaptureError, match="no logits tensor"):
        capture(nothing, sequences(2), net_targets(nothing, "first"), EYE2)

    class Pair(nn.Linear):
        def forward(self, input):
            return super().forward(input), input

    pair = Net(lambda s, x: s.head(s.first(x)[0].mean(1)))
    pair.first = Pair(4, 4).double()
    with pytest.raises(CaptureError, match="one tensor to one tensor"):
        capture(pair, sequences(2), net_targets(pair, "first"), EYE2)


# ---- storage, dtypes, memory


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01), (torch.float32, 1e-4)])
def test_low_precision_models(dtype, tolerance):
    exact = tiny_bert("sdpa", labels=2)
    model = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(model.state_dict())  # the same, rounded weights
    batches = text_batches()
    targets = select_targets(model, ["query", "value"])
    captured = capture(model, batches, targets, EYE2)
    assert captured.operator.dtype == torch.float32
    assert captured.base_logits.dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = per_sample_jacobians(exact, batches, select_targets(exact, ["query", "value"]), EYE2)
    for name, found in DenseOperator.from_operator(captured.operator.to(torch.float64)).jacobians().items():
        assert float((found - expected[name]).norm() / expected[name].norm()) < tolerance


def test_storage_dtypes():
    model = tiny_bert(labels=2)
    batches = text_batches()
    targets = select_targets(model, ["query", "value"])
    wide = capture(model, batches, targets, EYE2, dtype=torch.float64).operator
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        stored = capture(model, batches, targets, EYE2, dtype=dtype).operator
        assert stored.dtype == dtype
        assert stored.nbytes == wide.nbytes * dtype.itemsize // 8
        one, two = DenseOperator.from_operator(stored.to(torch.float64)), DenseOperator.from_operator(wide)
        for name in targets:
            error = (one.jacobians()[name] - two.jacobians()[name]).norm() / two.jacobians()[name].norm()
            assert 0 < float(error) < tolerance


def test_memory_budget():
    model = tiny_bert(labels=2)
    batches = text_batches(sizes=(2, 2, 2))
    targets = select_targets(model, "all-linear")
    needed = capture(model, batches, targets, EYE2).operator.nbytes
    seen = []
    with pytest.raises(MemoryBudgetError, match=r"fewer modules.*`samples`"):
        capture(model, batches, targets, EYE2, memory_bytes=needed / 2, progress=lambda *a: seen.append(a))
    assert seen == []  # refused on the first batch
    capture(model, batches, targets, EYE2, memory_bytes=2 * needed, progress=lambda *a: seen.append(a))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    check_memory(1.0, 1.0, "this")
    estimate = estimate_bytes(targets, 6, 6, 2)
    assert needed <= estimate


def test_captured_factors_do_not_alias_the_network():
    model = Net()
    batches = sequences(2)
    captured = capture(model, batches, net_targets(model), EYE2, dtype=torch.float64)
    before = DenseOperator.from_operator(captured.operator).jacobians()["first"].clone()
    batches[0]["x"].zero_()
    assert torch.equal(DenseOperator.from_operator(captured.operator).jacobians()["first"], before)


def test_batches_may_be_cut_anywhere():
    model = tiny_bert(labels=2)
    whole = text_batches(sizes=(5,))[0]
    targets = select_targets(model, ["query", "value", "dense"])
    one = capture(model, [whole], targets, EYE2, dtype=torch.float64)
    parts = [{key: value[low:high] for key, value in whole.items()} for low, high in ((0, 1), (1, 4), (4, 5))]
    two = capture(model, parts, targets, EYE2, dtype=torch.float64)
    torch.testing.assert_close(one.base_logits, two.base_logits)
    a, b = DenseOperator.from_operator(one.operator), DenseOperator.from_operator(two.operator)
    for name in targets:
        torch.testing.assert_close(a.jacobians()[name], b.jacobians()[name])


def test_a_gradient_that_vanishes_is_an_empty_block():
    """One token only: attention cannot depend on its queries, and that is no error."""
    model = tiny_bert(labels=2)
    batches = [{"input_ids": torch.tensor([[3], [4]]), "attention_mask": torch.ones(2, 1).long()}]
    targets = select_targets(model, ["query", "value"], "last")
    operator = capture(model, batches, targets, EYE2, dtype=torch.float64).operator
    norms = operator.sample_norms()
    assert float(norms["bert.encoder.layer.1.attention.self.query"].max()) == 0
    assert float(norms["bert.encoder.layer.1.attention.self.value"].min()) > 0
    factors = {name: (torch.ones(8, 1).double(), torch.ones(8, 1).double()) for name in targets}
    torch.testing.assert_close(operator.apply_factors(factors), operator.apply(updates(factors)))
