"""The loss of a run stays with it, from a fit through certify, grow and compress; of others it is read as their own.

Figures are compared with what PEFT and torch alone make of the folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import ranksure
from ranksure.cli.app import app
from ranksure.errors import RanksureError, SettingError
from ranksure.runs.fitting.fit import fit
from ranksure.runs.saved.data import DataSettings
from ranksure.runs.saved.open import open_run
from tests.runs.tiny_runs import save_llama, save_pairs, shaken
from tests.tiny_text import frame, save_bert, save_bert_classifier

pytestmark = pytest.mark.usefixtures("quick_collections")
LAM = 1e-3
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("base") / "bert")


def table(loss: str, path: Path, n: int = 24) -> str:
    rows = frame(n)
    if loss == "squared-error":
        rows["label"] = [len(text) / 10 + ("good" in text) for text in rows["text"]]
    rows.to_csv(path, index=False)
    return str(path)


def run(*command: Any) -> Result:
    return CliRunner().invoke(app, [str(part) for part in command])


def done(*command: Any) -> str:
    """What a command printed; it succeeded."""
    found = run(*command)
    assert found.exit_code == 0, (found.output, found.exception)
    return " ".join(found.output.split())


def refused(*command: Any) -> str:
    found = run(*command)
    assert isinstance(found.exception, RanksureError), (found.output, found.exception)
    return str(found.exception)


def certificate(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "certificate.json").read_text())


def mean_of(loss: str, logits: Tensor, rows: pd.DataFrame) -> float:
    """By torch alone."""
    z = logits.double()
    if loss == "squared-error":
        return float(F.mse_loss(z[:, 0], torch.tensor(list(rows["label"]), dtype=torch.float64)))
    y = torch.tensor([int(name == "good") for name in rows["label"]])
    if loss == "logistic":
        return float(F.binary_cross_entropy_with_logits(z[:, 0], y.double()))
    return float(F.cross_entropy(z, y))


def peft_loss(loss: str, base: str, folder: Path, csv: str, pooling: str = "model") -> float:
    """Of the adapter in a folder, as PEFT loads it."""
    rows, tokenizer = pd.read_csv(csv), AutoTokenizer.from_pretrained(base)
    batch = tokenizer(list(rows["text"]), padding=True, truncation=True, max_length=32, return_tensors="pt")
    if pooling == "mean":
        network: Any = AutoModel.from_pretrained(base)
    else:
        outputs = 2 if loss == "cross-entropy" else 1
        network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs)
    model = PeftModel.from_pretrained(network, str(folder)).eval()
    with torch.no_grad():
        output = model(**batch)
        if pooling == "model":
            return mean_of(loss, output.logits, rows)
        head, mask = load_file(folder / "head.safetensors"), batch["attention_mask"][..., None]
        pooled = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
        return mean_of(loss, F.linear(pooled, head["weight"], head["bias"]), rows)


@pytest.mark.parametrize("pooling", ["model", "mean"])
@pytest.mark.parametrize("loss", ["logistic", "squared-error", "cross-entropy"])
def test_a_fits_loss_goes_where_its_folder_goes(bert, loss, pooling, tmp_path):
    csv = table(loss, tmp_path / "d.csv")
    options = {"target_modules": ["query", "value"], "layers_to_transform": "last", "heldout": 0, "rank": 1}
    first = fit(bert, csv, out=tmp_path / "fit", loss=loss, lam=LAM, pooling=pooling, max_steps=8, **options)
    moved = Path(shutil.copytree(first.folder, tmp_path / "elsewhere" / "a"))
    shutil.rmtree(tmp_path / "fit")
    before, truth = certificate(moved), peft_loss(loss, bert, moved, csv, pooling)
    assert before["loss_kind"] == loss and before["loss"] == pytest.approx(truth, rel=1e-5)
    data = ("--data", csv, "--lambda", LAM)
    done("certify", moved, *data)
    after = certificate(moved)
    assert after["loss_kind"] == loss and not any("record its loss" in note for note in after["data"]["notes"])
    for key in ("loss", "objective", "rank_gain_bound", "training_gain_bound"):
        assert after[key] == pytest.approx(before[key], rel=2e-4), key
    done("grow", moved, *data, "--force", "--most-new", 1, "--out", tmp_path / "grown")
    done("compress", tmp_path / "grown", *data, "--out", tmp_path / "small")
    grown = json.loads((tmp_path / "grown" / "grow.json").read_text())
    small = json.loads((tmp_path / "small" / "compress.json").read_text())
    assert grown["certificate"]["loss_kind"] == loss
    assert grown["certificate"]["objective"] == pytest.approx(before["objective"], rel=1e-5)
    assert small["before"]["loss"] == pytest.approx(truth, rel=1e-5)
    done("certify", tmp_path / "small", *data)
    assert certificate(tmp_path / "small")["loss_kind"] == loss
    assert certificate(tmp_path / "small")["loss"] == pytest.approx(
        peft_loss(loss, bert, moved, csv, pooling), rel=1e-5
    )

    # A record of schema 1 says labels and no loss: there is only one that it can have been.
    path = moved / "task.json"
    content = {name: value for name, value in json.loads(path.read_text()).items() if name != "loss"}
    path.write_text(json.dumps({**content, "schema": 1}))
    _, read = open_run(moved, csv)
    assert (read.kind, read.kind_is_known) == (loss, True)


@pytest.mark.parametrize("loss", ["logistic", "squared-error"])
def test_a_plans_adapter_keeps_its_loss(bert, loss, tmp_path):
    csv = table(loss, tmp_path / "d.csv", 40)
    options = {
        "samples": 24,
        "heldout": 0,
        "weight_decay": "20%",
        "ranks": [1],
        "layers_to_transform": "last",
        "linearised": True,
    }
    ranksure.plan(bert, csv, loss=loss, target_modules=["value"], **options).save(tmp_path / "plan")
    done("certify", tmp_path / "plan" / "adapter", "--data", csv)
    found = certificate(tmp_path / "plan" / "adapter")
    assert found["loss_kind"] == loss
    assert found["loss"] == pytest.approx(peft_loss(loss, bert, tmp_path / "plan" / "adapter", csv), rel=1e-5)
    with pytest.raises(SettingError, match=f"made with `loss` {loss}, not cross-entropy"):
        fit(data=csv, plan=tmp_path / "plan", out=tmp_path / "out", loss="cross-entropy")


def test_what_contradicts_the_record_is_refused(bert, tmp_path):
    csv = table("logistic", tmp_path / "d.csv")
    done_fit = fit(bert, csv, out=tmp_path / "fit", loss="logistic", rank=1, max_steps=1, heldout=0)
    before = {path.name: path.read_bytes() for path in done_fit.folder.iterdir()}
    for name, more in (("certify", ()), ("grow", ("--out", tmp_path / "x")), ("compress", ("--out", tmp_path / "x"))):
        said = refused(name, done_fit.folder, "--data", csv, "--loss", "squared-error", *more)
        assert said == "the adapter was trained with `loss` logistic, not squared-error: leave `loss` out"
    said = refused("compress", done_fit.folder, "--loss", "squared-error", "--out", tmp_path / "x")  # without data
    assert "trained with `loss` logistic" in said
    done("certify", done_fit.folder, "--data", csv, "--loss", "logistic", "--out", tmp_path / "same")
    assert {path.name: path.read_bytes() for path in done_fit.folder.iterdir()} == before
    assert not (tmp_path / "x").exists()


def foreign(base: str, outputs: int, folder: Path, **stated: Any) -> PeftModel:
    """A run of another tool: PEFT's files alone."""
    torch.manual_seed(3)
    network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs, **stated)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["query"], task_type="SEQ_CLS")
    model = shaken(get_peft_model(network, config)).eval()
    model.save_pretrained(folder)
    return model


