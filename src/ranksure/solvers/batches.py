"""Mini-batches of a linearised problem, each an ordinary problem on some of the samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ranksure.problem import Problem


def mini_batches(problem: Problem, batch_size: int | None, seed: int) -> Iterator[Problem]:
    """The problem itself for ever, or the problems of its mini-batches in a new random order in every epoch.

    The samples are partitioned once, at random. The weights of a batch are scaled by the number of batches, so the
    loss of a random batch is unbiased for any sizes and weights.

    ``batch_size`` is that of all but the last, which may be smaller; None, or at least ``N``, takes all samples.

    Raises:
        SettingError: mini-batches of an operator that holds no gradients.
    """
    n = problem.operator.n_samples
    if batch_size is None or batch_size >= n:
        while True:
            yield problem
    generator = torch.Generator().manual_seed(seed + 1)
    parts = torch.randperm(n, generator=generator).split(batch_size)
    problems = [problem.subset(part, problem.weights[part] * len(parts)) for part in parts]
    while True:
        for index in torch.randperm(len(parts), generator=generator).tolist():
            yield problems[index]
