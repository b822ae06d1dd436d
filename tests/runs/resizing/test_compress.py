"""Compressing a run: three levels, each against an independent measurement of the written adapter."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2LMHeadModel

from ranksure.adapters.loaded import read_adapter
from ranksure.adapters.placed import placed
from ranksure.capture import capture
from ranksure.errors import AdapterError, CaptureError, MemoryBudgetError, SettingError
from ranksure.factors import thin_svd
from ranksure.losses import CrossEntropy
from ranksure.runs.resizing.compress import compress
from ranksure.runs.resizing.directions import (
    Direction,
    mean_squares,
    most_within,
    null_directions,
    ranked_directions,
    without,
)
from ranksure.runs.saved.data import DataSettings, read_data
from ranksure.runs.saved.open import load_run
from tests.commands import call
from tests.network.test_gradient import odd_run
from tests.runs.networks import Small, small_run
from tests.runs.tiny_runs import save_runs
from tests.tiny_text import (
    QUERY,
    VALUE,
    save_bert_classifier,
    save_gpt2,
    sentences,
    strict_json,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_bert_classifier(tmp_path_factory.mktemp("base") / "bert", ["bad", "good"])


@pytest.fixture(scope="module")
def run(base):
    """A tiny BERT fine-tuned at rank 8 on 24 sentences, and the data."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = sentences(24, noise=0.3)
    encoded = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([label for _, label in rows])
    batches = [
        {**{k: v[low : low + 8] for k, v in encoded.items()}, "labels": labels[low : low + 8]} for low in (0, 8, 16)
    ]
    torch.manual_seed(0)
    network = AutoModelForSequenceClassification.from_pretrained(base)
    model = get_peft_model(
        network, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=12, target_modules=["query", "value"])
    )
    model.base_model.model.classifier.requires_grad_(False)
    return trained(model, [{**encoded, "labels": labels}], 60), batches


def trained(model: nn.Module, batches, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "lora_" in n], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        optimizer.step()
    return model.eval()


def true_loss(model: nn.Module, batches) -> float:
    with torch.no_grad():
        pairs = [(model(**{k: v for k, v in b.items() if k != "labels"}).logits, b["labels"]) for b in batches]
    return float(F.cross_entropy(torch.cat([z for z, _ in pairs]).double(), torch.cat([y for _, y in pairs])))


def fresh(base: str, folder) -> nn.Module:
    return PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), str(folder)).eval()


def test_lossless_drops_null_directions_only(run, base, tmp_path):
    """Columns that copy one another, and columns of zeros, go; everything else stays, and so does every logit."""
    model, batches = run
    read = read_adapter(model)
    padded = {}
    for name, (u, v) in read.factors.items():
        p = torch.cat([u[:, :3], u[:, :3] @ torch.ones(3, 2).double(), torch.zeros(len(u), 3).double()], 1)
        padded[name] = (p, torch.cat([v[:, :3], v[:, 2:4], v[:, 5:8]], 1))
    with placed(read, padded, torch.float32):  # float32: null up to its rounding
        model.save_pretrained(tmp_path / "padded")
    wide = fresh(base, tmp_path / "padded")
    before = {name: block.rank for name, block in read_adapter(wide).blocks.items()}
    assert set(before.values()) == {8}
    found = compress(wide, batches)
    for name, (u, v) in padded.items():
        assert found.ranks_after[name] == int(torch.linalg.matrix_rank(u @ v.T, rtol=1e-6)) == 3
    assert found.parameters_after * 8 == found.parameters_before * 3
    found.save(wide, tmp_path / "small", source=tmp_path / "padded")
    small = fresh(base, tmp_path / "small")
    assert true_loss(small, batches) == pytest.approx(true_loss(wide, batches), rel=1e-5)
    assert found.before.loss == pytest.approx(true_loss(wide, batches), rel=1e-6)
    assert found.after.loss == pytest.approx(true_loss(small, batches), rel=1e-6)
    assert found.logit_changes["compressed"] <= 2e-5 and found.update_change <= 1e-6
    assert found.logit_changes["merged"] <= 2e-5 < found.logit_changes["merged_bfloat16"]
    exact = compress(wide, batches, level="data-exact").ranks_after  # null directions do not count there either
    assert all(exact[name] <= 3 for name in exact)
    again = compress(small)  # without data
    assert again.ranks_after == found.ranks_after and again.before is None
    assert {b.scale for b in read_adapter(small).blocks.values()} == {1.5}