def test_another_tools_loss_is_assumed_aloud_or_given(bert, tmp_path):
    """One output: squared error, as transformers trains it, unless it is told otherwise."""
    csv, folder = str(tmp_path / "d.csv"), tmp_path / "run"
    rows = frame(24)
    rows["label"] = [int(name == "good") for name in rows["label"]]
    rows.to_csv(csv, index=False)
    foreign(bert, 1, folder)
    said = done("certify", folder, "--data", csv)
    assert "does not record its loss, which is taken to be squared-error" in said and "--loss" not in said
    first = certificate(folder)
    assert first["loss"] == pytest.approx(peft_loss("squared-error", bert, folder, csv), rel=1e-5)
    assert any("taken to be squared-error" in note for note in first["data"]["notes"])
    said = refused("certify", folder, "--data", csv, "--loss", "logistic")
    assert said.startswith(f"{folder / 'certificate.json'} is a certificate with the squared-error loss, not logistic")
    assert certificate(folder) == first
    done("certify", folder, "--data", csv, "--loss", "logistic", "--out", tmp_path / "apart")
    words = frame(24)
    words.to_csv(csv, index=False)
    truth = peft_loss("logistic", bert, folder, csv)
    assert certificate(tmp_path / "apart")["loss"] == pytest.approx(truth, rel=1e-5)
    # What was said once is said by the folders that are made of it.
    done("grow", folder, "--data", csv, "--loss", "logistic", "--force", "--out", tmp_path / "grown")
    done("compress", folder, "--loss", "logistic", "--out", tmp_path / "small")
    for name in ("grown", "small"):
        assert json.loads((tmp_path / name / "task.json").read_text())["loss"] == "logistic"
        done("certify", tmp_path / name, "--data", csv)
        assert certificate(tmp_path / name)["loss"] == pytest.approx(truth, rel=1e-5)
    assert "needs a model of 2 outputs, but this one has 1" in refused(
        "certify", folder, "--data", csv, "--loss", "cross-entropy", "--out", tmp_path / "no"
    )


