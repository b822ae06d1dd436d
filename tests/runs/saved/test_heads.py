"""Heads by any name come back with their number of outputs; task types that PEFT cannot place say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from ranksure.adapters.export import export_adapter
from ranksure.adapters.saved import CONFIG, read_files
from ranksure.errors import AdapterError
from ranksure.network.targets import block_shape
from ranksure.runs.saved.base import saved_outputs, with_adapter
from ranksure.runs.saved.open import load_run
from ranksure.tasks.classifiers import head_name
from tests.families.agreement import tokenizer
from tests.families.networks import Family, build
from tests.refusals import refusal
from tests.runs.tiny_runs import shaken

HUB: dict[str, Any] = {"revision": None, "trust_remote_code": False}
OUTPUTS = 3  # what the base's own configuration says is 2
# By model type: the class, a target, and the modules that a user saves beside PEFT's own.
FAMILIES = {
    "xlnet": ("XLNetForSequenceClassification", "layer_1", ["logits_proj", "sequence_summary"]),
    "funnel": ("FunnelForSequenceClassification", "q_head", None),
    "bart": ("BartForSequenceClassification", "q_proj", ["classification_head"]),
    "xlm": ("XLMForSequenceClassification", "q_lin", ["sequence_summary"]),
    "distilbert": ("DistilBertForSequenceClassification", "q_lin", ["pre_classifier", "classifier"]),
    "gpt2": ("GPT2ForSequenceClassification", "c_attn", None),
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 3], [11, 10, 9, 8, 7, 6, 5, 3]])


def base(folder: Path, model_type: str, outputs: int = 2) -> Any:
    """The base network with its own head, saved; or loaded with another number of outputs."""
    cls: Any = getattr(transformers, FAMILIES[model_type][0])
    if not folder.exists():
        made = build(Family("text", model_type, FAMILIES[model_type][0])).float()
        config = type(made.config)(**{**made.config.to_dict(), "num_labels": 2, "pad_token_id": 0})
        cls(config).save_pretrained(folder)
        tokenizer(end=True).save_pretrained(folder)
    torch.manual_seed(1)
    return cls.from_pretrained(folder, num_labels=outputs, ignore_mismatched_sizes=True).eval()


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_a_head_by_its_own_name(tmp_path: Path, model_type: str, task_type: Any) -> None:
    _, target, saved = FAMILIES[model_type]
    base(tmp_path / "base", model_type)
    model = base(tmp_path / "base", model_type, OUTPUTS)
    if task_type is None:
        saved = saved or [head_name(model, OUTPUTS).partition(".")[0]]
    config = LoraConfig(r=2, target_modules=[target], modules_to_save=saved, task_type=task_type)
    adapted = shaken(get_peft_model(model, config)).eval()
    adapted.save_pretrained(tmp_path / "run")
    files = read_files(tmp_path / "run")
    assert saved_outputs(files, str(tmp_path / "base"), HUB) == OUTPUTS
    run = load_run(tmp_path / "run", base=tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(run.model(IDS).logits, adapted(IDS).logits) and adapted(IDS).logits.shape[1] == OUTPUTS
    assert run.task_type == "SEQ_CLS"


@pytest.mark.parametrize("model_type", ["xlnet", "funnel"])
def test_adapters_that_ranksure_wrote(tmp_path: Path, model_type: str) -> None:
    base(tmp_path / "base", model_type)
    model = base(tmp_path / "base", model_type, OUTPUTS)
    name = next(n for n, _ in model.named_modules() if n.endswith(FAMILIES[model_type][1]))
    m, n = block_shape(model.get_submodule(name))
    factors = {name: (0.1 * torch.randn(m, 1), torch.randn(n, 1))}
    head = [head_name(model, OUTPUTS).partition(".")[0]]
    export_adapter(model, factors, tmp_path / "run", head=head, base_model_name_or_path=str(tmp_path / "base"))
    run = load_run(tmp_path / "run")
    with torch.no_grad():
        expected = model(IDS).logits
        u, v = factors[name]
        model.get_submodule(name).weight += u @ v.T
        assert not torch.allclose(run.model(IDS).logits, expected, atol=1e-4)
        assert torch.allclose(run.model(IDS).logits, model(IDS).logits, atol=1e-5)


def test_nothing_saved_and_no_classifier_have_no_outputs(tmp_path: Path) -> None:
    model = base(tmp_path / "base", "gpt2")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"]))
    adapted.save_pretrained(tmp_path / "run")
    assert saved_outputs(read_files(tmp_path / "run"), str(tmp_path / "base"), HUB) is None
    vit = build(Family("image", "vit", "ViTForImageClassification"))
    vit.save_pretrained(tmp_path / "vit")
    config = LoraConfig(r=2, target_modules=["fc1", "dense"], modules_to_save=["classifier"])
    get_peft_model(vit, config).save_pretrained(tmp_path / "images")
    assert saved_outputs(read_files(tmp_path / "images"), str(tmp_path / "vit"), HUB) is None


@pytest.mark.parametrize(
    "family",
    [
        Family("text", "t5", "T5ForSequenceClassification"),
        Family("speech", "whisper", "WhisperForAudioClassification"),
        Family("text", "t5", "T5ForConditionalGeneration"),
    ],
)
def test_a_task_type_that_peft_cannot_place(tmp_path: Path, family: Family) -> None:
    model: Any = build(family)
    target = [name for name, _ in model.named_modules() if name.endswith((".q", ".q_proj"))][:1]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=target))
    adapted.save_pretrained(tmp_path)
    adapted.unload()
    whole = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**whole, "task_type": "SEQ_2_SEQ_LM"}))
    files = read_files(tmp_path)
    try:
        get_peft_model(build(family), LoraConfig(r=2, target_modules=target, task_type="SEQ_2_SEQ_LM"))
    except AttributeError as error:
        words = [f"peft {peft.__version__}", f"transformers {transformers.__version__}", str(error)[:40]]
        refusal(AdapterError, [*words, "remove task_type from"], with_adapter, model, files, "base", False)
        (tmp_path / CONFIG).write_text(json.dumps(whole))
    with_adapter(build(family), read_files(tmp_path), "base", False)
    (tmp_path / CONFIG).write_text(json.dumps({**whole, "task_type": "SEQ_2_SEQ_LM"}))
    model.save_pretrained(tmp_path / "base")
    refusal(AdapterError, ["SEQ_2_SEQ_LM", "without task_type"], load_run, tmp_path, base=tmp_path / "base")
