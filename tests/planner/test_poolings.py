"""The comparison of poolings is optional: a network that cannot be mean-pooled is planned all the same, and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoTokenizer

import ranksure
from ranksure.errors import ModelError
from ranksure.tasks.load import load_task
from tests.families.agreement import texts, tokenizer
from tests.families.networks import Family, build
from tests.refusals import refusal
from tests.tiny_text import frame

# What mean pooling cannot do with a network, or None where it can.
FAMILIES = {
    "t5": ("T5ForSequenceClassification", "T5Model cannot be run for mean pooling"),
    "bart": ("BartForSequenceClassification", None),
    "fnet": ("FNetForSequenceClassification", "mean pooling needs an attention mask"),
    "funnel": ("FunnelForSequenceClassification", "mean pooling needs a hidden state per token, but FunnelBaseModel"),
    "opt": ("OPTForSequenceClassification", None),
}


def save(folder: Path, model_type: str) -> str:
    """A classifier of three classes; data with two of them asks for a new head."""
    model: Any = build(Family("text", model_type, FAMILIES[model_type][0]))
    if model_type == "opt":
        model = type(model)(type(model.config)(**{**model.config.to_dict(), "word_embed_proj_dim": 12}))
    model.float().save_pretrained(folder)
    words = tokenizer(end=True)
    if model_type == "fnet":
        words.model_input_names = ["input_ids"]
    words.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_plan_is_made_whatever_becomes_of_the_comparison(tmp_path: Path, model_type: str) -> None:
    name, reason = save(tmp_path / "base", model_type), FAMILIES[model_type][1]
    data = _rows(40)
    leaf = {"fnet": "intermediate.dense", "t5": "q", "bart": "q_proj", "funnel": "q_head", "opt": "q_proj"}[model_type]
    settings = {
        "samples": 8,
        "heldout": 16,
        "weight_decay": "10%",
        "ranks": [1],
        "target_modules": [leaf],
        "linearised": True,
    }
    result = ranksure.plan(name, data, batch_size=1, layers_to_transform="last", **settings)
    compared = result.data["head"]["accuracy"]
    told = [note for note in result.data["notes"] if "pooling was not compared" in note]
    if reason is None:
        assert set(compared) == {"model", "mean"} and not told
        return
    assert set(compared) == {"model"} and len(told) == 1 and reason in told[0]
    asked = {"processor": AutoTokenizer.from_pretrained(name), "pooling": "mean"}
    refusal(ModelError, [reason], load_task, "text", name, texts(), **asked)
    if not result.is_zero:
        result.save(tmp_path / "plan")
        base = getattr(transformers, FAMILIES[model_type][0]).from_pretrained(
            name, num_labels=2, ignore_mismatched_sizes=True
        )
        assert isinstance(PeftModel.from_pretrained(base, str(tmp_path / "plan" / "adapter")), torch.nn.Module)


def _rows(count: int) -> Any:
    return frame(count)
