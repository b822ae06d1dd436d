"""Plan, fit and certify for every task: what is written is opened again and gives the same certificate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import ranksure
from ranksure.cli.app import app
from ranksure.data.images import image_rows
from ranksure.data.recordings import speech_rows
from ranksure.data.texts import load_rows
from ranksure.errors import AdapterError, ModelError, SettingError
from ranksure.runs.fitting.fit import fit
from ranksure.runs.saved.data import DataSettings
from ranksure.runs.saved.open import open_run
from tests.runs.tiny_runs import llama_config, save_runs
from tests.tasks.prompt_parts import SENTENCES, byte_bpe, rows_of
from tests.tiny_text import save_bert, save_csv

KINDS = ["mean", "prompt", "image", "speech"]


def save_llama(folder: Path) -> str:
    torch.manual_seed(0)
    tokenizer = byte_bpe(masked=False)
    config = llama_config(len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def vit_config(**more: Any) -> ViTConfig:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    return ViTConfig(**sizes, image_size=8, patch_size=4, initializer_range=0.4, **more)


def save_vit(folder: Path, network: Any = None) -> str:
    torch.manual_seed(0)
    (network or ViTModel(vit_config())).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


def save_whisper(folder: Path) -> str:
    torch.manual_seed(0)
    config = WhisperConfig(
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        d_model=8,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        vocab_size=20,
        num_mel_bins=80,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
        max_target_positions=8,
        classifier_proj_size=6,
        max_source_positions=200,
        init_std=0.3,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=4).save_pretrained(folder)
    return str(folder)


def pictures(n: int = 12):
    random = np.random.RandomState(0)
    images = [random.randint(0, 256, (8, 8, 3)).astype(np.uint8) for _ in range(n)]
    return image_rows(images, [i % 2 for i in range(n)], label_names=("ant", "bee"))


def tones(n: int = 12):
    random = np.random.RandomState(0)
    waves = []
    for i in range(n):
        t = np.arange(round(16_000 * (0.3 + 0.1 * (i % 4)))) / 16_000
        waves.append((0.3 * np.sin(2 * np.pi * (300 + 900 * (i % 2)) * t) + 0.05 * random.randn(len(t))).astype("f4"))
    return speech_rows(waves, ["low", "high"] * (n // 2), 16_000)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Model, data and options by kind."""
    root = tmp_path_factory.mktemp("tasks")
    texts = load_rows(save_csv(root / "two.csv", 16))
    return {
        "mean": (save_bert(root / "bert"), texts, {"pooling": "mean", "target_modules": ["query", "value"]}),
        "prompt": (
            save_llama(root / "llama"),
            rows_of([*SENTENCES, *[(text[::-1], label) for text, label in SENTENCES]]),
            {
                "task": "prompt",
                "template": "{text} Sentiment:",
                "verbalizers": "negative=terrible,positive=great",
                "target_modules": ["q_proj", "v_proj"],
            },
        ),
        "image": (
            save_vit(root / "vit"),
            pictures(),
            {"task": "image", "target_modules": [name for name in ("q_proj", "v_proj")]},
        ),
        "speech": (
            save_whisper(root / "whisper"),
            tones(),
            {"task": "speech", "max_seconds": 1.0, "target_modules": ["q_proj", "v_proj"]},
        ),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_is_opened_again(parts, kind, tmp_path):
    model, rows, options = parts[kind]
    settings = {"rank": 2, "lam": 1e-4, "max_steps": 30, "learning_rate": 0.05, "logging_steps": 4, "heldout": 0}
    done = fit(model, rows, out=tmp_path / "fit", layers_to_transform="last", **settings, **options)
    assert done.objective < done.data["objective_at_zero"]
    run, read = open_run(done.folder, rows, DataSettings(by_length=True))
    again = ranksure.certify(run.model, read.batches, lam=1e-4, loss=read.kind)
    assert again.objective == pytest.approx(done.certificate.objective, rel=2e-5)
    assert again.rank_gain_bound == pytest.approx(done.certificate.rank_gain_bound, rel=1e-3, abs=1e-6)
    frame = {"mean": "encoder.", "prompt": "lm."}.get(kind, "")
    assert {name.removeprefix(frame) for name in again.modules} == set(done.data["ranks"])
    assert run.task_type == ("text" if kind == "mean" else kind)
    assert read.n_rows == len(rows)
    # what a Trainer would be given makes the same batches
    batch = read.collator([dict(row) for row in read.features])
    with torch.no_grad():
        rest = {key: value for key, value in batch.items() if key != "labels"}
        output = run.model(**rest)
    logits = getattr(output, "logits", output)
    truth = torch.nn.functional.cross_entropy(logits.double(), torch.as_tensor(batch["labels"]))
    assert float(truth) == pytest.approx(done.certificate.loss, rel=2e-5)


@pytest.mark.parametrize("kind", ["texts", "causal", *KINDS[:2]])
def test_an_adapter_is_read_once(parts, kind, tmp_path, monkeypatch):
    if kind in KINDS:
        model, data, options = parts[kind]
        settings = {"rank": 1, "lam": 1e-4, "max_steps": 1, "heldout": 0, "layers_to_transform": "last"}
        folder = fit(model, data, out=tmp_path / "fit", **settings, **options).folder
    else:
        folder, data = save_runs(tmp_path) / kind, str(tmp_path / ("data.csv" if kind == "texts" else "pairs.jsonl"))
    read, real = [], safetensors.torch.load_file
    monkeypatch.setattr(
        safetensors.torch, "load_file", lambda path, *more: read.append(Path(path)) or real(path, *more)
    )
    open_run(folder, data)
    assert read.count(folder / "adapter_model.safetensors") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_is_trained(parts, kind, tmp_path):
    model, rows, options = parts[kind]
    common = {**options, "layers_to_transform": "last"}
    result = ranksure.plan(
        model, rows, samples=8, heldout=0, weight_decay="20%", ranks=[1, 2], linearised=True, **common
    )
    result.save(tmp_path / "plan")
    record = json.loads((tmp_path / "plan" / "adapter" / "task.json").read_text())
    assert record["kind"] == ("text" if kind == "mean" else kind) and record["labels"] == rows.label_names
    linear = fit(data=rows, out=tmp_path / "linear", plan=tmp_path / "plan", mode="linear", heldout=0)
    optimum = result.data["optimum"]
    assert linear.certificate.penalty == pytest.approx(optimum["objective"] - _loss(result), rel=1e-3)
    assert linear.data["prediction"]["objective"] == optimum["objective"]
    trained = fit(data=rows, out=tmp_path / "fit", plan=tmp_path / "plan", max_steps=10, learning_rate=0.02, heldout=0)
    assert set(trained.data["ranks"]) == set(result.data["target_modules"])
    assert set(trained.data["ranks"].values()) == {result.data["recommended"]["r"]}
    assert trained.data["prediction"] is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_grown_and_compressed(parts, kind, tmp_path):
    """Also where the adapted model is inside a frame: the new folder opens again, with the same loss."""
    model, rows, options = parts[kind]
    settings = {"rank": 1, "lam": 1e-4, "max_steps": 20, "learning_rate": 0.05, "logging_steps": 4, "heldout": 0}
    done = fit(model, rows, out=tmp_path / "fit", layers_to_transform="last", **settings, **options)
    run, read = open_run(done.folder, rows, DataSettings(by_length=True))
    grown = ranksure.grow(run.model, read.batches, lam=1e-4, loss=read.kind, force=True, most_new=1)
    grown.save(out_dir=tmp_path / "grown", **run.rewritten)
    larger, read = open_run(tmp_path / "grown", rows, DataSettings(by_length=True))
    after = ranksure.certify(larger.model, read.batches, lam=1e-4, loss=read.kind)
    assert sum(state.rank for state in after.modules.values()) > len(done.data["ranks"])
    assert after.objective == pytest.approx(grown.certificate.objective, rel=1e-5)
    smaller = ranksure.compress(larger.model, read.batches, loss=read.kind, source=tmp_path / "grown")
    smaller.save(out_dir=tmp_path / "small", **larger.rewritten)
    again, read = open_run(tmp_path / "small", rows, DataSettings(by_length=True))
    last = ranksure.certify(again.model, read.batches, lam=1e-4, loss=read.kind)
    assert {name: state.rank for name, state in last.modules.items()} == smaller.ranks_after
    assert last.objective == pytest.approx(after.objective, rel=1e-5)
    assert (tmp_path / "small" / "task.json").read_bytes() == (done.folder / "task.json").read_bytes()
    assert not (tmp_path / "small" / "fit.json").exists()  # about the factors as they were
    readme = (tmp_path / "small" / "README.md").read_text()
    assert [line for line in readme.splitlines() if line.startswith("## ")] == [
        "## Load",
        "## Who reads what",
        "## Compressed",
    ]
    assert str(done.folder) not in readme and str(tmp_path / "grown") not in readme
    code: dict[str, Any] = {}
    exec(readme.split("```python\n")[1].split("```")[0], code)  # what the README says loads it
    if kind == "mean":
        batch = {key: value for key, value in read.batches[0].items() if key != "labels"}
        with torch.no_grad():
            torch.testing.assert_close(code["classify"](**batch), again.model(**batch))


def test_the_commands_grow_and_compress_a_mean_pooled_fit(tmp_path):
    data = str(save_csv(tmp_path / "two.csv", 16))
    settings = {"pooling": "mean", "target_modules": ["query"], "layers_to_transform": "last", "heldout": 0}
    done = fit(save_bert(tmp_path / "bert"), data, rank=1, lam=1e-4, out=tmp_path / "fit", max_steps=5, **settings)

    def run(*command: str) -> Result:
        return CliRunner().invoke(app, [*command, "--lambda", "1e-4"])

    grown = run("grow", str(done.folder), "--data", data, "--force", "--out", str(tmp_path / "grown"))
    assert grown.exit_code == 0, grown.output
    small = run("compress", str(tmp_path / "grown"), "--data", data, "--out", str(tmp_path / "small"))
    assert small.exit_code == 0, small.output
    for folder in ("grown", "small"):  # of the folder itself, not of the fit that it came from
        assert (tmp_path / folder / "report.html").is_file(), grown.output + small.output
    without = CliRunner().invoke(app, ["compress", str(tmp_path / "grown"), "--out", str(tmp_path / "other")])
    assert isinstance(without.exception, SettingError) and "give `data`" in str(without.exception)


def _loss(result) -> float:
    return result.data["linearity"]["train_linear_loss"]


def test_an_image_adapter_of_another_tool(parts, tmp_path):
    """No task.json: the base model's architecture tells."""
    torch.manual_seed(0)
    labels = {0: "ant", 1: "bee"}
    network = ViTForImageClassification(vit_config(id2label=labels, label2id={"ant": 0, "bee": 1}))
    base = save_vit(tmp_path / "base", network)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(ViTForImageClassification.from_pretrained(base), config).save_pretrained(tmp_path / "run")
    run, rows = open_run(tmp_path / "run", pictures())
    assert run.task_type == "image" and rows.form == "labelled images"
    found = ranksure.certify(run.model, rows.batches, weight_decay=0.01)
    assert found.verdict == "not-converged" and found.n_samples == 12


def test_images_with_several_labels_are_refused_for_that(parts, tmp_path):
    torch.manual_seed(0)
    labels = {0: "ant", 1: "bee"}
    stated = {"id2label": labels, "label2id": {"ant": 0, "bee": 1}, "problem_type": "multi_label_classification"}
    base = save_vit(tmp_path / "base", ViTForImageClassification(vit_config(**stated)))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(ViTForImageClassification.from_pretrained(base), config).save_pretrained(tmp_path / "run")
    plan = {"task": "image", "samples": 8, "heldout": 0, "weight_decay": "20%", "ranks": [1], "linearised": True}
    for call in (
        lambda: open_run(tmp_path / "run", pictures()),
        lambda: ranksure.plan(base, pictures(), **plan),
        lambda: fit(base, pictures(), task="image", rank=1, out=tmp_path / "fit"),
    ):
        with pytest.raises(SettingError, match=r"2 labels or targets per row .*problem_type multi_label"):
            call()
    run, rows = open_run(tmp_path / "run", pictures(), DataSettings(loss="cross-entropy"))
    found = ranksure.certify(run.model, rows.batches, **rows.objective)
    with torch.no_grad():
        logits = torch.cat([run.model(pixel_values=batch["pixel_values"]).logits for batch in rows.batches])
    truth = torch.nn.functional.cross_entropy(logits.double(), torch.tensor([i % 2 for i in range(12)]))
    assert found.loss == pytest.approx(float(truth), rel=1e-5)
    assert ranksure.plan(base, pictures(), loss="cross-entropy", **plan).record.loss == "cross-entropy"
    with pytest.raises(SettingError, match=r"texts only|`loss` squared-error has no meaning"):
        open_run(tmp_path / "run", pictures(), DataSettings(loss="squared-error"))


def test_what_cannot_be_opened(parts, tmp_path):
    model, rows, options = parts["prompt"]
    settings = {"rank": 1, "lam": 1e-3, "max_steps": 1, "heldout": 0}
    done = fit(model, rows, out=tmp_path / "fit", layers_to_transform="last", **settings, **options)
    with pytest.raises(SettingError, match="trained for the task prompt, not image"):
        open_run(done.folder, rows, task="image")
    with pytest.raises(SettingError, match="packing"):
        open_run(done.folder, rows, DataSettings(packing=True))
    (done.folder / "task.json").write_text("{")
    with pytest.raises(AdapterError, match=r"task\.json cannot be read"):
        open_run(done.folder, rows)


def test_a_lost_head(parts, tmp_path):
    model = parts["image"][0]  # a checkpoint without a head
    torch.manual_seed(0)
    network = ViTForImageClassification.from_pretrained(model, num_labels=2)
    get_peft_model(network, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "run")
    with pytest.raises(ModelError, match=r"classifier is neither in .* nor saved"):
        open_run(tmp_path / "run", pictures(), task="image")
