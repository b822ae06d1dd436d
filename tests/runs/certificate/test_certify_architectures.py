"""Certificates on real architectures at toy sizes: gradients and losses against float64 autograd on merged copies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ranksure.adapters.loaded import read_adapter
from ranksure.network.gradient import mean_loss
from ranksure.runs.certificate.certify import certify
from tests.runs.networks import errors, gradients, merged_copy, randomise, reference

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set", "ignore:.is_gradient_checkpointing.")

VOCABULARY, CLASSES = 53, 3
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "initializer_range": 0.3,
    "num_labels": CLASSES,
}


def adapted(base: nn.Module, targets, dtype=torch.float64, **config) -> Any:
    config = {"r": 2, "lora_alpha": 4, "target_modules": targets, **config}
    model = get_peft_model(base.to(dtype), LoraConfig(**config), autocast_adapter_dtype=dtype != torch.float64)
    randomise(model, 0.2)
    return model.train()  # certificates are taken in evaluation mode all the same


def texts(labels: str, pad_left: bool = False):
    """Five rows in two batches, each padded to its own longest."""
    generator = torch.Generator().manual_seed(2)
    out = []
    for lengths in ([9, 4, 6], [3, 5]):
        width = max(lengths)
        ids, mask = torch.zeros(len(lengths), width).long(), torch.zeros(len(lengths), width).long()
        for row, length in enumerate(lengths):
            place = slice(width - length, width) if pad_left else slice(0, length)
            ids[row, place], mask[row, place] = torch.randint(1, VOCABULARY, (length,), generator=generator), 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if labels == "class":
            batch["labels"] = torch.randint(CLASSES, (len(lengths),), generator=generator)
        elif labels == "tokens":
            batch["labels"] = torch.randint(CLASSES, ids.shape, generator=generator).where(mask > 0, -100)
        elif labels == "number":
            batch["labels"] = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
        else:
            batch["labels"] = ids.where((mask > 0) & (torch.arange(width) > 1), -100)
        out.append(batch)
    return out


def images(size: int, channels: int = 3):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, channels, size, size, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (5,), generator=generator)
    return [{"pixel_values": x[:3], "labels": y[:3]}, {"pixel_values": x[3:], "labels": y[3:]}]


def one_loss(base, batch):
    """The mean loss that the model computes itself; a causal one's again in float64, where it rounds to float32."""
    output = base(**batch)
    if base.loss_type in ("ForTokenClassification", "ForMaskedLM") or batch["labels"].dim() != 2:
        return output.loss
    value = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert float(value.detach()) == pytest.approx(float(output.loss.detach()), rel=1e-5)
    return value


def own_loss(batches):
    """The mean over all terms of the model's own losses, batch by batch."""

    def loss(base):
        values, counts = [], []
        for batch in batches:
            labels = batch["labels"]
            shifted = labels.dim() == 2 and "ForTokenClassification" != base.loss_type != "ForMaskedLM"
            terms = labels[:, 1:] if shifted else labels
            counts.append(float((terms != -100).sum()))
            values.append(one_loss(base, batch))
        return sum(v * c for v, c in zip(values, counts, strict=True)) / sum(counts)

    return loss


