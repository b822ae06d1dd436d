"""Fits of a tiny BERT: verdicts, the plan's prediction, growth, what is on disk, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2LMHeadModel,
    TrainerCallback,
)

from ranksure.bundled.names import MODELS
from ranksure.cli.app import app
from ranksure.data.texts import load_rows
from ranksure.errors import RanksureError, SettingError
from ranksure.records.record import plain
from ranksure.runs.fitting.fit import fit
from ranksure.runs.fitting.plan_folder import read_plan
from ranksure.runs.fitting.settings import FitSettings
from ranksure.runs.saved.open import load_run
from ranksure.tasks import classifiers
from tests.runs.tiny_fits import ADAPTER, QUICK, fitted, same
from tests.runs.tiny_runs import save_llama, save_pairs
from tests.tiny_text import save_gpt2, sentences, strict_json

pytestmark = pytest.mark.usefixtures("quick_collections")


def reload(folder, tiny):
    base = AutoModelForSequenceClassification.from_pretrained(str(tiny / "bert"), num_labels=2)
    return PeftModel.from_pretrained(base, str(folder)).eval()


def test_at_a_sufficient_rank_it_ends_first_order_optimal_as_the_plan_predicted(tiny, done):
    assert done.certificate.verdict == "first-order-optimal"
    plan = plain(read_plan(tiny / "plan2").record)
    assert done.data["ranks"] == plan["recommended"]["rank_pattern"]
    assert done.data["lambda"] == plan["weight_decay"] and done.data["n_samples"] == 24
    predicted = done.data["prediction"]
    zero, dual = plan["optimum"]["objective_at_zero"], plan["optimum"]["dual"]
    assert predicted["objective"] == pytest.approx(zero - plan["recommended"]["captured_uniform"] * (zero - dual))
    assert done.data["objective_at_zero"] == pytest.approx(zero, rel=1e-6)
    # this network is 12% away from linear: the real gain is near the predicted one
    assert done.objective < zero and abs(done.objective - predicted["objective"]) < 0.25 * (zero - dual)
    text = " ".join(done.sentences())
    assert "The linearised problem predicted" in text and "no gradient clipping" in text
    assert "loss averaged per sample" in text and "head frozen" in text


def test_the_objective_is_that_of_the_adapter_on_disk(tiny, done):
    """Loss by transformers and PEFT alone, the penalty from the files' own matrices."""
    model = reload(done.folder, tiny)
    plan = plain(read_plan(tiny / "plan2").record)
    rows = load_rows(str(tiny / "two.csv")).shuffled(plan["seed"]).subset(range(24))
    encoded = AutoTokenizer.from_pretrained(str(tiny / "bert"))(rows.texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        loss = float(F.cross_entropy(model(**encoded).logits, torch.tensor(rows.labels)))
    tensors = load_file(done.folder / ADAPTER)
    penalty = 0.0
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            update = tensors[key.replace("lora_A", "lora_B")].double() @ a.double()
            penalty += plan["weight_decay"] * float(torch.linalg.svdvals(update).sum())
    assert done.data["final"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert done.objective == pytest.approx(loss + penalty, rel=1e-5)
    own = {n: p for n, p in done.model.named_parameters() if ".lora_A.default" in n}
    for name, value in own.items():
        assert torch.equal(value.cpu(), tensors[name.replace(".default", "")])


def test_what_is_written(tiny, done):
    assert sorted(path.name for path in done.folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        ADAPTER,
        "certificate.json",
        "fit.json",
        "task.json",
    ]
    data = strict_json((done.folder / "fit.json").read_text())
    found = strict_json((done.folder / "certificate.json").read_text())
    assert data["schema"] == 2 and found["verdict"] == data["verdict"] == "first-order-optimal"
    assert data["steps"] == 100 and data["gradient_clipping"] == 0 and data["head_trained"] is False
    assert [entry["step"] for entry in data["history"]] == list(range(5, 101, 5))
    assert sorted(path.name for path in done.folder.parent.iterdir()) == ["adapter", "run.json"]


def test_the_head_is_the_plans_and_stays(tiny, done):
    key = "base_model.model.classifier.weight"
    planned = load_file(tiny / "plan2" / "adapter" / ADAPTER)[key]
    assert torch.equal(load_file(done.folder / ADAPTER)[key], planned)


def test_stopped_early_it_is_not_converged(tiny, tmp_path):
    assert fitted(tiny, tmp_path / "out", max_steps=5).certificate.verdict == "not-converged"


def test_the_linear_optimum_as_it_is_and_as_a_start(tiny, tmp_path):
    linear = fitted(tiny, tmp_path / "linear", mode="linear")
    planned = load_file(tiny / "plan2" / "adapter" / ADAPTER)
    written = load_file(linear.folder / ADAPTER)
    assert set(planned) == set(written)
    assert all(torch.equal(value, written[key]) for key, value in planned.items())
    assert linear.data["steps"] == 0 and "without any training" in linear.sentences()[0]
    assert linear.data["prediction"]["objective"] == read_plan(tiny / "plan2").record.optimum.objective
    started = fitted(tiny, tmp_path / "start", init="linear", max_steps=10, learning_rate=1e-3)
    assert started.data["history"][0]["loss"] == pytest.approx(linear.data["final"]["loss"], rel=0.1)
    assert started.objective < linear.objective


def test_the_linear_optimum_without_a_plan_loads_the_model_once(tiny, tmp_path, monkeypatch):
    loads, real = [], classifiers.load_weights
    monkeypatch.setattr(classifiers, "load_weights", lambda *a, **k: loads.append(a) or real(*a, **k))
    options = {"samples": 24, "heldout": 32, "layers_to_transform": "last", "target_modules": ["query", "value"]}
    options |= {"mode": "linear", "lam": 0.01}
    first = fit(str(tiny / "bert"), str(tiny / "two.csv"), out=tmp_path / "out", **options)
    assert len(loads) == 1
    again = fit(data=str(tiny / "two.csv"), plan=tmp_path / "out" / "plan", out=tmp_path / "again", mode="linear")
    assert len(loads) == 2
    written = [load_file(found.folder / ADAPTER) for found in (first, again)]
    assert set(written[0]) == set(written[1])
    assert all(torch.equal(value, written[1][key]) for key, value in written[0].items())
    assert first.objective == again.objective and first.data["heldout"] == again.data["heldout"]
    assert first.data["prediction"] == again.data["prediction"] is not None
    with pytest.raises(SettingError, match="needs no adapter"):
        fit(str(tiny / "bert"), str(tiny / "two.csv"), out=tmp_path / "zero", **{**options, "lam": 1e6})


def test_a_language_model_by_its_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = save_llama(tmp_path / "llama")
    monkeypatch.setitem(MODELS, "smollm2", lambda: base)
    rows = save_pairs(tmp_path / "p.jsonl")
    result = fit("smollm2", rows, task="CAUSAL_LM", out=tmp_path / "out", rank=1, max_steps=1)
    assert result.record.model == base
    assert load_run(result.folder, base="smollm2").base == base


def test_without_a_plan(tiny, tmp_path):
    """A rank, targets and a lambda of one's own; the new head is fitted; another scale than 1 is written at 1."""
    found = fit(
        str(tiny / "bert"),
        str(tiny / "two.csv"),
        out=tmp_path / "out",
        rank=2,
        lora_alpha=8,
        target_modules=["value"],
        lam=0.01,
        samples=24,
        max_steps=5,
        **QUICK,
    )
    assert found.data["scale_in_training"] == 4 and found.data["prediction"] is None
    config = json.loads((found.folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2
    model = reload(found.folder, tiny)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert len(layers) == 2 and all(layer.scaling == {"default": 1} for layer in layers.values())
    for name, layer in layers.items():
        inner = dict(found.model.named_modules())[name]
        before = 4 * inner.lora_B["default"].weight @ inner.lora_A["default"].weight
        after = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert torch.allclose(before, after, rtol=1e-5, atol=1e-7)
    assert found.data["final"]["penalty"] == pytest.approx(found.certificate.penalty)


def test_mean_pooling(tiny, tmp_path):
    found = fit(data=str(tiny / "two.csv"), out=tmp_path / "out", plan=tiny / "mean", max_steps=60, **QUICK)
    planned = load_file(tiny / "mean" / "adapter" / "head.safetensors")
    written = load_file(found.folder / "head.safetensors")
    assert all(torch.equal(value, written[key]) for key, value in planned.items())
    assert found.data["ranks"] == read_plan(tiny / "mean").record.recommended.rank_pattern
    assert found.certificate.verdict == "first-order-optimal"
    assert found.objective == pytest.approx(found.data["prediction"]["objective"], rel=0.02)  # 3% from linear


@pytest.mark.parametrize("weighting", ["token", "sample"])
def test_a_causal_language_model(tmp_path, weighting):
    """Loss on completions only, averaged as asked; the adapter on disk has the loss that is told."""
    torch.manual_seed(0)
    save_gpt2(tmp_path / "gpt2")
    config = GPT2LMHeadModel.config_class.from_pretrained(str(tmp_path / "gpt2"))
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    if pickled := weighting == "sample":
        weights = tmp_path / "gpt2" / "model.safetensors"
        torch.save(load_file(weights), tmp_path / "gpt2" / "pytorch_model.bin")
        weights.unlink()
    rows = [
        {"prompt": f"{text} is", "completion": " very good film" if label else " bad"} for text, label in sentences(16)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = fit(
        str(tmp_path / "gpt2"),
        str(data),
        task="CAUSAL_LM",
        out=tmp_path / "out",
        rank=2,
        lam=1e-3,
        weighting=weighting,
        max_steps=20,
        gradient_accumulation_steps="full",
        **{**QUICK, "batch_size": 5},
    )
    assert found.data["mean_per"] == weighting and found.data["heldout"] is None
    assert any("pickled" in note for note in found.data["notes"]) == pickled
    assert found.data["final"]["loss"] < found.data["objective_at_zero"]
    base = GPT2LMHeadModel.from_pretrained(str(tmp_path / "gpt2"))
    model = PeftModel.from_pretrained(base, str(found.folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "gpt2"))
    totals, counts = [], []
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
        ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], 1)
        with torch.no_grad():
            losses = F.cross_entropy(model(ids).logits[0, start - 1 : -1], ids[0, start:], reduction="none")
        totals.append(float(losses.sum()))
        counts.append(len(losses))
    by_token = sum(totals) / sum(counts)
    by_sample = sum(total / count for total, count in zip(totals, counts, strict=True)) / len(rows)
    assert abs(by_token - by_sample) > 1e-3
    assert found.data["final"]["loss"] == pytest.approx(by_token if weighting == "token" else by_sample, rel=1e-4)


def test_growing_lowers_the_objective_of_a_rank_bound_run(tiny, tmp_path):
    settings = {**QUICK, "rank": 1, "max_steps": 100, "grow_stages": 1}
    common = {"data": str(tiny / "three.csv"), "plan": tiny / "plan3"}
    stuck = fit(**common, out=tmp_path / "stuck", **settings)
    assert stuck.certificate.verdict == "rank-bound"
    grown = fit(**common, out=tmp_path / "grown", grow=True, **settings)
    (stage,) = grown.data["stages"]
    assert stage["verdict"] == "rank-bound" and stage["objective"] == stuck.objective
    assert sum(grown.data["ranks"].values()) > sum(stage["ranks"].values()) == 1
    assert grown.objective < 0.9 * stuck.objective
    assert "Grown 1 time" in " ".join(grown.sentences())
    assert sorted(path.name for path in (tmp_path / "grown").iterdir()) == ["adapter", "run.json"]
    # killed after the first stage: the second starts from the saved factors, with the same end
    again = tmp_path / "again"
    fit_until_growth(common, again, settings)
    assert (again / "stage-1.safetensors").is_file() and not (again / "adapter").exists()
    resumed = fit(**common, out=again, grow=True, **settings)
    same(grown.folder, resumed.folder)


def fit_until_growth(common, out, settings):
    class Stop(TrainerCallback):
        begun = 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.begun += 1
            if self.begun == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(**common, out=out, grow=True, callbacks=[Stop()], **settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"optim": "adamw"}, "decoupled"),
        ({"rank": 0}, "`rank` 0"),
        ({"mode": "linear", "rank": 2}, "brings its own ranks"),
        ({"lam": 0.1, "weight_decay": 0.1}, "not both"),
        ({"lam": -0.1}, "`lam` -0.1"),
        ({"learning_rate": math.nan}, "`learning_rate` nan"),
        ({"stop": ["rank-bound"]}, "`certify_every`"),
        ({"stop": ["good"], "certify_every": 1}, "`stop` 'good' is unknown: use first-order-optimal"),
        ({"gradient_accumulation_steps": 0}, "at least 1"),
        ({"seed": -1}, "`seed`"),
        ({"packing": True, "weighting": "sample"}, "joins rows"),
    ],
)
def test_settings_without_a_meaning(settings, reason):
    with pytest.raises(SettingError, match=reason):
        FitSettings(**settings)


