"""Data for causal language models: prompts with completions, or conversations; loss on the completion only.

A row becomes one text and the character ranges of it that carry loss. The whole text is tokenised at once, as
the model sees it in training, and a token carries loss when its characters reach into such a range: so the
boundary never depends on how a prompt would be tokenised alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ranksure.choices import LossOn
from ranksure.data.chats import COLUMNS, Chat, own_mask, plain, read_variables, template_variables, written
from ranksure.data.tables import MissingColumnError, Table, read_source
from ranksure.data.texts import content_hash
from ranksure.errors import DataError, SettingError, shown

Form = Literal["prompt and completion", "messages"]
IGNORED = -100
"""Label of a token that carries no loss, as everywhere in transformers."""


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
        variables: what each row gives to its chat template beside the messages, by name.
        columns: names of all columns of the source.
    """

    form: Form
    prompts: list[Any]
    completions: list[Any]
    source: str
    sha256: str
    notes: list[str]
    places: list[str]
    variables: list[dict[str, Any]]
    columns: list[str]

    def __len__(self) -> int:
        return len(self.completions)

    def subset(self, indices: Sequence[int]) -> Examples:
        """The rows at ``indices``, in that order."""
        names = ("prompts", "completions", "places", "variables")
        return replace(self, **{name: [getattr(self, name)[i] for i in indices] for name in names})

    def chats(self) -> list[Chat]:
        """The rows as conversations."""
        rows = zip(self.prompts, self.completions, self.variables, self.places, strict=True)
        return [Chat(*row) for row in rows]


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
            the source does not have the two columns above. Conversations take what their template reads beside
            them from the columns ``tools``, ``documents`` and ``chat_template_kwargs``.
        split: which split of a Hub or saved data set.

    Raises:
        DataError: the source cannot be read, has neither form, or a row of it cannot be used.
    """
    try:
        table = read_source(source, [prompt_column, completion_column], "", split, COLUMNS)
        return _prompts_and_completions(table, prompt_column, completion_column)
    except MissingColumnError as error:
        missing = error
    try:
        table = read_source(source, [messages_column], "", split, COLUMNS)
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
    conversational = bool(prompts) and isinstance(plain(prompts[0]), list)
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        for column, value in ((prompt_column, prompt), (completion_column, completion)):
            where = f"{table.row(index)}, column {column!r}"
            if conversational:
                _check_messages(value, where)
                continue
            if not isinstance(value, str):
                found = "missing" if value is None or value != value else f"{shown(value)}, not text"
                raise DataError(f"{where}: the {column} is {found}; remove the row or fill it in")
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
    places = [table.row(index) for index in range(len(completions))]
    variables: list[dict[str, Any]] = [{} for _ in completions]
    if form == "messages":
        prompts, completions = ([plain(row) for row in part] for part in (prompts, completions))
        given = {name: table.columns[name] for name in COLUMNS if name in table.columns}
        for index, place in enumerate(places):
            variables[index] = template_variables({name: rows[index] for name, rows in given.items()}, place)
    content = [prompts, completions, variables] if any(variables) else [prompts, completions]
    sha256 = table.sha256 or content_hash(content)
    columns = [*table.columns, *table.unread]
    return Examples(form, prompts, completions, table.name, sha256, list(table.notes), places, variables, columns)


def _check_messages(value: Any, where: str) -> None:
    messages = plain(value)
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
      generation the prompt is tokenised alone, so the model then sees other tokens). A completion that does not end
      with the end token gets it, an empty one too, and it carries loss.
    - Messages go through the chat template, with the row's ``tools``, ``documents`` and ``chat_template_kwargs``. What
      carries loss are the assistant's turns: the characters between the template's ``{% generation %}`` markers where
      it has them; else, turn by turn, what the rendered conversation gains beyond the one before it with the
      generation prompt, the end of the turn included. With conversational prompts, turns of the completion only. A
      template that renders earlier turns anew (so that one rendering is not the start of the next) is refused.
    - Rows longer than ``max_length`` tokens lose their end. One that has no predicted token with a loss left is
      dropped. TRL's ``SFTTrainer`` does both.

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
    _collect(out, ids, masks, max_length, examples)
    return out


Tokens = tuple[list[list[int]], list[list[bool]]]
"""Token ids by row, and whether each carries loss."""


def _of_messages(examples: Examples, tokenizer: Any, notes: list[str], whole: bool) -> Tokens:
    chats = examples.chats()
    found = written(chats, tokenizer, whole)
    ids, masks, _ = _masked(found.texts, found.ranges, tokenizer, special=False)
    if found.headers:
        notes.append(f"In {found.headers} of the assistant's turns the template's header carries loss too.")
    notes += _other_masks(chats, masks, found.marked, tokenizer)
    notes += _not_given(examples, chats, tokenizer)
    others = [chat.place for chat in chats if any(message["role"] != "assistant" for message in chat.completion)]
    if others and any(examples.prompts) and not whole:
        notes.append(
            f"{_rows(others, len(chats))}: the completion holds turns that are not the assistant's, which carry no "
            "loss here (with TRL's completion_only_loss they do)."
        )
    return ids, masks


def _other_masks(chats: list[Chat], masks: list[list[bool]], marked: list[bool], tokenizer: Any) -> list[str]:
    """A sentence on rows whose ``assistant_masks`` of transformers are others."""
    others = []
    for chat, mask, by_markers in zip(chats, masks, marked, strict=True):
        if by_markers and own_mask(chat, tokenizer) not in (mask, None):
            others.append(chat.place)
    if not others:
        return []
    return [
        f"{_rows(others, len(chats))}: transformers' assistant_masks, which TRL's assistant_only_loss trains on, marks "
        "other tokens than stand between the template's {% generation %} markers; the loss here is on the latter."
    ]


def _not_given(examples: Examples, chats: list[Chat], tokenizer: Any) -> list[str]:
    """Sentences on columns that the template would read, and what it is given of them."""
    reads = read_variables(chats[0].template(tokenizer)).intersection(examples.columns)
    notes = [
        f"The chat template reads {name!r}, which is a column of the data, but is given it by the column "
        "'chat_template_kwargs' only (as by TRL): move it there."
        for name in sorted(reads.difference(COLUMNS, ["messages"]))
    ]
    if "documents" in reads and any("documents" in chat.variables for chat in chats):
        notes.append(
            "The column 'documents' reaches the chat template; TRL 1.16 leaves it out, unless it stands in the column "
            "'chat_template_kwargs'."
        )
    return notes


def _rows(places: list[str], total: int) -> str:
    """Rows as notes name them."""
    return f"In {len(places)} of {total} rows ({', '.join(places[:3])}{', ...' * (len(places) > 3)})"


def _of_prompts(examples: Examples, tokenizer: Any, notes: list[str], whole: bool) -> Tokens:
    end = tokenizer.eos_token
    texts = []
    for prompt, completion in zip(examples.prompts, examples.completions, strict=True):
        texts.append(prompt + completion + (end if end and not completion.endswith(end) else ""))
    starts = [0 if whole else len(prompt) for prompt in examples.prompts]
    spans = [[(start, len(text))] for start, text in zip(starts, texts, strict=True)]
    ids, masks, across = _masked(texts, spans, tokenizer, special=True)
    special = set(tokenizer.all_special_ids)
    if end is None and not all(row and row[-1] in special for row in ids):
        notes.append("The tokenizer has no end token: completions end without one.")
    if across and not whole:
        notes.append(
            f"In {across} of {len(texts)} rows a token spans the end of the prompt; it counts as completion. Where "
            "prompts end with a space, move the space to the completion."
        )
    return ids, masks


def _collect(out: Encoded, ids: list[list[int]], masks: list[list[bool]], max_length: int, examples: Examples) -> None:
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
        first = next(index for index in range(len(ids)) if index >= len(out.rows) or out.rows[index] != index)
        out.notes.append(
            f"{dropped} of {len(ids)} rows have no token with a loss left and were dropped (the first is "
            f"{examples.places[first]})."
        )
    if not out.rows:
        raise DataError(
            f"{examples.source}: no row has a token with a loss within {max_length} tokens; raise `max_length`"
        )


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
