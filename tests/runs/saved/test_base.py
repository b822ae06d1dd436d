"""Runs loaded as they were saved, and everything that does not fit refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from ranksure.errors import AdapterError, DataError, ModelError, RanksureError, SettingError
from ranksure.runs.certificate.certify import certify
from ranksure.runs.saved.data import DataSettings, read_data
from ranksure.runs.saved.open import load_run
from tests.runs.tiny_runs import (
    PAIRS,
    classifier,
    language_model,
    llama_config,
    save_gpt2_lm,
    save_llama,
    save_mixtral,
    save_pairs,
    save_runs,
)
from tests.tiny_text import frame, loaded, save_bert_classifier, save_gpt2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_runs(tmp_path_factory.mktemp("runs"))


def same_logits(a: torch.nn.Module, b: torch.nn.Module, **batch: torch.Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(a(**batch).logits, b(**batch).logits)


IDS = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])

# ---------------------------------------------------------------------------------------------------------------------
# what is saved comes back


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r": 3, "lora_alpha": 1, "use_rslora": True},
        {"rank_pattern": {"layer.1.attention.self.query": 4}, "alpha_pattern": {"value": 5}},
        {"bias": "lora_only"},
        {"target_modules": ["query", "word_embeddings"]},
    ],
)
def test_a_classifier_comes_back_as_saved(root, tmp_path, settings):
    original = classifier(str(root / "bert"), 3, **settings)
    original.save_pretrained(tmp_path / "run")
    run = load_run(tmp_path / "run")
    same_logits(original, run.model, input_ids=IDS)
    assert run.task_type == "SEQ_CLS" and run.base == str(root / "bert") and run.notes == []
    assert not run.model.training and not any(p.requires_grad for p in run.model.parameters())
    again = load_run(tmp_path / "run", trainable=True)
    trained = {name for name, p in original.named_parameters() if p.requires_grad}
    assert {name for name, p in again.model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens", "v_proj"]])
def test_a_causal_run_comes_back_as_saved(root, tmp_path, targets):
    original = language_model(str(root / "llama"), target_modules=targets)
    original.save_pretrained(tmp_path / "run")
    run = load_run(tmp_path / "run")
    same_logits(original, run.model, input_ids=IDS)
    assert run.task_type == "CAUSAL_LM" and run.tokenizer.chat_template


def test_conv1d(tmp_path):
    base = save_gpt2_lm(tmp_path / "gpt2")
    original = language_model(base, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    original.save_pretrained(tmp_path / "run")
    run = load_run(tmp_path / "run")
    same_logits(original, run.model, input_ids=IDS)
    assert certify(run.model, read_data(run, save_pairs(tmp_path / "p.jsonl")).batches, lam=0.01).modules


def test_a_resized_vocabulary(root, tmp_path):
    """Tokens were added in training: PEFT saves the embeddings, the Trainer the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "llama")
    tokenizer.add_tokens(["<new>"])
    network = AutoModelForCausalLM.from_pretrained(root / "llama")
    network.resize_token_embeddings(len(tokenizer))
    original = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    original.save_pretrained(tmp_path / "run", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "run")
    run = load_run(tmp_path / "run")
    same_logits(original, run.model, input_ids=torch.tensor([[5, len(tokenizer) - 1, 6]]))
    assert "<new>" in run.tokenizer.get_vocab()


ADDED = {
    "saved modules": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "saved modules, tied": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
    "kept tied": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "LoRA on both": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
    "LoRA on tied embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, True),
    "plain": ({"target_modules": ["q_proj"]}, False),
}
LOST = {
    "saved without embeddings": ({"target_modules": ["q_proj"]}, None),
    "LoRA on embeddings alone": ({"target_modules": ["q_proj", "embed_tokens"]}, "lm_head"),
    "LoRA on the head alone": ({"target_modules": ["q_proj", "lm_head"]}, "model.embed_tokens"),
}


