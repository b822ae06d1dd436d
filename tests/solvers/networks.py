"""Tiny networks for the tests of the network's solver, and the same by plain autograd."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ranksure.factors import Factors
from ranksure.losses import get_loss
from ranksure.operators.dense import DenseOperator
from ranksure.problem import Problem
from ranksure.solvers.network_objective import NetworkObjective


class Affine(nn.Module):
    """Linear in both weights: its linearisation is itself."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, k), nn.Linear(5, k)

    def forward(self, x, z):
        return self.first(x) + self.second(z)


class Layered(nn.Module):
    """A small nonlinear network."""

    def __init__(self, k: int = 4) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, k)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(h)) + h)


def affine(loss: str, k: int, seed: int = 0):
    """The network, batches, targets and the same problem for the linearised solver, at lambda = 1."""
    torch.manual_seed(seed)
    net = Affine(k).double()
    x, z = torch.randn(14, 6, dtype=torch.float64), torch.randn(14, 5, dtype=torch.float64)
    y = {
        "cross-entropy": torch.randint(k, (14,)),
        "logistic": torch.randint(2, (14, k)).double(),
        "squared-error": torch.randn(14, k, dtype=torch.float64),
    }[loss]
    function = get_loss(loss)
    contrasts = function.contrasts(k)
    operator = DenseOperator(
        {"first": torch.einsum("kc,in->ickn", contrasts, x), "second": torch.einsum("kc,in->ickn", contrasts, z)}
    )
    base = net(x, z).detach()
    batches = [{"x": x[low:high], "z": z[low:high], "labels": y[low:high]} for low, high in ((0, 5), (5, 14))]
    problem = Problem(operator, base, y, function, {"first": 1.0, "second": 1.0})
    return net, batches, {"first": net.first, "second": net.second}, problem


def layered(seed: int = 0, dtype: torch.dtype = torch.float64):
    torch.manual_seed(seed)
    net = Layered().to(dtype)
    x, y = torch.randn(24, 6, dtype=dtype), torch.randint(4, (24,))
    batches = [{"x": x[:11], "labels": y[:11]}, {"x": x[11:], "labels": y[11:]}]
    return net, batches, {"first": net.first, "second": net.second}, (x, y)


def largest_lambda(net, batches, targets) -> float:
    objective = NetworkObjective(net, batches, targets, dict.fromkeys(targets, 1.0), "cross-entropy")
    return max(state.gradient_norm for state in objective.examine(objective.zero()).states.values())


def dense_gradients(net: nn.Module, factors: Factors, x, y) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients at ``W0 + u v^T`` by plain autograd."""
    weights = {f"{n}.weight": net.get_submodule(n).weight.detach() + u @ v.T for n, (u, v) in factors.items()}
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    loss = F.cross_entropy(torch.func.functional_call(net, leaves, (x,)), y)
    found = torch.autograd.grad(loss, list(leaves.values()))
    return float(loss.detach()), {name: g for name, g in zip(factors, found, strict=True)}
