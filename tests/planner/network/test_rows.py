"""Held-out rows beside the objective: frozen layers run once for both, and neither takes the other's states."""

from __future__ import annotations

import math

import pytest
import torch

from ranksure.network.logits import predict
from ranksure.network.side_path import applied
from ranksure.planner.network.rows import held_out_rows, labelled
from ranksure.solvers.network import network_objective


@pytest.mark.parametrize("memory", [math.inf, 64])
def test_rows_beside_the_objective_are_measured_as_by_the_plain_network(answer, memory):
    prepared, factors = answer._prepared, answer.factors
    task, split, targets = prepared.task, prepared.split, prepared.targets

    def plain(rows, update) -> torch.Tensor:
        batches, back = task.batches_by_length(rows)
        with applied(targets, update):
            return predict(task.model, batches).double()[back]

    updates = ({}, factors)
    expected = [[plain(rows, update) for update in updates] for rows in (split.report, split.train)]
    batches, back = labelled(task, split.train)
    assert torch.equal(torch.cat([batch["labels"] for batch in batches])[back], task.labels(split.train))
    with (
        held_out_rows(task, targets, split.report, prepared.loss, memory) as held,
        held_out_rows(task, targets, None, prepared.loss, memory) as nothing,
        network_objective(task.model, batches, targets, memory_bytes=memory) as objective,
    ):
        assert nothing is None and held is not None and len(held) == len(split.report)
        held.beside = objective.whole
        for _ in range(2):
            for update, logits, trained in zip(updates, *expected, strict=True):
                losses, share = held.measured(update)
                assert torch.allclose(losses, prepared.loss.value(logits, held.labels), rtol=1e-5, atol=1e-6)
                assert share == pytest.approx(float((logits.argmax(1) == held.labels).double().mean()))
                loss = float(prepared.loss.value(trained, task.labels(split.train)).mean())
                assert objective.loss(update) == pytest.approx(loss, rel=1e-5)
    for rows, each in zip((split.report, split.train), expected, strict=True):
        assert torch.equal(plain(rows, {}), each[0])  # the network is as it was
