"""What version 0.1.0 wrote is still read, with its numbers (``tests/written_by_0_1_0``; its README: how made)."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ranksure
from ranksure.report.records import find
from ranksure.runs.fitting.plan_folder import read_plan
from tests import commands
from tests.tiny_text import QUERY, VALUE, loaded

WRITTEN = Path(__file__).parent / "written_by_0_1_0"
LAM = 0.12049431599046152
OBJECTIVE = 0.21366107753118269  # of the fit


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in: the paths in the files are relative to it."""
    shutil.copytree(WRITTEN, tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")
    return Path()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch):
    return partial(commands.call, monkeypatch=monkeypatch)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_plan():
    plan = read_plan(WRITTEN / "plan")
    assert plan.record.weight_decay == LAM and plan.pattern == {QUERY: 2, VALUE: 2}
    factors = plan.factors()
    assert {name: u.shape[1] for name, (u, _) in factors.items()} == {QUERY: 1, VALUE: 2}
    # The objective less the loss.
    penalty = LAM * sum(float(torch.linalg.svdvals(u @ v.T).sum()) for u, v in factors.values())
    assert penalty == pytest.approx(0.22004255651102944 - 0.1382797252160256, rel=1e-5)
    predicted = plan.prediction(None, False)
    assert predicted is not None and predicted.heldout_loss == 1.7467740174204247
    assert predicted.objective == pytest.approx(0.22004255651102944, rel=1e-12)
    assert predicted.optimum == 0.22004255651102944 and predicted.objective_at_zero == 0.2737270351246086
    one = plan.prediction(1, False)
    assert one is not None and one.objective == 0.22116628914777106


def test_a_plan_with_a_mean_pooled_head():
    plan = read_plan(WRITTEN / "mean")
    assert plan.record.weight_decay == 0.16639597790611105 and set(plan.head()) == {"weight", "bias"}
    (name,) = plan.factors()
    assert name == VALUE.removeprefix("bert.")


def test_a_plans_head_is_installed(here):
    from peft import get_peft_model

    scope: dict[str, Any] = {}
    exec((here / "plan" / "lora_config.py").read_text(encoding="utf-8"), scope)
    model = get_peft_model(loaded("bert"), scope["lora_config"])
    assert ranksure.install_planned_head(model, here / "plan") == ["classifier"]
    planned = load_file(here / "plan" / "adapter" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(model.get_base_model().classifier.weight, planned)


def test_a_plan_is_trained_from(here, call):
    """Its optimum in the real network has the loss that the plan measured there."""
    assert call("fit", "--plan", "plan", "--data", "two.csv", "--mode", "linear", "--out", "linear") == 0
    found = ranksure.FitResult.read(here / "linear" / "adapter")
    assert found.data["ranks"] == {QUERY: 1, VALUE: 2}
    measured = read(here / "plan" / "plan.json")["linearity"]["train_real_loss"]
    assert found.data["final"]["loss"] == pytest.approx(measured, rel=1e-5)


def test_a_fit():
    found = ranksure.FitResult.read(WRITTEN / "fit" / "adapter")
    assert found.objective == OBJECTIVE == found.certificate.objective
    assert found.data["steps"] == 40 and found.data["ranks"] == {QUERY: 2, VALUE: 2}
    assert found.data["prediction"]["objective"] == 0.22004255651102944
    certificate = found.certificate
    assert certificate.verdict == "not-converged" and certificate.lam == LAM and certificate.n_samples == 24
    assert certificate.training_gain_bound == 0.011627889505065384
    state = certificate.modules[VALUE]
    assert (state.verdict, state.rank_used, state.spectral_ratio) == ("not-converged", 2, 1.1393213941599427)
    assert "111.9% of the predicted gain" in " ".join(found.sentences())


def test_a_finished_fit_is_not_made_again(here, call, capfd):
    before = (here / "fit" / "adapter" / "adapter_model.safetensors").read_bytes()
    again = ["--max-steps", "40", "--gradient-accumulation-steps", "full", "--learning-rate", "0.03"]
    again += ["--logging-steps", "10", "--certify-every", "20", "--out", "fit"]
    assert call("fit", "--plan", "plan", "--data", "two.csv", *again) == 0
    assert "had been finished before" in capfd.readouterr().out
    assert (here / "fit" / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_an_adapter_is_certified_with_the_same_numbers(here, call):
    assert call("certify", "fit/adapter", "--data", "two.csv", "--lambda", "0.1", "--out", "again") == 0
    old, new = read(here / "certified" / "certificate.json"), read(here / "again" / "certificate.json")
    assert (
        new["run"]["adapter_sha256"] == old["run"]["adapter_sha256"] and new["data"]["sha256"] == old["data"]["sha256"]
    )
    assert new["verdict"] == old["verdict"] == "not-converged" and set(new["modules"]) == {QUERY, VALUE}
    assert old["loss"] == 1.080416523507609
    for key in ("loss", "penalty", "objective", "rank_gain_bound", "training_gain_bound"):
        assert new[key] == pytest.approx(old[key], rel=1e-4), key  # float32 gradients, perhaps of another processor


def test_grown_and_compressed_adapters(here, call):
    grown, smaller = read(here / "grown" / "grow.json"), read(here / "smaller" / "compress.json")
    assert grown["modules"][VALUE]["rank_after"] == 3 and smaller["ranks_after"] == {VALUE: 1}
    for folder, loss in (("grown", grown["certificate"]["loss"]), ("smaller", smaller["after"]["loss"])):
        assert call("certify", folder, "--data", "three.csv", "--out", f"{folder}-again") == 0
        assert read(here / f"{folder}-again" / "certificate.json")["loss"] == pytest.approx(loss, rel=1e-5)


def test_every_record_is_found_and_drawn(tmp_path):
    found = find(WRITTEN)
    assert found.skipped == ["fit/run.json"]  # no result, but what an unfinished fit is gone on with
    assert [(record.kind, record.where) for record in found.records] == [
        ("plan", "mean"),
        ("plan", "plan"),
        ("fit", "fit/adapter"),
        ("certificate", "certified"),
        ("grow", "grown"),
        ("compress", "smaller"),
        ("reproduce", "reproduce"),
        ("lab", "lab"),
    ]
    by_kind = {record.kind: record.data for record in found.records}
    assert by_kind["certificate"].objective == 1.1609465241777877
    assert by_kind["compress"].captured == 1.000000076989049
    assert by_kind["lab"].verdict == "reproduced" and by_kind["reproduce"].verdict == "agreed"
    assert by_kind["reproduce"].curves[0].y == [0, 1, 3, 3]
    page = ranksure.write_report(WRITTEN, tmp_path / "report.html").read_text(encoding="utf-8")
    for shown in ("Low-rank solutions of full fine-tuning", "Weight decay, rank and test loss", "not-converged"):
        assert shown in page