def with_added_token(folder: Path, settings: dict[str, Any], tied: bool, **saving: Any) -> tuple[PeftModel, int]:
    """A run that added a token; its model and the token's id."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    save_llama(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    network = LlamaForCausalLM(llama_config(len(tokenizer), tie_word_embeddings=tied))
    network.save_pretrained(folder / "base")
    tokenizer.add_tokens(["<new>"])
    network = AutoModelForCausalLM.from_pretrained(folder / "base")
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model: Any = get_peft_model(network, LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.eval().save_pretrained(folder / "run", **saving)
    tokenizer.save_pretrained(folder / "run")
    return model, len(tokenizer) - 1


@pytest.mark.parametrize("name", ADDED)
def test_added_tokens_load_where_peft_loads_them(tmp_path, name):
    original, new = with_added_token(tmp_path, *ADDED[name])
    run = load_run(tmp_path / "run")
    same_logits(original, run.model, input_ids=torch.tensor([[5, new, 6]]))
    assert certify(run.model, [{"input_ids": IDS, "labels": IDS}], lam=0.01).modules


@pytest.mark.parametrize("name", LOST)
def test_added_tokens_that_peft_loses_are_refused_for_that(tmp_path, name):
    settings, lost = LOST[name]
    _, new = with_added_token(tmp_path, settings, False, save_embedding_layers="auto" if lost else False)
    if lost is None:
        with pytest.raises(AdapterError, match=r"PEFT saved none of their rows, .* embeddings in modules_to_save"):
            load_run(tmp_path / "run")
        return
    with pytest.raises(AdapterError, match=rf"did not save the rows of {lost} .*{lost} in modules_to_save") as raised:
        load_run(tmp_path / "run")
    assert f"has {new + 1} tokens and the base {new}" in str(raised.value)


def test_all_biases_beside_a_saved_head(root, tmp_path):
    original = classifier(str(root / "bert"), 3, bias="all")
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape))
    original.save_pretrained(tmp_path / "run")
    run = load_run(tmp_path / "run")
    same_logits(original, run.model, input_ids=IDS)
    found = certify(run.model, [{"input_ids": IDS, "labels": torch.tensor([0, 2])}], lam=0.01)
    assert found.outside == ["biases trained with bias='all'", "modules_to_save (classifier)"]
    key = "base_model.model.classifier.modules_to_save.bias"  # PEFT's own copy: another one has no meaning
    edit_weights(tmp_path / "run", lambda tensors: tensors[key].add_(1))
    with pytest.raises(AdapterError, match=r"classifier\.modules_to_save\.bias has no place"):
        load_run(tmp_path / "run")


def test_attention_of_a_mixture_alone(root, tmp_path):
    base = save_mixtral(tmp_path / "base")
    original = language_model(base, target_modules=["q_proj", "v_proj"])
    original.save_pretrained(tmp_path / "run")
    run = load_run(tmp_path / "run")
    same_logits(original, run.model, input_ids=IDS)
    assert certify(run.model, [{"input_ids": IDS, "labels": IDS}], lam=0.01).modules
    original = language_model(base, target_modules=["q_proj", "w1", "w2", "w3"])
    original.save_pretrained(tmp_path / "experts")
    run = load_run(tmp_path / "experts")
    same_logits(original, run.model, input_ids=IDS)
    found = certify(run.model, [{"input_ids": IDS, "labels": IDS}], lam=0.01)
    assert found.verdict == "not-checked" and found.reasons[0].startswith("target_parameters=")


@pytest.mark.parametrize("start", ["eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone(root, tmp_path, start):
    original = classifier(str(root / "bert"), init_lora_weights=start)
    original.save_pretrained(tmp_path / "run")
    run = load_run(tmp_path / "run")
    same_logits(original, run.model, input_ids=IDS)
    found = certify(run.model, [{"input_ids": IDS, "labels": torch.tensor([0, 1])}], lam=0.01)
    assert found.modules and not found.reasons


def test_a_base_that_was_quantised_in_training_is_not_checked(root, tmp_path):
    """PEFT's model card is the only place that says so."""
    shutil.copytree(root / "texts", tmp_path / "run")
    card = "# Model\n\n## Training procedure\n\n\nThe following `bitsandbytes` quantization config was used during "
    card += "training:\n- quant_method: bitsandbytes\n- load_in_8bit: False\n- load_in_4bit: True\n\n### Versions\n"
    (tmp_path / "run" / "README.md").write_text(card)
    run = load_run(tmp_path / "run")
    found = certify(run.model, [{"input_ids": IDS, "labels": torch.tensor([0, 1])}], lam=0.01)
    assert found.verdict == "not-checked" and "quantised to 4 bits in training" in found.reasons[0]


