"""Checkpoints and texts as a task: which head, which order of labels, which rows of tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertModel

from ranksure.data.texts import Rows, load_rows
from ranksure.errors import ModelError, RanksureError, SettingError
from ranksure.tasks.text import TextTask, load_text_task
from tests.refusals import refusal
from tests.tiny_text import (
    VOCABULARY,
    frame,
    loaded,
    save_bert,
    save_bert_classifier,
    save_gpt2,
    save_roberta,
    save_tokenizer,
)


@pytest.fixture(scope="module")
def rows() -> Rows:
    return load_rows(frame(30))


@pytest.fixture(scope="module")
def three() -> Rows:
    return load_rows(frame(30, ("bad", "good", "odd")))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bert(tmp_path_factory.mktemp("tiny") / "bert")


def fails(error: type[RanksureError], *parts: str, model: Any, rows: Rows, **options: Any) -> str:
    return refusal(error, parts, load_text_task, model, rows, **options)


# ---------------------------------------------------------------------------------------------------------------------
# heads


def test_bert_without_a_head(bert, rows):
    task = load_text_task(bert, rows)
    assert (task.head, task.new_modules, task.head_is_new, task.n_outputs) == ("classifier", ["classifier"], True, 2)
    assert task.label_names == ["bad", "good"]
    assert task.notes == []
    weights = load_file(Path(bert) / "model.safetensors")
    for key, value in weights.items():  # everything else is the checkpoint's
        assert torch.equal(task.model.state_dict()[f"bert.{key}"], value)


def test_new_parts_are_drawn_from_the_seed(tmp_path, rows):
    """RoBERTa's head has a dense layer of its own, which stays as drawn: the same for the same seed."""
    path = save_roberta(tmp_path / "m")
    first, second, other = (load_text_task(path, rows, seed=seed) for seed in (0, 0, 1))
    assert (first.head, first.new_modules, first.head_is_new) == ("classifier.out_proj", ["classifier"], True)
    dense = "classifier.dense.weight"
    assert torch.equal(first.model.state_dict()[dense], second.model.state_dict()[dense])
    assert not torch.equal(first.model.state_dict()[dense], other.model.state_dict()[dense])


def test_missing_pooler_is_new_too(tmp_path, rows):
    """A BERT saved without its pooler: what replaces it is random, so an adapter has to carry it."""
    from tests.tiny_text import bert_config

    torch.manual_seed(0)
    BertModel(bert_config(), add_pooling_layer=False).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    task = load_text_task(str(tmp_path), rows)
    assert task.new_modules == ["bert.pooler.dense", "classifier"]
    assert task.head_is_new