def test_data_exact_keeps_the_first_order_predictions(run, base, tmp_path):
    model, batches = run
    found = compress(model, batches, level="data-exact")
    read = read_adapter(model)
    ranks = found.ranks_after
    equations = 24
    assert sum(r * (r + 1) // 2 for r in ranks.values()) <= equations < 4 * 36
    assert found.exact["count_after"] <= found.exact["independent"] <= equations
    # independently: the Jacobian of the logits in the weights, by autograd in float64
    model64 = copy.deepcopy(model).double()
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    modules = {n: m for n, m in read_adapter(model64).modules.items()}
    contrasts = CrossEntropy().contrasts(2)
    operator = capture(model64, inputs, modules, contrasts, dtype=torch.float64).operator
    change = {n: torch.cat([u, -found.factors[n][0]], 1) for n, (u, _) in read.factors.items()}
    other = {n: torch.cat([v, found.factors[n][1]], 1) for n, (_, v) in read.factors.items()}
    moved = operator.apply_factors({n: (change[n], other[n]) for n in change})
    size = operator.apply_factors({n: pair for n, pair in read.factors.items()})
    assert float(moved.abs().max()) <= 2e-4 * float(size.abs().max())
    found.save(model, tmp_path / "small")
    small = fresh(base, tmp_path / "small")
    assert found.after.loss == pytest.approx(true_loss(small, batches), rel=1e-5)
    assert {n: b.rank for n, b in read_adapter(small).blocks.items()} == {n: r for n, r in ranks.items() if r}
    with pytest.raises(MemoryBudgetError):
        compress(model, batches, level="data-exact", memory_bytes=2000)


@pytest.mark.parametrize("budget", [{"captured": 0.99}, {"captured": 0.8}, {"max_loss_increase": 0.01}])
def test_a_budget_is_never_exceeded_and_is_used(run, base, tmp_path, budget):
    model, batches = run
    lam = 0.001 if "captured" in budget else None
    found = compress(model, batches, level="budget", lam=lam, **budget)
    found.save(model, tmp_path / "small")
    small = fresh(base, tmp_path / "small")
    loss, before = true_loss(small, batches), true_loss(model, batches)
    with model.disable_adapter():
        zero = true_loss(model, batches)
    assert found.at_zero.loss == pytest.approx(zero, rel=1e-6)
    nuclear = lambda m: sum(  # noqa: E731
        float(torch.linalg.svdvals(u @ v.T).sum()) for u, v in read_adapter(m).factors.values()
    )
    if "captured" in budget:
        gain = zero - before - lam * nuclear(model)
        kept = (zero - loss - lam * nuclear(small)) / gain
        assert kept >= budget["captured"] - 1e-6
        assert found.captured == pytest.approx(kept, abs=1e-5) and found.captured >= budget["captured"]
    else:
        assert loss <= before + budget["max_loss_increase"] + 1e-7
        assert found.after.loss <= found.before.loss + budget["max_loss_increase"]
    assert found.parameters_after < 0.7 * found.parameters_before
    assert found.passes <= 20
    record = json.loads((tmp_path / "small" / "compress.json").read_text())
    assert record["schema"] == 2 and record["level"] == "budget"
    assert record["ranks_after"] == found.ranks_after and record["after"]["loss"] == found.after.loss
    assert "merged_bfloat16" in record["logit_changes"]


def test_harm_against_autograd():
    """Per sample, along each direction, at each length of the update: by forward-mode derivatives."""
    model, batches, (x, y) = small_run(rank=2)
    read = read_adapter(model)
    found = {(d.module, d.index): d.harm for d in ranked_directions(model, batches, read)}
    assert len(found) == 4
    layers = dict(model.base_model.model.named_modules())
    for name, (u, v) in read.factors.items():
        p, s, qt = torch.linalg.svd(u @ v.T)
        for i in range(2):

            def losses(t, p=p, qt=qt, i=i, layer=layers[name]):
                along = lambda module, args, out: out + t * ((args[0] @ qt[i])[..., None] * p[:, i])  # noqa: E731
                handle = layer.register_forward_hook(along)
                try:
                    return F.cross_entropy(model(x), y, reduction="none")
                finally:
                    handle.remove()

            square = 0.0
            for length in (0.0, 0.5, 1.0):
                shorter = {n: (math.sqrt(length) * a, math.sqrt(length) * b) for n, (a, b) in read.factors.items()}
                with placed(read, shorter, torch.float64):
                    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
                    d = torch.func.jvp(losses, (zero,), (one,))[1].detach()
                square += float(d.square().mean()) / 3
            assert found[name, i] == pytest.approx(0.5 * float(s[i]) ** 2 * square, rel=1e-9)


@pytest.mark.parametrize("weighting", ["token", "sample"])
def test_harm_of_a_language_model_with_position_embeddings(tmp_path, weighting):
    """The logits never whole, a module that all samples share, and both weightings, against autograd by sample."""
    network = GPT2LMHeadModel.from_pretrained(save_gpt2(tmp_path / "gpt2")).double()
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).double().eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(5, 30, (3, 6))
    labels = ids.masked_fill(torch.tensor([[1, 2, 3], [1, 1, 1], [3, 4, 5]]).repeat(1, 2) > 2, -100)
    read = read_adapter(model)
    parts = {name: thin_svd(u, v) for name, (u, v) in read.factors.items()}
    batches = [{"input_ids": ids[:2], "labels": labels[:2]}, {"input_ids": ids[2:], "labels": labels[2:]}]
    found = mean_squares(model, batches, read, parts, weighting=weighting)
    name = "transformer.h.1.attn.c_attn"
    p, _, q = parts[name]
    weight = dict(model.base_model.model.named_modules())[name].base_layer.weight.requires_grad_(True)
    square = total = 0.0
    for row in range(3):
        logits = model(input_ids=ids[row : row + 1]).logits[:, :-1].flatten(0, 1)
        losses = F.cross_entropy(logits, labels[row, 1:], reduction="none", ignore_index=-100)
        count = int((labels[row, 1:] != -100).sum())
        if not count:  # a sample without a label
            continue
        value = losses.sum() / (count if weighting == "sample" else 1)
        total += 1 if weighting == "sample" else count
        (gradient,) = torch.autograd.grad(value, [weight])
        square += float(p[:, 0] @ gradient.T @ q[:, 0]) ** 2
    assert float(found[name][0]) == pytest.approx(square / total, rel=1e-8)