def test_a_field_of_a_newer_peft_reaches_the_certificate(root, tmp_path):
    shutil.copytree(root / "texts", tmp_path / "run")
    edit(tmp_path / "run", newer_thing={"rank": 3}, other=None)
    run = load_run(tmp_path / "run")
    found = certify(run.model, [{"input_ids": IDS, "labels": torch.tensor([0, 1])}], lam=0.01)
    assert found.verdict == "not-checked" and found.to_json()["reasons"] == found.reasons
    assert len(found.reasons) == 1 and found.reasons[0].startswith("newer_thing=")


def test_ranks_that_peft_itself_cannot_load_again(root, tmp_path):
    """It sorts the keys of patterns when it saves, and takes the first that matches when it loads."""
    original = classifier(str(root / "bert"), rank_pattern={"value": 4, "layer.1.*": 1})
    original.save_pretrained(tmp_path / "run")
    with pytest.raises(
        AdapterError, match=r"layer\.1\.\S+value was trained at rank 4, by .* key 'value', .* let only one"
    ):
        load_run(tmp_path / "run")
    edit(tmp_path / "run", rank_pattern={"value": 4, "layer.1.*query": 1})
    same_logits(original, load_run(tmp_path / "run").model, input_ids=IDS)


def test_a_start_that_cannot_be_repeated_is_the_reason(root, tmp_path):
    shutil.copytree(root / "texts", tmp_path / "run")
    edit(tmp_path / "run", init_lora_weights="corda")
    with pytest.raises(AdapterError, match="init_lora_weights='corda' cannot be repeated: `eigens`"):
        load_run(tmp_path / "run")


def test_one_of_several_adapters(root, tmp_path):
    original = classifier(str(root / "bert"))
    original.add_adapter("other", LoraConfig(r=3, target_modules=["key"], task_type="SEQ_CLS"))
    original.save_pretrained(tmp_path / "run")
    assert load_run(tmp_path / "run").model.peft_config["default"].r == 2
    assert load_run(tmp_path / "run", adapter="other").model.peft_config["default"].r == 3
    with pytest.raises(AdapterError, match="no adapter 'third'; it has other"):
        load_run(tmp_path / "run", adapter="third")
    (tmp_path / "run" / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"several folders do \(other\)"):
        load_run(tmp_path / "run")


