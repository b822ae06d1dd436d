"""Target selection against PEFT itself, block shapes, and errors that help."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from ranksure.errors import TargetError
from ranksure.network.targets import (
    base_layer,
    block_shape,
    is_supported,
    parse_layers,
    select_targets,
    to_weight_shape,
)

SMALL = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}


def bert():
    return BertForSequenceClassification(BertConfig(vocab_size=20, **SMALL))


def albert():
    return AlbertForSequenceClassification(AlbertConfig(vocab_size=20, embedding_size=4, **SMALL))


def gpt2():
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=3, n_head=2, pad_token_id=0)
    return GPT2ForSequenceClassification(config)


def gpt2_lm():
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=3, n_head=2))


def llama():
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=20, pad_token_id=0, **SMALL))


def vit():
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SMALL))


def nested():
    """Numbers below the layer number, as in mixtures of experts, and names that end one another."""
    expert = lambda: nn.ModuleDict({"q": nn.Linear(4, 4), "xq": nn.Linear(4, 4)})  # noqa: E731
    layer = lambda: nn.ModuleDict({"q": nn.Linear(4, 4), "experts": nn.ModuleList([expert(), expert()])})  # noqa: E731
    model = nn.Module()
    model.body = nn.ModuleDict({"layers": nn.ModuleList([layer(), layer(), layer()])})
    model.head = nn.Linear(4, 2)
    return model


def peft_choice(model, target_modules, layers=None, task=None):
    config = LoraConfig(r=1, target_modules=target_modules, layers_to_transform=layers, task_type=task)
    return set(get_peft_model(copy.deepcopy(model), config).targeted_module_names)


@pytest.mark.parametrize(
    ("build", "targets", "layers"),
    [
        (bert, ["query", "value"], None),
        (bert, ["query", "value"], [2]),
        (bert, ["attention.output.dense", "classifier"], None),
        (bert, ["dense"], [0, 2]),
        (bert, ["bert.encoder.layer.1.attention.self.query"], None),
        (bert, r".*\.attention\.self\.(query|key)", None),
        (bert, r".*layer\.[01]\..*\.dense", None),
        (bert, ["word_embeddings", "key"], None),
        (albert, ["query", "ffn"], None),
        (albert, ["query"], [0]),
        (gpt2, ["c_attn", "c_proj"], None),
        (gpt2, ["mlp.c_proj", "wte"], None),
        (gpt2, ["c_fc"], [0, 1]),
        (llama, ["q_proj", "down_proj"], [1]),
        (vit, ["projection"], None),
        (nested, ["q"], None),
        (nested, ["q"], [1]),
        (nested, ["experts.1.q", "xq"], [0, 2]),
        (nested, r".*experts\.0\.q", None),
    ],
)
def test_the_same_modules_as_peft(build, targets, layers):
    model = build()
    ours = select_targets(model, targets, layers)
    assert set(ours) == peft_choice(model, targets, layers)
    assert ours
    for name, module in ours.items():
        assert module is model.get_submodule(name)
    order = [name for name, _ in model.named_modules()]
    assert list(ours) == sorted(ours, key=order.index)


@pytest.mark.parametrize(
    ("build", "task"),
    [(bert, "SEQ_CLS"), (albert, "SEQ_CLS"), (gpt2, "SEQ_CLS"), (llama, "SEQ_CLS"), (gpt2_lm, "CAUSAL_LM")],
)
def test_all_linear_is_pefts(build, task):
    """With the head left out, as PEFT leaves out what it saves whole."""
    model = build()
    assert set(select_targets(model, "all-linear")) == peft_choice(model, "all-linear", task=task)
    last = select_targets(model, "all-linear", "last")
    assert last
    assert len(last) < len(select_targets(model, "all-linear"))


@pytest.mark.parametrize("build", [bert, gpt2])
def test_all_linear_of_a_bare_encoder_is_pefts(build):
    """The base model under mean pooling has no head to leave out."""
    model = build().base_model
    assert set(select_targets(model, "all-linear")) == peft_choice(model, "all-linear", task="FEATURE_EXTRACTION")


def test_an_adapted_model_is_addressed_by_its_wrappers():
    plain = bert()
    wrapped = get_peft_model(copy.deepcopy(plain), LoraConfig(r=1, target_modules=["query", "dense"]))
    inner = wrapped.get_base_model()
    for targets in (["query", "value"], "all-linear", r".*(query|key)", ["dense"]):
        assert list(select_targets(inner, targets)) == list(select_targets(plain, targets))
    chosen = select_targets(wrapped, ["query", "value"], "last")
    assert list(chosen) == [f"base_model.model.bert.encoder.layer.2.attention.self.{x}" for x in ("query", "value")]
    module = next(iter(chosen.values()))
    assert base_layer(module) is module.base_layer is not module
    assert block_shape(module) == (8, 8)


def test_all_linear_leaves_out_a_saved_head():
    """Under SEQ_CLS PEFT wraps the head to save it whole; nothing inside is a target."""
    config = LoraConfig(r=1, target_modules=["query"], task_type="SEQ_CLS")
    wrapped = get_peft_model(bert(), config)
    names = set(select_targets(wrapped, "all-linear"))
    assert not any("classifier" in name for name in names)
    assert names == {f"base_model.model.{name}" for name in select_targets(bert(), "all-linear")}


def test_all_linear_of_a_plain_network_leaves_out_its_last_layer():
    assert set(select_targets(nested(), "all-linear")) == peft_choice(nested(), "all-linear") - {"head"}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (None, None),
        ("all", None),
        ("last", "last"),
        (3, [3]),
        ("3", [3]),
        ("0-2", [0, 1, 2]),
        (" 0 - 2 , 5", [0, 1, 2, 5]),
        ("0,2,2", [0, 2]),
        ([4, 1, 1], [1, 4]),
    ],
)
def test_parse_layers(written, read):
    assert parse_layers(written) == read


@pytest.mark.parametrize("written", ["first", "", "1-", "-1", "1..2", "3-1", "1,,2"])
def test_layers_that_cannot_be_read(written):
    with pytest.raises(TargetError, match="layers_to_transform"):
        parse_layers(written)


def test_last_layer():
    chosen = select_targets(bert(), ["query", "value"], "last")
    assert list(chosen) == [f"bert.encoder.layer.2.attention.self.{x}" for x in ("query", "value")]
    assert list(select_targets(bert(), ["query"], "0-1")) == [
        f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("targets", "layers", "message"),
    [
        (["qeury"], None, r"'qeury'; near matches: query"),
        (["query", "valeu"], None, r"'valeu'; near matches: .*value"),
        (["q_proj"], None, r"'q_proj'; its modules are called .*query"),
        (r".*\.quer", None, "no module of the model matches"),
        ("([", None, "not a regular expression"),
        (["LayerNorm"], None, "is a LayerNorm: only Linear"),
        (["query"], [7], r"names layer 7.*layers 0 to 2"),
        (["classifier"], "last", "no target module has a layer number"),
        ([], None, "no module of the model matches"),
    ],
)
def test_errors_that_help(targets, layers, message):
    with pytest.raises(TargetError, match=message):
        select_targets(bert(), targets, layers)


def test_exclude():
    model = bert()
    assert "classifier" in select_targets(model, ["classifier", "query"])
    assert "classifier" not in select_targets(model, r".*(classifier|query)", exclude=["classifier"])
    with pytest.raises(TargetError):
        select_targets(model, ["classifier"], exclude=["classifier"])


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(3, 5), (5, 3)),
        (nn.Conv2d(2, 4, (3, 5)), (4, 30)),
        (nn.Embedding(7, 3), (3, 7)),
        (gpt2().transformer.h[0].attn.c_attn, (24, 8)),
    ],
)
def test_block_shapes_and_back(module, shape):
    assert block_shape(module) == shape
    assert is_supported(module)
    delta = torch.randn(shape)
    update = to_weight_shape(module, delta)
    assert update.shape == module.weight.shape
    if isinstance(module, nn.Conv2d):
        x = torch.randn(1, 2, 6, 6)
        unfolded = torch.nn.functional.unfold(x, (3, 5))
        moved = torch.nn.functional.conv2d(x, update).flatten(2)
        torch.testing.assert_close(moved, delta @ unfolded)
    elif isinstance(module, nn.Embedding):
        torch.testing.assert_close(update[4], delta[:, 4])
    else:
        x = torch.randn(2, shape[1])
        moved = x @ update if module.weight.shape == shape[::-1] and shape[0] != shape[1] else x @ update.T
        torch.testing.assert_close(moved, x @ delta.T)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding_mode="reflect"),
        nn.Embedding(4, 2, max_norm=1.0),
        nn.Embedding(4, 2, scale_grad_by_freq=True),
        nn.LayerNorm(4),
        nn.Conv1d(4, 4, 3),
    ],
)
def test_unsupported_modules(module):
    assert not is_supported(module)
    with pytest.raises(TargetError, match="cannot be targets"):
        block_shape(module)
