"""Small networks under LoRA, and independent gradients of their mean loss, for the tests of runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ranksure.adapters.loaded import read_adapter
from ranksure.adapters.merging import merged
from ranksure.losses import get_loss
from ranksure.network.gradient import GradientPass, gradient_pass
from ranksure.network.targets import to_weight_shape
from ranksure.operators.dense import DenseOperator
from ranksure.problem import Problem
from ranksure.solvers.fixed_rank import solve_fixed_rank


class Linear(nn.Module):
    """A network that is linear in its one weight: its linearisation is itself."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.layer = nn.Linear(n, m, bias=False)

    def forward(self, x):
        return self.layer(x)


def linear_run(seed: int, rank: int, n: int = 12, inputs: int = 6, outputs: int = 4, scale: float = 2.0):
    """A linear classifier under LoRA in float64, its data, and the same problem for the certified solver."""
    torch.manual_seed(seed)
    net = Linear(inputs, outputs).double()
    x = torch.randn(n, inputs, dtype=torch.float64)  # before PEFT draws, so that every rank has the same problem
    y = torch.randint(outputs, (n,))
    config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=["layer"])
    model: Any = get_peft_model(net, config, autocast_adapter_dtype=False)
    batches = [{"x": x[:5], "labels": y[:5]}, {"x": x[5:], "labels": y[5:]}]
    loss = get_loss("cross-entropy")
    contrasts = loss.contrasts(outputs)
    jacobian = torch.einsum("kc,in->ickn", contrasts, x)
    base = x @ net.layer.base_layer.weight.detach().T
    problem = Problem(DenseOperator({"layer": jacobian}), base, y, loss, {"layer": 1.0})
    return model, batches, problem


def place(model, name: str, u, v) -> None:
    """Put the update ``u v^T`` into the adapter."""
    layer = dict(model.base_model.model.named_modules())[name]
    scale = layer.scaling["default"]
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
        layer.lora_A["default"].weight.zero_()
        layer.lora_B["default"].weight[:, : u.shape[1]] = u / math.sqrt(scale)
        layer.lora_A["default"].weight[: v.shape[1]] = v.T / math.sqrt(scale)


def largest_lambda(problem: Problem) -> float:
    from ranksure.certificate import lambda_max

    return lambda_max(problem)


def stuck_run():
    """A linear classifier whose best rank-1 point is well above the optimum: run, problem, that point, and the seed."""
    for seed in range(30):
        model, batches, problem = linear_run(seed, rank=1, n=10, inputs=8, outputs=6)
        problem = problem.with_penalty(0.05 * largest_lambda(problem))
        found = solve_fixed_rank(problem, {"layer": 1}, random_starts=4)
        if found.solution.certificate.relative_gap > 0.1 and found.stationary:
            return model, batches, problem, found.solution.factors["layer"], seed
    raise AssertionError("no stuck problem")


class Small(nn.Module):
    """A nonlinear network of two layers, one of them used twice."""

    def __init__(self, k: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 7)
        self.head = nn.Linear(7, k)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.second(h))
        h = torch.tanh(self.second(h)) + h
        return self.head(h.mean(1))


def small_run(rank=2, k=3, seed=0, dtype=torch.float64, **config):
    torch.manual_seed(seed)
    settings_ = {"r": rank, "lora_alpha": 3, "target_modules": ["first", "second"], **config}
    model = get_peft_model(Small(k).to(dtype), LoraConfig(**settings_), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(9, 4, 5, dtype=dtype)
    y = torch.randint(k, (9,))
    return model, [{"x": x[:4], "labels": y[:4]}, {"x": x[4:], "labels": y[4:]}], (x, y)


def gradients(model: nn.Module, batches: Iterable[Any], **options: Any) -> GradientPass:
    """The gradient pass of a certificate, over all adapted modules."""
    return gradient_pass(model, batches, read_adapter(model).modules, around=merged, **options)


def merged_copy(model: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The base network with ``W0 + delta`` in its adapted modules, each a weight of its own; and these weights.

    A weight that was tied to another module is tied no more: the adapter changes its own module's use only.
    """
    read = read_adapter(model)
    base: Any = copy.deepcopy(model)
    base = base.unload().to(dtype).eval()
    weights: dict[str, nn.Parameter] = {}
    for name, (u, v) in read.factors.items():
        layer = base.get_submodule(name)
        weights[name] = layer.weight = nn.Parameter(layer.weight.detach() + to_weight_shape(layer, u @ v.T).to(dtype))
    return base, weights


def reference(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Mean loss and its gradient in every adapted block, ``(m, n)``, by float64 autograd on a merged copy."""
    base, weights = merged_copy(model)
    value = loss(base)
    gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    out = {}
    for (name, weight), g in zip(weights.items(), gradients, strict=True):
        g = torch.zeros_like(weight) if g is None else g
        out[name] = g.T if isinstance(base.get_submodule(name), (Conv1D, nn.Embedding)) else g.flatten(1)
    return float(value.detach()), out


def randomise(model: nn.Module, std: float = 0.3, seed: int = 1) -> None:
    """Random adapter matrices, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterable[float]:
    """Relative error of every gradient, in the Frobenius norm."""
    assert found.keys() == expected.keys()
    return [float((found[name].double() - g).norm() / g.norm()) for name, g in expected.items()]
