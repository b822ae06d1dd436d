"""The house keeps its order: who may import whom, how long a function is, and what the pages say of it."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

from scripts import layout

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "ranksure"
PACKAGES = sorted(SOURCES.rglob("__init__.py"))
LONGEST = 60
ARGUED = "longer than 60 lines: "
"""A comment above a function with this and a reason allows it."""


def functions(path: Path):
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            above = lines[first - 2] if first > 1 else ""
            yield node.name, node.end_lineno - node.lineno + 1, ARGUED in above


def test_no_function_is_longer_than_a_screen():
    found = [
        f"{path.relative_to(SOURCES)}: {name} has {size} lines"
        for path in sorted(SOURCES.rglob("*.py"))
        for name, size, argued in functions(path)
        if size > LONGEST and not argued
    ]
    assert found == []


def test_the_order_names_every_module():
    present = {path.stem for path in SOURCES.glob("*.py")} | {
        path.parent.name for path in SOURCES.glob("*/__init__.py")
    }
    assert present - {"__init__"} == set(layout.order())


@pytest.mark.parametrize("page", layout.PAGES)
def test_the_layout_in_the_pages_is_the_tree(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert layout.MARKED.search(text), "the page has no layout"
    assert layout.written(text) == text, "run python -m scripts.layout --write"


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: str(path.parent.relative_to(SOURCES)))
def test_a_package_says_what_lives_there(path):
    """And every name that it re-exports is there."""
    assert layout.summary(path)
    name = ".".join(path.parent.relative_to(SOURCES.parent).parts)
    package = importlib.import_module(name)
    for public in getattr(package, "__all__", []):
        assert getattr(package, public) is not None
        inside = path.parent / public
        assert not inside.with_suffix(".py").exists() and not inside.is_dir(), f"{public} is a module there, too"


def names() -> list[str]:
    """Public names of the package and of its packages, as ``package.name``."""
    found = []
    for path in PACKAGES:
        name = ".".join(path.parent.relative_to(SOURCES.parent).parts)
        found += [f"{name}.{public}" for public in getattr(importlib.import_module(name), "__all__", [])]
    return sorted(found)


def test_no_public_name_goes_without_a_line_in_the_changelog():
    """Recorded in ``tests/public_names.txt``: add new names there; one that goes needs its line first."""
    recorded = (ROOT / "tests" / "public_names.txt").read_text().split()
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    gone = [name for name in recorded if name not in names() and f"`{name}`" not in changelog]
    assert gone == [], "say in CHANGELOG.md that it went, and what to use"
    assert [name for name in names() if name not in recorded] == [], "add it to tests/public_names.txt"


NAMED = re.compile(r"`(ranksure(?:\.\w+)+)`")


@pytest.mark.parametrize("name", sorted(set(NAMED.findall((ROOT / "docs" / "architecture.md").read_text()))))
def test_what_the_architecture_page_names_is_there(name):
    assert pkgutil.resolve_name(name) is not None


def test_the_files_that_the_architecture_page_names_are_there():
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## Where would you change it?")[2]
    for path in re.findall(r"`([\w/]+(?:\.py|/))`", table):
        assert (SOURCES / path).exists(), path
