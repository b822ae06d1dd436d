"""``LoraConfig`` source to copy, from what a plan wrote."""

from __future__ import annotations

import ast
import pprint
import re
from pathlib import Path
from typing import Any

_PATTERNS = ("rank_pattern", "alpha_pattern")


def written(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The text of ``lora_config.py`` and the arguments in it; None where there is none that can be read."""
    try:
        text = (folder / "lora_config.py").read_text(encoding="utf-8")
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        return text, {str(word.arg): ast.literal_eval(word.value) for word in calls[0].keywords}
    except (OSError, ValueError, SyntaxError, IndexError, RecursionError):
        return None


def source(arguments: dict[str, Any]) -> str:
    """Python source of a ``LoraConfig`` with these arguments."""
    lines = []
    for name, value in arguments.items():
        text = pprint.pformat(value, width=90, sort_dicts=False).replace("\n", "\n    ")
        lines.append(f"    {name}={text},")
    return "\n".join(["from peft import LoraConfig", "", "lora_config = LoraConfig(", *lines, ")", ""])


def pattern(arguments: dict[str, Any], ranks: dict[str, int]) -> str:
    """The same configuration with a rank for each of some modules, and no others, at scale one."""
    largest, alike = max(ranks.values()), len(set(ranks.values())) == 1
    out = {key: value for key, value in arguments.items() if key not in _PATTERNS}
    out |= {"r": largest, "lora_alpha": largest, "target_modules": list(ranks)}
    exact = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    return source(out if alike else out | {"rank_pattern": exact, "alpha_pattern": exact})