def test_a_causal_language_model_with_conv1d_and_a_tied_embedding(tmp_path):
    """Merging a tied embedding is not measured; a budget works; data-exact does not."""
    folder = save_gpt2(tmp_path / "gpt2")
    network = GPT2LMHeadModel.from_pretrained(folder)
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=6, use_rslora=True, target_modules=["c_attn", "wte"], fan_in_fan_out=True
    )
    model = get_peft_model(network, config)
    ids = torch.randint(5, 30, (6, 7))
    labels = ids.masked_fill(torch.arange(7) < 3, -100)
    batches = [{"input_ids": ids[:3], "labels": labels[:3]}, {"input_ids": ids[3:], "labels": labels[3:]}]
    trained(model, batches, 40)
    found = compress(model, batches, level="budget", max_loss_increase=0.3)
    assert "tied" in found.notes[0] and "merged" not in found.logit_changes
    assert 0 < sum(found.ranks_after.values()) < sum(found.ranks_before.values())
    found.save(model, tmp_path / "small")
    small = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(folder), str(tmp_path / "small")).eval()
    with torch.no_grad():
        loss = float(small(input_ids=ids, labels=labels).loss)
    assert loss == pytest.approx(found.after.loss, rel=1e-5)
    assert found.after.loss <= found.before.loss + 0.3
    with pytest.raises(SettingError, match="classifiers"):
        compress(model, batches, level="data-exact")


def test_a_bfloat16_base(base, tmp_path):
    network = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = get_peft_model(network, LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=4, target_modules=["value"]))
    batches = [{"input_ids": torch.randint(5, 30, (8, 9)), "labels": torch.tensor([0, 1] * 4)}]
    trained(model, batches, 40)
    found = compress(model, batches, level="budget", max_loss_increase=0.05)
    assert found.logit_changes["merged"] == found.logit_changes["merged_bfloat16"] > 0
    assert any("bfloat16" in note for note in found.notes)
    found.save(model, tmp_path / "small")
    loaded = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.bfloat16), str(tmp_path / "small")
    ).eval()
    assert true_loss(loaded, batches) == pytest.approx(found.after.loss, rel=1e-2)


