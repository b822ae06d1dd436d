"""The rounds: honest ends, budgets, and going on after a kill to the same bits."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from ranksure.errors import AdapterError, CaptureError, DataError, SettingError, TargetError
from ranksure.factors import balanced
from ranksure.solvers.network import NetworkSolution, network_objective, solve_network, solve_objective
from ranksure.solvers.network_objective import NetworkObjective, NetworkPoint
from ranksure.solvers.network_rounds import Checkpoint, Rounds
from tests.solvers.networks import Layered, largest_lambda, layered


class Walled(nn.Module):
    """A network whose outputs are no numbers beyond a wall."""

    def __init__(self, net: nn.Module, wall: float) -> None:
        super().__init__()
        self.net, self.wall = net, wall

    def forward(self, x):
        z = self.net(x)
        return torch.where(z.abs() > self.wall, torch.nan, z)


class Half(Layered):
    """A module's output is multiplied by zero, or not used at all."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.used = used

    def forward(self, x):
        z = self.head(torch.tanh(self.first(x)))
        return z + 0 * self.second(torch.tanh(self.first(x))).sum(1, keepdim=True) if self.used else z


def same(a: NetworkSolution, b: NetworkSolution) -> bool:
    """Whether all but the seconds agrees, to the last bit."""
    alike = (a.objective, a.gap, a.status, a.remedy, a.gradients, a.forwards, a.captures, a.history) == (
        *(b.objective, b.gap, b.status, b.remedy, b.gradients, b.forwards, b.captures, b.history),
    )
    return alike and all(torch.equal(x, y) for n in a.factors for x, y in zip(a.factors[n], b.factors[n], strict=True))


def test_a_column_of_no_size_hides_no_direction():
    """Growth adds where a column is so small that descent would not get away from it."""
    net, batches, targets, _ = layered()
    lam = 0.05 * largest_lambda(net, batches, targets)
    objective = NetworkObjective(net, batches, targets, lam, "cross-entropy")
    best = solve_objective(objective, tolerance=1e-6).factors
    name = max(best, key=lambda n: best[n][0].shape[1])
    assert best[name][0].shape[1] >= 2
    tiny = torch.ones(best[name][0].shape[1], dtype=torch.float64)
    tiny[-1] = 1e-3
    start = {**best, name: (best[name][0] * tiny, best[name][1] * tiny)}
    point = objective.examine(balanced(start))
    assert point.factors[name][0].shape == best[name][0].shape
    assert point.pairs[name][0].shape[1] >= 1


def test_a_step_into_nothing_is_one_too_long():
    net, batches, targets, (x, _) = layered()
    lam = 0.05 * largest_lambda(net, batches, targets)
    free = solve_network(net, batches, targets, weight_decay=lam, loss="cross-entropy", tolerance=1e-3)
    wall = 1.2 * max(float(net(x).detach().abs().max()), 1.0)
    walled = Walled(net, wall)
    inner = {f"net.{name}": module for name, module in targets.items()}
    objective = NetworkObjective(walled, batches, inner, lam, "cross-entropy")
    far = {n: (100 * torch.ones(8, 1).double(), torch.ones(m.in_features, 1).double()) for n, m in inner.items()}
    value, gradient = objective.value_and_gradient(far)
    assert value == objective.loss(far) == float("inf")
    assert not any(part.any() for pair in gradient.values() for part in pair)
    found = solve_network(walled, batches, inner, weight_decay=lam, loss="cross-entropy", tolerance=1e-3)
    assert found.objective < found.objective_at_zero
    assert found.status == "converged" or found.remedy
    assert found.objective >= free.objective - free.gap  # of the same network, less of it
    values = [objective for _, objective, _ in found.history]
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    with pytest.raises(SettingError, match=r"at `start`.*not finite"):
        solve_network(walled, batches, inner, weight_decay=lam, loss="cross-entropy", start=far)


def test_a_network_that_gives_no_numbers_is_refused():
    net, batches, targets, _ = layered()
    nn.init.constant_(net.head.weight, float("inf"))
    with pytest.raises(DataError, match="not finite"):
        solve_network(net, batches, targets, weight_decay=0.1, loss="cross-entropy")


@pytest.mark.parametrize("used", [True, False])
def test_a_module_that_does_nothing_stays_as_it_is(used):
    torch.manual_seed(0)
    net = Half(used).double()
    _, batches, _, _ = layered()
    targets = {"first": net.first, "second": net.second}
    lam = 0.2 * largest_lambda(net, batches, targets)
    start = {"second": (torch.ones(8, 1).double(), torch.ones(8, 1).double())}
    found = solve_network(net, batches, targets, weight_decay=lam, loss="cross-entropy", start=start)
    assert found.status == "converged" and found.ranks["second"] == 0 and found.ranks["first"] > 0
    assert found.unreached == ([] if used else ["second"])
    if not used:
        with pytest.raises(CaptureError, match="does nothing"):
            solve_network(net, batches, {"second": net.second}, weight_decay=lam, loss="cross-entropy")


