"""Which tokens carry loss: on real tokenizers and small ones, by decoding what is labelled."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from ranksure.bundled.minilm import minilm_path
from ranksure.data.conversations import IGNORED, encode, load_examples
from ranksure.errors import DataError, ModelError, SettingError
from tests.refusals import refusal

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + "
    "'<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
# Keeps the content of the last turn only, as templates that drop earlier reasoning do.
REWRITES = (
    "{% for message in messages %}{{ message['role'] + ': ' + (message['content'] if loop.last else '...') + '\n' }}"
    "{% endfor %}"
)


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with real merges, trained here."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    inner.train_from_iterator(
        ["the review is good", "the review is bad", "it is a very good film, a good film"], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        bos_token="<|im_start|>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(CHATML)


def rows(**columns: list[Any]):
    return load_examples(pd.DataFrame(columns))


def labelled(tokenizer: Any, feature: dict[str, list[int]]) -> str:
    return tokenizer.decode([label for label in feature["labels"] if label != IGNORED])


def unlabelled(tokenizer: Any, feature: dict[str, list[int]]) -> str:
    pairs = zip(feature["input_ids"], feature["labels"], strict=True)
    return tokenizer.decode([token for token, label in pairs if label == IGNORED])


# ---------------------------------------------------------------------------------------------------------------------
# prompts and completions


def test_loss_is_on_the_completion_and_the_end(tokenizer):
    found = encode(rows(prompt=["the review", "it is"], completion=[" is good", " a film"]), tokenizer, max_length=64)
    first, second = found.features
    assert labelled(tokenizer, first) == " is good<|im_end|>" and unlabelled(tokenizer, first) == "the review"
    assert labelled(tokenizer, second) == " a film<|im_end|>" and unlabelled(tokenizer, second) == "it is"
    assert found.notes == [] and found.rows == [0, 1]
    for row in found.features:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"]) == sum(row["attention_mask"])
        assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    # the very tokens of the joined text, nothing tokenised apart
    assert first["input_ids"][:-1] == tokenizer("the review is good")["input_ids"]


@settings(max_examples=150)
@given(prompt=st.text("the revi\n 😀é,.", max_size=12), completion=st.text("the good\n 😀é,.", min_size=1, max_size=12))
def test_what_is_labelled_is_the_shortest_tail_of_tokens_that_holds_the_completion(prompt, completion):
    tokenizer = byte_tokenizer()
    (row,) = encode(rows(prompt=[prompt], completion=[completion]), tokenizer, max_length=1000).features
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    sizes = [sum(char in alphabet for char in token) for token in tokenizer.convert_ids_to_tokens(row["input_ids"])]
    sizes[-1] = 0  # the end token
    count = sum(label != IGNORED for label in row["labels"])
    assert row["labels"][-count:] == row["input_ids"][-count:]  # a tail
    wanted = len(completion.encode())
    assert sum(sizes) == len((prompt + completion).encode())
    if prompt:
        assert sum(sizes[-count:]) >= wanted > sum(sizes[len(sizes) - count + 1 :])


def test_a_token_across_the_boundary_counts_and_is_told(tokenizer):
    found = encode(rows(prompt=["the review ", "the"], completion=["is good", " film"]), tokenizer, max_length=64)
    assert labelled(tokenizer, found.features[0]) == " is good<|im_end|>"  # the space went into the completion's token
    assert found.notes == [
        "In 1 of 2 rows a token spans the end of the prompt; it counts as completion. Where prompts end with a space, "
        "move the space to the completion."
    ]


def test_the_end_token_is_not_added_twice(tokenizer):
    (row,) = encode(rows(prompt=["the"], completion=[" film<|im_end|>"]), tokenizer, max_length=64).features
    assert labelled(tokenizer, row) == " film<|im_end|>"


def test_truncation(tokenizer):
    data = rows(prompt=["the", "the review is good " * 3, ""], completion=[" film" * 20, " bad", " a"])
    whole = encode(data, tokenizer, max_length=1000)
    assert whole.rows == [0, 1, 2] and whole.notes == []
    limit = len(tokenizer("the review is good " * 3)["input_ids"]) - 1
    found = encode(data, tokenizer, max_length=limit)
    assert found.rows == [0, 2]
    kept = found.features[0]
    assert kept["input_ids"] == whole.features[0]["input_ids"][:limit]
    assert kept["labels"] == whole.features[0]["labels"][:limit]
    assert found.notes[0].startswith("2 of 3 rows were cut at") and found.notes[1].startswith("1 of 3 rows have no")
    with pytest.raises(DataError, match="no row has a token with a loss within 4 tokens"):
        encode(rows(prompt=["the review is good " * 3], completion=[" bad"]), tokenizer, max_length=4)


def test_loss_on_all(tokenizer):
    (row,) = encode(rows(prompt=["the"], completion=[" film"]), tokenizer, max_length=64, loss_on="all").features
    assert row["labels"] == row["input_ids"]
    with pytest.raises(SettingError, match="loss_on 'some'"):
        encode(rows(prompt=["the"], completion=[" film"]), tokenizer, max_length=64, loss_on="some")  # type: ignore[arg-type]


def test_minilm_tokens_with_their_own_end():
    """A tokenizer that puts tokens around a text and has no end token of its own."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    data = rows(prompt=["An unforgettable film.", "mov"], completion=[" Sentiment: positive", "ie itself"])
    found = encode(data, tokenizer, max_length=64)
    tokens = [tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in found.features]
    assert tokens[0][0] == "[CLS]" and tokens[0][-1] == "[SEP]"
    assert labelled(tokenizer, found.features[0]) == "sentiment : positive [SEP]"
    assert unlabelled(tokenizer, found.features[0]) == "[CLS] an unforgettable film."
    assert tokens[1] == ["[CLS]", "movie", "itself", "[SEP]"]
    assert labelled(tokenizer, found.features[1]) == "movie itself [SEP]"
    assert len(found.notes) == 1 and "In 1 of 2 rows a token spans" in found.notes[0]


