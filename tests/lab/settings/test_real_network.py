"""The real network as an objective: values and gradients against plain torch, skipped layers against the whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.func import functional_call

from ranksure.lab.settings.parts import Parts
from ranksure.lab.settings.prepared import Prepared
from ranksure.lab.settings.real_network import RealNetwork, full_fine_tuning
from ranksure.lab.settings.training import Rule
from ranksure.progress import Silent
from tests.lab.tiny import tiny_setting


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("real")
    return Prepared(tiny_setting(folder, n=20), 0, Parts(folder / "parts"), Silent())


@pytest.fixture(scope="module")
def network(prepared) -> Iterator[RealNetwork]:
    with RealNetwork(prepared.task, prepared.targets, prepared.splits.train) as network:
        yield network


def some_factors(prepared, rank: int = 2):
    generator = torch.Generator().manual_seed(0)
    shapes = prepared.problem.operator.shapes
    return {n: tuple(0.2 * torch.randn(d, rank, generator=generator) for d in shape) for n, shape in shapes.items()}


def by_weights(prepared, factors) -> torch.Tensor:
    """Logits of the whole network with changed weights, differentiable."""
    weights = dict(prepared.task.model.named_parameters())
    changed = {f"{name}.weight": weights[f"{name}.weight"] + u @ v.T for name, (u, v) in factors.items()}
    (batch,) = prepared.task.batches(prepared.splits.train)
    return functional_call(prepared.task.model, {**weights, **changed}, kwargs=dict(batch)).logits


def test_the_layers_before_are_skipped_and_put_back(prepared):
    calls: list[int] = []
    first = prepared.task.model.get_submodule(next(iter(prepared.targets)).partition(".layer.")[0]).layer[0]
    inner = next(module for module in first.modules() if isinstance(module, nn.Linear))
    handle = inner.register_forward_hook(lambda *_: calls.append(1))
    whole = RealNetwork(prepared.task, prepared.targets, prepared.splits.train)
    expected = whole.logits({})
    with whole as network:
        calls.clear()
        assert torch.equal(network.logits({}), expected) and not calls
    assert torch.equal(whole.logits({}), expected) and calls
    handle.remove()


def test_logits_at_an_update(prepared, network):
    factors = some_factors(prepared)
    assert torch.allclose(network.logits(factors), by_weights(prepared, factors).double(), atol=1e-5)


def test_loss_and_gradient(prepared, network):
    factors = some_factors(prepared)
    x = {name: tuple(t.clone().requires_grad_() for t in pair) for name, pair in factors.items()}
    loss = nn.functional.cross_entropy(by_weights(prepared, x), torch.tensor(prepared.splits.train.labels))
    loss.backward()
    lam = 0.03
    value, gradient = network.lora_objective(lam)(factors)
    penalty = sum(lam / 2 * float(t.square().sum()) for pair in factors.values() for t in pair)
    assert value == pytest.approx(float(loss.detach()) + penalty, rel=1e-5)
    for name in factors:
        for found, tensor in zip(gradient[name], x[name], strict=True):
            assert torch.allclose(found, tensor.grad + lam * tensor.detach(), atol=1e-5)


def test_outside_its_context_the_whole_network_runs(prepared):
    whole = RealNetwork(prepared.task, prepared.targets, prepared.splits.train)
    factors = some_factors(prepared)
    assert torch.allclose(whole.logits(factors), by_weights(prepared, factors).double(), atol=1e-5)


def test_full_fine_tuning_ends_at_a_stationary_point(prepared, network):
    lam, shapes = 0.1 * prepared.lambda_max, prepared.problem.operator.shapes
    zero = {name: (torch.zeros(m, n), torch.eye(n)) for name, (m, n) in shapes.items()}
    base = network.loss_and_gradient(zero)[0]
    done = full_fine_tuning(network, shapes, lam, Rule(steps=600, window=150, tolerance=1e-6), step=1.0)
    assert done.value < base and done.curve[0] == (0, pytest.approx(base, rel=1e-5))
    # At a minimum of loss + lambda ||delta||_* the gradient's singular values are at most lambda, and lambda on delta.
    weights = {name: (u @ v.T).requires_grad_() for name, (u, v) in done.factors.items()}
    logits = by_weights(prepared, {name: (d, torch.eye(d.shape[1])) for name, d in weights.items()})
    loss = nn.functional.cross_entropy(logits, torch.tensor(prepared.splits.train.labels))
    loss.backward()
    moved = 0
    for delta in weights.values():
        assert float(torch.linalg.matrix_norm(delta.grad, 2)) <= lam * 1.03
        u, s, vt = torch.linalg.svd(delta.detach())
        for k in range(int((s > 1e-2 * s[0]).sum()) if float(s[0]) > 0 else 0):
            assert float(u[:, k] @ delta.grad @ vt[k]) == pytest.approx(-lam, rel=0.05)
            moved += 1
    assert moved
    nuclear = sum(float(torch.linalg.svdvals(d.detach()).sum()) for d in weights.values())
    assert done.value == pytest.approx(float(loss.detach()) + lam * nuclear, rel=1e-4)