def test_pickled_weights_are_read_and_told(root, tmp_path):
    shutil.copytree(root / "texts", tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    (tmp_path / "run" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "run" / "adapter_model.bin")
    run = load_run(tmp_path / "run")
    assert "pickled" in run.notes[0]
    same_logits(run.model, load_run(root / "texts").model, input_ids=IDS)


def test_the_task_is_told_by_what_there_is(root, tmp_path):
    def without_task(source: str, target: str) -> Path:
        shutil.copytree(root / source, tmp_path / target)
        edit(tmp_path / target, task_type=None)
        return tmp_path / target

    assert load_run(without_task("texts", "a")).task_type == "SEQ_CLS"  # by its head
    assert load_run(without_task("causal", "b")).task_type == "CAUSAL_LM"  # by its base
    torch.manual_seed(0)
    plain = get_peft_model(loaded(str(root / "bert")), LoraConfig(r=1, target_modules=["query"]))
    plain.save_pretrained(tmp_path / "c")
    with pytest.raises(SettingError, match="add `task` SEQ_CLS or CAUSAL_LM"):
        load_run(tmp_path / "c")
    with pytest.raises(ModelError, match=r"classifier\.\w+ is neither in .* nor saved with the adapter"):
        load_run(tmp_path / "c", task="SEQ_CLS")
    with pytest.raises(SettingError, match="trained for SEQ_CLS, not CAUSAL_LM"):
        load_run(root / "texts", task="CAUSAL_LM")
    edit(tmp_path / "a", task_type="TOKEN_CLS")
    with pytest.raises(AdapterError, match="the adapter's task is TOKEN_CLS"):
        load_run(tmp_path / "a")


# ---------------------------------------------------------------------------------------------------------------------
# what does not fit


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


A = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.weight"


def bad_run(kind: str, folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "half a header":
        weights.write_bytes(weights.read_bytes()[:40])
    elif kind == "not tensors":
        weights.unlink()
        torch.save([1, 2], folder / "adapter_model.bin")
    elif kind == "code in a pickle":
        weights.unlink()
        torch.save({"a": Path("x")}, folder / "adapter_model.bin")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "missing tensor":
        edit_weights(folder, lambda tensors: tensors.pop(A))
    elif kind == "missing head":
        edit_weights(folder, lambda tensors: tensors.pop("base_model.model.classifier.weight"))
    elif kind == "extra tensor":
        edit_weights(folder, lambda tensors: tensors.update({A.replace("query", "key"): tensors[A].clone()}))
    elif kind == "other ranks":
        edit(folder, r=3)
    elif kind == "other pattern":
        edit(folder, rank_pattern={"layer.1.attention.self.query": 1})
    elif kind == "NaN":
        edit_weights(folder, lambda tensors: tensors[A].fill_(torch.nan))
    elif kind == "rank zero":
        edit(folder, r=0)
    elif kind == "not LoRA":
        edit(folder, peft_type="LOHA")
    elif kind == "config is no JSON":
        (folder / "adapter_config.json").write_text("{")
    elif kind == "config is a list":
        (folder / "adapter_config.json").write_text("[]")
    elif kind == "no such module":
        edit(folder, target_modules=["qery"])
    elif kind == "no base":
        edit(folder, base_model_name_or_path=None)
    elif kind == "moved base":
        edit(folder, base_model_name_or_path="/nowhere/bert")
    elif kind == "no config":
        (folder / "adapter_config.json").unlink()
    elif kind == "no folder":
        shutil.rmtree(folder)


BAD = {
    "truncated": (AdapterError, "adapter_model.safetensors is damaged or incomplete"),
    "half a header": (AdapterError, "adapter_model.safetensors is damaged or incomplete"),
    "not tensors": (AdapterError, "holds a list, not tensors"),
    "code in a pickle": (
        AdapterError,
        r"adapter_model.bin is a pickle, .* save the adapter as adapter_model\.safetensors",
    ),
    "no weights": (AdapterError, "holds neither adapter_model.safetensors nor"),
    "missing tensor": (AdapterError, r"the weights lack .*layer\.1\.attention\.self\.query\.lora_A"),
    "missing head": (AdapterError, r"the weights lack base_model\.model\.classifier\.weight"),
    "extra tensor": (AdapterError, r"the weights hold .*key\.lora_A.*no place"),
    "other ranks": (AdapterError, r"has rank 2 .* but adapter_config\.json says 3"),
    "other pattern": (AdapterError, r"layer\.1\.attention\.self\.query\.lora_\w\.weight has rank 2 .* says 1"),
    "NaN": (AdapterError, r"query\.lora_A\.weight holds a value that is not finite"),
    "rank zero": (AdapterError, "the rank of r is 0"),
    "not LoRA": (AdapterError, "the adapter's type is LOHA; only LoRA"),
    "config is no JSON": (AdapterError, r"adapter_config\.json cannot be read"),
    "config is a list": (AdapterError, "the adapter's type is not stated"),
    "no such module": (AdapterError, "qery.* does not fit"),
    "no base": (AdapterError, "does not record its base model: name it with `base`"),
    "moved base": (ModelError, "/nowhere/bert, is not there: give its place with `base`"),
    "no config": (AdapterError, r"is no adapter: it holds no adapter_config\.json"),
    "no folder": (AdapterError, "does not exist"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_run_that_does_not_fit_is_one_clear_line(root, tmp_path, kind):
    shutil.copytree(root / "texts", tmp_path / "run")
    bad_run(kind, tmp_path / "run")
    error, message = BAD[kind]
    with pytest.raises(error, match=message) as raised:
        load_run(tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert "weights_only" not in str(raised.value)  # no advice to run what a file holds


def test_another_base_model(root, tmp_path):
    with pytest.raises(AdapterError, match=r"does not fit|weights lack"):
        load_run(root / "texts", base=save_gpt2(tmp_path / "gpt2"))
    from transformers import BertModel

    from tests.tiny_text import bert_config

    config = bert_config()
    config.hidden_size = 32
    BertModel(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(AdapterError, match=r"has shape \(\d+, \d+\), but .*wide needs .*`base`") as raised:
        load_run(root / "texts", base=tmp_path / "wide")
    assert "\n" not in str(raised.value)
    shutil.copytree(root / "bert", tmp_path / "moved")
    assert load_run(root / "texts", base=tmp_path / "moved").base == str(tmp_path / "moved")
    with pytest.raises(ModelError, match="holds no config"):
        load_run(root / "texts", base=tmp_path)
    with pytest.raises(AdapterError, match="a whole model"):
        load_run(root / "bert")


# ---------------------------------------------------------------------------------------------------------------------
# data


def test_texts_keep_the_order_of_the_models_classes(root, tmp_path):
    base = save_bert_classifier(tmp_path / "named", ["Good", "Bad", "Odd"])
    model = loaded(base, 3)
    from tests.tiny_text import save_tokenizer

    tokenizer = save_tokenizer(tmp_path / "words")
    data = frame(30, ("bad", "good", "odd"))
    found = read_data((model, tokenizer), data)
    assert found.label_names == ["good", "bad", "odd"] and found.kind == "cross-entropy"
    assert [row["labels"] for row in found.features] == [["good", "bad", "odd"].index(v) for v in data["label"]]
    two = read_data((model, tokenizer), data[data["label"] != "bad"])
    assert {row["labels"] for row in two.features} == {0, 2}
    numbers = data.assign(label=["2" if v == "odd" else "0" for v in data["label"]])
    assert {row["labels"] for row in read_data((model, tokenizer), numbers).features} == {0, 2}
    with pytest.raises(DataError, match=r"2 different labels .*but the model has 3 classes"):
        read_data((model, tokenizer), data.assign(label=["yes" if v == "odd" else "no" for v in data["label"]]))
    with pytest.raises(DataError, match="4 different labels"):
        read_data((model, tokenizer), data.assign(label=[str("wxyz"[i % 4]) for i in range(30)]))


def test_the_loss_is_the_models_own(root, tmp_path):
    """The mean that is certified is the loss that transformers computes, on the whole data."""
    run = load_run(root / "texts")
    found = read_data(run, frame(20), DataSettings(batch_size=7))
    assert [len(batch["labels"]) for batch in found.batches] == [7, 7, 6] and found.n_rows == found.total_rows == 20
    with torch.no_grad():
        whole = run.model(**found.collator(found.features))
    assert certify(run.model, found.batches, lam=0.01).loss == pytest.approx(float(whole.loss), rel=1e-5)

    other = classifier(str(root / "bert"), 1)
    regression = read_data((other, run.tokenizer), frame(20).assign(label=[i / 3 for i in range(20)]))
    assert regression.kind == "squared-error"
    with torch.no_grad():
        expected = float(other(**regression.collator(regression.features)).loss)
    assert certify(other, regression.batches, loss=regression.kind, lam=0.01).loss == pytest.approx(expected, rel=1e-5)
    other.get_base_model().config.problem_type = "multi_label_classification"
    yes_no = read_data((other, run.tokenizer), frame(20))
    with torch.no_grad():
        expected = float(other(**yes_no.collator(yes_no.features)).loss)
    assert certify(other, yes_no.batches, loss=yes_no.kind, lam=0.01).loss == pytest.approx(expected, rel=1e-5)


def test_truncated_texts_and_samples_are_told(root):
    run = load_run(root / "texts")
    data = frame(40)
    found = read_data(run, data, DataSettings(max_length=6, samples=10))
    assert found.n_rows == 10 and found.total_rows == 40 and found.max_length == 6
    cut = sum(len(run.tokenizer(text)["input_ids"]) > 6 for text in data["text"])
    assert cut and any("texts were cut at 6 tokens" in note for note in found.notes)
    assert {len(row["labels"]) if isinstance(row["labels"], list) else 1 for row in found.features} == {1}
    with pytest.raises(SettingError, match="limit of 32 tokens"):
        read_data(run, data, DataSettings(max_length=33))
    with pytest.raises(SettingError, match="for causal language models"):
        read_data(run, data, DataSettings(packing=True))


# ---------------------------------------------------------------------------------------------------------------------
# causal certificates: padding, packing and weights


def by_hand(model: PeftModel, features: list[dict[str, list[int]]], weighting: str) -> float:
    """The mean loss one row at a time, without any padding."""
    sums, counts = [], []
    for row in features:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        labels = torch.tensor(row["labels"])[1:]
        sums.append(float(F.cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="sum")))
        counts.append(int((labels != -100).sum()))
    if weighting == "token":
        return sum(sums) / sum(counts)
    return sum(total / count for total, count in zip(sums, counts, strict=True)) / len(sums)


@pytest.mark.parametrize("weighting", ["token", "sample"])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_certificates_do_not_depend_on_padding_or_packing(root, tmp_path, base, weighting):
    if base == "gpt2":
        name = save_gpt2_lm(tmp_path / "gpt2")
        language_model(name, target_modules=["c_attn"]).save_pretrained(tmp_path / "run")
        run = load_run(tmp_path / "run")
    else:
        run = load_run(root / "causal")
    settings = [
        DataSettings(batch_size=1),
        DataSettings(batch_size=5),
        DataSettings(batch_size=2, by_length=True),
        DataSettings(batch_size=2, packing=True, max_length=64),
    ]
    found = []
    for setting in settings if weighting == "token" else settings[:3]:
        data = read_data(run, str(root / "pairs.jsonl"), setting)
        assert data.n_rows == len(PAIRS) and data.kind == "cross-entropy"
        found.append(certify(run.model, data.batches, weight_decay=0.01, weighting=weighting))  # the loss by its labels
    unpadded = read_data(run, str(root / "pairs.jsonl"), settings[0])
    assert found[0].loss == pytest.approx(by_hand(run.model, unpadded.features, weighting), rel=1e-6)
    for other in found[1:]:
        assert other.n_terms == found[0].n_terms
        assert other.loss == pytest.approx(found[0].loss, rel=1e-5)
        assert other.rank_gain_bound == pytest.approx(found[0].rank_gain_bound, rel=1e-4)
        for name, state in found[0].modules.items():
            assert other.modules[name].spectral_ratio == pytest.approx(state.spectral_ratio, rel=1e-4)
            assert other.modules[name].stationarity == pytest.approx(state.stationarity, rel=1e-4)


def test_token_and_sample_weights_differ(root):
    run = load_run(root / "causal")
    data = read_data(run, str(root / "pairs.jsonl"))
    token, sample = (certify(run.model, data.batches, lam=0.01, weighting=w) for w in ("token", "sample"))
    assert token.loss is not None and abs(token.loss - sample.loss) > 1e-3


def test_features_train_with_a_trainer(root, tmp_path):
    from transformers import Trainer, TrainingArguments

    run = load_run(root / "causal", trainable=True)
    data = read_data(run, str(root / "pairs.jsonl"))
    before = {name: p.clone() for name, p in run.model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, learning_rate=0.01,
    )  # fmt: skip
    trainer = Trainer(run.model, arguments, train_dataset=data.features, data_collator=data.collator)  # type: ignore[arg-type]
    trainer.train()
    after = dict(run.model.named_parameters())
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_what_is_refused(root):
    for bad in ({"batch_size": 0}, {"samples": 0}, {"seed": -1}, {"loss_on": "half"}):
        with pytest.raises(SettingError):
            DataSettings(**bad)
    from ranksure.runs.saved.data import is_causal

    with pytest.raises(RanksureError, match="neither a sequence classifier nor a causal"):
        is_causal(torch.nn.Linear(1, 1))
    with pytest.raises(SettingError, match="unknown dtype"):
        load_run(root / "texts", dtype="float8")
    with pytest.raises(SettingError, match="cannot be used"):
        load_run(root / "texts", device="nonsense")