def test_a_tokenizer_without_any_end():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    found = encode(rows(prompt=["the"], completion=[" film"]), tokenizer, max_length=64)
    assert labelled(tokenizer, found.features[0]) == " film"
    assert found.notes == ["The tokenizer has no end token: completions end without one."]


def test_a_tokenizer_without_offsets():
    """Byte by byte, in Python, with an end token that the tokenizer adds itself."""
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    (row,) = encode(rows(prompt=["né"], completion=["é!"]), tokenizer, max_length=64).features
    assert row["input_ids"] == [byte + 3 for byte in "néé!".encode()] + [tokenizer.eos_token_id]
    assert row["labels"] == [IGNORED] * 3 + row["input_ids"][3:]


# ---------------------------------------------------------------------------------------------------------------------
# conversations

TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "is it good?"},
    {"role": "assistant", "content": "very good"},
    {"role": "user", "content": "and the cast?"},
    {"role": "assistant", "content": "a good cast"},
]


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>\n"), (MARKED, "<|im_end|>")])
def test_loss_is_on_the_turns_of_the_assistant(template, end):
    tokenizer = byte_tokenizer(template)
    found = encode(rows(messages=[TALK, TALK[:3]]), tokenizer, max_length=512)
    assert labelled(tokenizer, found.features[0]) == f"very good{end}a good cast{end}"
    assert labelled(tokenizer, found.features[1]) == f"very good{end}"
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(found.features[0]["input_ids"]) == whole
    assert found.features[0]["input_ids"] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert found.notes == []


def test_conversational_prompts(tokenizer):
    found = encode(rows(prompt=[TALK[:4]], completion=[TALK[4:]]), tokenizer, max_length=512)
    assert labelled(tokenizer, found.features[0]) == "a good cast<|im_end|>\n"  # not the prompt's own assistant turn


def test_all_of_a_conversation(tokenizer):
    for template in (CHATML, MARKED, REWRITES):
        tokenizer.chat_template = template
        (row,) = encode(rows(messages=[TALK]), tokenizer, max_length=512, loss_on="all").features
        assert row["labels"] == row["input_ids"]
    tokenizer.chat_template = CHATML


def test_templates_that_do_not_tell_turns_apart():
    with pytest.raises(DataError, match=r"row 1: the chat template renders earlier messages differently"):
        encode(rows(messages=[TALK]), byte_tokenizer(REWRITES), max_length=512)
    no_prompt = CHATML.partition("{% if add_generation_prompt")[0]
    tokenizer = byte_tokenizer(no_prompt)
    found = encode(rows(messages=[TALK]), tokenizer, max_length=512)
    assert found.notes == ["In 2 of the assistant's turns the template's header carries loss too."]
    assert labelled(tokenizer, found.features[0]).startswith("<|im_start|>assistant\nvery good<|im_end|>\n<|im_start|>")
    with pytest.raises(ModelError, match="no chat template"):
        encode(rows(messages=[TALK]), byte_tokenizer(), max_length=512)
    refuses = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="row 1: the chat template does not take this conversation: roles must alt"):
        encode(rows(messages=[TALK]), refuses, max_length=512)


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_files(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    lines = [{"prompt": "a", "completion": " b"}, {"prompt": "", "completion": " c", "extra": 1}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = load_examples(str(path))
    assert (found.form, found.prompts, found.completions) == ("prompt and completion", ["a", ""], [" b", " c"])
    assert len(found.sha256) == 64 and found.source == str(path)
    again = found.subset([1])
    assert again.completions == [" c"] and again.places == [f"{path}: row 2 (line 2)"]
    table = tmp_path / "talk.parquet"
    pd.DataFrame({"messages": [TALK, TALK[:3]]}).to_parquet(table)
    talk = load_examples(table)
    assert talk.form == "messages" and talk.completions[1] == TALK[:3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 1}], "no column 'messages'.*needs 'prompt' and 'completion', or 'messages'"),
        ([{"prompt": "a", "answer": "b"}], "no column 'completion'; its columns are 'prompt', 'answer'"),
        ([{"prompt": "a", "completion": None}], "row 1 .*the completion is missing"),
        ([{"prompt": "a", "completion": ""}], "the completion is empty"),
        ([{"prompt": 3, "completion": "b"}], "the prompt is 3, not text"),
        ([{"prompt": "a", "completion": "\ud800"}], "surrogate"),
        ([{"messages": []}], "not a list of messages"),
        ([{"messages": [{"from": "human", "value": "hi"}]}], "message 1 is .*each needs a 'role'"),
        ([{"messages": [{"role": "user", "content": "hi"}]}], "no message has the role 'assistant'"),
        ([{"messages": [{"role": "assistant", "content": None}]}], "the content of message 1 is not text"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, rows, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert re.search(message, refusal(DataError, ["bad.jsonl"], load_examples, path))
