"""The network's plan for every task and loss: the objective found again with the update added to the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import ranksure
from ranksure.network.logits import predict
from tests.helpers import rounding
from tests.runs.saved.test_open import pictures, save_llama, save_vit, save_whisper, tones
from tests.tasks.prompt_parts import SENTENCES, rows_of
from tests.tiny_text import frame, save_bert

KINDS = ["mean", "prompt", "image", "speech", "logistic", "squared-error", "bfloat16"]


def parts(kind: str, root) -> tuple[str, Any, dict[str, Any]]:
    if kind == "prompt":
        words = {"template": "{text} Sentiment:", "verbalizers": "negative=terrible,positive=great"}
        return (
            save_llama(root),
            rows_of([*SENTENCES, *[(text[::-1], label) for text, label in SENTENCES]]),
            {"task": kind, "target_modules": ["v_proj"], **words},
        )
    if kind == "image":
        return save_vit(root), pictures(), {"task": kind, "target_modules": ["v_proj"]}
    if kind == "speech":
        return save_whisper(root), tones(), {"task": kind, "max_seconds": 1.0, "target_modules": ["v_proj"]}
    data, options = frame(40), {"target_modules": ["value"]}
    if kind == "squared-error":
        data["label"] = [0.1 * len(text) + 0.01 * i for i, text in enumerate(data["text"])]
    return save_bert(root), data, options | ({"loss": kind} if kind in ("logistic", "squared-error") else {})


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_that_of_edited_weights(kind, tmp_path):
    model, rows, options = parts(kind, tmp_path)
    more = {"pooling": "mean"} if kind == "mean" else {"dtype": "bfloat16"} if kind == "bfloat16" else {}
    samples = 36 if kind == "squared-error" else 8  # more than the head has weights
    common = {"samples": samples, "heldout": 0, "weight_decay": "50%", "ranks": [1], "layers_to_transform": "last"}
    result = ranksure.plan(model, rows, random_starts=0, **common, **options, **more)
    found, prepared = result.record.network, result._prepared
    assert found is not None, result.record.notes
    task, train = prepared.task, prepared.split.train
    near = 4e3 * rounding(task.model)
    assert found.optimum.objective_at_zero == pytest.approx(result.record.optimum.objective_at_zero, rel=near)
    assert found.optimum.objective <= found.optimum.objective_at_zero
    penalty = 0.0
    with torch.no_grad():
        for name, module in prepared.targets.items():
            u, v = result.factors[name]
            module.weight += (u @ v.T).to(module.weight)
            penalty += found.weight_decay * float(torch.linalg.svdvals(u @ v.T).sum())
    batches, back = task.batches_by_length(train)
    logits, labels = predict(task.model, batches).double()[back], task.labels(train)
    losses = {"squared-error": F.mse_loss, "logistic": F.binary_cross_entropy_with_logits}
    loss = float(losses.get(prepared.loss.name, F.cross_entropy)(logits, labels))
    assert loss + penalty == pytest.approx(found.optimum.objective, rel=near)
