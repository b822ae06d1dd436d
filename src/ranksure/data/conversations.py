"""Data for causal language models: prompts with completions, or conversations; loss on the completion only.

A row becomes one text and the character ranges of it that carry loss. The whole text is tokenised at once, as
the model sees it in training, and a token carries loss when its characters reach into such a range: so the
boundary never depends on how a prompt would be tokenised alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from ranksure.choices import LossOn
from ranksure.data.tables import MissingColumnError, Table, read_source
from ranksure.data.texts import content_hash
from ranksure.errors import DataError, ModelError, SettingError, one_line, shown

Form = Literal["prompt and completion", "messages"]
IGNORED = -100
"""Label of a token that carries no loss, as everywhere in transformers."""

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Examples:
    """Rows of a causal language model's training data, read and checked.

    Attributes:
        form: which columns they come from.
        prompts: one per row, a string; a list of messages (as ``apply_chat_template`` takes them) for messages,
            empty unless the source has conversational prompts.
        completions: one per row, of the same type as the prompts.
        source: where the rows come from, as messages name it.
        sha256: of the file's bytes; of the rows where the source is not one file.
        notes: sentences for the user.
        places: the rows as errors name them.
    """

    form: Form
    prompts: list[Any]
    completions: list[Any]
    source: str
    sha256: str
    notes: list[str]
    places: list[str]

    def __len__(self) -> int:
        return len(self.completions)

    def subset(self, indices: Sequence[int]) -> Examples:
        """The rows at ``indices``, in that order."""
        parts = [[part[i] for i in indices] for part in (self.prompts, self.completions, self.places)]
        return Examples(self.form, parts[0], parts[1], self.source, self.sha256, self.notes, parts[2])


@dataclass
class Encoded:
    """Tokenised rows.

    Attributes:
        features: ``input_ids``, ``attention_mask`` and ``labels`` by row, lists of one length, not padded.
        rows: which example each comes from.
        notes: sentences for the user: truncated and dropped rows, tokens across a boundary.
    """

    features: list[dict[str, list[int]]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_examples(
    source: Any,
    *,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    messages_column: str = "messages",
    split: str | None = None,
) -> Examples:
    """Read prompts and completions, or conversations.

    Args:
        source: whatever :func:`ranksure.data.texts.load_rows` reads; JSON lines, as a rule.
        prompt_column: the column of prompts: strings, or lists of messages.
        completion_column: the column of completions, of the same kind.
        messages_column: the column of conversations, each a list of ``{"role": ..., "content": ...}``; read where
            the source does not have the two columns above.
        split: which split of a Hub or saved data set.

    Raises:
        DataError: the source cannot be read, has neither form, or a row of it cannot be used.
    """
    try:
        table = read_source(source, [prompt_column, completion_column], "", split)
        return _prompts_and_completions(table, prompt_column, completion_column)
    except MissingColumnError as error:
        missing = error
    try:
        table = read_source(source, [messages_column], "", split)
    except MissingColumnError as error:
        if {prompt_column, completion_column} & set(missing.columns):
            raise missing from None
        raise DataError(
            f"{error}; a causal language model's data needs {prompt_column!r} and {completion_column!r}, or "
            f"{messages_column!r}"
        ) from None
    rows = table.columns[messages_column]
    for index, messages in enumerate(rows):
        _check_messages(messages, f"{table.row(index)}, column {messages_column!r}")
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{table.row(index)}, column {messages_column!r}: no message has the role 'assistant'")
    return _examples("messages", [[] for _ in rows], rows, table)


def _prompts_and_completions(table: Table, prompt_column: str, completion_column: str) -> Examples:
    prompts, completions = table.columns[prompt_column], table.columns[completion_column]
    conversational = bool(prompts) and isinstance(_plain(prompts[0]), list)
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        for column, value in ((prompt_column, prompt), (completion_column, completion)):
            where = f"{table.row(index)}, column {column!r}"
            if conversational:
                _check_messages(value, where)
                continue
            if not isinstance(value, str):
                found = "missing" if value is None or value != value else f"{shown(value)}, not text"
                raise DataError(f"{where}: the {column} is {found}; remove the row or fill it in")
            if column == completion_column and not value:
                raise DataError(f"{where}: the completion is empty; remove the row or fill it in")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise DataError(f"{where}: half a surrogate pair, which is not Unicode text; correct it") from None
    if conversational:
        return _examples("messages", prompts, completions, table)
    return _examples("prompt and completion", prompts, completions, table)


def _examples(form: Form, prompts: list[Any], completions: list[Any], table: Table) -> Examples:
    if not completions:
        raise DataError(f"{table.name} has no rows")
    if form == "messages":
        prompts, completions = ([_plain(row) for row in part] for part in (prompts, completions))
    sha256 = table.sha256 or content_hash([prompts, completions])
    places = [table.row(index) for index in range(len(completions))]
    return Examples(form, prompts, completions, table.name, sha256, list(table.notes), places)


def _plain(value: Any) -> Any:
    """Lists as lists: Parquet and data frames give arrays."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, (str, pd.Series)) else value


