"""Conversations as a chat template writes them, and which characters of them the assistant wrote.

A template is given what TRL's ``SFTTrainer`` gives it: the messages, ``tools`` (a list, or its JSON) and
``chat_template_kwargs`` of the row; ``documents``, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import jinja2
import jinja2.meta

from ranksure.errors import DataError, ModelError, one_line, shown

COLUMNS = ("tools", "documents", "chat_template_kwargs")
"""Columns of conversations that the template reads beside the messages."""

Ranges = list[tuple[int, int]]
"""Characters of a text, ``(start, end)``."""

_GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
_END = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
_OWN = {"conversation", "messages", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict"}
_OWN |= {"return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length", "tokenizer_kwargs"}
_OWN |= {"sanitize_control_tokens"}


def plain(value: Any) -> Any:
    """Lists and dicts as JSON has them: Parquet and data frames give arrays, which templates cannot read."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # of NumPy
        value = value.tolist()
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def template_variables(columns: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a row gives to the template beside its messages, from those of ``COLUMNS`` that it has.

    Raises:
        DataError: a value that no template can be given.
    """
    given = {name: plain(value) for name, value in columns.items()}
    given = {name: None if value != value else value for name, value in given.items()}  # NaN: a data frame's None
    tools = given.get("tools")
    if isinstance(tools, str):
        try:
            given["tools"] = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{where}, column 'tools': not valid JSON ({error}); correct it") from None
    for name in ("tools", "documents"):
        value = given.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
            raise DataError(f"{where}, column {name!r}: {shown(value)} is not a list of objects; correct it")
    more = given.pop("chat_template_kwargs", None) or {}
    if not isinstance(more, dict):
        raise DataError(f"{where}, column 'chat_template_kwargs': {shown(more)} is not an object; correct it")
    if own := sorted(name for name in _OWN & more.keys() if more[name]):
        raise DataError(
            f"{where}, column 'chat_template_kwargs': {own[0]!r} is no variable of a template but says how to call "
            "it; take it out"
        )
    given |= {name: value for name, value in more.items() if name not in _OWN}
    return {name: value for name, value in given.items() if name not in COLUMNS or value is not None}


@dataclass(frozen=True)
class Chat:
    """One conversation.

    Attributes:
        prompt: messages that carry no loss.
        completion: the others.
        variables: what the template is given beside them.
        place: the row, as errors name it.
    """

    prompt: list[Any]
    completion: list[Any]
    variables: dict[str, Any]
    place: str

    @property
    def messages(self) -> list[Any]:
        """All of them."""
        return [*self.prompt, *self.completion]

    def template(self, tokenizer: Any) -> str:
        """The template that this row goes through.

        Raises:
            ModelError: the tokenizer has none.
        """
        if own := self.variables.get("chat_template"):
            return str(own)
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "the tokenizer has no chat template, which messages need: write the data as prompt and completion, or "
                "save a template with the tokenizer"
            )
        return self._call(lambda: tokenizer.get_chat_template(None, self.variables.get("tools")))

    def render(self, tokenizer: Any, count: int | None = None, begin: bool = False, template: str | None = None) -> str:
        """The first ``count`` messages as text; with ``begin`` and the header of the next turn of the assistant.

        Raises:
            DataError: the template does not take them.
        """
        variables = self.variables if template is None else {**self.variables, "chat_template": template}
        return self._call(
            lambda: tokenizer.apply_chat_template(
                self.messages[:count], tokenize=False, add_generation_prompt=begin, **variables
            )
        )

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # jinja2's errors, and whatever a template's own filters raise
            raise DataError(
                f"{self.place}: the chat template does not take this conversation: {one_line(error)}"
            ) from None


@dataclass
class Written:
    """Conversations as text.

    Attributes:
        texts: one per row.
        ranges: the characters of each that carry loss.
        marked: whether the template's own markers say which.
        headers: turns of the assistant whose header carries loss too.
    """

    texts: list[str] = field(default_factory=list)
    ranges: list[Ranges] = field(default_factory=list)
    marked: list[bool] = field(default_factory=list)
    headers: int = 0


def written(chats: Sequence[Chat], tokenizer: Any, whole: bool) -> Written:
    """Conversations as text, with the characters of the assistant's turns (of everything if ``whole``).

    Raises:
        DataError: a template that does not take a row, or turns that cannot be told apart.
        ModelError: no template.
    """
    out = Written()
    for chat in chats:
        template = chat.template(tokenizer)
        text = chat.render(tokenizer)
        marked = not whole and not chat.prompt and _GENERATION.search(template) is not None
        ranges, headers = [(0, len(text))], 0
        if marked:
            ranges = _between_markers(chat, tokenizer, template, text)
        elif not whole:
            ranges, headers = _turns(chat, tokenizer, text)
        out.texts.append(text)
        out.ranges.append(ranges)
        out.marked.append(marked)
        out.headers += headers
    return out


def own_mask(chat: Chat, tokenizer: Any) -> list[bool] | None:
    """Which tokens transformers' ``assistant_masks`` marks; None where it has none (no character offsets)."""
    try:
        found = tokenizer.apply_chat_template(
            chat.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **chat.variables
        )
    except Exception:  # of tokenizers that are not "fast", and of places that it does not find
        return None
    return [bool(value) for value in found["assistant_masks"]]


def read_variables(template: str) -> set[str]:
    """Names that a template reads and does not set itself."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return jinja2.meta.find_undeclared_variables(environment.parse(_with_calls(template)))
    except jinja2.TemplateError:
        return set()


def _with_calls(template: str, opening: str = "", closing: str = "") -> str:
    """The template with its markers as calls of a macro, which writes characters around what they hold.

    A ``call`` block has the white space control and the scope of a ``generation`` block, which is one to jinja2.
    The line break after the macro is taken off, as after every block of a chat template.
    """
    body = _END.sub(r"{%\1 endcall \2%}", _GENERATION.sub(r"{%\1 call ranksure_generated() \2%}", template))
    return f"{{% macro ranksure_generated() %}}{opening}{{{{ caller() }}}}{closing}{{% endmacro %}}\n{body}"


def _between_markers(chat: Chat, tokenizer: Any, template: str, text: str) -> Ranges:
    """What the template writes between its markers.

    Not by transformers' ``assistant_masks``: these take a first token that is the whole turn for none, miss the last
    bytes of a character of several tokens, and count wrongly inside macros and captured blocks.
    """
    unused = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text and chr(code) not in template)
    opening, closing = next(unused), next(unused)
    ranges: Ranges = []
    starts: list[int] = []
    kept = 0
    parts = re.split(
        f"([{opening}{closing}])", chat.render(tokenizer, template=_with_calls(template, opening, closing))
    )
    for part in parts:
        if part == opening:
            starts.append(kept)
        elif part == closing and starts:
            ranges.append((starts.pop(), kept))
        else:
            kept += len(part)
    whole = "".join(part for part in parts if part not in (opening, closing)) == text and not starts
    if not whole:
        raise DataError(
            f"{chat.place}: the chat template rewrites what stands between its {{% generation %}} markers, so the "
            "assistant's words cannot be told apart; take the markers out of the template"
        )
    return sorted((low, high) for low, high in ranges if high > low)


def _turns(chat: Chat, tokenizer: Any, text: str) -> tuple[Ranges, int]:
    """What the text gains by each turn of the assistant beyond its header, and how many have no header apart."""
    ranges: Ranges = []
    headers = 0
    messages = chat.messages
    for index in range(len(chat.prompt), len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        after = chat.render(tokenizer, index + 1)
        before = chat.render(tokenizer, index) if index else ""
        header = chat.render(tokenizer, index, begin=True) if index else ""
        start = len(header) if after.startswith(header) else max(_shared(header, after, tokenizer), len(before))
        told = after.startswith(header) or after.startswith(before)
        if not (told and text.startswith(after)):
            raise DataError(
                f"{chat.place}: the chat template renders earlier messages differently once later ones follow, so the "
                "assistant's turns cannot be told apart; use a template with {% generation %} markers, or rows of "
                "one turn"
            )
        headers += start == len(before)
        ranges.append((start, len(after)))
    return ranges, headers


def _shared(header: str, text: str, tokenizer: Any) -> int:
    """Characters of the tokens that both begin with: a header may say more than the turn (an empty thought)."""
    if getattr(tokenizer, "is_fast", False):
        first = tokenizer(header, add_special_tokens=False, verbose=False)["input_ids"]
        second = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for one, other, (start, _) in zip(first, second["input_ids"], second["offset_mapping"], strict=False):
            if one != other:
                return start
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(header, text, strict=False)))
