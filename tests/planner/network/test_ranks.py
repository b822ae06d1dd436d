"""Rows of the network's table against certify on a run of PEFT's, and what a search may take."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model

import ranksure
from ranksure.planner.network.pieces import Pieces, Reached
from ranksure.planner.network.ranks import NetworkTable
from ranksure.planner.network.rows import labelled
from ranksure.planner.network.search import smallest_pattern, smallest_uniform
from ranksure.planner.network.stage import MOST_GRADIENTS, Budget, Stage
from ranksure.solvers.network import network_objective


@contextmanager
def table_of(answer, share: float, passes: float = math.inf):
    """The table of the session's network at a share of lambda_max, and the batches."""
    prepared, lam = answer._prepared, share * answer.record.network.lambda_max
    batches, _ = labelled(prepared.task, prepared.split.train)
    with network_objective(prepared.task.model, batches, prepared.targets, weight_decay=lam) as objective:
        stage = Stage(objective, Budget(passes, math.inf, 1.0), Pieces(None, {}), 0.01)
        yield NetworkTable(stage, stage.solved("solution", None, 0.01, MOST_GRADIENTS, "solving")), batches, lam


def run_of(answer, row: Reached):
    """A PEFT run of rank 1 with a row's factors."""
    names = list(answer._prepared.targets)
    model = get_peft_model(
        copy.deepcopy(answer._prepared.task.model), LoraConfig(r=1, lora_alpha=1, target_modules=names)
    )
    for name in names:
        layer = model.get_base_model().get_submodule(name)
        u, v = row.factors[name]
        assert u.shape[1] <= 1
        with torch.no_grad():
            layer.lora_B["default"].weight.copy_(torch.nn.functional.pad(u, (0, 1 - u.shape[1])))
            layer.lora_A["default"].weight.copy_(torch.nn.functional.pad(v, (0, 1 - v.shape[1])).T)
    return model.eval()


@pytest.mark.parametrize("share", [0.4, 0.2])
def test_a_rows_verdict_is_certifys(answer, share):
    """Of a run of PEFT's at the row's rank, the same gain counting as none."""
    with table_of(answer, share) as (table, batches, lam):
        row = table.row(1)
        allowed = table.allowed
        assert row is table.solution or row.gradients <= 40
        assert row.objective == pytest.approx(
            row.loss + lam * sum(float(torch.linalg.svdvals(u @ v.T).sum()) for u, v in row.factors.values()), rel=1e-9
        )
    found = ranksure.certify(run_of(answer, row), batches, lam=lam, tolerance=allowed / row.objective)
    assert found.objective == pytest.approx(row.objective, rel=1e-5)
    assert found.verdict == row.verdict


def test_a_search_keeps_to_the_share_and_to_its_budget(answer):
    with table_of(answer, 0.3) as (table, _, _):
        uniform = smallest_uniform(table, 0.9)
        pattern, point = smallest_pattern(table, 0.9, uniform)
        assert table.captured(table.row(uniform).objective) >= 0.9
        assert uniform == 1 or table.captured(table.row(uniform - 1).objective) < 0.9
        assert table.captured(point.objective) >= 0.9
        assert table.parameters(pattern) <= table.parameters(table.clipped(uniform))
        assert all(u.shape[1] <= pattern[name] for name, (u, _) in point.factors.items())
    with table_of(answer, 0.3, passes=10) as (table, _, _):
        spent = table.stage.gradients
        uniform = smallest_uniform(table, 0.9)
        pattern, point = smallest_pattern(table, 0.9, uniform)
        assert table.stage.gradients == spent and table.stage.budget.stopped
        assert uniform == table.largest and pattern == table.solution.ranks and point is table.solution
