"""Mini-batches of a linearised problem, each an ordinary problem on some of the samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ranksure.errors import SettingError
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator
from ranksure.problem import Problem


def mini_batches(problem: Problem, batch_size: int | None, seed: int) -> Iterator[Problem]:
    """The problem itself for ever, or the problems of its mini-batches in a new random order in every epoch.

    The samples are partitioned once, at random. The weights of a batch are scaled by the number of batches, so the
    loss of a random batch is unbiased for any sizes and weights.

    Args:
        problem: the problem.
        batch_size: samples of a mini-batch (the last may be smaller); None, or at least ``N``, for all.
        seed: seed of the partition and of the orders.

    Raises:
        SettingError: mini-batches of an operator that is neither factored nor dense.
    """
    n = problem.operator.n_samples
    if batch_size is None or batch_size >= n:
        while True:
            yield problem
    generator = torch.Generator().manual_seed(seed + 1)
    parts = torch.randperm(n, generator=generator).split(batch_size)
    problems = [_subproblem(problem, part, len(parts)) for part in parts]
    while True:
        for index in torch.randperm(len(parts), generator=generator).tolist():
            yield problems[index]


def _subproblem(problem: Problem, samples: Tensor, scale: float) -> Problem:
    """The problem on some samples, their weights times ``scale``."""
    operator, samples = problem.operator, samples.to(problem.operator.device)
    if isinstance(operator, FactoredOperator):
        part = operator.select(samples)
    elif isinstance(operator, DenseOperator):
        part = DenseOperator({name: g[samples] for name, g in operator.jacobians.items()})
    else:
        raise SettingError(f"mini-batches need a factored or dense operator, not a {type(operator).__name__}")
    return replace(
        problem,
        operator=part,
        base_logits=problem.base_logits[samples],
        labels=problem.labels[samples],
        weights=problem.weights[samples] * scale,
    )