@pytest.fixture(autouse=True)
def _exact_norm(monkeypatch):
    """Llama's norm rounds to float32 inside, which a float64 reference would show."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def llama(**settings) -> nn.Module:
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = {key: ENCODER[key] for key in keys}
    return LlamaForCausalLM(LlamaConfig(**config, num_key_value_heads=1, initializer_range=0.3, **settings))


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=24, initializer_range=0.3)
    return GPT2LMHeadModel(config)


ATTENTION = ["query", "value"]
CASES: dict[str, Any] = {
    "BERT": lambda: (
        adapted(BertForSequenceClassification(BertConfig(**ENCODER)), ATTENTION + ["dense"]),
        texts("class"),
    ),
    "BERT, its first layers": lambda: (
        adapted(
            BertForSequenceClassification(BertConfig(**ENCODER)),
            ["word_embeddings", "position_embeddings", "layer.0.attention.self.query"],
        ),
        texts("class"),
    ),
    "BERT, one number": lambda: (
        adapted(BertForSequenceClassification(BertConfig(**{**ENCODER, "num_labels": 1})), ATTENTION),
        texts("number"),
    ),
    "BERT, tokens": lambda: (adapted(BertForTokenClassification(BertConfig(**ENCODER)), ATTENTION), texts("tokens")),
    "BERT, masked words": lambda: (adapted(BertForMaskedLM(BertConfig(**ENCODER)), ATTENTION), texts("words")),
    "ALBERT, shared layers": lambda: (
        adapted(
            AlbertForSequenceClassification(AlbertConfig(**ENCODER, embedding_size=8)),
            [*ATTENTION, "ffn", "ffn_output"],
        ),
        texts("class"),
    ),
    "GPT-2, Conv1D": lambda: (adapted(gpt2(), ["c_attn", "c_proj", "c_fc"]), texts("words")),
    "GPT-2, tied embeddings": lambda: (adapted(gpt2(), ["wte"]), texts("words")),
    "GPT-2, tied embeddings and output": lambda: (adapted(gpt2(), ["wte", "lm_head", "c_attn"]), texts("words")),
    "Llama": lambda: (adapted(llama(), ["q_proj", "v_proj", "gate_proj", "down_proj"]), texts("words")),
    "Llama, padded left": lambda: (adapted(llama(), ["q_proj", "o_proj"]), texts("words", pad_left=True)),
    "Llama, tied": lambda: (adapted(llama(tie_word_embeddings=True), ["embed_tokens", "k_proj"]), texts("words")),
    "ViT": lambda: (
        adapted(
            ViTForImageClassification(
                ViTConfig(
                    image_size=8,
                    patch_size=4,
                    **{key: ENCODER[key] for key in ENCODER if key not in ("vocab_size", "max_position_embeddings")},
                )
            ),
            r".*layers?\.\d+\..*(q_proj|query|v_proj|value|fc1|intermediate\.dense)|.*patch_embeddings\.projection",
        ),
        images(8),
    ),
    "ResNet": lambda: (
        adapted(
            ResNetForImageClassification(
                ResNetConfig(
                    embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=CLASSES
                )
            ),
            ["convolution"],
        ),
        images(16),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_rho_are_those_of_float64_autograd(name):
    torch.manual_seed(0)
    model, batches = CASES[name]()
    loss, expected = reference(model, own_loss(batches))
    read = read_adapter(model)
    assert not read.untested
    found = gradients(model, batches)
    assert found.terms.mean == pytest.approx(loss, rel=1e-9)
    assert max(errors(found.gradients, expected)) < 1e-8
    certificate = certify(model, batches, weight_decay=1e-3)
    assert certificate.loss == pytest.approx(loss, rel=1e-9) and certificate.verdict == "not-converged"
    for module, g in expected.items():
        state = certificate.modules[module]
        assert state.lam == pytest.approx(1e-3 / read.blocks[module].scale)
        assert state.spectral_ratio == pytest.approx(float(torch.linalg.matrix_norm(g, 2)) / state.lam, rel=1e-5)
        u, v = read.blocks[module].factors
        left, right = torch.linalg.qr(u).Q, torch.linalg.qr(v).Q
        outside = (torch.eye(len(left)) - left @ left.T) @ g @ (torch.eye(len(right)) - right @ right.T)
        if state.rank_used == 2:
            assert state.outside * state.lam == pytest.approx(float(torch.linalg.matrix_norm(outside, 2)), rel=1e-5)
        assert state.followed == pytest.approx(1 - float(outside.square().sum() / g.square().sum()), abs=1e-7)
    assert 0 <= certificate.training_gain_bound <= certificate.rank_gain_bound
    # without the adapter: the base network, whatever is tied to what
    with model.disable_adapter():
        plain = mean_loss(model, batches)
    with read.without():
        assert mean_loss(model, batches) == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("weighting", ["token", "sample"])
def test_a_language_model_by_tokens_and_by_samples(weighting):
    torch.manual_seed(0)
    model, batches = CASES["Llama"]()

    def loss(base):
        total, weight = 0.0, 0.0
        for batch in batches:
            for row in range(len(batch["labels"])):
                one = {key: value[row : row + 1] for key, value in batch.items()}
                count = float((one["labels"][:, 1:] != -100).sum())
                share = 1.0 if weighting == "sample" else count
                total, weight = total + share * one_loss(base, one), weight + share
        return total / weight

    expected_loss, expected = reference(model, loss)
    found = gradients(model, batches, weighting=weighting)
    assert found.terms.mean == pytest.approx(expected_loss, rel=1e-9)
    assert max(errors(found.gradients, expected)) < 1e-8


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["BERT, its first layers", "Llama"])
def test_gradient_checkpointing_as_a_training_run_leaves_it(name, reentrant):
    torch.manual_seed(0)
    model, batches = CASES[name]()
    expected = certify(model, batches, lam=1e-3)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    found = certify(model, batches, lam=1e-3)
    assert found.rank_gain_bound == pytest.approx(expected.rank_gain_bound, rel=1e-9)
    assert {n: s.gradient_norm for n, s in found.modules.items()} == pytest.approx(
        {n: s.gradient_norm for n, s in expected.modules.items()}, rel=1e-9
    )


def test_modules_to_save_and_biases_are_outside_and_as_trained():
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**ENCODER))
    model = adapted(base, ATTENTION, task_type=TaskType.SEQ_CLS, bias="lora_only")
    with torch.no_grad():  # as after training: the saved head and the biases have moved
        for name, p in model.named_parameters():
            if "modules_to_save" in name or ("query" in name and name.endswith("bias")):
                p.add_(0.3 * torch.randn_like(p))
    batches = texts("class")
    loss, expected = reference(model, own_loss(batches))
    found = certify(model, batches, lam=1e-3)
    assert found.loss == pytest.approx(loss, rel=1e-9)
    assert found.outside == ["biases trained with bias='lora_only'", "modules_to_save (classifier)"]
    grads = gradients(model, batches).gradients
    assert max(errors(grads, expected)) < 1e-8
    # F at zero keeps the trained head and biases: only the update goes
    base, _ = merged_copy(model)
    for name, (u, v) in read_adapter(model).factors.items():
        layer = base.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight - u @ v.T)
    with read_adapter(model).without():
        assert mean_loss(model, batches) == pytest.approx(float(own_loss(batches)(base).detach()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_the_error_of_gradients_in_the_model_s_own_precision(name, dtype):
    """Half-precision bases with float32 adapters: against float64 autograd at the same stored weights."""
    torch.manual_seed(0)
    if name == "BERT":
        model, batches = adapted(BertForSequenceClassification(BertConfig(**ENCODER)), ATTENTION, dtype), texts("class")
    else:
        model, batches = adapted(llama(), ["q_proj", "down_proj"], dtype), texts("words")
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)
    loss, expected = reference(model, own_loss(batches))
    found = gradients(model, batches)
    assert all(g.dtype == torch.float32 for g in found.gradients.values())
    rounding = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    worst = max(errors(found.gradients, expected))
    assert worst < rounding and worst > 0
    assert found.terms.mean == pytest.approx(loss, rel=rounding)
    certificate = certify(model, batches, lam=1e-3)
    assert math.isfinite(certificate.rank_gain_bound) and certificate.verdict == "not-converged"
    exact = float(torch.linalg.matrix_norm(next(iter(expected.values())), 2))
    assert next(iter(certificate.modules.values())).gradient_norm == pytest.approx(exact, rel=rounding)


def test_an_encoder_decoder_is_not_checked():
    torch.manual_seed(0)
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = adapted(T5ForConditionalGeneration(config), ["q"])
    found = certify(model, [{"input_ids": torch.ones(1, 3).long(), "labels": torch.ones(1, 3).long()}], lam=0.1)
    assert found.verdict == "not-checked" and "encoder-decoder" in found.reasons[0]


def test_a_model_with_an_adapter_loaded_into_it():
    """Not a PeftModel: transformers' own way of loading adapters."""
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**ENCODER)).double()
    base.add_adapter(LoraConfig(r=2, target_modules=ATTENTION))
    randomise(base, 0.2)
    batches = texts("class")
    found = certify(base, batches, lam=1e-3)
    assert found.loss == pytest.approx(
        float(base.eval()(**batches[0]).loss) * 0.6 + float(base(**batches[1]).loss) * 0.4
    )
    assert set(found.modules) == {f"bert.encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in ATTENTION}


def test_state_of_the_model_s_configuration_is_kept():
    torch.manual_seed(0)
    model, batches = CASES["BERT"]()
    assert model.config.problem_type is None
    certify(model, batches, lam=1e-3)
    assert model.config.problem_type is None  # transformers writes there when it computes a loss
