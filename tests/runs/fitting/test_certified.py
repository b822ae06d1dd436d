"""Fits by the network's own solver: every task, every start, what is claimed and what is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import ranksure
from ranksure.data.texts import load_rows
from ranksure.errors import RanksureError, SettingError
from ranksure.runs.fitting.fit import fit
from ranksure.runs.fitting.folder import Workspace
from ranksure.runs.fitting.plan_folder import read_plan
from ranksure.runs.fitting.settings import FitSettings
from ranksure.runs.saved.data import DataSettings
from ranksure.runs.saved.open import open_run
from tests.commands import call
from tests.helpers import rounding
from tests.processes import run, script
from tests.runs.saved.test_open import KINDS, parts  # noqa: F401  (a fixture)
from tests.runs.tiny_fits import ADAPTER, same
from tests.runs.tiny_runs import classifier, save_pairs
from tests.runs.tiny_runs import save_llama as save_causal

pytestmark = pytest.mark.usefixtures("quick_collections")
LAM = 0.03


def solved(tiny, out, **settings: Any):
    """A fit of a new classifier from nothing."""
    asked = {"method": "certified", "lam": LAM, "samples": 24, "target_modules": ["query", "value"]}
    return fit(str(tiny / "bert"), str(tiny / "two.csv"), out=out, **{**asked, **settings})


def continued(tiny, adapter, out, **settings: Any):
    """A fit from an adapter."""
    asked = {"method": "certified", "lam": LAM, "samples": 24, "data": str(tiny / "two.csv")}
    return fit(adapter=adapter, out=out, **{**asked, **settings})


def nuclear(folder, scale: float = 1.0) -> float:
    """Sum of the nuclear norms of the updates in an adapter's file."""
    tensors, total = load_file(folder / ADAPTER), 0.0
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            update = scale * tensors[key.replace("lora_A", "lora_B")].double() @ a.double()
            total += float(torch.linalg.svdvals(update).sum())
    return total


def text_loss(folder, tiny, rows) -> float:
    """Mean loss by transformers and PEFT alone."""
    base = AutoModelForSequenceClassification.from_pretrained(str(tiny / "bert"), num_labels=2)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    encoded = AutoTokenizer.from_pretrained(str(tiny / "bert"))(rows.texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return float(F.cross_entropy(model(**encoded).logits.double(), torch.tensor(rows.labels)))


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """From nothing, and with a target that needs no update."""
    return solved(tiny, tmp_path_factory.mktemp("first") / "out", lam=0.1)


def rows_of(tiny):
    return load_rows(str(tiny / "two.csv")).shuffled(0).subset(range(24))


def test_from_nothing_the_adapter_on_disk_has_the_stated_objective(tiny, first):
    found, eps = first.record.solved, torch.finfo(torch.float32).eps
    assert (found.status, found.remedy, found.start) == ("converged", "", "nothing")
    assert found.gap <= 0.01 * (found.objective_at_zero - found.objective)
    own = text_loss(first.folder, tiny, rows_of(tiny)) + 0.1 * nuclear(first.folder)
    assert found.objective == pytest.approx(own, rel=64 * eps)
    assert first.objective == pytest.approx(own, rel=64 * eps)
    assert first.data["objective_at_zero"] == pytest.approx(found.objective_at_zero, rel=64 * eps)


def test_the_certificate_is_an_independent_check_of_all_targets(first):
    found, verdict = first.record.solved, first.certificate
    assert verdict.verdict == "first-order-optimal" and first.record.verdict == verdict.verdict
    assert verdict.rank_gain_bound == pytest.approx(found.gap, abs=1e-5 * found.objective)
    ratios = {name: state.spectral_ratio for name, state in verdict.modules.items()}
    assert max(ratios.values()) == pytest.approx(found.spectral_ratio, rel=1e-4)
    assert len(ratios) == 4 and set(ratios) == {*first.record.ranks, *found.without}
    assert {name: verdict.modules[name].rank for name in found.without} == dict.fromkeys(found.without, 0)
    assert found.without and 0.5 < max(ratios[name] for name in found.without) <= 1 + 1e-4


def test_what_is_written_of_it(first):
    config = json.loads((first.folder / "adapter_config.json").read_text())
    record = json.loads((first.folder / "fit.json").read_text())
    assert config["lora_dropout"] == 0
    shapes = {key: len(a) for key, a in load_file(first.folder / ADAPTER).items() if key.endswith("lora_A.weight")}
    ranks = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): r for key, r in shapes.items()}
    assert ranks == record["ranks"] and all(record["ranks"].values())
    history, found = record["history"], record["solved"]
    assert (record["method"], record["optimizer"], record["steps"]) == ("certified", "L-BFGS", found["gradients"])
    assert history[-1] == {"step": found["gradients"], "objective": found["objective"], "gap": found["gap"]}
    falls = [entry["objective"] for entry in history[:-1]]  # the end is without directions that do next to nothing
    assert falls == sorted(falls, reverse=True) and falls[0] == pytest.approx(record["objective_at_zero"])
    assert "learning_rate" not in record["settings"] and record["settings"]["method"] == "certified"
    text = " ".join(first.sentences())
    assert "Certified: " in text and "Measured: " in text and "need no update" in text and "over all rows" in text
    assert "Certified: " in (first.folder / "README.md").read_text()


