"""Rows of a run reach the network as they were trained: losses against PEFT's own forward pass, row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from ranksure.runs.certificate.certify import certify
from ranksure.runs.options import DataSettings
from ranksure.runs.saved.data import read_data
from tests.data.test_conversations import CHATML
from tests.helpers import rounding
from tests.runs.tiny_runs import language_model, save_llama
from tests.tiny_text import save_bert

TOOLS = [{"type": "function", "function": {"name": "good film", "parameters": {}}}]
TEMPLATE = "{% for tool in tools or [] %}the {{ tool['function']['name'] }} {% endfor %}" + CHATML


def test_chat_rows_with_tools(tmp_path: Path) -> None:
    """The case of a user whose rows have tools: the loss is the one with them."""
    base = save_llama(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    model = language_model(base, target_modules=["q_proj"])
    talk = [{"role": "user", "content": "is it good"}, {"role": "assistant", "content": "a very good film"}]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"messages": talk, "tools": t}) for t in (TOOLS, None)))
    found = certify(model, read_data((model, tokenizer), str(tmp_path / "t.jsonl"), DataSettings()).batches)
    losses = []
    for tools in (TOOLS, None):
        asked = tokenizer.apply_chat_template(talk[:1], tools=tools, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(asked)["input_ids"])
        ids = tokenizer(tokenizer.apply_chat_template(talk, tools=tools, tokenize=False), return_tensors="pt").input_ids
        with torch.no_grad():
            losses.append(
                F.cross_entropy(model(ids).logits[0, start - 1 : -1].double(), ids[0, start:], reduction="none")
            )
    assert len(losses[0]) == len(losses[1]) and abs(float(losses[0].mean() - losses[1].mean())) > 1e-3
    assert found.loss == pytest.approx(float(torch.cat(losses).mean()), rel=200 * rounding(model))


@pytest.mark.parametrize(
    ("names", "codes", "order"),
    [
        (["2116", "02116", "10001"], ["02116", "2116", "10001"], ["2116", "02116", "10001"]),
        (["1", "0", "2"], ["0.0", "1.0", "2.0"], ["1.0", "0.0", "2.0"]),  # as numbers, where no name is equal
        (["a", "A", "b"], ["A", "a", "b"], ["a", "A", "b"]),
        (["NaN", "Inf", "x"], ["nan", "inf", "x"], ["nan", "inf", "x"]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["0.0", "1.0", "2.0"], ["0.0", "1.0", "2.0"]),  # class numbers
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["2", "1", "1"], ["0", "1", "2"]),
        (["pos", "neg", "02"], ["02", "neg", "neg"], ["pos", "neg", "02"]),
    ],
)
def test_class_names_of_the_model_are_equal_exactly_first(
    names: list[str], codes: list[str], order: list[str], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_bert(tmp_path / "bert"))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BertConfig(vocab_size=len(tokenizer), id2label=dict(enumerate(names)), **sizes)
    rows = "".join(f"text {i},{code}\n" for i, code in enumerate(codes))
    (tmp_path / "d.csv").write_text("text,label\n" + rows)
    found = read_data((BertForSequenceClassification(config), tokenizer), str(tmp_path / "d.csv"))
    assert found.label_names == order
    assert [order[row["labels"]] for row in found.features] == codes
