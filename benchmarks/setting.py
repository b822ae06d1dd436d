"""The one real setting of every row: all-MiniLM-L6-v2, Rotten Tomatoes, a fitted head, two labels."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ranksure.bundled.minilm import minilm_path
from ranksure.bundled.rotten_tomatoes import rotten_tomatoes
from ranksure.capture import capture
from ranksure.certificate import lambda_max
from ranksure.losses import CrossEntropy
from ranksure.network.targets import select_targets
from ranksure.operators.factored import FactoredOperator
from ranksure.problem import Problem, uniform_penalty
from ranksure.tasks.head import fit_head, head_features, install_head

N_OUTPUTS = 2
BATCH_SIZE = 16
MAX_LENGTH = 128
SHARE = 0.1  # lambda of the solver rows, as a share of lambda_max

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """Model, batches and labels of ``n`` texts."""

    model: nn.Module
    batches: list[Batch]
    labels: Tensor

    def targets(self, layers: str, names: tuple[str, ...] = ("query", "value")) -> dict[str, nn.Module]:
        return select_targets(self.model, names, layers)


@functools.lru_cache(maxsize=1)
def _model_and_tokenizer() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    path = minilm_path()
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=N_OUTPUTS)
    return model.eval(), AutoTokenizer.from_pretrained(path)


@functools.lru_cache(maxsize=4)
def setting(n: int, fitted: bool = True) -> Setting:
    """The first ``n`` shuffled rows; the head is fitted on them, unless only the cost matters."""
    model, tokenizer = _model_and_tokenizer()
    rows = rotten_tomatoes().shuffled(0)
    # By length, so that batches hold little padding: the order of the samples changes no objective.
    order = sorted(range(n), key=lambda index: len(tokenizer(rows.texts[index])["input_ids"]))
    texts, labels = [rows.texts[index] for index in order], torch.tensor([rows.labels[index] for index in order])
    batches: list[Batch] = [
        dict(
            tokenizer(
                texts[low : low + BATCH_SIZE], padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
            )
        )
        for low in range(0, n, BATCH_SIZE)
    ]
    if fitted:
        features = head_features(model, "classifier", batches, N_OUTPUTS)
        install_head(model, "classifier", fit_head(features, labels, CrossEntropy(), N_OUTPUTS, bias=True))
    return Setting(model, batches, labels)


def contrasts() -> Tensor:
    return CrossEntropy().contrasts(N_OUTPUTS)


def captured_problem(
    n: int, layers: str = "last", names: tuple[str, ...] = ("query", "value"), fitted: bool = True
) -> Problem:
    """The linearised problem at ``lambda = SHARE * lambda_max``."""
    chosen = setting(n, fitted)
    captured = capture(chosen.model, chosen.batches, chosen.targets(layers, names), contrasts())
    return problem_of(captured.operator, captured.base_logits, chosen.labels)


def problem_of(operator: FactoredOperator, base_logits: Tensor, labels: Tensor) -> Problem:
    problem = Problem(operator, base_logits, labels, CrossEntropy(), uniform_penalty(operator, 1.0))
    return problem.with_penalty(SHARE * lambda_max(problem))