BASES = [(REGRESSION, 1), (None, 1), (MULTI, 1), (SINGLE, 2), (None, 2), (None, 3), (SINGLE, 3)]


@pytest.mark.parametrize(("stated", "outputs"), BASES)
def test_a_base_is_read_as_transformers_reads_it(stated, outputs, tmp_path):
    base = save_bert_classifier(tmp_path / "base", [f"c{i}" for i in range(outputs)], problem_type=stated)
    model: Any = foreign(base, outputs, tmp_path / "run")
    words = frame(24, ("c0", "c1", "c2")[: max(outputs, 2)])
    if outputs == 1 and stated != MULTI:
        words["label"] = [len(text) / 10 for text in words["text"]]
    words.to_csv(tmp_path / "d.csv", index=False)
    batch = AutoTokenizer.from_pretrained(base)(list(words["text"]), padding=True, return_tensors="pt")
    ids = [float(name[1:]) if isinstance(name, str) else name for name in words["label"]]
    labels = torch.tensor(ids)[:, None] if outputs == 1 else torch.tensor(ids).long()
    with torch.no_grad():
        truth = float(model(**batch, labels=labels).loss)
    run_, read = open_run(tmp_path / "run", tmp_path / "d.csv")
    found = ranksure.certify(run_.model, read.batches, **read.objective)
    assert found.loss == pytest.approx(truth, rel=1e-5)
    assert not read.kind_is_known and any("does not record its loss" in note for note in read.notes)


@pytest.mark.parametrize(("stated", "outputs"), [(MULTI, 3), (REGRESSION, 3)])
def test_several_labels_per_text_are_refused_for_that(stated, outputs, tmp_path):
    base = save_bert_classifier(tmp_path / "base", ["c0", "c1", "c2"], problem_type=stated)
    foreign(base, outputs, tmp_path / "run")
    rows = frame(30, ("c0", "c1", "c2"))
    with pytest.raises(SettingError, match=rf"3 labels or targets per text \(problem_type {stated}"):
        open_run(tmp_path / "run", rows)
    _, read = open_run(tmp_path / "run", rows, DataSettings(loss="cross-entropy"))
    assert read.kind == "cross-entropy" and read.kind_is_known
    plan = {
        "samples": 8,
        "heldout": 0,
        "weight_decay": "20%",
        "ranks": [1],
        "layers_to_transform": "last",
        "linearised": True,
    }
    with pytest.raises(SettingError, match=rf"3 labels or targets per row .*problem_type {stated}.*`loss` cross-entro"):
        ranksure.plan(base, rows, **plan)
    with pytest.raises(SettingError, match="per row"):
        fit(base, rows, out=tmp_path / "fit", rank=1)
    assert ranksure.plan(base, rows, loss="cross-entropy", **plan).record.n_outputs == 3


@pytest.mark.parametrize(("stated", "outputs"), [(REGRESSION, 1), (None, 1), (MULTI, 1), (SINGLE, 2)])
def test_plan_and_fit_take_the_bases_loss(stated, outputs, tmp_path):
    base = save_bert_classifier(tmp_path / "base", [f"c{i}" for i in range(outputs)], problem_type=stated)
    rows, expected = frame(30), {MULTI: "logistic", SINGLE: "cross-entropy"}.get(str(stated), "squared-error")
    if expected == "squared-error":
        rows["label"] = [len(text) / 10 for text in rows["text"]]
    options = {"heldout": 0, "layers_to_transform": "last", "target_modules": ["value"]}
    planned = ranksure.plan(base, rows, samples=16, weight_decay="20%", ranks=[1], linearised=True, **options).record
    assert planned.loss == planned.settings["loss"] == expected
    told = [note for note in planned.notes if note.startswith("The loss is")]
    assert len(told) == (expected != "cross-entropy")
    fitted = fit(base, rows, out=tmp_path / "fit", rank=1, max_steps=2, **options)
    assert fitted.record.loss == fitted.certificate.loss_kind == expected
    assert [note for note in fitted.record.notes if note.startswith("The loss is")] == told


