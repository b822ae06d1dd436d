"""The factored objective and its training from their definitions, by autograd and torch's own optimisers."""

from __future__ import annotations

from typing import Any

import torch

from ranksure.factors import Factors
from ranksure.operators.dense import DenseOperator
from ranksure.perturbation import Perturbation
from ranksure.problem import Problem


def dense_loss(problem: Problem, factors: Factors) -> torch.Tensor:
    """The data loss from its definition, one sample gradient at a time, for autograd."""
    grads = DenseOperator.from_operator(problem.operator).jacobians()
    rows = sum((grads[name] * (u @ v.T)).sum((2, 3)) for name, (u, v) in factors.items())
    z = problem.base_logits + rows @ problem.contrasts.T
    return (problem.loss.value(z, problem.labels) * problem.weights).sum()


def dense_objective(
    problem: Problem, factors: Factors, decay: bool = True, perturbation: Perturbation | None = None
) -> torch.Tensor:
    """The factored objective from its definition, with ``<P, Q Q^T>`` written out."""
    value = dense_loss(problem, factors)
    for name, (u, v) in factors.items():
        if decay:
            value = value + problem.penalty[name] / 2 * (u.square().sum() + v.square().sum())
        if perturbation is not None:
            q = torch.cat([u, v])
            value = value + (perturbation.matrices[name] * (q @ q.T)).sum()
    return value


def run_torch(
    problem: Problem,
    start: Factors,
    optimiser: str,
    rate: float,
    steps: int,
    *,
    freeze_a: bool = False,
    decay: bool = True,
    perturbation: Perturbation | None = None,
) -> Factors:
    """The same training by torch's own optimiser on the definition."""
    x = {k: (u.clone().requires_grad_(), v.clone().requires_grad_(not freeze_a)) for k, (u, v) in start.items()}
    parameters = [t for pair in x.values() for t in pair if t.requires_grad]
    kind = {"gd": torch.optim.SGD, "adam": torch.optim.Adam}[optimiser]
    steps_of: Any = kind(parameters, lr=rate)
    for _ in range(steps):
        steps_of.zero_grad()
        dense_objective(problem, x, decay, perturbation).backward()
        steps_of.step()
    return {k: (u.detach(), v.detach()) for k, (u, v) in x.items()}
