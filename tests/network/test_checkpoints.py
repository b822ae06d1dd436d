"""All weights of a loaded model are those of its checkpoint, whatever transformers would draw or leave out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    CamembertConfig,
    CamembertModel,
    CLIPConfig,
    CLIPModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from ranksure.errors import ModelError
from ranksure.network.checkpoints import load_weights, with_embeddings
from tests.refusals import refusal
from tests.tiny_text import VOCABULARY, bert_config, save_gpt2, save_roberta, save_tokenizer

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
AUTO = {
    "text": AutoModelForSequenceClassification,
    "image": AutoModelForImageClassification,
    "speech": AutoModelForAudioClassification,
    "masked": AutoModelForMaskedLM,
    "causal": AutoModelForCausalLM,
}
WHISPER = WhisperConfig(
    vocab_size=20,
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    num_mel_bins=8,
    max_source_positions=20,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    classifier_proj_size=8,
)
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForSequenceClassification(bert_config()),
    "bert base": lambda: BertModel(bert_config()),
    "bert without pooler": lambda: BertModel(bert_config(), add_pooling_layer=False),
    "bert masked": lambda: BertForMaskedLM(bert_config()),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=30, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
    ),
    "camembert": lambda: CamembertModel(CamembertConfig(vocab_size=30, **SMALL)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(vocab_size=30, num_local_experts=2, **SMALL)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=30, **SMALL)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=30, tie_word_embeddings=True, **SMALL)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ),
    "vit": lambda: ViTModel(ViTConfig(image_size=16, patch_size=8, **SMALL)),
    "clip": lambda: CLIPModel(
        CLIPConfig(
            text_config={"vocab_size": 30, **SMALL},
            vision_config={"image_size": 16, "patch_size": 8, **SMALL},
            projection_dim=8,
        )
    ),
    "whisper": lambda: WhisperForConditionalGeneration(WHISPER),
}


def saved(folder: Path, model: str, config: dict[str, Any] | None = None, **options: Any) -> str:
    """A checkpoint, with other values in its configuration."""
    torch.manual_seed(0)
    MODELS[model]().save_pretrained(folder, **options)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    return str(folder)


def edited(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


def loads(kind: str, name: str, **more: Any) -> tuple[PreTrainedModel, list[str], list[str]]:
    head = kind in ("text", "image", "speech")
    options = {"num_labels": 3} if head else {}
    return load_weights(AUTO[kind], f"a model of {kind}", name, [], head=head, **options, **more)


def refused(kind: str, name: str, *parts: str) -> None:
    refusal(ModelError, [name, *parts], loads, kind, name)


@pytest.mark.parametrize(
    ("kind", "model", "new"),
    [
        ("text", "bert base", {"classifier"}),
        ("text", "bert without pooler", {"classifier", "bert.pooler.dense"}),
        ("text", "bert masked", {"classifier", "bert.pooler.dense"}),
        ("text", "camembert", {"classifier.dense", "classifier.out_proj"}),  # whose head stands before its base
        ("text", "distilbert", {"classifier", "pre_classifier"}),
        ("text", "llama", {"score"}),
        ("text", "llama tied", {"score"}),
        ("text", "t5", {"classification_head.dense", "classification_head.out_proj"}),
        ("image", "vit", {"classifier"}),
        ("image", "clip", {"classifier"}),
        ("speech", "whisper", {"projector", "classifier"}),
        ("masked", "bert masked", set()),
        ("causal", "llama", set()),
        ("causal", "llama tied", set()),
    ],
)
def test_only_a_head_is_new_and_it_is_drawn_by_the_seed(tmp_path, kind, model, new):
    name = saved(tmp_path, model)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, missing, reshaped = loads(kind, name)
    assert torch.equal(torch.get_rng_state(), before)
    assert {key.rpartition(".")[0] for key in missing} == new and reshaped == []
    torch.manual_seed(2)
    again, other = loads(kind, name)[0].state_dict(), loads(kind, name, seed=1)[0].state_dict()
    for key, value in first.state_dict().items():
        assert torch.equal(value, again[key])
        assert key.endswith("bias") or torch.equal(value, other[key]) == (key not in missing)


@pytest.mark.parametrize("model", ["bert", "bert base"])
@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"num_hidden_layers": 3}, ["lack", "bert.encoder.layer.2.", "and 13 more"]),
        ({"num_hidden_layers": 1}, ["hold", "encoder.layer.1.", "has no place for"]),
        ({"intermediate_size": 40}, ["bert.encoder.layer.0.intermediate.dense.weight", "(40,)", "(24,)", "and 3 more"]),
        ({"vocab_size": 99}, ["bert.embeddings.word_embeddings.weight", "(99, 16)", f"({len(VOCABULARY)}, 16)"]),
        ({"hidden_size": 32}, ["shape", "bert.", "32"]),
        ({"max_position_embeddings": 64}, ["bert.embeddings.position_embeddings.weight", "(64, 16)", "(40, 16)"]),
        ({"type_vocab_size": 1}, ["bert.embeddings.token_type_embeddings.weight", "(1, 16)", "(2, 16)"]),
    ],
)
def test_a_configuration_of_another_model_is_refused(tmp_path, model, config, parts):
    refused("text", saved(tmp_path, model, config), *parts)


@pytest.mark.parametrize(
    ("kind", "model", "lost"),
    [
        ("text", "bert", "layer.1.intermediate"),
        ("text", "bert", "embeddings.LayerNorm"),
        ("text", "distilbert", "attention.q_lin"),
        ("text", "t5", "decoder.block.1"),
        ("image", "vit", "embeddings.cls_token"),
        ("image", "clip", "vision_model.encoder.layers.1.mlp"),
        ("speech", "whisper", "encoder.conv1"),
        ("masked", "bert masked", "cls.predictions.transform"),
        ("masked", "bert base", "pooler"),  # its head is no part of a base
        ("causal", "llama", "lm_head"),
        ("causal", "llama tied", "model.norm"),
    ],
)
def test_a_file_without_some_weights_is_refused(tmp_path, kind, model, lost):
    saved(tmp_path, model)

    def drop(tensors: dict[str, Tensor]) -> None:
        gone = [key for key in tensors if lost in key]
        assert gone
        for key in gone:
            del tensors[key]

    refused(kind, edited(tmp_path, drop), "lack", "would be random", "cls." if model == "bert base" else lost)


def test_weights_of_more_than_the_network_has_are_refused_where_they_belong_to_it(tmp_path):
    saved(tmp_path, "bert")
    own = torch.zeros(16)

    def refuses(name: str) -> bool:
        edited(tmp_path, lambda tensors: tensors.update({name: own}))
        try:
            loads("text", str(tmp_path))
        except ModelError as error:
            assert name in str(error)
            return True
        finally:
            edited(tmp_path, lambda tensors: tensors.pop(name))
        return False

    assert refuses("bert.encoder.layer.1.crossattention.self.query.weight")
    assert refuses("bert.encoder.layer.1.attention.self.query.lora_A.weight")
    assert refuses("bert.encoder.layer.7.output.dense.bias")
    assert not refuses("cls.predictions.bias")
    assert not refuses("bert.embeddings.position_ids")
    assert not refuses("bert.embeddings.word_embeddings._weight")
    assert not refuses("bert.encoder.layer.0.attention.bias")
    assert not refuses("bert.pooler_of_another.dense.bias")


def test_what_older_versions_wrote_beside_the_weights_is_no_reason(tmp_path):
    name = save_gpt2(tmp_path)
    buffers = {"h.0.attn.bias": torch.ones(1, 1, 40, 40), "h.0.attn.masked_bias": torch.ones(())}
    edited(tmp_path, lambda tensors: tensors.update(buffers))
    assert loads("text", name)[1] == ["score.weight"]
    edited(tmp_path, lambda t: t.update({"h.0.attn.c_attn.weight": t["h.0.attn.c_attn.weight"].T.contiguous()}))
    refused("text", name, "transformer.h.0.attn.c_attn.weight", "(48, 16)", "(16, 48)")


def test_a_bias_that_the_network_does_not_add_is_refused(tmp_path):
    saved(tmp_path, "llama")
    name = edited(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}))
    refused("causal", name, "model.layers.0.self_attn.q_proj.bias", "has no place for")


def test_roberta_holds_a_pooler_that_its_classifier_does_not_use(tmp_path):
    name = save_roberta(tmp_path)
    assert any("pooler" in key for key in load_file(tmp_path / "model.safetensors"))
    model, missing, _ = loads("text", name)
    assert isinstance(model, RobertaForSequenceClassification)
    assert {key.rpartition(".")[0] for key in missing} == {"classifier.dense", "classifier.out_proj"}


def test_a_head_of_another_size_is_new_and_nothing_else_may_have_another_size(tmp_path):
    name = saved(tmp_path / "two", "bert")
    assert loads("text", name)[1:] == ([], ["classifier.bias", "classifier.weight"])
    torch.manual_seed(0)
    model = transformers.WhisperForAudioClassification(WHISPER)
    model.save_pretrained(tmp_path / "w")
    path = tmp_path / "w" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classifier_proj_size": 12}))
    refused("speech", str(tmp_path / "w"), "projector.bias", "projector.weight", "in other shapes")


def test_a_shard_that_is_missing_or_short_is_refused(tmp_path):
    name = saved(tmp_path, "llama", max_shard_size="20kB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and loads("causal", name)[1:] == ([], [])
    tensors = load_file(shards[-1])
    gone = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != gone}, shards[-1], metadata={"format": "pt"})
    refused("causal", name, "lack", gone)
    torch.save(MODELS["llama"]().state_dict(), tmp_path / "pytorch_model.bin")  # never read in its place
    shards[-1].unlink()
    refused("causal", name, "cannot be loaded as a model of causal", shards[-1].name)


def test_an_expert_without_weights_is_refused(tmp_path):
    saved(tmp_path, "mixtral")
    name = edited(tmp_path, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.1.w1.weight"))
    refused("causal", name, "cannot be loaded", "of experts")


def test_tensors_from_elsewhere_may_be_new(tmp_path):
    saved(tmp_path, "llama")
    name = edited(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    assert loads("causal", name, elsewhere={"lm_head.weight"})[1] == ["lm_head.weight"]


def test_tokens_without_an_embedding_are_refused(tmp_path):
    model = MODELS["bert"]()
    tokenizer: BertTokenizerFast = save_tokenizer(tmp_path)
    last = len(VOCABULARY) - 1
    rows = [{"input_ids": [2, last, 3], "token_type_ids": [0, 1, 1]}, {"input_ids": [2, 3]}]
    assert with_embeddings(model, rows, tokenizer) is rows
    refusal(ModelError, [f"input_ids up to {last + 1}"], with_embeddings, model, [{"input_ids": [last + 1]}], tokenizer)
    refusal(ModelError, ["token_type_ids up to 2"], with_embeddings, model, [{"token_type_ids": [2]}], tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    assert with_embeddings(model, rows[:1], tokenizer) == rows[:1]  # nothing is padded
    refusal(ModelError, [f"input_ids up to {last + 1}"], with_embeddings, model, rows, tokenizer)