def test_from_a_plan_and_never_from_what_is_worse_than_nothing(tiny, tmp_path):
    plan = read_plan(tiny / "plan2").record
    common = {"data": str(tiny / "two.csv"), "plan": tiny / "plan2", "method": "certified"}
    found = fit(out=tmp_path / "out", **common)
    assert found.record.solved.start == "plan" and found.record.lam == plan.weight_decay
    start = found.record.history[0]["objective"]
    assert found.objective <= start < found.record.objective_at_zero
    assert found.record.prediction.of == "the optimum" and found.certificate.verdict == "first-order-optimal"
    worse = fit(out=tmp_path / "worse", lam=3 * plan.weight_decay, **common)
    assert worse.record.solved.start == "nothing" and "began from none" in " ".join(worse.record.notes)
    assert worse.record.history[0]["objective"] == pytest.approx(worse.record.objective_at_zero)


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_from_nothing_and_from_its_adapter(parts, kind, tmp_path):  # noqa: F811
    model, rows, options = parts[kind]
    asked = {"method": "certified", "heldout": 0, "layers_to_transform": "last", **options}
    lam = 5e-4 if kind == "image" else 2e-3
    found = fit(model, rows, out=tmp_path / "fit", lam=lam, **asked)
    assert found.certificate.verdict == "first-order-optimal" and found.record.solved.status == "converged"
    run, read = open_run(found.folder, rows, DataSettings(by_length=True))
    again = ranksure.certify(run.model, read.batches, lam=lam, loss=read.kind)
    noise = 256 * rounding(run.model) * found.record.solved.objective_at_zero
    assert again.objective == pytest.approx(found.record.solved.objective, abs=noise)
    more = fit(data=rows, adapter=found.folder, out=tmp_path / "more", method="certified", lam=lam / 2)
    assert more.record.solved.start == "adapter" and more.certificate.verdict == "first-order-optimal"
    start = more.record.history[0]["objective"]
    assert start == pytest.approx(again.loss + 0.5 * again.penalty, abs=noise) and more.objective < start
    run, read = open_run(more.folder, rows, DataSettings(by_length=True))
    last = ranksure.certify(run.model, read.batches, lam=lam / 2, loss=read.kind)
    assert last.objective == pytest.approx(more.record.solved.objective, abs=noise)
    assert json.loads((more.folder / "task.json").read_text()) == json.loads((found.folder / "task.json").read_text())