def test_gpt2_head(tmp_path, three):
    task = load_text_task(save_gpt2(tmp_path / "m"), three)
    assert (task.head, task.new_modules, task.n_outputs) == ("score", ["score"], 3)
    # No padding token in the checkpoint: the last real token is found all the same.
    batch = task.batches(three.subset(range(6)))[0]
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    task.model.eval()
    with torch.no_grad():
        together = task.model(**batch).logits
        for i, length in enumerate(lengths):
            alone = task.model(**{key: value[i : i + 1, :length] for key, value in batch.items()}).logits
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_trained_head_is_used_as_it_is(tmp_path, rows):
    path = save_bert_classifier(tmp_path / "m", ["bad", "good"])
    task = load_text_task(path, rows)
    assert (task.head_is_new, task.new_modules, task.notes) == (False, [], [])
    reference = loaded(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        expected = reference(**tokenizer(rows.texts, padding=True, return_tensors="pt")).logits
        task.model.eval()
        found = torch.cat([task.model(**batch).logits for batch in task.batches(rows)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-2


@pytest.mark.parametrize("names", [["good", "bad"], ["Good", "BAD"]])
def test_trained_head_keeps_its_label_order(tmp_path, rows, names):
    assert rows.label_names == ["bad", "good"]
    task = load_text_task(save_bert_classifier(tmp_path / "m", names), rows)
    assert task.label_names == ["good", "bad"]  # the data's spelling in the model's order
    assert rows.with_label_names(task.label_names).labels == [1 - label for label in rows.labels]


def test_trained_head_with_other_names_says_how_labels_are_read(tmp_path, rows):
    """Nothing tells which class is which: the data's order is taken, and the user is told."""
    task = load_text_task(save_bert_classifier(tmp_path / "m", ["joy", "anger"]), rows)
    assert task.label_names == ["bad", "good"]
    assert not task.head_is_new
    assert any("joy" in note and "bad" in note for note in task.notes), task.notes


def test_unnamed_trained_head_is_quiet_for_class_numbers(tmp_path):
    numbered = load_rows(frame(30).replace({"bad": 0, "good": 1}))
    task = load_text_task(save_bert_classifier(tmp_path / "m", ["LABEL_0", "LABEL_1"]), numbered)
    assert task.label_names == ["0", "1"]
    assert task.notes == []


def test_head_of_another_size_is_replaced(tmp_path, three):
    task = load_text_task(save_bert_classifier(tmp_path / "m", ["bad", "good"]), three)
    assert (task.n_outputs, task.head_is_new, task.new_modules) == (3, True, ["classifier"])
    assert task.model.get_submodule("classifier").weight.shape[0] == 3
    assert any("another number of outputs" in note and "3" in note for note in task.notes)


def test_pickled_weights_are_read_and_said(tmp_path, rows):
    safe = save_bert(tmp_path / "m")
    expected = load_file(tmp_path / "m" / "model.safetensors")
    torch.save(expected, tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    task = load_text_task(safe, rows)
    assert any("pickled" in note for note in task.notes)
    assert all(torch.equal(task.model.state_dict()[f"bert.{key}"], value) for key, value in expected.items())


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_pickled_code_does_not_run(tmp_path, rows, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save_bert(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    torch.save({**weights, "x": Malicious()}, tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    fails(ModelError, "cannot be loaded", model=path, rows=rows)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_stay_as_they_are(tmp_path, rows, dtype):
    path = save_bert(tmp_path / "m", dtype)
    task = load_text_task(path, rows)
    assert {p.dtype for p in task.model.parameters()} == {dtype}
    promoted = load_text_task(path, rows, dtype="float32")
    assert {p.dtype for p in promoted.model.parameters()} == {torch.float32}
    with torch.no_grad():
        task.model.eval()
        assert torch.isfinite(task.model(**task.batches(rows)[0]).logits).all()
    mean = load_text_task(path, rows, pooling="mean")
    assert {p.dtype for p in mean.model.parameters()} == {dtype}


def test_mean_pooling(bert, rows):
    task = load_text_task(bert, rows, pooling="mean")
    assert (task.head, task.new_modules, task.head_is_new, task.pooling) == ("head", [], True, "mean")
    assert isinstance(task.adapted, BertModel)  # what PEFT wraps, and what users load with AutoModel
    batch = task.batches(rows.subset(range(5)))[0]
    with torch.no_grad():
        task.model.eval()
        hidden = task.adapted(**batch).last_hidden_state
        means = torch.stack([hidden[i, : int(batch["attention_mask"][i].sum())].mean(0) for i in range(5)])
        torch.testing.assert_close(task.model(**batch), task.model.head(means), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# outputs, batches, labels


def test_outputs_follow_the_loss(bert, rows, three):
    assert load_text_task(bert, rows, loss="logistic").n_outputs == 1
    targets = load_rows(pd.DataFrame({"text": ["a", "b"], "label": [0.5, 2.0]}), regression=True)
    task = load_text_task(bert, targets, loss="squared-error")
    assert (task.n_outputs, task.labels(targets).tolist()) == (1, [[0.5], [2.0]])
    logistic = load_text_task(bert, rows, loss="logistic")
    assert logistic.labels(rows).shape == (30, 1)
    assert logistic.labels(rows)[:, 0].tolist() == rows.labels
    assert load_text_task(bert, three).labels(three).tolist() == three.labels
    fails(SettingError, "two classes", "3 classes", model=bert, rows=three, loss="logistic")
    fails(SettingError, "squared-error", model=bert, rows=targets)


def test_batches_keep_the_order_and_cut_at_the_limit(bert, rows):
    task = load_text_task(bert, rows, batch_size=7, max_length=6)
    batches = task.batches(rows)
    assert [len(b["input_ids"]) for b in batches] == [7, 7, 7, 7, 2]
    flat = [ids[mask.bool()] for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
    for text, ids in zip(rows.texts, flat, strict=True):
        words = text.split()[:4]
        assert [VOCABULARY[i] for i in ids] == ["[CLS]", *words, "[SEP]"]
    assert task.count_truncated(rows) == sum(len(text.split()) > 4 for text in rows.texts)


def test_a_text_that_just_fits_is_not_truncated(bert):
    texts = ["good film", "good film is", "good film is very"]  # with [CLS] and [SEP]: 4, 5, 6 tokens
    few = load_rows(pd.DataFrame({"text": texts, "label": [0, 1, 1]}))
    assert load_text_task(bert, few, max_length=5).count_truncated(few) == 1


def test_pairs_are_read_as_pairs(bert):
    pairs = load_rows(
        pd.DataFrame({"a": ["good", "bad"], "b": ["film", "plot"], "label": [0, 1]}),
        text_column="a",
        text_pair_column="b",
    )
    batch = load_text_task(bert, pairs).batches(pairs)[0]
    assert [VOCABULARY[i] for i in batch["input_ids"][0]] == ["[CLS]", "good", "[SEP]", "film", "[SEP]"]
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1]


def test_default_length(bert, tmp_path, rows):
    assert load_text_task(bert, rows).max_length == 32  # the tokenizer's limit
    fails(SettingError, "32 tokens", model=bert, rows=rows, max_length=33)
    fails(SettingError, "at least 4", model=bert, rows=rows, max_length=2)


def test_roberta_counts_positions_from_its_padding(tmp_path):
    """40 positions, of which the first is for padding: 39 tokens are the most."""
    path = save_roberta(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.model_max_length = 10**12
    tokenizer.save_pretrained(path)
    long = load_rows(pd.DataFrame({"text": ["good " * 100, "bad " * 50], "label": [0, 1]}))
    task = load_text_task(path, long)
    assert task.max_length == 39
    task.model.eval()
    with torch.no_grad():
        assert task.model(**task.batches(long)[0]).logits.shape == (2, 2)


# ---------------------------------------------------------------------------------------------------------------------
# models in memory


def test_model_in_memory(bert, rows):
    model, tokenizer = loaded(bert), AutoTokenizer.from_pretrained(bert)
    task = load_text_task(model, rows, tokenizer=tokenizer)
    assert task.model is model
    assert not task.head_is_new  # what is in memory is taken as trained
    fails(SettingError, "tokenizer", model=model, rows=rows)


def test_model_in_memory_with_another_number_of_labels(bert, three):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    fails(ModelError, "3 outputs", model=loaded(bert), rows=three, tokenizer=tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# what cannot be loaded


def broken(kind: str, folder: Path) -> str:
    path = folder / "m"
    if kind == "absent":
        return str(path)
    save_bert(path)
    weights = path / "model.safetensors"
    if kind == "no config":
        (path / "config.json").unlink()
    elif kind == "bad config":
        (path / "config.json").write_text("{nope")
    elif kind == "unknown type":
        (path / "config.json").write_text(json.dumps({"model_type": "flubber"}))
    elif kind == "no weights":
        weights.unlink()
    elif kind == "half of the weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif kind == "weights of a pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    elif kind == "bad pickle":
        weights.unlink()
        (path / "pytorch_model.bin").write_bytes(b"garbage")
    elif kind == "a file":
        return str(path / "config.json")
    elif kind == "no tokenizer":
        for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
            (path / name).unlink(missing_ok=True)
    elif kind == "not a text model":
        (path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    return str(path)


KINDS = [
    "absent",
    "no config",
    "bad config",
    "unknown type",
    "no weights",
    "half of the weights",
    "weights of a pointer",
]
KINDS += ["bad pickle", "a file", "no tokenizer", "not a text model"]


@pytest.mark.parametrize("kind", KINDS)
def test_broken_models_are_one_line(tmp_path, rows, kind):
    path = broken(kind, tmp_path)
    message = fails(ModelError, str(tmp_path), model=path, rows=rows)
    if kind == "no tokenizer":
        assert "tokenizer" in message


def test_a_hub_id_while_offline_is_one_line_and_quiet(rows, capfd, monkeypatch):
    fails(ModelError, "someone/no-such-model-here", "folder", model="someone/no-such-model-here", rows=rows)
    assert capfd.readouterr() == ("", "")


def test_loading_is_quiet_and_leaves_logging_as_it_was(bert, rows, capfd):
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub").level
    load_text_task(bert, rows)
    assert capfd.readouterr() == ("", "")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    assert logging.getLogger("huggingface_hub").level == hub


def test_tokenizer_without_padding_or_end_is_refused(tmp_path, rows):
    path = save_gpt2(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(path)
    fails(ModelError, "padding", model=path, rows=rows)


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ({"dtype": "float64"}, "dtype"),
        ({"pooling": "max"}, "pooling"),
        ({"device": "abacus"}, "device"),
        ({"device": "meta"}, "device"),
    ],
)
def test_options_without_meaning(bert, rows, option, part):
    fails(SettingError, part, model=bert, rows=rows, **option)


def test_task_is_a_text_task(bert, rows):
    assert isinstance(load_text_task(bert, rows), TextTask)
