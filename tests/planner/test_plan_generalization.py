"""The generalisation bound of a plan: its norms from a network of one's own, its reasons, its line."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from rich.console import Console
from transformers import AutoTokenizer

import ranksure
from ranksure.planner.render import show
from ranksure.planner.result import PlanResult, generalization_record
from ranksure.theory.generalization import FORMS, NOT_LIPSCHITZ, ROWS_NORM, generalization_bound
from tests.helpers import random_problem
from tests.tiny_text import frame, loaded


def text_of(result: PlanResult) -> str:
    console = Console(file=io.StringIO(), width=300)
    show(result, console)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def gradient_norms(result: PlanResult, path: str) -> torch.Tensor:
    """``sum_j ||G_ijc||_F^2`` of every training row and contrast, ``(N, C)``, by autograd on a model of one's own."""
    task, rows = result._prepared.task, result._prepared.split.train
    k = result.data["n_outputs"]
    model = loaded(path, k).double()
    with torch.no_grad():
        for part in ("weight", "bias"):
            model.get_parameter(f"classifier.{part}").copy_(task.model.get_parameter(f"{task.head}.{part}"))
    batch = AutoTokenizer.from_pretrained(path)(rows.texts, padding=True, return_tensors="pt")
    values = model(**batch).logits @ ranksure.get_loss(result.data["loss"]).contrasts(k)
    weights = [model.get_parameter(f"{name}.weight") for name in result.data["target_modules"]]
    squares = [
        sum(float(g.square().sum()) for g in torch.autograd.grad(value, weights, retain_graph=True))
        for value in values.flatten()
    ]
    return torch.tensor(squares, dtype=torch.float64).view_as(values)


def test_norms_are_those_of_the_network(answer, bert):
    bound = answer.data["generalization"]
    squares = gradient_norms(answer, bert)
    assert bound["norm"] == pytest.approx(math.sqrt(float(squares.max())), rel=1e-3)
    assert bound["total_norm"] == pytest.approx(math.sqrt(float(squares.sum(1).max())), rel=1e-3)
    assert (bound["n_samples"], bound["n_outputs"], bound["n_contrasts"]) == (40, 3, 2)
    assert bound["lipschitz"] == pytest.approx(math.sqrt(2))
    kappa = 2 * math.sqrt(2) * bound["norm"] * (2 + math.sqrt(math.log(20))) / math.sqrt(40)
    assert bound["prescribed_weight_decay"] == pytest.approx(2 * kappa)
    assert 0 < bound["rademacher"] < bound["rademacher_upper"] <= bound["total_norm"] / math.sqrt(40)


@pytest.mark.parametrize("name", ["answer", "auto"])
def test_beside_the_lambda_that_was_used(name, request):
    data = request.getfixturevalue(name).data
    bound = data["generalization"]
    assert bound["prescribed_over_used"] * data["weight_decay"] == pytest.approx(bound["prescribed_weight_decay"])
    assert bound["prescribed_over_lambda_max"] * data["lambda_max"] == pytest.approx(bound["prescribed_weight_decay"])
    assert bound["heuristic"] == [ROWS_NORM, "the head was fitted on these rows", "the rows were drawn by class"]
    assert all(bound[form]["kappa"] > 0 for form in FORMS)
    assert data["seconds"]["generalization"] >= 0
    json.dumps(bound)


def test_the_line(answer):
    bound = answer.data["generalization"]
    line = next(line for line in text_of(answer).splitlines() if "Theorem 5.1" in line)
    assert f"set lambda to {bound['prescribed_weight_decay']:.4g} (heuristic: R is the largest" in line
    assert f"{bound['prescribed_over_used']:.3g} times what was used" in line
    assert ("no adapter is trained" in line) == (bound["prescribed_over_lambda_max"] >= 1)
    sure = replace(answer.record.generalization, heuristic=[], prescribed_over_lambda_max=0.5)
    record = replace(answer.record, generalization=sure)
    line = next(
        line
        for line in text_of(PlanResult(record, answer.factors, answer._prepared)).splitlines()
        if "Theorem 5.1" in line
    )
    assert "heuristic" not in line and "no adapter" not in line


def test_regression_is_heuristic_for_its_loss(bert):
    data = frame(40)
    data["label"] = [0.1 * len(text) for text in data["text"]]
    settings: dict[str, Any] = {"target_modules": ["query"], "layers_to_transform": "last", "samples": 8, "ranks": [1]}
    result = ranksure.plan(
        bert, data, loss="squared-error", weight_decay="50%", random_starts=0, linearised=True, **settings
    )
    assert result.data["generalization"]["heuristic"][:2] == [ROWS_NORM, NOT_LIPSCHITZ]
    assert "the rows were drawn by class" not in result.data["generalization"]["heuristic"]


def test_no_gradient_no_ratio():
    bound = generalization_bound(random_problem(seed=0), draws=2)
    assert generalization_record(bound, 0.1, 0.0).prescribed_over_lambda_max is None
