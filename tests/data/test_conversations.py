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


@pytest.mark.parametrize("prompt", ["the review", "the review<|im_end|>"])
def test_an_empty_completion_is_its_end_token(tokenizer, prompt):
    """As TRL adds it, to the text: a prompt that ends with an end token does not stand for the completion's."""
    found = encode(rows(prompt=[prompt, "it"], completion=["", " is"]), tokenizer, max_length=64)
    assert found.rows == [0, 1] and found.notes == []
    assert labelled(tokenizer, found.features[0]) == "<|im_end|>"
    assert found.features[0]["input_ids"] == tokenizer(prompt + "<|im_end|>")["input_ids"]


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
    assert found.notes[1].endswith("were dropped (the first is data frame: row 2).")
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


def test_a_header_that_says_more_than_the_turn(tokenizer):
    """As TRL: the completion starts where the tokens of the prompt alone and of the whole part."""
    thinks = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}")
    found = encode(rows(messages=[TALK[:3]]), byte_tokenizer(thinks), max_length=512)
    assert labelled(tokenizer, found.features[0]) == "very good<|im_end|>\n" and found.notes == []


# Markers inside a macro and a captured block, where transformers' own offsets go wrong; white space control is kept.
MACRO = (
    "{%- macro turn(m) -%}<|im_start|>{{ m['role'] }}|{% if m['role'] == 'assistant' -%}\n  {%- generation -%}\n "
    "{{ m['content'] }}<|im_end|>\n{%- endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endmacro %}\n"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}"
)
CAPTURED = (
    "{% for m in messages %}{% set text %}{{ m['role'] }}|{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% endset %}{% if m['role'] == 'assistant' %}{{ text }}{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
)
FIRST = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ '\n' + m['content'] + '\n' }}{% endif %}{% endfor %}"
)