@pytest.mark.parametrize(("loss", "stated"), [("squared-error", SINGLE), ("logistic", SINGLE), ("logistic", None)])
def test_a_base_that_was_trained_with_another_loss(loss, stated, tmp_path):
    """Trainer writes problem_type into the config; transformers refuses one output for single labels."""
    base = save_bert_classifier(tmp_path / "base", ["bad", "good"], problem_type=stated)
    csv = table(loss, tmp_path / "d.csv")
    result = fit(base, csv, out=tmp_path / "fit", loss=loss, rank=1, max_steps=2, heldout=0)
    loading = (result.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code: dict[str, Any] = {}
    exec(loading.replace("num_labels=1", "num_labels=1, ignore_mismatched_sizes=True"), code)  # as the README says
    rows = pd.read_csv(csv)
    batch = AutoTokenizer.from_pretrained(base)(list(rows["text"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        truth = mean_of(loss, code["model"](**batch).logits, rows)
    assert result.certificate.loss == pytest.approx(truth, rel=1e-5)
    run_, read = open_run(result.folder, csv)
    found = ranksure.certify(run_.model, read.batches)  # whose config says the loss, so that nobody need tell it
    assert found.loss_kind == loss and found.loss == pytest.approx(truth, rel=1e-5)


def test_rows_without_one_of_the_classes(bert, tmp_path):
    """The class ids are those of the fit, whatever classes the rows at hand have."""
    rows = frame(36, ("bad", "good", "odd"))
    result = fit(bert, rows, out=tmp_path / "fit", rank=1, max_steps=2, heldout=0)
    few = rows[rows["label"] != "good"].reset_index(drop=True)
    run_, read = open_run(result.folder, few)
    found = ranksure.certify(run_.model, read.batches, **read.objective)
    batch = AutoTokenizer.from_pretrained(bert)(list(few["text"]), padding=True, return_tensors="pt")
    network = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model = PeftModel.from_pretrained(network, str(result.folder)).eval()
    with torch.no_grad():
        logits = model(**batch).logits.double()
    truth = F.cross_entropy(logits, torch.tensor([{"bad": 0, "odd": 2}[name] for name in few["label"]]))
    assert found.loss == pytest.approx(float(truth), rel=1e-5)
    assert read.label_names == ["bad", "good", "odd"]
    numbers = rows.assign(label=[{"bad": 0, "good": 1, "odd": 2}[name] for name in rows["label"]])
    assert open_run(result.folder, numbers)[1].features == open_run(result.folder, rows)[1].features


@pytest.mark.parametrize(("weighting", "loss_on"), [("sample", "completion"), ("token", "all"), ("sample", "all")])
def test_a_language_models_mean_stays(weighting, loss_on, tmp_path):
    base, pairs = save_llama(tmp_path / "llama"), save_pairs(tmp_path / "p.jsonl")
    mean = {"weighting": weighting, "loss_on": loss_on, "max_length": 20}
    result = fit(base, pairs, task="CAUSAL_LM", out=tmp_path / "fit", rank=1, lam=LAM, max_steps=4, **mean)
    before = certificate(result.folder)
    done("certify", result.folder, "--data", pairs, "--lambda", LAM, "--out", tmp_path)
    after = certificate(tmp_path)
    assert (after["weighting"], after["n_terms"]) == (weighting, before["n_terms"])
    assert after["objective"] == pytest.approx(before["objective"], rel=1e-5)
    done("grow", result.folder, "--data", pairs, "--lambda", LAM, "--force", "--out", tmp_path / "grown")
    done("compress", tmp_path / "grown", "--data", pairs, "--lambda", LAM, "--out", tmp_path / "small")
    small = json.loads((tmp_path / "small" / "compress.json").read_text())
    assert small["before"]["objective"] == pytest.approx(before["objective"], rel=1e-4)
    other = "token" if weighting == "sample" else "sample"
    said = refused("certify", result.folder, "--data", pairs, "--weighting", other)
    assert said == f"the adapter was trained with `weighting` {weighting}, not {other}: leave `weighting` out"
    with pytest.raises(SettingError, match="no loss of a causal"):
        fit(base, pairs, task="CAUSAL_LM", out=tmp_path / "no", rank=1, loss="squared-error")