def test_what_the_precision_cannot_resolve_is_said():
    net, batches, targets, _ = layered(dtype=torch.bfloat16)
    lam = 0.1 * largest_lambda(*(x for x in layered()[:3]))
    found = solve_network(net, batches, targets, weight_decay=lam, loss="cross-entropy", tolerance=1e-4)
    assert found.status == "not-converged"
    assert "noise of an evaluation" in found.remedy
    assert found.objective <= found.objective_at_zero + found.noise


def test_factors_that_do_not_fit_are_named():
    net, batches, targets, _ = layered()
    start = {"third": (torch.ones(8, 1).double(), torch.ones(8, 1).double())}
    with pytest.raises(AdapterError, match="third"):
        solve_network(net, batches, targets, weight_decay=0.1, loss="cross-entropy", start=start)


def test_a_quantised_module_is_refused():
    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8, bias=False)
            self.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)

    net, batches, _, _ = layered()
    net.second = Packed()
    with pytest.raises(TargetError, match=r"second is a Packed .*uint8.*quantis"):
        NetworkObjective(net, batches, {"second": net.second}, 0.1, "cross-entropy")


def test_no_time_gives_the_best_point_so_far(monkeypatch: pytest.MonkeyPatch):
    net, batches, targets, _ = layered()
    lam = 0.02 * largest_lambda(net, batches, targets)
    found = solve_network(net, batches, targets, weight_decay=lam, loss="cross-entropy", max_seconds=0)
    assert found.status == "not-converged" and "seconds" in found.remedy and found.gradients == 1
    assert found.objective == pytest.approx(found.objective_at_zero, rel=1e-14)
    monkeypatch.setattr(Rounds, "out_of_time", lambda self: self.counts.gradients >= 8)
    found = solve_network(net, batches, targets, weight_decay=lam, loss="cross-entropy", max_seconds=1e9)
    assert found.status == "not-converged" and "seconds" in found.remedy
    assert found.objective < found.objective_at_zero and found.gradients <= 8 + 2


def test_progress_moves_with_every_gradient():
    net, batches, targets, _ = layered()
    lam = 0.1 * largest_lambda(net, batches, targets)
    seen: list[int] = []

    def progress(gradients: int, point: NetworkPoint) -> None:
        assert point.gap >= 0
        seen.append(gradients)

    found = solve_network(net, batches, targets, weight_decay=lam, loss="cross-entropy", progress=progress)
    assert seen == sorted(seen) and set(range(1, found.history[-1][0] + 1)) == set(seen)


def test_a_solve_goes_on_to_the_same_bits_from_every_round(tmp_path: Path):
    net, batches, targets, _ = layered()
    lam = 0.1 * largest_lambda(net, batches, targets)
    kept: list[Checkpoint] = []
    with network_objective(net, batches, targets, weight_decay=lam, loss="cross-entropy") as objective:
        whole = solve_objective(objective, tolerance=1e-6, max_gradients=200, checkpoint=kept.append)
        assert len(kept) >= 4
        for state in kept:
            torch.save(asdict(state), tmp_path / "state.pt")
            again = Checkpoint(**torch.load(tmp_path / "state.pt", weights_only=True))
            later: list[Checkpoint] = []
            found = solve_objective(objective, tolerance=1e-6, max_gradients=200, resume=again, checkpoint=later.append)
            assert same(found, whole)
            assert len(later) == len(kept) - len(state.history)


_KILLED = """
import os, signal, sys, torch
from dataclasses import asdict
torch.set_num_threads(int(sys.argv[2]))
from ranksure.solvers.network import solve_network
from tests.solvers.networks import largest_lambda, layered
net, batches, targets, _ = layered()
def keep(state):
    torch.save(asdict(state), sys.argv[1])
    if len(state.history) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
solve_network(net, batches, targets, weight_decay=0.1 * largest_lambda(net, batches, targets), loss="cross-entropy",
              tolerance=1e-6, max_gradients=200, checkpoint=keep)
"""


def test_a_killed_solve_is_taken_up_by_another_process(tmp_path: Path):
    arguments = [sys.executable, "-c", _KILLED, str(tmp_path / "state.pt"), str(torch.get_num_threads())]
    assert subprocess.run(arguments, cwd=Path(__file__).parents[2]).returncode == -signal.SIGKILL
    state = Checkpoint(**torch.load(tmp_path / "state.pt", weights_only=True))
    net, batches, targets, _ = layered()
    lam = 0.1 * largest_lambda(net, batches, targets)
    taken, whole = (
        solve_network(
            net,
            batches,
            targets,
            weight_decay=lam,
            loss="cross-entropy",
            tolerance=1e-6,
            max_gradients=200,
            resume=resume,
        )
        for resume in (state, None)
    )
    assert same(taken, whole)
