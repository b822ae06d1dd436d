"""Small random problems of known shape, for the solvers' tests."""

from __future__ import annotations

import torch

from ranksure.certificate import lambda_max
from ranksure.losses import CrossEntropy, Logistic, Loss, SquaredError
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator, Group
from ranksure.problem import Problem, uniform_penalty

LOSSES: list[Loss] = [CrossEntropy(), Logistic(), SquaredError()]
SHAPES = {"first.query": (5, 4), "first.value": (6, 4), "second": (3, 7)}


def factored_operator(n: int = 9, contrasts: int = 2, seed: int = 0) -> FactoredOperator:
    """Two groups, ragged tokens (every sample has one to three), three blocks of unequal shapes."""
    g = torch.Generator().manual_seed(seed)
    groups = []
    for names in (["first.query", "first.value"], ["second"]):
        sample = torch.arange(n).repeat_interleave(torch.randint(1, 4, (n,), generator=g))
        width = SHAPES[names[0]][1]
        tokens = len(sample)
        outputs = {k: torch.randn(tokens, contrasts, SHAPES[k][0], generator=g, dtype=torch.float64) for k in names}
        inputs = torch.randn(tokens, width, generator=g, dtype=torch.float64)
        groups.append(Group(inputs, width, sample, outputs))
    return FactoredOperator(groups, n)


def small_problem(
    loss: Loss,
    *,
    share: float = 0.3,
    n: int = 9,
    k: int = 3,
    seed: int = 0,
    dense: bool = False,
    weighted: bool = False,
) -> Problem:
    """A problem with ``lambda = share * lambda_max`` in float64."""
    g = torch.Generator().manual_seed(seed + 1)
    factored = factored_operator(n, loss.effective_outputs(k), seed)
    operator = DenseOperator.from_operator(factored) if dense else factored
    base = 0.5 * torch.randn(n, k, generator=g, dtype=torch.float64)
    if isinstance(loss, CrossEntropy):
        labels = torch.randint(0, k, (n,), generator=g)
    elif isinstance(loss, Logistic):
        labels = torch.randint(0, 2, (n, k), generator=g).double()
    else:
        labels = torch.randn(n, k, generator=g, dtype=torch.float64)
    weights = torch.rand(n, generator=g, dtype=torch.float64) + 0.1 if weighted else torch.empty(0)
    if weighted:
        weights = weights / weights.sum()
    problem = Problem(operator, base, labels, loss, uniform_penalty(operator, 1.0), weights)
    return problem.with_penalty(share * lambda_max(problem))
