"""The layout of the sources, drawn as data flows, from the tree itself: ``python -m scripts.layout``.

The order is that of the import contract in ``pyproject.toml``; what lives in a file or package is the first sentence of
its docstring. ``--write`` puts the drawing between the marks in the pages that show it.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "ranksure"
PAGES = ("docs/architecture.md",)
MARKED = re.compile(r"(<!-- layout: made by scripts/layout.py -->\n).*?(<!-- /layout -->)", re.S)


def order() -> list[str]:
    """Modules and packages of ``ranksure``, from the one that imports nothing up to the command line."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [name.strip() for layer in reversed(layers) for name in re.split("[|:]", layer)]


def summary(path: Path) -> str:
    """First sentence of a docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=[.])\s", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0].rstrip(".").replace("``", "")


def drawing() -> str:
    """A line for each file and package; a package imports only from what stands above it."""
    rows: list[tuple[str, str]] = []
    for name in order():
        package = SOURCES / name / "__init__.py"
        if not package.is_file():
            rows.append((f"{name}.py", summary(SOURCES / f"{name}.py")))
            continue
        rows.append((f"{name}/", summary(package)))
        inner = sorted(path for path in (SOURCES / name).glob("*/__init__.py"))
        rows += [(f"    {path.parent.name}/", summary(path)) for path in inner]
    width = max(len(name) for name, _ in rows) + 2
    return "".join(f"    {name.ljust(width)}{text}\n" for name, text in rows)


def written(text: str) -> str:
    """A page with the drawing between its marks."""
    return MARKED.sub(lambda found: f"{found[1]}\n{drawing()}\n{found[2]}", text)


def main() -> None:
    """Print the drawing, or write it into the pages."""
    if sys.argv[1:] != ["--write"]:
        print(drawing(), end="")
        return
    for page in PAGES:
        path = ROOT / page
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
