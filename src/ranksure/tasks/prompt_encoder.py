"""Templates and verbalisers: from a labelled text to a prompt, and from a class to one token of it.

A prompt is one string, tokenised as a whole with the tokenizer's own special tokens, so that whoever uses the model
later needs nothing but ``str.format`` and the tokenizer. Where it is too long, characters of the text go, never the
template. A verbaliser's token is found in its place: with the spaces and merges that it has right there.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ranksure.data.samples import listed, matched, value_of
from ranksure.data.texts import Rows
from ranksure.errors import DataError, ModelError, SettingError, shown

Architecture = Literal["masked", "causal"]
Verbalizers = str | Sequence[str] | Mapping[str, str]

# Masked: what Gao, Fisch and Chen (2021, "LM-BFF", table 1) give for SST-2. Causal: SmolLM2-135M-Instruct gets 77% of
# 128 Rotten Tomatoes snippets right with it, and 51% (62% calibrated) with that of the masked models (docs/prompts.md).
DEFAULT_TEMPLATES: dict[Architecture, str] = {
    "masked": "{text} It was {mask}.",
    "causal": "Review: {text}\nSentiment:",
}
DEFAULT_WORDS: dict[Architecture, dict[str, str]] = {
    "masked": {"negative": "terrible", "positive": "great"},
    "causal": {"negative": "negative", "positive": "positive"},
}

_CONTEXTS = 3  # rows in whose prompts the verbalisers are looked up


@dataclass(frozen=True)
class Template:
    """Text around ``{text}``, ``{pair}`` and, for a masked model, ``{mask}``.

    Attributes:
        text: as ``str.format`` takes it; a backslash followed by ``n`` has become a line break.
        architecture: which kind of model reads it.
        has_pair: whether it has a place for a second text.
    """

    text: str
    architecture: Architecture
    has_pair: bool

    def fill(self, text: str, pair: str = "", answer: str = "") -> str:
        """The prompt, with ``answer`` in the place of ``{mask}`` or at the end."""
        if self.architecture == "masked":
            return self.text.format(text=text, pair=pair, mask=answer)
        return self.text.format(text=text, pair=pair) + answer


def parse_template(template: str | None, architecture: Architecture, pairs: bool) -> Template:
    """Check a template, or take the default one.

    Args:
        template: text with ``{text}`` once, ``{pair}`` once where rows are pairs, and ``{mask}`` once for a masked
            model; ``{{`` and ``}}`` are braces, a backslash followed by ``n`` is a line break. A causal model's
            template ends where the answer begins.
        architecture: the model's.
        pairs: whether the rows have second texts.

    Raises:
        SettingError: a field is unknown, missing, there twice, or formatted; or there is no default.
    """
    if template is None:
        if pairs:
            mask = " {mask}" * (architecture == "masked")
            raise SettingError(
                f"no template is known for pairs of texts: give `template` '{{text}} ...{mask} {{pair}}'"
            )
        template = DEFAULT_TEMPLATES[architecture]
    template = template.replace("\\n", "\n")
    found: list[str] = []
    try:
        for _, name, format_spec, conversion in string.Formatter().parse(template):
            if name is not None:
                found.append(name)
            if format_spec or conversion:
                raise SettingError(f"`template` {shown(template)}: write {{{name}}} without a format")
    except ValueError as error:
        raise SettingError(f"`template` {shown(template)}: {error}; write {{{{ and }}}} for braces") from None
    allowed = ["text", *["pair"] * pairs, *["mask"] * (architecture == "masked")]
    why = {"mask": "a causal model's template ends where the answer begins", "pair": "the rows have no second texts"}
    for name in found:
        if name not in allowed:
            use = "use " + ", ".join(f"{{{each}}}" for each in allowed)
            raise SettingError(f"`template` {shown(template)} has {{{name}}}: {why.get(name, 'it is unknown')}; {use}")
    for name in allowed:
        if (count := found.count(name)) != 1:
            raise SettingError(f"`template` {shown(template)} needs {{{name}}} exactly once, not {count} times")
    return Template(template, architecture, pairs)


def parse_verbalizers(given: Verbalizers | None, label_names: Sequence[str], architecture: Architecture) -> list[str]:
    """A word per class, in the order of the classes.

    Args:
        given: words in the order of the labels, a mapping from label to word, either as a string
            (``"terrible,great"``, ``"negative=terrible,positive=great"``, or JSON), or None for the default ones.
        label_names: the classes.
        architecture: the model's; the default words depend on it.

    Raises:
        SettingError: a class without a word, a word without a class, an empty or repeated word, or no default.
    """
    example = ",".join(f"{name}=WORD" for name in label_names[:3]) + ",..." * (len(label_names) > 3)
    if given is None:
        defaults = DEFAULT_WORDS[architecture]
        if sorted(name.lower() for name in label_names) != sorted(defaults):
            raise SettingError(
                f"no verbalisers are known for the labels {listed(label_names)}: give a word for each, `verbalizers` "
                f"'{example}'"
            )
        given = {name: defaults[name.lower()] for name in label_names}
    if isinstance(given, str):
        given = _from_string(given, example)
    if isinstance(given, Mapping):
        words = {str(label): word for label, word in given.items()}
        if (places := matched(list(words), label_names, str, value_of)) is not None:
            words = {label_names[place]: word for place, word in zip(places, words.values(), strict=True)}
        if unknown := [label for label in words if label not in label_names]:
            raise SettingError(
                f"`verbalizers` names {listed(unknown)}, but the data's labels are {listed(label_names)}"
            )
        if absent := [name for name in label_names if name not in words]:
            raise SettingError(f"`verbalizers` has no word for {listed(absent)}: give '{example}'")
        given = [words[name] for name in label_names]
    out = list(given)
    if len(out) != len(label_names):
        raise SettingError(
            f"`verbalizers` has {len(out)} words for the {len(label_names)} classes {listed(label_names)}: give "
            f"'{example}'"
        )
    for name, word in zip(label_names, out, strict=True):
        if not isinstance(word, str) or not word.strip():
            raise SettingError(f"`verbalizers`: the word for {shown(name)} is {shown(word)}, which is not a word")
        if out.count(word) > 1:
            raise SettingError(f"`verbalizers` gives {shown(word)} to two classes; each needs a word of its own")
    return out


def _from_string(given: str, example: str) -> Mapping[str, str] | list[str]:
    if given.lstrip()[:1] in ("{", "["):
        try:
            parsed = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise SettingError(f"`verbalizers` {shown(given)} is not JSON ({error}): give '{example}'") from None
        return parsed
    parts = [part.strip() for part in given.split(",")]
    if not any("=" in part for part in parts):
        return parts
    out: dict[str, str] = {}
    for part in parts:
        label, equals, word = (piece.strip() for piece in part.partition("="))
        if not equals or not label:
            raise SettingError(f"`verbalizers`: {shown(part)} is not label=word: give '{example}'")
        if label in out:
            raise SettingError(f"`verbalizers` gives the label {shown(label)} twice")
        out[label] = word
    return out


@dataclass
class Encoded:
    """Prompts and their tokens.

    Attributes:
        features: per row ``input_ids`` and what else the model reads, lists of one length, not padded.
        prompts: the strings that were tokenised.
        cut: rows whose text was shortened.
        masks: rows whose text spells the mask token, which was broken up there.
    """

    features: list[dict[str, list[int]]] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)


class PromptEncoder:
    """Fills the template and tokenises, within ``max_length`` tokens.

    Args:
        tokenizer: the model's.
        template: from :func:`parse_template`.
        max_length: tokens per prompt, special ones included.
        accepts: names of the model's inputs; what else the tokenizer gives is dropped.

    Raises:
        ModelError: a masked model's tokenizer has no mask token.
        SettingError: the template alone leaves no room for a text.
    """

    def __init__(self, tokenizer: Any, template: Template, max_length: int, accepts: Callable[[str], bool]) -> None:
        self.tokenizer, self.template, self.max_length, self.accepts = tokenizer, template, max_length, accepts
        self.mask = ""
        self.dropped_at_end = 0
        if template.architecture == "masked":
            if getattr(tokenizer, "mask_token", None) is None:
                raise ModelError("the tokenizer has no mask token, which a masked language model's prompts need")
            self.mask = str(tokenizer.mask_token)
        else:
            special = set(tokenizer.all_special_ids)
            ids = list(tokenizer("a", verbose=False)["input_ids"])
            while len(ids) > 1 and ids[-1] in special:  # an end token there would end the prompt before the answer
                ids.pop()
                self.dropped_at_end += 1
        alone = len(self.tokens("", ""))
        if alone + 1 + template.has_pair > max_length:
            raise SettingError(
                f"the template alone takes {alone} of the {max_length} tokens: shorten it, or raise `max_length`"
            )

    @property
    def truncation_side(self) -> str:
        """``right`` where a text's end is cut, ``left`` where its start is: the tokenizer's choice."""
        return "left" if getattr(self.tokenizer, "truncation_side", "right") == "left" else "right"

    def tokens(self, text: str, pair: str = "", answer: str | None = None) -> list[int]:
        """Token ids of one prompt, with ``answer`` in the mask's place (or at the end)."""
        prompt = self.template.fill(text, pair, self.mask if answer is None else answer)
        return self._tokenised([prompt])[0]["input_ids"]

    def encode(self, rows: Rows) -> Encoded:
        """Prompts of labelled texts.

        A text that is too long keeps as many characters of its start (of its end where the tokenizer's
        ``truncation_side`` is ``left``) as fit; of two texts the longer one is cut first.

        Raises:
            DataError: a prompt that has not exactly one mask.
        """
        out = Encoded()
        pairs = rows.pairs if rows.pairs is not None else [""] * len(rows)
        contents = [(self._plain(text), self._plain(pair)) for text, pair in zip(rows.texts, pairs, strict=True)]
        out.masks = [i for i, pair in enumerate(zip(rows.texts, pairs, strict=True)) if pair != contents[i]]
        out.prompts = [self.template.fill(text, pair, self.mask) for text, pair in contents]
        out.features = self._tokenised(out.prompts)
        for index, row in enumerate(out.features):
            if len(row["input_ids"]) > self.max_length:
                out.cut.append(index)
                out.prompts[index] = self._shortened(*contents[index])
                out.features[index] = self._tokenised([out.prompts[index]])[0]
        if self.mask:
            mask_id = self.tokenizer.mask_token_id
            for index, row in enumerate(out.features):
                if (count := row["input_ids"].count(mask_id)) != 1:
                    raise DataError(f"{rows.source}, row {index + 1}: its prompt has {count} mask tokens, not one")
        return out

    def _plain(self, text: str) -> str:
        """A text that spells no mask."""
        return text.replace(self.mask, self.mask[:1] + " " + self.mask[1:]) if self.mask else text

    def _tokenised(self, prompts: list[str]) -> list[dict[str, list[int]]]:
        if not prompts:
            return []
        encoded = self.tokenizer(prompts, padding=False, truncation=False, verbose=False)
        keys = [key for key in encoded if self.accepts(key) or key == "attention_mask"]
        stop = -self.dropped_at_end or None
        return [{key: list(encoded[key][i])[:stop] for key in keys} for i in range(len(prompts))]

    def _shortened(self, text: str, pair: str) -> str:
        """The prompt with at most so many characters of either text as fit, found by bisection."""

        def prompt(characters: int) -> str:
            def keep(content: str) -> str:
                start = max(0, len(content) - characters) if self.truncation_side == "left" else 0
                return content[start : start + characters]

            return self.template.fill(keep(text), keep(pair), self.mask)

        def fits(characters: int) -> bool:
            return len(self._tokenised([prompt(characters)])[0]["input_ids"]) <= self.max_length

        low, high = 0, 4 * self.max_length
        while high < max(len(text), len(pair)) and fits(high):
            low, high = high, 2 * high
        high = min(high, max(len(text), len(pair)))  # does not fit, or prompt() would have been whole
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return prompt(low)

    def verbalizer_ids(self, words: Sequence[str], label_names: Sequence[str], rows: Rows) -> list[int]:
        """The token of every word in its place, the same in the prompts of the first rows.

        Raises:
            SettingError: a word is several tokens, is unknown, runs into the template, or shares its token.
        """
        few = rows.subset(range(min(_CONTEXTS, len(rows))))
        contexts = list(zip(few.texts, few.pairs or [""] * len(few), strict=True))
        out: list[int] = []
        for word, label in zip(words, label_names, strict=True):
            found = [self._in_place(word, *context) for context in contexts]
            if len(set(found)) > 1:
                tokens = listed(sorted({str(self.tokenizer.convert_ids_to_tokens(token)) for token in found}))
                raise SettingError(
                    f"the verbaliser {shown(word)} is another token in other rows ({tokens}): put fixed text beside it "
                    "in `template`"
                )
            if found[0] in out:
                raise SettingError(
                    f"the verbalisers {shown(words[out.index(found[0])])} and {shown(word)} are the same token "
                    f"({self.tokenizer.convert_ids_to_tokens(found[0])}); choose another word for {shown(label)}"
                )
            out.append(found[0])
        return out

    def _in_place(self, word: str, text: str, pair: str) -> int:
        text, pair = self._plain(text[-self.max_length :]), self._plain(pair[-self.max_length :])  # what stands nearest
        prompt = self.tokens(text, pair)
        tries = [word]
        if self.template.architecture == "causal" and not word[0].isspace():
            last = self.template.fill("a", "a")[-1:]
            spaced = not (last.isspace() or last in "([{<\"'“‘«")
            tries = [" " + word] if spaced else [word]
            if spaced and not (last.isascii() and word[0].isascii()):  # scripts that write no spaces
                tries.append(word)
        for attempt in tries:
            filled = self.tokens(text, pair, attempt)
            own = _replaced(prompt, filled, self.tokenizer.mask_token_id if self.mask else None)
            if own is not None and len(own) == 1 and own[0] != getattr(self.tokenizer, "unk_token_id", None):
                return own[0]
        raise SettingError(self._refusal(word, prompt, self.tokens(text, pair, tries[0])))

    def _refusal(self, word: str, prompt: list[int], filled: list[int]) -> str:
        own = _replaced(prompt, filled, self.tokenizer.mask_token_id if self.mask else None)
        if own is None:
            cure = "put a space or a stop beside {mask}" if self.mask else "leave no space at its end"
            return f"the verbaliser {shown(word)} merges with the template {shown(self.template.text)}; {cure}"
        tokens = [str(token) for token in self.tokenizer.convert_ids_to_tokens(own)]
        if len(own) == 1:
            return f"the verbaliser {shown(word)} is not in the tokenizer's vocabulary; choose another word"
        if not own:
            return f"the verbaliser {shown(word)} leaves no token; choose another word"
        return (
            f"the verbaliser {shown(word)} is {len(own)} tokens here ({', '.join(tokens)}), and has to be one; choose "
            "another word"
        )


def _replaced(prompt: list[int], filled: list[int], mask_id: int | None) -> list[int] | None:
    """What stands in ``filled`` for the mask of ``prompt`` (or after its end); None where other tokens changed."""
    at = len(prompt) if mask_id is None else prompt.index(mask_id)
    after = len(prompt) - at - (mask_id is not None)
    if filled[:at] != prompt[:at] or (after and filled[-after:] != prompt[-after:]) or len(filled) < at + after:
        return None
    return filled[at : len(filled) - after]
