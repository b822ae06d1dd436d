"""Templates, prompts and verbalisers on real tokenizers: SmolLM2's, rxnmapper's SMILES, and byte-level BPE."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ranksure.bundled.smollm import smollm2_path
from ranksure.data.texts import Rows
from ranksure.errors import DataError, ModelError, SettingError
from ranksure.tasks.prompt_encoder import PromptEncoder, parse_template, parse_verbalizers
from tests.refusals import refusal
from tests.tasks.prompt_parts import (
    MOLECULES,
    SENTENCES,
    byte_bpe,
    ending_with_eos,
    needs_albert,
    needs_smollm,
    rows_of,
    save_albert,
)

NAMES = ["negative", "positive"]
LONG = "The plot, such as it is, wanders from one dim room to the next; nobody laughs, nobody cries. " * 12


@pytest.fixture(scope="module")
def smollm() -> Any:
    return AutoTokenizer.from_pretrained(smollm2_path())


@pytest.fixture(scope="module")
def smiles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_albert(tmp_path_factory.mktemp("rxn") / "albert"))


@pytest.fixture(scope="module")
def bpe() -> Any:
    return byte_bpe(masked=True)


def encoder_of(tokenizer: Any, template: str | None, max_length: int = 64, pairs: bool = False) -> PromptEncoder:
    architecture = "masked" if tokenizer.mask_token else "causal"
    accepts = {"input_ids", "attention_mask"}.__contains__
    return PromptEncoder(tokenizer, parse_template(template, architecture, pairs), max_length, accepts)


def texts(*given: str, pairs: list[str] | None = None) -> Rows:
    return rows_of([(text, NAMES[i % 2]) for i, text in enumerate(given)], pairs)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------------------------------------------------------------
# templates and words as they are given


@pytest.mark.parametrize(
    ("template", "architecture", "pairs", "parts"),
    [
        ("It was {mask}.", "masked", False, ["{text} exactly once, not 0"]),
        ("{text} {text} {mask}", "masked", False, ["{text} exactly once, not 2"]),
        ("{text} It was", "masked", False, ["{mask} exactly once, not 0"]),
        ("{text} {mask} {mask}", "masked", False, ["{mask} exactly once, not 2"]),
        ("{text} It was {mask}", "causal", False, ["{mask}", "ends where the answer begins"]),
        ("{text} {pair} {mask}", "masked", False, ["{pair}", "no second texts"]),
        ("{text} {mask}", "masked", True, ["{pair} exactly once, not 0"]),
        ("{text} {label} is", "causal", False, ["{label}", "unknown", "use {text}"]),
        ("{text!r} is", "causal", False, ["{text}", "without a format"]),
        ("{text:>9} is", "causal", False, ["{text}", "without a format"]),
        ("{text is", "causal", False, ["braces"]),
        ("{} is", "causal", False, ["unknown"]),
        ("{text.__class__} is", "causal", False, ["unknown"]),
        (None, "causal", True, ["pairs of texts", "{pair}"]),
    ],
)
def test_templates_that_are_refused(template, architecture, pairs, parts):
    refusal(SettingError, [*parts, "`template`"], parse_template, template, architecture, pairs)


def test_a_template_is_filled():
    assert parse_template("{{{text}}}\\nIs it {mask}?", "masked", False).fill("a {mask} {0}", answer="[M]") == (
        "{a {mask} {0}}\nIs it [M]?"
    )
    assert parse_template("{text} / {pair}:", "causal", True).fill("a", "b", " yes") == "a / b: yes"
    assert parse_template(None, "masked", False).fill("Good.", answer="<mask>") == "Good. It was <mask>."
    assert parse_template(None, "causal", False).fill("Good.") == "Review: Good.\nSentiment:"


@pytest.mark.parametrize(
    "given",
    [
        ["bad", "good"],
        "bad,good",
        " bad , good ",
        {"positive": "good", "negative": "bad"},
        "positive=good,negative=bad",
        '{"positive": "good", "negative": "bad"}',
        '["bad", "good"]',
    ],
)
def test_words_in_every_form(given):
    assert parse_verbalizers(given, NAMES, "causal") == ["bad", "good"]


def test_default_words_follow_the_order_of_the_labels():
    assert parse_verbalizers(None, ["Positive", "Negative"], "masked") == ["great", "terrible"]
    assert parse_verbalizers(None, NAMES, "causal") == ["negative", "positive"]


@pytest.mark.parametrize(
    ("given", "names", "parts"),
    [
        (None, ["0", "1"], ["'0', '1'", "`verbalizers` '0=WORD,1=WORD'"]),
        (None, ["a", "b", "c", "d"], ["'a=WORD,b=WORD,c=WORD,...'"]),
        ("bad", NAMES, ["1 words for the 2 classes"]),
        ("bad,good,odd", NAMES, ["3 words for the 2 classes"]),
        ("bad,bad", NAMES, ["'bad' to two classes"]),
        ("bad,", NAMES, ["word for 'positive' is ''"]),
        (["bad", 3], NAMES, ["word for 'positive' is 3"]),
        ("negative=bad,good", NAMES, ["'good' is not label=word"]),
        ("negative=bad,negative=good", NAMES, ["'negative' twice"]),
        ("negative=bad", NAMES, ["no word for 'positive'"]),
        ("negative=bad,positive=good,neutral=so", NAMES, ["names 'neutral'"]),
        ('{"negative": ', NAMES, ["not JSON"]),
    ],
)
def test_words_that_are_refused(given, names, parts):
    refusal(SettingError, [*parts, "`verbalizers`"], parse_verbalizers, given, names, "causal")


# ---------------------------------------------------------------------------------------------------------------------
# tokens in their place


@needs_smollm
@pytest.mark.parametrize(
    ("template", "words", "tokens"),
    [
        (None, ["negative", "positive"], ["Ġnegative", "Ġpositive"]),
        ("{text} It was", ["terrible", "great"], ["Ġterrible", "Ġgreat"]),
        ("{text} It was", [" terrible", " great"], ["Ġterrible", "Ġgreat"]),
        ("{text}\nGood or bad?\n", ["bad", "good"], ["bad", "good"]),
        ('{text}\nSentiment: "', ["negative", "positive"], ["negative", "positive"]),
        ("<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", ["No", "Yes"], ["No", "Yes"]),
    ],
)
def test_causal_words_in_their_place(smollm, template, words, tokens):
    encoder = encoder_of(smollm, template)
    ids = encoder.verbalizer_ids(words, NAMES, rows_of(SENTENCES))
    assert smollm.convert_ids_to_tokens(ids) == tokens
    # What the tokenizer makes of prompt and answer written out is the prompt's tokens and this one.
    for text, _ in SENTENCES:
        prompt = encoder.template.fill(text)
        spaced = " " if tokens[0].startswith("Ġ") and not words[0].startswith(" ") else ""
        assert smollm(prompt + spaced + words[0])["input_ids"] == [*smollm(prompt)["input_ids"], ids[0]]


@needs_smollm
@pytest.mark.parametrize(
    ("template", "words", "parts"),
    [
        (None, ["terrible", "unputdownable"], ["'unputdownable' is", "tokens here", "Ġun"]),
        (None, ["great", " great"], ["'great' and ' great'", "same token", "Ġgreat", "'positive'"]),
        ("{text} It was ", ["bad", "good"], ["'bad' merges with the template", "no space at its end"]),
    ],
)
def test_causal_words_that_are_refused(smollm, template, words, parts):
    with pytest.raises(SettingError) as caught:
        encoder_of(smollm, template).verbalizer_ids(words, NAMES, rows_of(SENTENCES))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_masked_words_in_their_place(bpe):
    rows = rows_of(SENTENCES)
    spaced = encoder_of(bpe, "{text} It was {mask}.").verbalizer_ids(["terrible", "great"], NAMES, rows)
    assert bpe.convert_ids_to_tokens(spaced) == ["Ġterrible", "Ġgreat"]
    assert spaced == [plain_ids(bpe, f"It was {word}.")[2] for word in ("terrible", "great")]
    first = encoder_of(bpe, "{mask}! {text}").verbalizer_ids(["!", "a"], NAMES, rows)
    assert bpe.convert_ids_to_tokens(first) == ["!", "a"]
    with pytest.raises(SettingError, match=r"'wonderful' is \d+ tokens here \(Ġ"):
        encoder_of(bpe, None).verbalizer_ids(["terrible", "wonderful"], NAMES, rows)


@needs_albert
def test_smiles_in_their_place(smiles):
    rows = rows_of(MOLECULES)
    encoder = encoder_of(smiles, "{text}.{mask}>>")
    assert smiles.convert_ids_to_tokens(encoder.verbalizer_ids(["O", "N"], ["acid", "amine"], rows)) == ["O", "N"]
    with pytest.raises(SettingError, match=r"'OC' is 2 tokens here \(O, C\)"):
        encoder.verbalizer_ids(["OC", "N"], ["acid", "amine"], rows)
    with pytest.raises(SettingError, match="'Q' is not in the tokenizer's vocabulary"):
        encoder.verbalizer_ids(["Q", "N"], ["acid", "amine"], rows)


def test_a_word_whose_token_depends_on_the_text(bpe):
    """Without fixed text beside it, a mask after a space stands for another token than a mask after a stop."""
    encoder = encoder_of(bpe, "{text}{mask}")
    assert encoder.verbalizer_ids(["great"], ["positive"], texts("It was ")) == [bpe.convert_tokens_to_ids("Ġgreat")]
    assert encoder.verbalizer_ids(["great"], ["positive"], texts("It was.")) == [bpe.convert_tokens_to_ids("great")]
    with pytest.raises(SettingError, match=r"'great' is another token in other rows \('great', 'Ġgreat'\)"):
        encoder.verbalizer_ids(["great"], ["positive"], texts("It was ", "It was."))


# ---------------------------------------------------------------------------------------------------------------------
# prompts and truncation


@needs_smollm
@pytest.mark.parametrize("side", ["right", "left"])
def test_long_texts_lose_characters_and_the_template_none(smollm, side, monkeypatch):
    monkeypatch.setattr(smollm, "truncation_side", side)
    encoder = encoder_of(smollm, "Review: {text}\nSentiment:", 40)
    rows = texts(LONG, "Short one.")
    found = encoder.encode(rows)
    assert found.cut == [0] and found.masks == [] and encoder.truncation_side == side
    head, tail = plain_ids(smollm, "Review:"), plain_ids(smollm, "\nSentiment:")
    for row in found.features:
        ids = row["input_ids"]
        assert ids[: len(head)] == head and ids[-len(tail) :] == tail and len(ids) <= 40
        assert row["attention_mask"] == [1] * len(ids)
    kept = found.prompts[0].removeprefix("Review: ").removesuffix("\nSentiment:")
    assert LONG.startswith(kept) if side == "right" else LONG.endswith(kept)
    more = LONG[: len(kept) + 1] if side == "right" else LONG[-len(kept) - 1 :]
    assert len(smollm(f"Review: {more}\nSentiment:")["input_ids"]) > 40  # as much as fits was kept
    assert found.features[0]["input_ids"] == smollm(found.prompts[0])["input_ids"]
    assert found.prompts[1] == "Review: Short one.\nSentiment:"


def test_one_mask_survives_truncation(bpe):
    encoder = encoder_of(bpe, "{text} It was {mask}.", 24)
    rows = texts(LONG, "Good.", LONG[5:], LONG * 30)
    found = encoder.encode(rows)
    assert found.cut == [0, 2, 3]
    tail = plain_ids(bpe, " It was")
    for row in found.features:
        ids = row["input_ids"]
        assert ids.count(bpe.mask_token_id) == 1 and len(ids) <= 24
        assert ids[0] == bpe.bos_token_id and ids[-1] == bpe.eos_token_id
        at = ids.index(bpe.mask_token_id)
        assert ids[at - len(tail) : at] == tail and ids[at + 1 : -1] == plain_ids(bpe, ".")
    # transformers' own truncation loses the mask, which is why it is not used
    own = bpe(encoder.template.fill(LONG, answer=bpe.mask_token), truncation=True, max_length=24)["input_ids"]
    assert own.count(bpe.mask_token_id) == 0


@needs_albert
def test_one_mask_survives_truncation_of_smiles(smiles):
    encoder = encoder_of(smiles, "{text}.{mask}>>", 16)
    found = encoder.encode(rows_of(MOLECULES))
    lengths = [len(plain_ids(smiles, text)) for text, _ in MOLECULES]
    assert found.cut == [i for i, length in enumerate(lengths) if length + 5 > 16] and 0 < len(found.cut) < 8
    for row, length in zip(found.features, lengths, strict=True):
        tokens = smiles.convert_ids_to_tokens(row["input_ids"])
        assert tokens[0] == "[CLS]" and tokens[-4:] == [".", "[MASK]", ">>", "[SEP]"]
        assert len(tokens) == min(16, length + 5)


def test_of_two_texts_the_longer_one_is_cut(bpe):
    encoder = encoder_of(bpe, "{text} ? {mask} , {pair}", 30, pairs=True)
    found = encoder.encode(texts(LONG, "A film.", "A film.", pairs=["A day.", LONG, "It."]))
    assert found.cut == [0, 1]
    assert found.prompts[0].endswith(" ? <mask> , A day.") and found.prompts[1].startswith("A film. ? <mask> , The")
    assert all(len(row["input_ids"]) <= 30 for row in found.features)


def test_a_text_that_spells_the_mask(bpe):
    encoder = encoder_of(bpe, None)
    found = encoder.encode(texts("I say <mask> and <mask>", "plain"))
    assert found.masks == [0] and found.prompts[0] == "I say < mask> and < mask> It was <mask>."
    assert all(row["input_ids"].count(bpe.mask_token_id) == 1 for row in found.features)


def test_a_mask_in_the_template_is_refused_with_the_row(bpe):
    encoder = encoder_of(bpe, "<mask> {text} It was {mask}.")
    with pytest.raises(DataError, match=r"row 1: its prompt has 2 mask tokens"):
        encoder.encode(texts("good"))


def test_an_end_token_is_not_the_end_of_the_prompt():
    plain = byte_bpe(masked=False)
    ended = ending_with_eos(plain)
    assert ended("a")["input_ids"] == [*plain("a")["input_ids"], plain.eos_token_id]
    rows = rows_of(SENTENCES)
    first, second = encoder_of(plain, None), encoder_of(ended, None)
    assert second.dropped_at_end == 1 and first.encode(rows).features == second.encode(rows).features
    words = ["negative", "positive"]
    assert first.verbalizer_ids(words, NAMES, rows) == second.verbalizer_ids(words, NAMES, rows)


def test_no_room_and_no_mask(bpe):
    with pytest.raises(SettingError, match=r"template alone takes \d+ of the 4 tokens: shorten it, or raise `max_len"):
        encoder_of(bpe, "{text} It was a very very long {mask}.", 4)
    causal = byte_bpe(masked=False)
    with pytest.raises(ModelError, match="no mask token"):
        PromptEncoder(causal, parse_template(None, "masked", False), 32, {"input_ids"}.__contains__)


_BPE = byte_bpe(masked=True)


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.text(min_size=1, max_size=300), st.text(max_size=300), st.sampled_from(["left", "right"]))
def test_any_text_gives_one_mask_within_the_limit(text: str, pair: str, side: str):
    _BPE.truncation_side = side
    try:
        encoder = encoder_of(_BPE, "{text} It was {mask}. {pair}", 40, pairs=True)
        found = encoder.encode(texts(text, pairs=[pair]))
    finally:
        _BPE.truncation_side = "right"
    ids = found.features[0]["input_ids"]
    assert ids.count(_BPE.mask_token_id) == 1 and len(ids) <= 40
    assert ids == _BPE(found.prompts[0])["input_ids"] and " It was <mask>. " in found.prompts[0]


def test_inputs_that_the_model_does_not_take_are_dropped(bpe, monkeypatch):
    monkeypatch.setattr(bpe, "model_input_names", ["input_ids", "token_type_ids", "attention_mask"])
    assert "token_type_ids" in bpe("good")  # the default of fast tokenizers; RoBERTa's model has one type only
    assert set(encoder_of(bpe, None).encode(texts("good")).features[0]) == {"input_ids", "attention_mask"}