def _check_messages(value: Any, where: str) -> None:
    messages = _plain(value)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: {shown(value)} is not a list of messages; write a JSON list of objects")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(
                f"{where}: message {number} is {shown(message)}; each needs a 'role' (system, user, assistant) and a "
                "'content' of text"
            )
        if not isinstance(message.get("content"), str) and "tool_calls" not in message:
            raise DataError(f"{where}: the content of message {number} is not text ({shown(message.get('content'))})")


# ---------------------------------------------------------------------------------------------------------------------
# texts and tokens


def encode(examples: Examples, tokenizer: Any, *, max_length: int, loss_on: LossOn = "completion") -> Encoded:
    """Tokenise examples for training: labels are token ids where there is a loss, else -100.

    - Prompt and completion are tokenised as one text, with the tokenizer's own special tokens; a token that
      reaches into the completion carries loss, one that spans the boundary included (``notes`` counts those: at
      generation the prompt is tokenised alone, so the model then sees other tokens). The end token is added where
      the tokenizer does not, and carries loss.
    - Messages go through the chat template. What carries loss are the assistant's turns: the tokens between the
      template's ``{% generation %}`` markers where it has them; else, turn by turn, what the rendered conversation
      gains beyond the one before it with the generation prompt, the end of the turn included. With conversational
      prompts, turns of the completion only. A template that renders earlier turns anew (so that one rendering is
      not the start of the next) is refused.
    - Rows longer than ``max_length`` tokens lose their end. One that has no predicted token with a loss left is
      dropped.

    Args:
        examples: from :func:`load_examples`.
        tokenizer: the model's. One without character offsets (not "fast") is used by common prefixes of tokens.
        max_length: tokens per row.
        loss_on: ``completion``, or ``all`` tokens, the prompts' included.

    Raises:
        DataError: a conversation that the template refuses, or no row with a loss.
        ModelError: messages, and a tokenizer without a chat template.
        SettingError: an unknown ``loss_on``.
    """
    if loss_on not in ("completion", "all"):
        raise SettingError(f"unknown loss_on {loss_on!r}: use completion or all")
    out = Encoded()
    tokens = _of_messages if examples.form == "messages" else _of_prompts
    ids, masks = tokens(examples, tokenizer, out.notes, loss_on == "all")
    _collect(out, ids, masks, max_length, examples.source)
    return out


Tokens = tuple[list[list[int]], list[list[bool]]]
"""Token ids by row, and whether each carries loss."""


def _of_messages(examples: Examples, tokenizer: Any, notes: list[str], whole: bool) -> Tokens:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ModelError(
            "the tokenizer has no chat template, which messages need: write the data as prompt and completion, or "
            "save a template with the tokenizer"
        )
    marked = isinstance(template, str) and _MARKERS.search(template) is not None
    if marked and not whole and not any(examples.prompts):
        return _marked(examples, tokenizer)
    texts, spans = _rendered(examples, tokenizer, notes, whole)
    return _masked(texts, spans, tokenizer, special=False)[:2]


def _of_prompts(examples: Examples, tokenizer: Any, notes: list[str], whole: bool) -> Tokens:
    texts = [p + c for p, c in zip(examples.prompts, examples.completions, strict=True)]
    starts = [0 if whole else len(prompt) for prompt in examples.prompts]
    spans = [[(start, len(text))] for start, text in zip(starts, texts, strict=True)]
    ids, masks, across = _masked(texts, spans, tokenizer, special=True)
    end = tokenizer.eos_token_id
    for row, mask in zip(ids, masks, strict=True):
        if end is not None and row[-1:] != [end]:
            row.append(end)
            mask.append(True)
    special = set(tokenizer.all_special_ids)
    if end is None and not all(row[-1] in special for row in ids):
        notes.append("The tokenizer has no end token: completions end without one.")
    if across and not whole:
        notes.append(
            f"In {across} of {len(texts)} rows a token spans the end of the prompt; it counts as completion. Where "
            "prompts end with a space, move the space to the completion."
        )
    return ids, masks