def test_one_of_two_active_adapters(tmp_path):
    """The other counts as part of the network, and is neither moved nor written."""
    model, batches, (x, _) = small_run(rank=3)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=8, target_modules=["second"]))
    for name, parameter in model.named_parameters():
        if "other" in name:
            nn.init.normal_(parameter, std=0.3)
    model.base_model.set_adapter(["default", "other"])
    y = torch.cat([batch["labels"] for batch in batches])
    optimizer = torch.optim.Adam(
        [p.requires_grad_(True) for n, p in model.named_parameters() if "default" in n], lr=0.05
    )
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    loss = compress(model, batches, adapter="other").before.loss
    found = compress(model, batches, level="budget", max_loss_increase=0.02, adapter="default")
    assert found.before.loss == pytest.approx(loss) and set(found.ranks_before) == {"first", "second"}
    found.save(model, tmp_path / "small")
    with torch.no_grad():
        before = float(F.cross_entropy(model(x), y))
    assert before == pytest.approx(loss)
    assert {p.name for p in (tmp_path / "small").iterdir()} >= {"adapter_config.json", "compress.json"}
    # the small one beside the other one, freshly loaded
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Small().double(), str(tmp_path / "small"), autocast_adapter_dtype=False)
    again.add_adapter("other", LoraConfig(r=2, lora_alpha=8, target_modules=["second"]), autocast_adapter_dtype=False)
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            if "other" in name:
                parameter.copy_(theirs[name])
    again.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        after = float(F.cross_entropy(again.eval()(x), y))
    assert after == pytest.approx(found.after.loss, rel=1e-6) and after <= loss + 0.02


def test_null_directions_and_truncation():
    torch.manual_seed(0)
    u, v = torch.randn(6, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    u[:, 2] = 1e-9 * u[:, 2]
    assert len(null_directions({"a": (u, v)}, torch.float32)) == 1
    assert not null_directions({"a": (u, v)}, torch.float64)
    p, s, qt = torch.linalg.svd(u @ v.T)
    left = without({"a": (u, v)}, [Direction("a", 0, float(s[0]), 0.0, 11)])["a"]
    assert torch.allclose(left[0] @ left[1].T, u @ v.T - s[0] * torch.outer(p[:, 0], qt[0]), atol=1e-12)
    assert torch.allclose(left[0].T @ left[0], left[1].T @ left[1], atol=1e-12)


@pytest.mark.parametrize("limit", range(7))
def test_bisection_finds_the_last_that_may_go(limit):
    order = [Direction("a", i, 1.0, float(i), 2) for i in range(7)]
    measured = []

    def allowed(removed) -> bool:
        measured.append(len(removed))
        return len(removed) <= limit

    assert most_within(order, allowed) == order[:limit] and limit in measured
    with pytest.raises(AdapterError, match="without the adapter is within"):
        most_within(order, lambda removed: True)
    with pytest.raises(SettingError, match="rounding"):
        most_within(order, lambda removed: False)


def test_placed_gives_back_the_parameters(run):
    model, batches = run
    read = read_adapter(model)
    before = dict(model.named_parameters())
    loss = true_loss(model, batches)
    with placed(read, {n: (u[:, :0], v[:, :0]) for n, (u, v) in read.factors.items()}, torch.float32):
        assert true_loss(model, batches) != loss
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[key] is after[key] for key in before)


def test_what_is_refused(run):
    model, batches = run
    cases = [
        ({"level": "small"}, "unknown level"),
        ({"level": "budget"}, "takes `captured`"),
        ({"captured": 0.9}, "no other"),
        ({"level": "budget", "captured": 0.9, "max_loss_increase": 1.0}, "one budget"),
        ({"level": "budget", "captured": 1.0}, "share in"),
        ({"level": "budget", "max_loss_increase": 0.0}, "must be positive"),
        ({"level": "budget", "captured": 0.9, "lam": 1.0, "weight_decay": 1.0}, "not both"),
        ({"lam": -1.0}, "lambda must be"),
        ({"level": "budget", "captured": 0.9, "lam": 1e9}, "gains nothing"),
    ]
    for settings, match in cases:
        with pytest.raises(SettingError, match=match):
            compress(model, batches, **settings)
    with pytest.raises(SettingError, match="needs data"):
        compress(model, level="data-exact")
    with pytest.raises(SettingError, match="several times"):
        compress(model, iter(batches))
    with pytest.raises(AdapterError, match="without the adapter is within"):
        compress(model, batches, level="budget", max_loss_increase=100.0)
    with pytest.raises(AdapterError, match="zero in every module"):
        compress(get_peft_model(Small(), LoraConfig(r=2, target_modules=["first"])))
    assert QUERY in read_adapter(model).blocks and VALUE in read_adapter(model).blocks