@pytest.mark.parametrize("weighting", ["token", "sample"])
def test_a_causal_language_model(tmp_path, weighting):
    base, data = save_causal(tmp_path / "llama"), save_pairs(tmp_path / "pairs.jsonl")
    asked = {"method": "certified", "task": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    found = fit(base, data, out=tmp_path / "fit", lam=0.5, weighting=weighting, **asked)
    assert found.certificate.verdict == "first-order-optimal" and found.record.mean_per == weighting
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(found.folder)).eval()
    _, rows = open_run(found.folder, data)
    totals, counts = [], []
    for feature in rows.features:
        ids, labels = (torch.tensor([feature[key]]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        keep = labels[0, 1:] != -100
        totals.append(float(F.cross_entropy(logits[keep], labels[0, 1:][keep], reduction="sum")))
        counts.append(int(keep.sum()))
    means = [total / count for total, count in zip(totals, counts, strict=True)]
    loss = sum(means) / len(means) if weighting == "sample" else sum(totals) / sum(counts)
    own = loss + 0.5 * nuclear(found.folder)
    assert found.record.solved.objective == pytest.approx(own, rel=256 * rounding(model))
    more = fit(data=data, adapter=found.folder, out=tmp_path / "more", method="certified", lam=0.4, max_steps=9)
    assert more.record.mean_per == weighting and more.record.solved.start == "adapter"
    assert more.record.history[0]["objective"] == pytest.approx(loss + 0.8 * (own - loss), rel=256 * rounding(model))


def test_from_somebodys_adapter_with_a_decay_of_its_matrices(tiny, tmp_path):
    """Scale 3, a trained head, dropout: scale and head stay, and lambda is the decay over the scale."""
    classifier(str(tiny / "bert"), lora_dropout=0.3).save_pretrained(tmp_path / "run")
    found = continued(tiny, tmp_path / "run", tmp_path / "out", lam=None, weight_decay=3 * LAM, samples=None)
    assert found.record.lam == pytest.approx(LAM) and found.certificate.verdict == "first-order-optimal"
    config = json.loads((found.folder / "adapter_config.json").read_text())
    before, after = (load_file(folder / ADAPTER) for folder in (tmp_path / "run", found.folder))
    key = "base_model.model.classifier.weight"
    assert torch.equal(before[key], after[key]) and config["lora_dropout"] == 0
    assert (
        config["lora_alpha"] / config["r"]
        == 3
        == next(iter(config["alpha_pattern"].values()), 3 * 1) / next(iter(config["rank_pattern"].values()), 1)
    )
    rows = load_rows(str(tiny / "two.csv"))
    own = text_loss(found.folder, tiny, rows) + LAM * nuclear(found.folder, 3.0)
    assert found.record.solved.objective == pytest.approx(own, rel=64 * torch.finfo(torch.float32).eps)
    assert any("modules_to_save" in sentence for sentence in found.sentences())


def test_after_growing_the_solver_finishes_the_run_and_needs_no_growing(tiny, tmp_path):
    """The new columns of a grown adapter change nothing, so both starts are one."""
    data = str(tiny / "three.csv")
    adam = {"rank": 1, "max_steps": 20, "learning_rate": 0.03}
    targets = {"lam": 0.1, "samples": 24, "target_modules": ["value"]}
    rough = fit(str(tiny / "bert"), data, out=tmp_path / "rough", **targets, **adam)
    run, rows = open_run(rough.folder, data, DataSettings(samples=24))
    grown = ranksure.grow(run.model, rows.batches, lam=0.1, force=True, loss=rows.kind)
    grown.save(out_dir=tmp_path / "grown", **run.rewritten)
    ends = [
        fit(data=data, adapter=start, out=tmp_path / f"end{i}", method="certified", lam=0.1, samples=24)
        for i, start in enumerate((tmp_path / "grown", rough.folder))
    ]
    for end in ends:
        assert end.record.history[0]["objective"] == pytest.approx(rough.objective, rel=1e-6)
        assert end.certificate.verdict == "first-order-optimal" and end.objective < rough.objective
    gained = rough.record.objective_at_zero - ends[0].objective
    assert abs(ends[0].objective - ends[1].objective) <= 0.02 * gained


def test_too_few_gradients_is_said(tiny, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    options = ["--model", str(tiny / "bert"), "--data", str(tiny / "two.csv"), "--target-modules", "query,value"]
    options += ["--lambda", "0.01", "--samples", "24", "--max-steps", "4", "--out", str(out)]
    assert call("fit", "--method", "certified", *options, monkeypatch=monkeypatch) == 0
    record = json.loads((out / "adapter" / "fit.json").read_text())
    assert record["solved"]["status"] == "not-converged" and record["verdict"] == "not-converged"
    assert record["steps"] <= 4 + 1 and "limit of 4 gradients" in record["solved"]["remedy"]
    said = " ".join(capfd.readouterr().out.split())
    assert "Not certified" in said and "limit of 4 gradients" in said


def test_a_looser_gap_is_the_users_own(tiny, tmp_path):
    loose = solved(tiny, tmp_path / "out", lam=0.01, tolerance=0.3)
    found = loose.record.solved
    assert found.status == "converged" and found.tolerance == 0.3
    assert found.gap <= 0.3 * (found.objective_at_zero - found.objective)
    assert loose.certificate.tolerance == 0.05


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rank": 2}, "`rank` .*finds the ranks"),
    ({"grow": True}, "`grow` .*finds the ranks"),
    ({"learning_rate": 0.1}, "`learning_rate` .*steps of its own"),
    ({"optim": "sgd"}, "`optim` .*steps of its own"),
    ({"num_train_epochs": 1}, "`num_train_epochs` .*steps of its own"),
    ({"gradient_accumulation_steps": "full"}, "`gradient_accumulation_steps` .*over all rows"),
    ({"lora_dropout": 0.1}, "`lora_dropout` .*without dropout"),
    ({"model_dropout": True}, "`model_dropout` .*without dropout"),
    ({"train_head": True}, "`train_head` .*head as it is"),
    ({"certify_every": 5}, "`certify_every` .*every round"),
    ({"mode": "linear"}, "`mode` .*plan's solution"),
    ({"report_to": "tensorboard"}, "`report_to` .*fit.json"),
    ({"adapter": "a", "target_modules": ["query"]}, "`target_modules` is that of the adapter"),
    ({"adapter": "a", "eval_data": "b.csv"}, "`eval_data` .*training rows alone"),
    ({"adapter": "a", "method": "trainer"}, "`adapter` is a start for `method` certified"),
    ({"method": "exact"}, "`method` 'exact' is unknown: use trainer or certified"),
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED)
def test_options_without_a_meaning_are_refused_for_the_true_reason(settings, reason):
    with pytest.raises(SettingError, match=reason):
        FitSettings(**{"method": "certified", **settings})


def test_every_option_of_training_is_refused_or_has_a_meaning():
    """Of those that a Trainer's loop alone reads, none is left without a word."""
    from ranksure.options import TRAINING, options_of
    from ranksure.runs.fitting.settings import _NOT_CERTIFIED

    refused = {name for names in _NOT_CERTIFIED.values() for name in names}
    kept = {stated.name for stated in options_of(FitSettings) if stated.option.group == TRAINING} - refused
    assert kept == {"max_steps", "batch_size", "seed"}
    assert refused <= {stated.name for stated in options_of(FitSettings)}


def test_what_cannot_be_solved_is_one_line(tiny, tmp_path, first):
    data, run = str(tiny / "two.csv"), first.folder
    new = {"model": str(tiny / "bert"), "data": data}
    cases: list[tuple[dict[str, Any], str]] = [
        (new, "`method` certified needs a penalty"),
        (
            {"model": str(tiny / "bert"), "data": data, "lam": 1e3, "samples": 24},
            "no update at all is best.* smaller `lam`",
        ),
        ({"model": str(tiny / "bert"), "data": data, "lam": 1e-2, "max_steps": 1, "samples": 24}, "too few"),
        ({"adapter": run, "lam": 0.1}, "give `data`"),
        ({"adapter": run, "data": data, "plan": tiny / "plan2"}, "not both"),
        ({"adapter": run, "data": data, "lam": 0.1, "tokenizer": object()}, "base model from disk"),
        ({"adapter": tmp_path / "none", "data": data, "lam": 0.1}, "does not exist"),
        ({"plan": tiny / "plan2", "data": data, "callbacks": [object()]}, "`callbacks` are the Trainer's"),
    ]
    for i, (arguments, reason) in enumerate(cases):
        with pytest.raises(RanksureError, match=reason) as caught:
            fit(method="certified", out=tmp_path / str(i), **arguments)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / str(i) / "adapter").exists()


def test_an_adapter_that_no_certificate_covers_is_no_start(tiny, tmp_path):
    classifier(str(tiny / "bert"), use_dora=True).save_pretrained(tmp_path / "dora")
    with pytest.raises(SettingError, match=r"cannot start from .*dora"):
        continued(tiny, tmp_path / "dora", tmp_path / "out")
    classifier(str(tiny / "bert"), alpha_pattern={"query": 12}).save_pretrained(tmp_path / "uneven")
    with pytest.raises(SettingError, match="several scales"):
        continued(tiny, tmp_path / "uneven", tmp_path / "out", lam=None, weight_decay=0.1)
    found = continued(tiny, tmp_path / "uneven", tmp_path / "out")
    assert found.certificate.verdict == "first-order-optimal"


def test_a_finished_fit_is_only_shown_again(tiny, first, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(first.folder.parent, out)
    again = solved(tiny, out, lam=0.1)
    assert again.model is None and again.record == first.record
    with pytest.raises(SettingError, match="a finished run with another"):
        solved(tiny, out, lam=0.1, method="trainer", rank=1)


KILLED = """
import os, signal, sys
from ranksure.runs.fitting.fit import fit
from ranksure.runs.fitting.folder import Workspace
from ranksure.runs.fitting.folder import Workspace

save, rounds = Workspace.save_round, []

def killed(work, reached):
    save(work, reached)
    rounds.append(reached)
    if len(rounds) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Workspace.save_round = killed
fit(data=sys.argv[1], plan=sys.argv[2], out=sys.argv[3], method="certified")
"""


def test_killed_after_any_round_it_ends_with_the_same_bits(tiny, tmp_path, monkeypatch):
    common = {"data": str(tiny / "two.csv"), "plan": tiny / "plan2", "method": "certified"}
    whole = fit(out=tmp_path / "whole", **common)
    ended = run(script(KILLED, common["data"], str(common["plan"]), str(tmp_path / "killed")))
    assert ended.returncode == -9, ended.stderr
    folders, save = [tmp_path / "killed"], Workspace.save_round
    for stop in range(1, len(whole.record.history) + 1):

        def interrupted(work, reached, stop=stop):
            save(work, reached)
            if len(reached.history) == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            patched.setattr(Workspace, "save_round", interrupted)
            fit(out=tmp_path / str(stop), **common)
            assert stop == len(whole.record.history)  # the end has no round of its own where nothing was dropped
            continue
        folders.append(tmp_path / str(stop))
    assert len(folders) >= 3
    for out in folders:
        assert not (out / "adapter").exists() and list(out.glob("checkpoints/stage-0/checkpoint-*"))
        resumed = fit(out=out, **common)
        assert resumed.record.resumed and not whole.record.resumed
        same(whole.folder, resumed.folder)
        assert resumed.record.solved == whole.record.solved
        assert sorted(path.name for path in out.iterdir()) == ["adapter", "run.json"]


def test_a_damaged_round_is_said_and_other_settings_do_not_go_on(tiny, tmp_path, monkeypatch):
    def fails(work, reached, save=Workspace.save_round):
        save(work, reached)
        raise KeyboardInterrupt

    out, common = tmp_path / "out", {"data": str(tiny / "two.csv"), "plan": tiny / "plan2", "method": "certified"}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Workspace, "save_round", fails)
        fit(out=out, **common)
    with pytest.raises(SettingError, match="an unfinished run with another tolerance"):
        fit(out=out, tolerance=0.5, **common)
    (path,) = out.glob("checkpoints/stage-0/*")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SettingError, match=r"cannot be read .*`restart`"):
        fit(out=out, **common)
    assert not fit(out=out, restart=True, **common).record.resumed