def test_mistakes_leave_nothing_behind(tiny, tmp_path):
    """Each one line; the folder stays empty but for what says what was asked."""
    data, plan = str(tiny / "two.csv"), tiny / "plan2"
    cases = [
        ({"out": tmp_path / "a", "plan": tmp_path}, "holds no plan.json"),
        ({"out": tmp_path / "a", "data": data}, "give `model`"),
        ({"out": tmp_path / "a", "plan": plan}, "give `data`"),
        ({"out": tmp_path / "a", "model": str(tiny / "bert"), "data": data, "lam": 0.1}, "which rank"),
        ({"out": tmp_path / "a", "plan": plan, "data": data, "lora_alpha": 2.0}, "`lora_alpha` needs `rank`"),
        ({"out": tmp_path / "a", "plan": plan, "data": data, "nonsense": 2}, "no such setting: 'nonsense'"),
        ({"out": tmp_path / "b", "plan": plan, "data": data, "report_to": "nobody"}, "Trainer refuses"),
        ({"out": tmp_path / "c", "plan": plan, "data": data, "lr_scheduler_type": "up"}, "Trainer refuses"),
        ({"out": tiny, "plan": plan, "data": data}, "which no fit wrote"),
        ({"out": tiny / "two.csv", "plan": plan, "data": data}, "is a file"),
        ({"out": tmp_path / "d", "plan": plan, "data": data, "learning_rate": 1e30, "max_steps": 10}, "diverged"),
    ]
    for arguments, reason in cases:
        with pytest.raises(RanksureError, match=reason) as caught:
            fit(**arguments)
        assert "\n" not in str(caught.value)
        assert not (Path(arguments["out"]) / "adapter").exists()


