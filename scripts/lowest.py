"""The lowest allowed version of every dependency, as constraints: ``python -m scripts.lowest > lowest.txt``.

``make test-lowest`` installs them and runs the tests.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def lowest(requirement: str) -> str | None:
    """``name==version`` for a requirement with a lower bound or an exact version; None for one without."""
    found = re.match(r"([\w.-]+)(?:\[.*?\])?\s*(?:==|>=)\s*([\w.]+)", requirement)
    return f"{found[1]}=={found[2]}" if found else None


def main() -> None:
    """Print one line for each dependency, those of the extras included."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    print(*sorted({line for group in groups for line in map(lowest, group) if line}), sep="\n")


if __name__ == "__main__":
    main()
