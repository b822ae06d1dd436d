"""``report.html`` from a folder: find, build, render, write whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from ranksure.errors import DataError, SettingError, one_line
from ranksure.files import put_back, write_or_refuse
from ranksure.options import spoken
from ranksure.report.blocks import Section, Status
from ranksure.report.module_places import is_control
from ranksure.report.records import Found, Record, find
from ranksure.report.wording import counted

NAME = "report.html"
LARGEST = 2_000_000
"""Bytes of a page, at most."""

_MARK = '<meta name="generator" content="ranksure'


def write_report(
    folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, command: str | None = None
) -> Path:
    """Write one self-contained page about the results in a folder.

    It opens without a network and without JavaScript, and is the same for the same results.

    Args:
        folder: the ``--out`` of a command (``plan.json``, ``fit.json``, ``certificate.json``, ``grow.json``,
            ``compress.json``, records of the lab and of reproduced claims), or a folder of several of those.
        out: the file to write; ``report.html`` in ``folder`` by default.
        command: the command line that made the result of ``folder`` itself, where its record does not say.

    Returns:
        The file.

    Raises:
        SettingError: no result there, too many for one page, or a file that cannot be written or is another's.
        DataError: a record that is damaged, or of a schema that this version does not read.
    """
    source = Path(folder)
    put_back(source)
    path = source / NAME if out is None else Path(out)
    found = find(source)
    if path.is_dir():
        raise SettingError(f"{path} is a folder; name a file such as {path / NAME}")
    if path.exists() and not _is_ours(path):
        raise SettingError(f"{path} exists and is no report of ranksure: move it away, or name another file")
    text = _page(source, found, command)
    write_or_refuse(path, text.encode(), SettingError)
    return path


def _page(source: Path, found: Found, command: str | None) -> str:
    size = 0
    for detail in (True, False):
        text = _rendered(source, found, _sections(found, command, detail))
        size = len(text.encode("utf-8"))
        if size < LARGEST:
            return text
    raise SettingError(
        f"the report of {source} would have {size / 1e6:.1f} MB, more than the {LARGEST / 1e6:.0f} of one page: "
        "make one of a folder below it"
    )


def _sections(found: Found, command: str | None, detail: bool) -> list[Section]:
    out = []
    top = [record for record in found.records if record.where in ("", "adapter")]  # a fit writes into the latter
    for index, record in enumerate(found.records, start=1):
        own = command if len(top) == 1 and record is top[0] else None
        try:
            section = _builder(record.kind)(record, f"s{index}", own, detail)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # no schema says what belongs together
            raise DataError(
                f"{record.path} cannot be shown, as its values do not belong together ({type(error).__name__}: "
                f"{one_line(error)}): make it again, or move it away"
            ) from error
        if own or getattr(record.data, "command", None):  # whose reader knows options, not arguments
            section.sentences = list(map(spoken, section.sentences))
            section.warnings = list(map(spoken, section.warnings))
        out.append(section)
    return out


def _builder(kind: str) -> Callable[[Record, str, str | None, bool], Section]:
    from ranksure.report.sections import certify, change, claims, fit, plan

    plain: dict[str, Callable[..., Section]] = {
        "plan": plan.build,
        "certificate": certify.build,
        "fit": fit.build,
        "grow": change.build_grow,
        "compress": change.build_compress,
    }
    if kind in plain:
        return lambda record, name, command, detail: plain[kind](record, name, command)
    return {"lab": claims.build_lab, "reproduce": claims.build_reproduction}[kind]


def _rendered(source: Path, found: Found, sections: list[Section]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ranksure.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: clean_text(value) if isinstance(value, str) else value,
    )
    style, script = _asset("page.css"), _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = (
        sections[0].answer if len(sections) == 1 else f"{counted(len(sections), 'result')} of {source.resolve().name}"
    )
    return environment.get_template("page.html").render(
        title=title,
        sections=sections,
        statuses=list(Status),
        skipped=found.skipped,
        where={f"s{n}": record.where for n, record in enumerate(found.records, start=1)},
        version=version("ranksure"),
        style=style,
        script=script,
        digest=digest,
    )


def clean_text(text: Any) -> Any:
    """Text without control characters; markup that is ours stays as it is."""
    from markupsafe import Markup

    if isinstance(text, Markup):
        return text
    return "".join(char for char in text if char == "\n" or not is_control(char))


def _asset(name: str) -> Any:
    from markupsafe import Markup

    text = files("ranksure.report").joinpath("templates", name).read_text(encoding="utf-8")
    return Markup(text)


def _is_ours(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return _MARK in file.read(4096)
    except (OSError, ValueError):
        return False