def test_a_damaged_plan_is_one_line(tiny, tmp_path):
    folder = tmp_path / "plan"
    shutil.copytree(tiny / "plan2", folder)
    (folder / "adapter" / ADAPTER).write_bytes(b"no tensors")
    with pytest.raises(RanksureError, match="cannot be read"):
        fit(data=str(tiny / "two.csv"), out=tmp_path / "out", plan=folder)
    (folder / "plan.json").write_text("{")
    with pytest.raises(RanksureError, match=r"plan\.json is damaged, no JSON"):
        fit(data=str(tiny / "two.csv"), out=tmp_path / "out", plan=folder)


def test_the_command(tiny, tmp_path):
    out = tmp_path / "out"
    command = ["fit", "--plan", str(tiny / "plan2"), "--data", str(tiny / "two.csv"), "--out", str(out), "--mode"]
    run = CliRunner().invoke(app, [*command, "linear", "--json"])
    assert run.exit_code == 0, run.output
    assert (
        strict_json(run.stdout)["verdict"] == json.loads((out / "adapter" / "certificate.json").read_text())["verdict"]
    )
    # certify writes its own record over the fit's; the fit is read again all the same
    certified = CliRunner().invoke(app, ["certify", str(out / "adapter"), "--data", str(tiny / "two.csv")])
    assert certified.exit_code == 0, certified.output
    again = CliRunner().invoke(app, [*command, "linear"])
    assert "finished before" in again.output
    other = CliRunner().invoke(app, [*command, "train"])
    assert isinstance(other.exception, SettingError) and "another ranks" in str(other.exception)
    assert "--gradient-accumulation-steps" in CliRunner().invoke(app, ["fit", "--help"]).output


def test_a_refused_fit_leaves_no_folder(tiny, tmp_path):
    with pytest.raises(RanksureError, match="at most rank 16"):
        fit(
            str(tiny / "bert"),
            str(tiny / "two.csv"),
            out=tmp_path / "new",
            rank=500,
            target_modules=["query"],
            lam=0.01,
        )
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(RanksureError):
        fit(str(tiny / "bert"), str(tiny / "two.csv"), out=tmp_path / "mine", rank=500, lam=0.01)
    assert (tmp_path / "mine").is_dir()
