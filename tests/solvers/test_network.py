"""The network's solver against the linearised one, dense proximal mappings, and its own promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ranksure.certificate import lambda_max
from ranksure.errors import SettingError
from ranksure.factors import nuclear_norms
from ranksure.losses import get_loss
from ranksure.operators.dense import DenseOperator
from ranksure.problem import Problem
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.network import solve_network
from ranksure.solvers.network_objective import NetworkObjective
from tests.solvers.networks import affine, dense_gradients, largest_lambda, layered


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("loss", ["cross-entropy", "logistic", "squared-error"])
def test_on_a_network_linear_in_its_weights_it_is_the_linearised_solver(loss, k):
    net, batches, targets, problem = affine(loss, k)
    lam = {"first": 0.2 * lambda_max(problem), "second": 0.1 * lambda_max(problem)}
    expected = solve(problem.with_penalty(lam), tolerance=1e-9)
    found = solve_network(net, batches, targets, weight_decay=lam, loss=loss, tolerance=1e-7)
    assert found.status == "converged" and found.relative_gap <= 1e-7
    assert found.objective == pytest.approx(expected.certificate.objective, rel=1e-6)
    assert found.ranks == expected.ranks


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_the_end_is_stationary_for_the_full_nuclear_norm_problem(share):
    """``delta`` is a fixed point of the proximal map of the nuclear norm, computed densely."""
    net, batches, targets, (x, y) = layered()
    lam = share * largest_lambda(net, batches, targets)
    found = solve_network(net, batches, targets, weight_decay=lam, loss="cross-entropy", tolerance=1e-7)
    assert found.status == "converged"
    loss, gradients = dense_gradients(net, found.factors, x, y)
    assert found.loss == pytest.approx(loss, rel=1e-10)
    assert found.objective == pytest.approx(loss + lam * sum(nuclear_norms(found.factors).values()), rel=1e-10)
    for name, (u, v) in found.factors.items():
        p, s, qt = torch.linalg.svd(u @ v.T - gradients[name], full_matrices=False)
        proximal = (p * (s - lam).clamp(min=0)) @ qt
        assert float((proximal - u @ v.T).norm()) < 2e-3 * lam


def test_gradients_of_the_factors_are_those_of_autograd():
    net, batches, targets, (x, y) = layered()
    penalty = {"first": 0.3, "second": 0.7}
    objective = NetworkObjective(net, batches, targets, penalty, "cross-entropy")
    torch.manual_seed(1)
    factors = {
        n: (torch.randn(8, 2, dtype=torch.float64), torch.randn(m.in_features, 2, dtype=torch.float64))
        for n, m in targets.items()
    }
    value, found = objective.value_and_gradient(factors)
    loss, gradients = dense_gradients(net, factors, x, y)
    squares = {n: u.square().sum() + v.square().sum() for n, (u, v) in factors.items()}
    assert value == pytest.approx(loss + sum(float(0.5 * penalty[n] * squares[n]) for n in factors), rel=1e-12)
    for n, (u, v) in factors.items():
        torch.testing.assert_close(found[n][0], gradients[n] @ v + penalty[n] * u, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found[n][1], gradients[n].T @ u + penalty[n] * v, rtol=1e-9, atol=1e-11)


def test_the_gap_is_a_bound_for_the_model_relinearised_there():
    """Its optimum by the linearised solver, from dense Jacobians, is no lower than the objective less the gap."""
    net, batches, targets, (x, y) = layered(seed=3)
    lam = 0.1 * largest_lambda(net, batches, targets)
    found = solve_network(net, batches, targets, weight_decay=lam, loss="cross-entropy", tolerance=0.05)
    weights = {f"{n}.weight": net.get_submodule(n).weight.detach() + u @ v.T for n, (u, v) in found.factors.items()}
    jacobians = torch.func.jacrev(lambda w: torch.func.functional_call(net, w, (x,)))(weights)
    loss = get_loss("cross-entropy")
    contrasts = loss.contrasts(4)
    operator = DenseOperator(
        {n: torch.einsum("ikmn,kc->icmn", jacobians[f"{n}.weight"].detach(), contrasts) for n in targets}
    )
    here = torch.func.functional_call(net, weights, (x,)).detach()
    base = here - operator.apply({n: u @ v.T for n, (u, v) in found.factors.items()}) @ contrasts.T
    exact = solve(Problem(operator, base, y, loss, dict.fromkeys(targets, lam)), tolerance=1e-9).certificate
    assert exact.objective >= found.objective - found.gap - 1e-12
    assert found.objective >= exact.dual  # and the network's objective at the point is the re-linearised one's


def test_at_a_large_lambda_no_update_is_best():
    net, batches, targets, _ = layered()
    lam = 1.01 * largest_lambda(net, batches, targets)
    found = solve_network(net, batches, targets, weight_decay=lam, loss="cross-entropy")
    assert found.status == "converged" and found.ranks == {"first": 0, "second": 0}
    assert found.objective == pytest.approx(found.objective_at_zero, rel=1e-14)


def test_a_complete_start_that_is_too_large_shrinks():
    net, batches, targets, problem = affine("squared-error", 3)
    lam = 0.2 * lambda_max(problem)
    best = solve(problem.with_penalty(lam), tolerance=1e-9)
    start = {name: (2 * u, 2 * v) for name, (u, v) in best.factors.items()}
    found = solve_network(net, batches, targets, weight_decay=lam, loss="squared-error", start=start, tolerance=1e-6)
    assert found.status == "converged"
    assert found.objective == pytest.approx(best.certificate.objective, rel=1e-6)


def test_the_objective_never_rises_and_the_budget_holds():
    net, batches, targets, _ = layered(dtype=torch.float32)
    lam = 0.02 * largest_lambda(net, batches, targets)
    found = solve_network(
        net, batches, targets, weight_decay=lam, loss="cross-entropy", tolerance=1e-9, max_gradients=60
    )
    values = [objective for _, objective, _ in found.history]
    assert all(later <= earlier + found.noise for earlier, later in itertools.pairwise(values))
    assert found.status == "not-converged" and found.remedy
    assert found.gradients <= 60 + 3  # the certificates of the last round


def test_the_same_bits_from_the_same_start():
    net, batches, targets, _ = layered()
    lam = 0.1 * largest_lambda(net, batches, targets)
    runs = [solve_network(net, batches, targets, weight_decay=lam, loss="cross-entropy") for _ in range(2)]
    for name in targets:
        assert all(torch.equal(a, b) for a, b in zip(runs[0].factors[name], runs[1].factors[name], strict=True))


def test_the_network_stays_as_it_was():
    net, batches, targets, (x, _) = layered()
    net.train()
    before = net(x).detach()
    solve_network(net, batches, targets, weight_decay=0.05, loss="cross-entropy", max_gradients=20)
    assert net.training and all(p.requires_grad for p in net.parameters()) and torch.equal(net(x), before)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("lam", [0.0, -1.0, float("nan"), {"first": 1.0}])
def test_a_lambda_that_is_none(lam):
    net, batches, targets, _ = layered()
    with pytest.raises(SettingError, match="lambda"):
        solve_network(net, batches, targets, weight_decay=lam, loss="cross-entropy")


class Tokens(nn.Module):
    """A row of logits for every token, each of which predicts the next one."""

    def __init__(self, k: int = 5) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(k, 6), nn.Linear(6, 6), nn.Linear(6, k)

    def forward(self, input_ids):
        return self.head(torch.tanh(self.layer(self.embedding(input_ids))))


@pytest.mark.parametrize("weighting", ["token", "sample"])
@pytest.mark.parametrize("most", [2, 300])
def test_a_language_model_has_a_term_for_every_token(weighting, most):
    """Batches of several lengths, labels left out; stopped early, it takes no capture of such logits."""
    torch.manual_seed(0)
    net, k = Tokens().double(), 5
    batches = []
    for length in (4, 7):
        ids = torch.randint(k, (3, length))
        labels = ids.clone()
        labels[0, :3] = -100
        batches.append({"input_ids": ids, "labels": labels})
    asked = {"weight_decay": 0.02, "loss": "cross-entropy", "weighting": weighting, "tolerance": 1e-6}
    found = solve_network(net, batches, {"layer": net.layer}, max_gradients=most, **asked)
    assert (found.status, found.captures) == ("converged" if most > 2 else "not-converged", 0)
    delta = (found.factors["layer"][0] @ found.factors["layer"][1].T).requires_grad_()
    weights, losses = {"layer.weight": net.layer.weight.detach() + delta}, []
    for batch in batches:
        logits = torch.func.functional_call(net, weights, (batch["input_ids"],))
        for row, labels in zip(logits, batch["labels"], strict=True):
            losses.append(F.cross_entropy(row[:-1], labels[1:], ignore_index=-100, reduction="none"))
    counts = [int((loss != 0).sum()) for loss in losses]
    sums = torch.stack([loss.sum() for loss in losses])
    means = sums / torch.tensor(counts)
    loss = means.mean() if weighting == "sample" else sums.sum() / sum(counts)
    assert found.loss == pytest.approx(float(loss.detach()), abs=1e-12)
    if most > 2:
        (gradient,) = torch.autograd.grad(loss, delta)
        u, s, vt = torch.linalg.svd((delta - gradient).detach(), full_matrices=False)
        moved = (u * (s - 0.02).clamp(min=0)) @ vt
        assert float((moved - delta.detach()).norm()) <= 1e-3 * float(delta.detach().norm())
