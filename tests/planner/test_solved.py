"""A plan whose update cannot be written is not lost, and what could not be written is found out before the work."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import MixtralForSequenceClassification, Qwen3MoeConfig, Qwen3MoeForCausalLM

import ranksure
from ranksure.errors import AdapterError
from ranksure.planner import result as results
from ranksure.planner import run
from ranksure.planner.solved import read_solved
from ranksure.runs.fitting.plan_folder import read_plan
from tests.commands import call
from tests.data.test_conversations import byte_tokenizer
from tests.planner.test_plan import QUICK
from tests.runs.tiny_runs import save_mixtral
from tests.tiny_text import frame, save_bert, save_csv

ASKED = ["--target-modules", "query,value", "--layers-to-transform", "last", "--samples", "16", "--ranks", "1"]
ASKED += ["--linearised", "--weight-decay", "10%", "--random-starts", "0", "--heldout", "12"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    return save_bert(root / "bert"), str(save_csv(root / "data.csv", 60))


def fail(*_args, **_more):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_a_solved_plan_outlives_its_export(inputs, tmp_path, monkeypatch, capsys, pooling):
    model, data = inputs
    out = tmp_path / "out"
    command = ["plan", "--model", model, "--data", data, *ASKED, "--pooling", pooling, "--out", str(out)]
    with monkeypatch.context() as patch:
        for name in ("export_adapter", "export_mean_pooled"):
            patch.setattr(results, name, fail)
        assert call(*command, monkeypatch=patch) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "the plan is solved and kept in" in told and "No space left" in told
    assert {path.name for path in out.iterdir()} >= {"plan.json", "solved.safetensors"}
    assert not (out / "adapter").exists()
    plan = json.loads((out / "plan.json").read_text())
    solved = load_file(out / "solved.safetensors")

    with pytest.raises(AdapterError, match="is solved, but its update is not written"):
        read_plan(out).factors()

    with monkeypatch.context() as patch:
        patch.setattr(run, "run_plan", fail)  # nothing is solved again
        assert call(*command, monkeypatch=patch) == 0
    assert not (out / "solved.safetensors").exists()
    again = json.loads((out / "plan.json").read_text())
    assert again["optimum"] == plan["optimum"] and again["recommended"] == plan["recommended"]
    stored = load_file(out / "adapter" / "adapter_model.safetensors")
    for name in plan["target_modules"]:
        if plan["optimum"]["ranks"][name]:
            a, b = (stored[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
            u, v = (solved[f"{side}.{name}"].double() for side in "uv")
            assert float((b @ a - u @ v.T).norm()) <= 4 * torch.finfo(torch.float32).eps * float(u.norm() * v.norm())
    head = (
        load_file(out / "adapter" / "head.safetensors")
        if pooling == "mean"
        else {
            key.removeprefix("base_model.model.classifier."): value
            for key, value in stored.items()
            if "classifier" in key
        }
    )
    for key in ("weight", "bias"):
        assert torch.equal(head[key], solved[f"new.0.{key}"].to(head[key])), key


def test_another_request_is_solved_anew(inputs, tmp_path, monkeypatch):
    model, data = inputs
    monkeypatch.setattr(results, "export_adapter", fail)
    result = ranksure.plan(model, data, **QUICK)
    with pytest.raises(AdapterError, match="kept in"):
        result.save(tmp_path / "out")
    assert read_solved(tmp_path / "out", result._prepared) is not None
    other = ranksure.plan(model, data, **{**QUICK, "seed": 1})
    assert read_solved(tmp_path / "out", other._prepared) is None
    assert read_solved(tmp_path / "nothing", result._prepared) is None


def test_a_mixture_is_planned_and_written(tmp_path):
    base = save_mixtral(tmp_path / "base")
    small = {**QUICK, "target_modules": ["q_proj", "v_proj"]}
    result = ranksure.plan(base, frame(60), **small)
    names = {f"model.layers.1.self_attn.{leaf}" for leaf in ("q_proj", "v_proj")}
    assert set(result.record.target_modules) == names
    assert set(result.record.recommended.peft["target_modules"]) == names
    result.save(tmp_path / "out")
    network = MixtralForSequenceClassification.from_pretrained(base, num_labels=2)
    adapted = PeftModel.from_pretrained(network, tmp_path / "out" / "adapter").get_base_model()
    wrapped = {name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    assert wrapped == {name for name in names if result.record.optimum.ranks[name]}


def test_what_peft_cannot_hold_is_refused_before_the_work(tmp_path, monkeypatch):
    """The names of a dense layer of this mixture are those of the experts' parts."""
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1, "mlp_only_layers": [1]}
    config = Qwen3MoeConfig(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=8, **sizes, **experts)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(run, "linearise", fail)
    with pytest.raises(AdapterError, match="experts"):
        ranksure.plan(str(tmp_path), frame(60), **{**QUICK, "target_modules": ["model.layers.1.mlp.up_proj"]})
