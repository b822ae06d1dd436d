"""A setting of two layers and forty words, for experiments that end in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ranksure.data.texts import load_rows
from ranksure.lab.settings.named import Setting
from tests.tiny_text import frame, save_bert


def tiny_setting(folder: Path, name: str = "tiny", **changes: Any) -> Setting:
    """A setting on a tiny BERT and made-up sentences."""
    if not (folder / "model").is_dir():
        save_bert(folder / "model")
    given: dict[str, Any] = {
        "name": name,
        "title": f"Sentences ({name})",
        "kind": "text",
        "model": lambda: str(folder / "model"),
        "data": lambda: load_rows(frame(120)),
        "model_name": "tiny BERT",
        "data_name": "sentences",
        "n": 8,
        "heldout": 20,
    }
    return Setting(**{**given, **changes})
