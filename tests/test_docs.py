"""README and docs: links lead somewhere, code runs, options and settings exist."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from ranksure.cli import app
from ranksure.planner.settings import PlanSettings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = "<!-- run -->"
BLOCK = re.compile(r"^(?P<mark><!-- run -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
DEMO = re.compile(r"<!-- demo output.*?<!-- /demo output -->", re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
# Two dashes that are ours: not those of an HTML comment or of another program.
OPTION = re.compile(r"(?<![\w<!-])--[a-z][a-z-]*")
OTHER_PROGRAMS = re.compile(r"^\s*(pip|npm|git|pytest|python -m (pip|benchmarks\.))|`python -m benchmarks\.")


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def blocks(language: str) -> Iterator[tuple[str, bool, str]]:
    """Page, whether it is to be run, and text of every fenced block of a language."""
    for page in PAGES:
        for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if found["language"] == language:
                yield page.relative_to(ROOT).as_posix(), found["mark"] is not None, found["text"]


def anchors(page: Path) -> set[str]:
    """Anchors of headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PYTHON = list(blocks("python"))
RUNNABLE = [(page, text) for page, run, text in PYTHON if run]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_linked_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in LINK.findall(prose(index))}
    assert set((ROOT / "docs").rglob("*.md")) - {index} <= linked


@pytest.mark.parametrize(("page", "text"), [(page, text) for page, _, text in PYTHON], ids=[p for p, _, _ in PYTHON])
def test_python_blocks_compile_and_plan_settings_exist(page: str, text: str) -> None:
    settings = {field.name for field in dataclasses.fields(PlanSettings)} | {"tokenizer", "reporter"}
    for node in ast.walk(ast.parse(text, page)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ranksure.plan":
            assert {keyword.arg for keyword in node.keywords} <= settings


@pytest.mark.parametrize(("page", "text"), RUNNABLE, ids=[page for page, _ in RUNNABLE])
def test_marked_blocks_run(page: str, text: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-c", text],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, f"{page}:\n{ran.stderr}"
    assert ran.stdout


def test_marks_are_followed_by_python() -> None:
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    assert len(RUNNABLE) == lines.count(RUN) > 0


def test_options_exist() -> None:
    """Options named in README and docs are some command's; in a line that runs a command, that command's."""
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    known = {name: {o for p in command.params for o in p.opts} | {"--help"} for name, command in commands.items()}
    anything = set().union(*known.values())
    named: set[str] = set()
    for page in [PAGES[0], *sorted((ROOT / "docs").rglob("*.md"))]:
        text = re.sub(
            r"<!-- demo output.*?<!-- /demo output -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL
        )
        lines = [line for line in text.replace("\\\n", " ").splitlines() if not OTHER_PROGRAMS.search(line)]
        for line in lines:
            found = set(OPTION.findall(line))
            assert found <= anything, (page.name, line)
            for name, options in known.items():
                for command in re.findall(rf"ranksure {name} ([^`]*)", line):
                    assert set(OPTION.findall(command)) <= options, (page.name, line)
            named |= found
    assert {"--model", "--data", "--weight-decay", "--samples"} <= named
