"""How a settings dataclass states an option: ``name: Annotated[type, Option(help, group)] = default``.

The Python signature, the command line, the docs and the records read the same statement. No module of settings imports
torch or a library of the command line, so that ``--help`` is quick.

In a class body Python assigns a default before it evaluates the annotation: a function that an Option names must not
have the name of its own field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ranksure.errors import SettingError

COMMON, DATA, MODEL, TARGETS, SOLVER, TRAINING, OUTPUT = GROUPS = (
    "Used first",
    "Data",
    "Model",
    "Targets",
    "Solver and certificate",
    "Training",
    "Output",
)
"""The groups of a command's help, in its order."""

Complaint = Callable[[Any], str | None]
"""What is wrong with a value, to be read after the option's name and the value; None if nothing is."""


@dataclass(frozen=True)
class Option:
    """What a type and a default do not say of an option.

    Attributes:
        help: one sentence; the default need not be repeated, unless it is None.
        group: of the command's help, one of ``GROUPS``.
        flag: on the command line, where it is not the field's name with hyphens.
        words: what it is, as a rule, where the type is wider than a Literal; ``check`` is asked about others only.
        positional: an argument of the command without a name.
        parse: makes the value of the text of the command line, where the type does not say how; raises ValueError
            with what is wrong.
        check: complains about a value that has the type and no meaning (None is never shown to it).
        decides: whether the result depends on it.
        was: names that it had, which the command line answers with its new one.
    """

    help: str
    group: str
    flag: str | None = None
    words: tuple[str, ...] = ()
    positional: bool = False
    parse: Callable[[str], Any] | None = None
    check: Complaint | None = None
    decides: bool = True
    was: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stated:
    """One option of a settings dataclass, with the parts that the dataclass knows."""

    name: str
    type: Any
    option: Option
    default: Any

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def flag(self) -> str:
        """As it is written on the command line."""
        if self.option.positional:
            return self.name.upper()
        return self.option.flag or "--" + self.name.replace("_", "-")

    @property
    def key(self) -> str:
        """In a file of options."""
        return self.name if self.option.positional else self.flag.removeprefix("--").replace("-", "_")

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The type's alternatives without None."""
        parts = get_args(self.type) if get_origin(self.type) in (Union, UnionType) else (self.type,)
        return tuple(part for part in parts if part is not NoneType)

    @property
    def is_flag(self) -> bool:
        """Whether it takes no value on the command line."""
        return bool in self.kinds

    @property
    def many(self) -> bool:
        """Whether it may be a list."""
        return any(_is_sequence(kind) for kind in self.kinds)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it may be: those of its Literals, of a sequence's entries too."""
        parts = [get_args(kind)[0] if _is_sequence(kind) else kind for kind in self.kinds]
        words = (word for part in parts if get_origin(part) is Literal for word in get_args(part))
        return self.option.words or tuple(words)

    @property
    def only_choices(self) -> bool:
        """Whether it is, or its entries are, one of the choices and nothing else."""
        return bool(self.choices) and all(
            get_origin(kind) is Literal or _is_sequence(kind) or (kind is str and self.option.words)
            for kind in self.kinds
        )

    @property
    def word(self) -> str:
        """What it takes, as one word for help and docs; empty for a flag."""
        if self.is_flag:
            return ""
        if self.only_choices and not self.many:
            return "|".join(self.choices)
        if self.many:
            return "list"
        if str in self.kinds:
            return "text"
        words = [_WORDS.get(kind, "text") for kind in self.kinds if get_origin(kind) is not Literal]
        return "|".join([words[0], *self.choices])

    def read(self, text: str) -> Any:
        """The value that a text on the command line means.

        Raises:
            ValueError: it means none; the message says what was expected.
        """
        if self.option.parse is not None:
            return self.option.parse(text)
        if self.many:
            return names(text)
        for kind in self.kinds:
            if kind in (int, float, Path):
                try:
                    return kind(text)
                except ValueError:
                    continue
            if get_origin(kind) is not Literal or text in get_args(kind) or len(self.kinds) == 1:
                return text  # a single Literal is checked with the settings, in Python's way too
        expected = [_EXPECTED[kind] for kind in self.kinds if kind in _EXPECTED]
        raise ValueError(f"is not {either([*expected, *self.choices])}")

    def complain(self, value: Any) -> str | None:
        """What is wrong with a value, in one sentence that names the option; None if nothing is."""
        if value is None and (self.type is Any or NoneType in get_args(self.type)):
            return None
        if isinstance(value, str) and value in self.choices:
            return None
        try:
            wrong = self.option.check and self.option.check(value)
        except TypeError:
            wrong = "is not understood"
        if wrong:
            return f"`{self.name}` {value!r} {wrong}"
        entries = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
        for entry in entries if self.only_choices and not self.option.words else ():
            if entry not in self.choices:
                return f"`{self.name}` {entry!r} is unknown: use {either(self.choices)}"
        return None


