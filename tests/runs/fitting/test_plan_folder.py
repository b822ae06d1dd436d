"""The plan's head in a model for a Trainer of one's own: the planned problem, not another one."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import ranksure
from ranksure.errors import AdapterError, RanksureError
from ranksure.planner.result import PlanResult
from ranksure.records.plan import PathStep
from tests.runs.tiny_fits import make_tiny
from tests.tiny_text import save_bert, save_bert_classifier, save_csv

KEY = "base_model.model.classifier.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("planned-head"))


def test_the_network_starts_where_the_plan_does(tiny):
    planned = load_file(tiny / "plan2" / "adapter" / "adapter_model.safetensors")
    torch.manual_seed(3)  # another random head
    base = AutoModelForSequenceClassification.from_pretrained(tiny / "bert", num_labels=2)
    scope: dict = {}
    exec((tiny / "plan2" / "lora_config.py").read_text(), scope)
    model = get_peft_model(base, scope["lora_config"])
    before = model.get_base_model().classifier.weight.detach().clone()
    assert ranksure.install_planned_head(model, tiny / "plan2") == ["classifier"]
    after = model.get_base_model().classifier.weight
    assert torch.equal(after, planned[KEY]) and not torch.equal(after, before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_a_model_without_an_adapter(tiny):
    base = AutoModelForSequenceClassification.from_pretrained(tiny / "bert", num_labels=2)
    assert ranksure.install_planned_head(base, tiny / "plan2") == ["classifier"]
    planned = load_file(tiny / "plan2" / "adapter" / "adapter_model.safetensors")
    assert torch.equal(base.classifier.weight, planned[KEY])


def test_what_has_no_such_head(tiny, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(tiny / "bert", num_labels=2)
    with pytest.raises(AdapterError, match=r"averaged states.*head\.safetensors"):
        ranksure.install_planned_head(base, tiny / "mean")
    other = AutoModelForSequenceClassification.from_pretrained(tiny / "bert", num_labels=3)
    with pytest.raises(AdapterError, match=r"classifier\.\w+ of the plan .* does not fit"):
        ranksure.install_planned_head(other, tiny / "plan2")
    path = save_bert_classifier(tmp_path / "trained", ["bad", "good"])
    common = {
        "samples": 24,
        "heldout": 0,
        "layers_to_transform": "last",
        "ranks": [1],
        "weight_decay": "30%",
        "linearised": True,
    }
    ranksure.plan(path, save_csv(tmp_path / "two.csv", 30), **common).save(tmp_path / "plan")
    trained = AutoModelForSequenceClassification.from_pretrained(path)
    assert ranksure.install_planned_head(trained, tmp_path / "plan") == []


def test_the_end_of_the_path_and_a_far_network_are_told(tmp_path):
    result = ranksure.plan(
        save_bert(tmp_path / "bert"),
        save_csv(tmp_path / "two.csv", 60),
        samples=16,
        heldout=0,
        weight_decay="30%",
        ranks=[1],
        layers_to_transform="last",
        linearised=True,
    )
    result.record.linearity = near = replace(result.record.linearity, train=0.1, heldout=None)
    assert result.sentences()[0].startswith("Rank ") and not any("path" in text for text in result.warnings)
    points = ((0.5, 0.6), (0.1, 0.4), (0.05, 0.3))
    path = [PathStep(weight_decay=lam, selection_loss=loss, ranks={}) for lam, loss in points]
    told = PlanResult(replace(result.record, path=path, weight_decay=0.05), result.factors, result._prepared)
    assert any("still fell at the end of the path" in text for text in told.warnings)
    path[-1] = replace(path[-1], selection_loss=0.5)
    assert not any("still fell" in text for text in told.warnings)
    record = replace(result.record, linearity=replace(near, train=0.9))
    far = PlanResult(record, result.factors, result._prepared)
    assert "linearised network, which is far from the real one here, rank" in far.sentences()[0]


MODULE = "bert.encoder.layer.1.attention.self.query"
RUBBISH: dict[str, tuple[Any, str]] = {
    "a number for a path": ({"model": 5}, "model: expected `str`"),
    "a string for a pattern": ({"recommended": {"rank_pattern": "query"}}, "rank_pattern"),
    "a negative rank": ({"recommended": {"rank_pattern": {MODULE: -1}}}, "rank_pattern"),
    "an enormous rank": ({"recommended": {"rank_pattern": {MODULE: 10**12}}}, f"rank {10**12} of {MODULE}"),
    "no number for lambda": ({"weight_decay": None}, "weight_decay"),
    "a number beyond all": ('{"schema": 2, "weight_decay": 1e999}', "damaged"),
    "NaN": ('{"schema": 2, "weight_decay": NaN}', "damaged"),
    "a number among names": ({"target_modules": [3]}, "target_modules"),
    "a name of no module": ({"settings": {"target_modules": ["nothing.there"]}}, "nothing.there"),
    "a number for a column": ({"settings": {"text_column": 7}}, "settings.text_column"),
    "a list for options": ({"settings": []}, "settings"),
    "a number for offsets": ({"task": {"offsets": 5}}, "task.offsets"),
    "an unknown loss": ({"loss": "hinge"}, "hinge"),
    "too many rows": ({"n_samples": 10**9}, f"{10**9}"),
    "brackets": ("[" * 100_000, "damaged"),
    "no JSON": ("\0", "damaged"),
    "another form": ("[]", "no schema"),
}


def merged(content: Any, change: Any) -> Any:
    if isinstance(content, dict) and isinstance(change, dict):
        return content | {key: merged(content.get(key), value) for key, value in change.items()}
    return change


@pytest.mark.parametrize("kind", RUBBISH)
def test_rubbish_in_a_plan_is_one_line(tiny, tmp_path, kind):
    change, said = RUBBISH[kind]
    shutil.copytree(tiny / "plan2", tmp_path / "plan")
    path = tmp_path / "plan" / "plan.json"
    path.write_text(change if isinstance(change, str) else json.dumps(merged(json.loads(path.read_text()), change)))
    with pytest.raises(RanksureError) as caught:
        ranksure.fit(data=str(tiny / "two.csv"), out=tmp_path / "fit", plan=tmp_path / "plan", max_steps=1)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan"]
