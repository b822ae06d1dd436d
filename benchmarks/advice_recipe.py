"""The common recipe, for people who do not care for lambda: AdamW at r = 8, on the rows of ``benchmarks.advice``."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.advice_training import Bench, trained
from benchmarks.advice_whole import Whole, in_model
from ranksure.adapters.config import lora_config
from ranksure.data.samples import Samples
from ranksure.network.logits import logits_of, unlabelled

RANK, ALPHA = 8, 16
RATES = (1e-4, 3e-4, 1e-3)
EPOCHS = (3, 10, 30)
"""Ends of training that are compared; one run at a constant rate passes them all."""
ROWS = 8
"""Rows per step."""


def common_recipe(bench: Bench, select: Samples) -> dict[str, Any]:
    """PEFT's LoRA with its defaults, AdamW with torch's; rate and epochs by the loss on the rows that choose lambda.

    The network is in evaluation mode, as for the other methods, and its head is the same. Batches keep their rows (of
    like length) and come in a new order each epoch.
    """
    began = time.process_time()
    task, targets = bench.task, in_model(bench.task, bench.shapes)
    train = Whole(task, targets, bench.rows, size=ROWS)
    judge = Whole(task, targets, select, beside=train)
    report = Whole(task, targets, bench.report_rows, beside=train)
    ranks = {name: min(RANK, *shape) for name, shape in bench.shapes.items()}
    ends: list[dict[str, Any]] = []
    for rate in RATES:
        config = lora_config(ranks, model=task.adapted)
        config.lora_alpha = config.r * ALPHA // RANK
        config.alpha_pattern = {}
        with bench.adapted(config, bench.seed) as model:
            optimizer = torch.optim.AdamW(trained(model), lr=rate)
            generator = torch.Generator().manual_seed(bench.seed)
            with train.cached():
                for epoch in range(1, max(EPOCHS) + 1):
                    _epoch(train, optimizer, torch.randperm(len(train.batches), generator=generator))
                    if epoch in EPOCHS:
                        chosen = float(cross_entropy(judge.all_logits(), judge.labels()))
                        ends.append({"rate": rate, "epochs": epoch, "select": chosen, **_figures(report)})
    best = min(ends, key=lambda end: end["select"])
    return {
        **best,
        "parameters": bench.parameters(ranks),
        "seconds": time.process_time() - began,
        "ends": [{key: value for key, value in end.items() if key != "losses"} for end in ends],
    }


def _epoch(train: Whole, optimizer: torch.optim.Optimizer, order: Tensor) -> None:
    assert train.prefix is not None
    for index in order.tolist():
        batch = train.prefix.batches[index]
        optimizer.zero_grad()
        cross_entropy(logits_of(train.task.model, unlabelled(batch)), batch["labels"]).backward()
        optimizer.step()


def _figures(report: Whole) -> dict[str, Any]:
    logits, labels = report.all_logits(), report.labels()
    losses = cross_entropy(logits, labels, reduction="none")
    accuracy = float((logits.argmax(1) == labels).double().mean())
    return {"loss": float(losses.mean()), "losses": [round(x, 6) for x in losses.tolist()], "accuracy": accuracy}
