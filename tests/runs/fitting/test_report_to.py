"""A reporter of the Trainer's own, TensorBoard's event files: what fit and the callback log is in them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from ranksure.runs.certificate.callback import CertificateCallback
from tests.runs.certificate.test_callback import trained
from tests.runs.tiny_fits import fitted, same

pytestmark = pytest.mark.usefixtures("quick_collections")

FIGURES = ["loss", "objective", "spectral_ratio", "rank_gain_bound", "training_gain_bound"]
VERDICTS = ["first_order_optimal", "rank_bound", "not_converged", "failed_loudly", "not_checked"]


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every number in the event files below a folder, by tag and step; read record by record."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack("<Q", content[at : at + 8])  # then 4 bytes of checksum, the event, 4 more
            event = Event.FromString(content[at + 12 : at + 12 + length])
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
            at += 16 + length
    return found


def test_fit_reports_its_loss_and_its_certificates(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    settings = {"max_steps": 10, "certify_every": 5}
    result = fitted(tiny, tmp_path / "out", report_to=["tensorboard"], **settings)
    logged = scalars(tmp_path / "out" / "runs" / "stage-0")
    for key in [*FIGURES, *VERDICTS]:
        assert sorted(logged[f"train/ranksure/{key}"]) == [5, 10], key
    assert sorted(logged["train/loss"]) == [5, 10]
    told = 0
    for entry in json.loads((result.folder / "fit.json").read_text())["history"]:
        for key, value in entry.items():
            if key.startswith("ranksure/") or key == "loss":
                assert logged[f"train/{key}"][entry["step"]] == pytest.approx(value, rel=1e-6), key
                told += 1
    assert told >= 2 * len([*FIGURES, *VERDICTS])
    assert logged["train/ranksure/objective"][10] == pytest.approx(result.objective, rel=1e-6)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "run.json", "runs"]
    # reporting changes no bit, and what is reported is no part of what was asked
    silent = fitted(tiny, tmp_path / "silent", **settings)
    same(silent.folder, result.folder)
    assert not (tmp_path / "silent" / "runs").exists()
    assert fitted(tiny, tmp_path / "out", report_to="none", **settings).model is None


def test_the_folder_that_the_reader_chose_is_used(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    fitted(tiny, tmp_path / "out", report_to="tensorboard", max_steps=5)
    assert 5 in scalars(tmp_path / "mine")["train/loss"]
    assert not (tmp_path / "out" / "runs").exists()


def test_the_callback_reports_through_a_trainer_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = CertificateCallback(every=4, sample_every=3, sample_rows=8, lam=0.01)
    trained(tmp_path / "out", callback, report_to="tensorboard")
    logged = scalars(tmp_path / "events")
    assert [step for step, _ in callback.certificates] == [4, 8]
    for step, found in callback.certificates:
        assert logged["train/ranksure/objective"][step] == pytest.approx(found.objective, rel=1e-6)
        assert logged[f"train/ranksure/{found.verdict.replace('-', '_')}"][step] == 1.0
        assert sum(logged[f"train/ranksure/{name}"][step] for name in VERDICTS) == 1.0
    for key in FIGURES:
        assert sorted(logged[f"train/ranksure/{key}"]) == [4, 8]
        assert sorted(logged[f"train/ranksure/sample_{key}"]) == [3, 6, 9]
    assert not any(name in key for key in logged if "sample_" in key for name in VERDICTS)