def test_a_network_whose_derivatives_cannot_be_taken_is_refused():
    model, batches = odd_run()
    model.base_model.model.in_place = True
    with pytest.raises(CaptureError, match="changed in place"):
        compress(model, batches, level="budget", max_loss_increase=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_runs(tmp_path_factory.mktemp("compress"))
    run = load_run(root / "texts", trainable=True)
    batches = read_data(run, str(root / "data.csv"), DataSettings()).batches
    trained(run.model, batches, 15).save_pretrained(root / "texts")
    return root


@pytest.mark.parametrize(
    ("options", "level"),
    [
        ([], "lossless"),
        (["--data", "data.csv"], "lossless"),
        (["--data", "data.csv", "--level", "data-exact", "--samples", "3"], "data-exact"),
        (["--data", "data.csv", "--captured", "0.9", "--lambda", "1e-4"], "budget"),
    ],
)
def test_the_command(here, tmp_path, monkeypatch, capfd, options, level):
    monkeypatch.chdir(here)
    assert call("compress", "texts", "--out", str(tmp_path / "small"), *options, monkeypatch=monkeypatch) == 0
    out, err = capfd.readouterr()
    assert level in out and "written to" in out and "Traceback" not in err
    record = strict_json((tmp_path / "small" / "compress.json").read_text())
    assert record["level"] == level and record["run"]["adapter"] == "texts"
    if "--data" in options:
        assert "true loss" in out and "largest change of a logit" in out and record["data"]["sha256"]
    else:
        assert "no data was given" in " ".join(out.split()) and record["before"] is None
    ranks = {name: block.rank for name, block in read_adapter(load_run(tmp_path / "small").model).blocks.items()}
    assert ranks == {name: rank for name, rank in record["ranks_after"].items() if rank}
    texts = (" ".join(record["notes"]), (tmp_path / "small" / "README.md").read_text(), " ".join(out.split()))
    assert [("llama.cpp" in text) for text in texts] == [len(set(ranks.values())) > 1] * 3
    if level == "data-exact":  # 3 rows of two classes: 3 predictions
        assert sum(r * (r + 1) // 2 for r in ranks.values()) <= 3


def test_the_command_on_a_language_model(here, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(here)
    out = str(tmp_path / "small")
    assert (
        call(
            "compress",
            "causal",
            "--data",
            "pairs.jsonl",
            "--level",
            "data-exact",
            "--out",
            out,
            monkeypatch=monkeypatch,
        )
        == 2
    )
    assert "for a language model use --captured or --max-loss-increase" in capfd.readouterr().err
    options = ["--max-loss-increase", "0.02", "--json"]
    assert call("compress", "causal", "--data", "pairs.jsonl", "--out", out, *options, monkeypatch=monkeypatch) == 0
    record = strict_json(capfd.readouterr().out)
    assert record["after"]["loss"] <= record["before"]["loss"] + 0.02


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--captured", "0.9"], ["needs data"]),
        (["--captured", "1.5", "--data", "data.csv"], ["share in"]),
        (["--level", "best"], ["best", "lossless"]),
        (["--level", "budget", "--data", "data.csv"], ["--max-loss-increase"]),
        (["--level", "data-exact", "--data", "data.csv", "--memory", "1KB"], ["budget"]),
        (["--out", "data.csv"], ["is a file"]),
    ],
)
def test_mistakes_of_the_command(here, tmp_path, monkeypatch, capfd, options, parts):
    monkeypatch.chdir(here)
    before = sorted(here.rglob("*"))
    assert call("compress", "texts", "--out", str(tmp_path / "small"), *options, monkeypatch=monkeypatch) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("error ") and "Traceback" not in err
    assert all(part in err.splitlines()[-1] for part in parts)
    assert sorted(here.rglob("*")) == before and not (tmp_path / "small").exists()