@cache
def options_of(settings: type) -> tuple[Stated, ...]:
    """The options of a settings dataclass: its own, in order, then those of the classes that it extends.

    A field without an Option is none, nor is one that the class names in ``LEFT_OUT``.
    """
    hints = get_type_hints(settings, include_extras=True)
    places = reversed([*enumerate(settings.__mro__)])
    owner = {name: place for place, base in places for name in vars(base).get("__annotations__", {})}
    left_out = getattr(settings, "LEFT_OUT", ())
    stated: list[Stated] = []
    for field in sorted(fields(settings), key=lambda field: owner[field.name]):
        kind, *extras = get_args(hints[field.name]) or (None,)
        found = [extra for extra in extras if isinstance(extra, Option)]
        if found and field.name not in left_out:
            stated.append(Stated(field.name, kind, found[0], field.default))
    return tuple(stated)


class Settings:
    """What dataclasses of options extend: each value is checked as its option says."""

    def __post_init__(self) -> None:
        for stated in options_of(type(self)):
            if wrong := stated.complain(getattr(self, stated.name)):
                raise SettingError(wrong)


def plain(value: Any, other: Callable[[str], Any] = str) -> Any:
    """A value as JSON and YAML have it; ``other`` of its type's name where they have none."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry, other) for entry in value]
    return str(value) if isinstance(value, Path) else other(type(value).__name__)


def spoken(text: str) -> str:
    """A message of the library for a command line: the argument `` `max_length` `` as the option ``--max-length``."""

    def flag(found: re.Match[str]) -> str:
        return "--lambda" if found[1] == "lam" else "--" + found[1].replace("_", "-")

    return re.sub(r"`([a-z][a-z_]*)`", flag, text)


# ---------------------------------------------------------------------------------------------------------------------
# readers and ranges


def names(text: str) -> list[str]:
    """``a,b`` as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def whole(least: int, most: int | None = None) -> Complaint:
    """A whole number of at least ``least`` (and at most ``most``)."""

    def complaint(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int) or (most is None and value < least):
            return f"must be a whole number of at least {least}"
        if most is not None and not least <= value <= most:
            return f"is out of range: use {least} to {most}"
        return None

    return complaint


SEED = whole(0, 2**32 - 1)
"""A seed that numpy and torch take."""


def positive(value: float) -> str | None:
    """More than 0 and finite."""
    return None if 0 < value < math.inf else "must be positive and finite"


def not_negative(value: float) -> str | None:
    """At least 0 and finite."""
    return None if 0 <= value < math.inf else "must be at least 0 and finite"


def either(words: Sequence[str]) -> str:
    """``a, b or c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


_WORDS = {int: "integer", float: "number", Path: "path"}
_EXPECTED = {int: "a whole number", float: "a number"}


def _is_sequence(kind: Any) -> bool:
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Sequence)
