"""``python -m ranksure.cli.parts``."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from ranksure.bundled import minilm
from ranksure.bundled.names import MODELS
from ranksure.bundled.packages import Package
from ranksure.cli import parts
from ranksure.errors import ModelError


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Package:
    """The only package, which lies in ``tmp_path``."""
    own = Package("x", "1", "a" * 64, "pool/x.deb", "MIT")
    monkeypatch.setattr(parts, "PACKAGES", {"x": own})
    monkeypatch.setattr(parts, "package_path", lambda name, reporter: tmp_path)
    return own


def test_checksums_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert parts.main(["demo"]) == 0
    lines = dict(reversed(line.split("  ")) for line in capsys.readouterr().out.splitlines())
    assert lines == minilm.verify_bundled()


def test_every_part_by_default(
    package: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in MODELS:
        monkeypatch.setitem(MODELS, name, lambda name=name: tmp_path / name)
    monkeypatch.setattr("sys.argv", ["parts"])
    assert parts.main() == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-5:] == [
        *(str(tmp_path / name) for name in ("minilm", "smollm2", "dinov2", "whisper")),
        f"{'a' * 64}  x 1 (MIT)  {tmp_path}",
    ]
    assert len(out) == 5 + len(minilm.verify_bundled())


def test_an_error_is_one_line_and_the_others_go_on(
    package: Package, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(what: str) -> NoReturn:
        raise ModelError(f"{what} is not installed; run: pip install it")

    monkeypatch.setitem(MODELS, "whisper", lambda: fails("Whisper"))
    monkeypatch.setattr(parts, "verify_bundled", lambda: fails("MiniLM"))
    assert parts.main(["y", "whisper", "demo", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{package.sha256}  x 1 (MIT)  ") and captured.out.count("\n") == 1
    assert captured.err.splitlines() == [
        "unknown part 'y': choose from demo, minilm, smollm2, dinov2, whisper, x",
        "Whisper is not installed; run: pip install it",
        "MiniLM is not installed; run: pip install it",
    ]
