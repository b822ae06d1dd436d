"""Claims found by their names, measured and written: one way for the theory's and the paper's.

Names and words are read without running a claim's file, so that a list needs neither torch nor matplotlib.
"""

from __future__ import annotations

import ast
import csv
import difflib
import io
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ranksure.errors import SettingError
from ranksure.files import write_together, writing
from ranksure.lab.claim import Claim, Finding, Run
from ranksure.records.claims import ClaimRecord, LabRecord, Reference, ReproductionRecord, Table
from ranksure.records.record import encoded


def near(name: str, known: Iterable[str], *also: str) -> str:
    """A hint for a name that is not known: those like it, or all."""
    close = difflib.get_close_matches(name, [*known, *also], n=2, cutoff=0.4)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are {', '.join(known)}" + "".join(f", or {other}" for other in also)


@dataclass(frozen=True)
class Shelf:
    """The claims that one command measures.

    Attributes:
        command: its name.
        folder: of this package, one claim per file.
        what: what an error message calls a claim.
        verdicts: that all, some or none of a claim was found.
        all: whether the command takes ``all`` for a name.
    """

    command: str
    folder: str
    what: str
    verdicts: tuple[str, str, str]
    all: bool = False

    def names(self) -> list[str]:
        """Names of all claims, in the order in which they are run: the quick ones first."""
        return sorted(self._files(), key=lambda name: (self.load(name).minutes or (0, 0))[0])

    def load(self, name: str) -> Claim:
        """A claim by its name; its file is read for the words, and runs when it is measured.

        Raises:
            SettingError: there is none of that name.
        """
        files = self._files()
        if name not in files:
            raise SettingError(f"there is no {self.what} {name!r}: {near(name, files, *['all'] * self.all)}")
        module = f"{__package__}.{self.folder}.{files[name].stem}"

        def measure(run: Run) -> Finding:
            return import_module(module).CLAIM.measure(run)

        return Claim(**_words(files[name]), measure=measure)

    def chosen(self, asked: Sequence[str]) -> list[str]:
        """Claims by what the user wrote: names, or ``all``; each once.

        Raises:
            SettingError: a name that is none.
        """
        for name in asked:
            if not (self.all and name == "all"):
                self.load(name)
        return self.names() if self.all and "all" in asked else list(dict.fromkeys(asked))

    def minutes(self, asked: Sequence[str], run: Run) -> float:
        """About how long these take on two cores if no part of them is finished."""
        return sum(0.1 if run.small else (self.load(name).minutes or (2, 30))[run.full] for name in asked)

    def _files(self) -> dict[str, Path]:
        found = sorted((Path(__file__).parent / self.folder).glob("[!_]*.py"))
        return {path.stem.replace("_", "-"): path for path in found}


THEORY = Shelf("lab", "theory", "lab entry", ("reproduced", "partly", "not-reproduced"))
PAPER = Shelf("reproduce", "paper", "experiment", ("agreed", "partly", "not agreed"), all=True)


def _words(path: Path) -> dict[str, Any]:
    """The words of the ``CLAIM`` of a file, which is not run for it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="CLAIM")], value=ast.Call(keywords=words)):
                return {word.arg: ast.literal_eval(word.value) for word in words if word.arg and word.arg != "measure"}
    raise ValueError(f"{path} has no CLAIM = Claim(title=..., claim=..., source=..., measure=...)")


def measure(shelf: Shelf, name: str, run: Run, command: str = "") -> tuple[Finding, ClaimRecord]:
    """Measure a claim.

    Returns:
        The finding, and its record: what ``NAME.json`` holds.
    """
    from ranksure.lab.figures import style

    claim = shelf.load(name)
    began, before = time.perf_counter(), run.parts_count()
    with style():
        finding = claim.measure(run)
    summary = [check.measured for check in finding.checks]
    common: dict[str, Any] = {
        "command": command or f"ranksure {shelf.command} {name}",
        "versions": {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}},
        "name": name,
        "title": claim.title,
        "claim": claim.claim,
        "verdict": finding.verdict(shelf.verdicts),
        "source": claim.source,
        "where": claim.source,
        "settings": {**run.to_json(), "missing": list(finding.missing)},
        "checks": list(finding.checks),
        "curves": list(finding.curves),
        "axes": dict(finding.axes),
        "reference": Reference("certified optimum", None, dict(finding.reference)),
        "table": finding.table,
        "summary": [*summary, *finding.missing],
        "seed": run.seed,
        "size": run.size("small", "default", "full"),
        "seconds": round(time.perf_counter() - began, 2),
        "parts": {kind: count - before[kind] for kind, count in run.parts_count().items()},
    }
    if shelf is PAPER:
        return finding, ReproductionRecord(**common, numbers=dict(finding.numbers))
    return finding, LabRecord(**common, measured={"summary": summary, **finding.numbers})


_PACKAGES = ("ranksure", "torch", "transformers", "peft", "numpy", "scipy")


def write(out: Path, finding: Finding, record: ClaimRecord) -> list[Path]:
    """Write ``NAME.json`` and ``NAME.png`` into ``out``, with a table ``NAME.csv`` and ``NAME.svg``, too.

    All of them are there, of one measurement, or none.

    Raises:
        SettingError: the folder cannot be written.
    """
    from ranksure.lab.figures import image, style

    name, table = record.name, finding.table
    with style():
        content = {f"{name}.{kind}": image(finding.figure, kind) for kind in ("png", *["svg"] * bool(table.columns))}
    if table.columns:
        content[f"{name}.csv"] = table_csv(table).encode()
    # Last: where the record is, its figures are.
    content[f"{name}.json"] = encoded(record)
    for file in content:
        if (out / file).is_dir():
            raise SettingError(f"`out` {out} cannot be written: {file} is a folder")
    try:
        with writing(out):
            write_together(out, content)
    except OSError as error:
        raise SettingError(f"`out` {out} cannot be written: {error.strerror or error}") from None
    return [out / file for file in reversed(content)]


def table_csv(table: Table) -> str:
    """The table as CSV; an empty cell is a number that does not exist."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.columns)
    for row in table.rows:
        writer.writerow(["" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row])
    return buffer.getvalue()