def turns(*contents: str) -> list[dict[str, str]]:
    """Turns of the assistant and the user, in turns."""
    return [{"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.mark.parametrize(
    ("template", "talk", "said"),
    [
        (FIRST, turns("a", "tell me more", "yes"), "ayes"),  # a first token that is the whole turn
        (FIRST, turns("good 😀", "more", "é"), "good 😀é"),  # a last character of several tokens
        (MACRO, turns("very good", "it is", "a film"), "very good<|im_end|>a film<|im_end|>"),
        (CAPTURED, turns("very good", "it is", "a film"), "very gooda film"),
    ],
)
def test_the_right_tokens_where_those_of_transformers_are_others(template, talk, said):
    tokenizer = byte_tokenizer(template)
    found = encode(rows(messages=[turns("", "good", "film"), talk]), tokenizer, max_length=512)
    assert labelled(tokenizer, found.features[1]) == said
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    assert tokenizer.decode(found.features[1]["input_ids"]) == whole
    told = [note for note in found.notes if "assistant_masks" in note]
    assert len(told) == 1 and "data frame: row 2" in told[0]
    own = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert [label != IGNORED for label in found.features[1]["labels"]] != list(map(bool, own))


def test_markers_that_do_not_survive_are_refused():
    upper = (
        "{% set text %}{% generation %} {{ messages[0]['content'] }} {% endgeneration %}{% endset %}{{ text | trim }}"
    )
    with pytest.raises(DataError, match=r"row 1: the chat template rewrites .* take the markers out"):
        encode(rows(messages=[turns("a")]), byte_tokenizer(upper), max_length=64)


# Keys in the order of the alphabet, in which pyarrow 17 writes them.
TOOLS = [{"function": {"name": "weather", "parameters": {"required": ["city"], "type": "object"}}, "type": "function"}]
READS = (
    "{% for tool in tools or [] %}{{ tool['function']['name'] }}{{ tool['function'].get('parameters') | tojson }} "
    "{% endfor %}{% for document in documents or [] %}{{ document['title'] }} {% endfor %}"
    "{% if thinking is defined %}thinking {{ thinking }} {% endif %}{{ mood or '' }}" + CHATML
)


@pytest.mark.parametrize("form", ["messages", "prompt"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "frame", "json text"])
def test_what_a_template_reads_reaches_it(tmp_path, form, kind):
    """The text is the one of ``apply_chat_template`` with the row's own variables, as TRL calls it."""
    given = [
        {"tools": TOOLS, "documents": [{"title": "a note", "text": "x"}], "chat_template_kwargs": {"thinking": True}},
        {"tools": None, "documents": None, "chat_template_kwargs": {"thinking": False}},
    ]
    table = [
        {**row, **({"messages": TALK} if form == "messages" else {"prompt": TALK[:4], "completion": TALK[4:]})}
        for row in given
    ]
    if kind == "json text":
        table = [{**row, "tools": json.dumps(row["tools"])} for row in table]
    source: Any = tmp_path / f"talk.{kind}"
    if kind == "jsonl":
        source.write_text("\n".join(map(json.dumps, table)))
    elif kind == "parquet":
        pd.DataFrame(table).to_parquet(source)
        pd.DataFrame(table[::-1]).to_parquet(tmp_path / "other.parquet")
        assert load_examples(source).sha256 != load_examples(tmp_path / "other.parquet").sha256
    else:
        source = pd.DataFrame(table)
        bare = source.drop(columns=["tools", "documents", "chat_template_kwargs"])
        assert load_examples(source).sha256 != load_examples(bare).sha256
    tokenizer = byte_tokenizer(READS)
    found = encode(load_examples(source), tokenizer, max_length=512)
    said = "a good cast<|im_end|>\n"
    for row, feature in zip(given, found.features, strict=True):
        more = {name: row[name] for name in ("tools", "documents")}
        whole = tokenizer.apply_chat_template(TALK, tokenize=False, **more, **row["chat_template_kwargs"])
        assert tokenizer.decode(feature["input_ids"]) == whole
        assert labelled(tokenizer, feature) == ("very good<|im_end|>\n" if form == "messages" else "") + said
    assert "weather" in tokenizer.decode(found.features[0]["input_ids"])
    assert [note for note in found.notes if "TRL 1.16" in note and "'documents'" in note]


def test_a_template_of_the_row_and_one_for_tools():
    """``chat_template_kwargs`` may hold a template; a tokenizer may have one for tools."""
    tokenizer = byte_tokenizer({"default": CHATML, "tool_use": READS})  # pyright: ignore[reportArgumentType]
    own = "{{ messages[0]['content'] }}!{% generation %}{{ messages[1]['content'] }}{% endgeneration %}"
    talk = [TALK[1], TALK[2]]
    data = rows(
        messages=[talk, talk, talk], tools=[TOOLS, None, None], chat_template_kwargs=[None, {}, {"chat_template": own}]
    )
    texts = [tokenizer.decode(row["input_ids"]) for row in encode(data, tokenizer, max_length=512).features]
    assert texts[0] == tokenizer.apply_chat_template(talk, tools=TOOLS, tokenize=False) and "weather" in texts[0]
    assert texts[1] == tokenizer.apply_chat_template(talk, tokenize=False) and "weather" not in texts[1]
    assert texts[2] == "is it good?!very good"


def test_what_a_template_would_read_of_other_columns_is_told():
    data = rows(messages=[TALK], mood=["calm"], other=["x"])
    tokenizer = byte_tokenizer(READS)
    found = encode(data, tokenizer, max_length=512)
    assert found.notes == [
        "The chat template reads 'mood', which is a column of the data, but is given it by the column "
        "'chat_template_kwargs' only (as by TRL): move it there."
    ]
    assert "calm" not in tokenizer.decode(found.features[0]["input_ids"])


def test_turns_of_others_in_a_completion_are_told(tokenizer):
    found = encode(rows(prompt=[TALK[:2]], completion=[TALK[2:]]), tokenizer, max_length=512)
    assert labelled(tokenizer, found.features[0]) == "very good<|im_end|>\na good cast<|im_end|>\n"
    assert found.notes[0].startswith("In 1 of 1 rows (data frame: row 1): the completion holds turns that are not")


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


ASKED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 1}], "no column 'messages'.*needs 'prompt' and 'completion', or 'messages'"),
        ([{"prompt": "a", "answer": "b"}], "no column 'completion'; its columns are 'prompt', 'answer'"),
        ([{"prompt": "a", "completion": None}], "row 1 .*the completion is missing"),
        ([{"prompt": 3, "completion": "b"}], "the prompt is 3, not text"),
        ([{"prompt": "a", "completion": "\ud800"}], "surrogate"),
        ([{"messages": []}], "not a list of messages"),
        ([{"messages": [{"from": "human", "value": "hi"}]}], "message 1 is .*each needs a 'role'"),
        ([{"messages": [{"role": "user", "content": "hi"}]}], "no message has the role 'assistant'"),
        ([{"messages": [{"role": "assistant", "content": None}]}], "the content of message 1 is not text"),
        ([{"messages": ASKED, "tools": "[{"}], "row 1 .*column 'tools': not valid JSON"),
        ([{"messages": ASKED, "tools": ["f"]}], "row 1 .*column 'tools': .* is not a list of objects"),
        ([{"messages": ASKED, "documents": "text"}], "column 'documents': 'text' is not a list of objects"),
        ([{"messages": ASKED, "chat_template_kwargs": [1]}], r"column 'chat_template_kwargs': \[1\] is not an object"),
        ([{"messages": ASKED, "chat_template_kwargs": {"tokenize": True}}], "'tokenize' is no variable of a template"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, rows, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert re.search(message, refusal(DataError, ["bad.jsonl"], load_examples, path))
