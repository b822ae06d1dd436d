"""The lowest allowed version of what ``ranksure`` depends on, as constraints: ``python -m scripts.lowest``.

The tools of development keep their versions of ``constraints.txt``. ``make test-lowest`` installs both and tests.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lowest(requirement: str) -> str | None:
    """``name==version`` for a requirement with a lower bound or an exact version; None for one without."""
    found = re.match(r"([\w.-]+)(?:\[.*?\])?\s*(?:==|>=)\s*([\w.]+)", requirement)
    return f"{found[1]}=={found[2]}" if found else None


def main() -> None:
    """Print one line for each dependency, those of the extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = {name(line) for group in ("dev", "lint", "docs") for line in project["optional-dependencies"][group]}
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    own = {line for group in groups for line in map(lowest, group) if line and name(line) not in tools}
    pinned = {line for line in (ROOT / "constraints.txt").read_text().splitlines() if name(line) in tools}
    print(*sorted(own | pinned), sep="\n")


def name(requirement: str) -> str:
    """Of a requirement or a constraint."""
    return re.split(r"[\[<>=! ]", requirement, maxsplit=1)[0].lower()


if __name__ == "__main__":
    main()