def _collect(out: Encoded, ids: list[list[int]], masks: list[list[bool]], max_length: int, source: str) -> None:
    cut = 0
    for index, (row, mask) in enumerate(zip(ids, masks, strict=True)):
        cut += len(row) > max_length
        row, mask = row[:max_length], mask[:max_length]
        if not any(mask[1:]):  # the first token is never predicted
            continue
        labels = [token if use else IGNORED for token, use in zip(row, mask, strict=True)]
        out.features.append({"input_ids": row, "attention_mask": [1] * len(row), "labels": labels})
        out.rows.append(index)
    if cut:
        out.notes.append(f"{cut} of {len(ids)} rows were cut at {max_length} tokens.")
    if dropped := len(ids) - len(out.rows):
        out.notes.append(f"{dropped} of {len(ids)} rows have no token with a loss left and were dropped.")
    if not out.rows:
        raise DataError(f"{source}: no row has a token with a loss within {max_length} tokens; raise `max_length`")


def _masked(
    texts: list[str], spans: list[list[tuple[int, int]]], tokenizer: Any, *, special: bool
) -> tuple[list[list[int]], list[list[bool]], int]:
    """Token ids, whether each reaches into a span of its text, and how many rows have one across a span's start."""
    if not getattr(tokenizer, "is_fast", False):
        pairs = [_masked_by_prefixes(t, s, tokenizer, special) for t, s in zip(texts, spans, strict=True)]
        return [ids for ids, _ in pairs], [mask for _, mask in pairs], 0
    encoded = tokenizer(
        texts, add_special_tokens=special, return_offsets_mapping=True, truncation=False, padding=False, verbose=False
    )
    masks: list[list[bool]] = []
    across = 0
    for text, ranges, offsets in zip(texts, spans, encoded["offset_mapping"], strict=True):
        mask = [any(end > low and start < high and end > start for low, high in ranges) for start, end in offsets]
        across += any(start < low < end for low, _ in ranges for start, end in offsets)
        if ranges and ranges[-1][1] == len(text):  # end tokens that the tokenizer adds belong to the last span
            for place in range(len(mask) - 1, 0, -1):
                if offsets[place][1] > offsets[place][0]:
                    break
                mask[place] = True
        masks.append(mask)
    return [list(ids) for ids in encoded["input_ids"]], masks, across


def _masked_by_prefixes(
    text: str, spans: list[tuple[int, int]], tokenizer: Any, special: bool
) -> tuple[list[int], list[bool]]:
    """As above without offsets: a span's tokens are those beyond the common start with the text cut there."""
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def reached(place: int) -> int:
        if place >= len(text):
            return len(ids)
        if not place:
            return 0
        part = list(tokenizer(text[:place], add_special_tokens=special, verbose=False)["input_ids"])
        return next((i for i, (a, b) in enumerate(zip(ids, part, strict=False)) if a != b), min(len(ids), len(part)))

    mask = [False] * len(ids)
    for low, high in spans:
        for place in range(reached(low), reached(high)):
            mask[place] = True
    return ids, mask


def _marked(examples: Examples, tokenizer: Any) -> tuple[list[list[int]], list[list[bool]]]:
    """By the template's own markers around what the assistant generates."""
    ids, masks = [], []
    for messages, place in zip(examples.completions, examples.places, strict=True):
        found = _template(
            lambda messages=messages: tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            ),
            place,
        )
        ids.append(list(found["input_ids"]))
        masks.append([bool(value) for value in found["assistant_masks"]])
    return ids, masks


def _rendered(
    examples: Examples, tokenizer: Any, notes: list[str], whole: bool
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Conversations as text, and the character ranges of the assistant's turns (of everything if ``whole``)."""
    texts, spans, headed = [], [], 0
    for prompt, completion, place in zip(examples.prompts, examples.completions, examples.places, strict=True):
        messages = [*prompt, *completion]

        def render(count: int, begin: bool, messages: list[Any] = messages, place: str = place) -> str:
            return _template(
                lambda: tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=begin),
                place,
            )

        text = render(len(messages), False)
        ranges = [(0, len(text))] if whole else []
        for index, message in enumerate(messages):
            if whole or index < len(prompt) or message["role"] != "assistant":
                continue
            after = render(index + 1, False)
            before = render(index, True) if index else ""
            if index and not after.startswith(before):  # a template whose generation prompt says more
                before = render(index, False)
            headed += not index or before == render(index, False)
            if not (text.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"{place}: the chat template renders earlier messages differently once later ones follow, so the "
                    "assistant's turns cannot be told apart; use a template with {% generation %} markers, or rows of "
                    "one turn"
                )
            ranges.append((len(before), len(after)))
        texts.append(text)
        spans.append(ranges)
    if headed:
        notes.append(f"In {headed} of the assistant's turns the template's header carries loss too.")
    return texts, spans


def _template(call: Callable[[], Any], place: str) -> Any:
    try:
        return call()
    except Exception as error:  # jinja2's errors, and whatever a template's own filters raise
        raise DataError(f"{place}: the chat template does not take this conversation: {one_line(error)}") from None
