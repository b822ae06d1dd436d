"""Certificates of LoRA runs: exact on linear networks; every verdict, from runs that earn it."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ranksure.adapters import loaded
from ranksure.adapters.loaded import read_adapter
from ranksure.certificate import certify_point
from ranksure.errors import DataError, SettingError
from ranksure.network.gradient import mean_loss
from ranksure.runs.certificate import certify as certify_module
from ranksure.runs.certificate.certify import certify
from ranksure.runs.resizing.grow import grow
from ranksure.solvers.burer_monteiro import solve
from ranksure.verdict import Network, Point, rank_or_saddle
from tests.runs.networks import gradients, largest_lambda, linear_run, place, small_run, stuck_run


@pytest.mark.parametrize("seed", range(4))
def test_on_a_linear_network_it_is_the_certificate_of_the_problem_itself(seed):
    model, batches, problem = linear_run(seed, rank=4)
    lam = 0.3 * largest_lambda(problem)
    problem = problem.with_penalty(lam)
    optimum = solve(problem, tolerance=1e-10)
    u, v = optimum.factors["layer"]
    place(model, "layer", u, v)
    done = certify(model, batches, weight_decay=lam * 2.0)  # scale 2
    assert done.verdict == "first-order-optimal"
    assert done.objective == pytest.approx(optimum.certificate.objective, rel=1e-9)
    assert done.rank_gain_bound <= 1e-6
    state = done.modules["layer"]
    assert state.lam == pytest.approx(lam) and state.rank == 4 and state.rank_used == u.shape[1]
    assert state.spectral_ratio == pytest.approx(1, abs=1e-4)
    assert state.stationarity <= 1e-3 and state.seconds > 0
    assert done.objective_at_zero > done.objective
    assert certify(model, batches, lam=lam).rank_gain_bound == pytest.approx(done.rank_gain_bound)


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), size=st.sampled_from([1e-2, 0.3, 1.0, 5.0]), share=st.sampled_from([0.02, 0.3]))
def test_the_gap_bounds_the_true_suboptimality_of_a_linear_network(seed, size, share):
    model, batches, problem = linear_run(seed, rank=2)
    lam = share * largest_lambda(problem)
    optimum = solve(problem.with_penalty(lam), tolerance=1e-9)
    generator = torch.Generator().manual_seed(seed)
    u = size * torch.randn(4, 2, generator=generator, dtype=torch.float64)
    v = size * torch.randn(6, 2, generator=generator, dtype=torch.float64)
    place(model, "layer", u, v)
    found = certify(model, batches, lam=lam)
    assert found.rank_gain_bound >= found.objective - optimum.certificate.objective >= -1e-9
    assert 0 <= found.training_gain_bound <= found.rank_gain_bound
    # the same point by the certificate of the stored problem
    own = certify_point(problem.with_penalty(lam), {"layer": (u, v)}).certificate
    assert found.rank_gain_bound == pytest.approx(own.gap, rel=1e-5, abs=1e-9)
    assert found.modules["layer"].spectral_ratio == pytest.approx(own.spectral_ratio, rel=1e-9)


@pytest.fixture(scope="module")
def stuck():
    """A linear classifier at the best point of rank 1, a spurious stationary point; and its seed."""
    return stuck_run()


def test_optimal_stuck_and_stopped_early_on_a_linear_network(stuck):
    model, batches, problem, (u, v), seed = stuck
    lam = problem.penalty["layer"]
    place(model, "layer", u, v)
    bound = certify(model, batches, lam=lam, tolerance=0.02)
    assert bound.verdict == "rank-bound" and bound.rank_bound_modules == ["layer"]
    new, weakest = bound.probes
    assert (new.kind, weakest.kind) == ("new direction", "weakest column")
    assert new.decrease > 0 >= weakest.decrease
    assert bound.training_gain_bound <= 1e-5 < bound.rank_gain_bound
    assert "grow" in " ".join(bound.advice()) and bound.forward_passes <= 7
    place(model, "layer", 0.5 * u, 0.5 * v)
    early = certify(model, batches, lam=lam, tolerance=0.02)
    assert early.verdict == early.modules["layer"].verdict == "not-converged" and early.forward_passes == 0
    # at one rank more, with an empty column: a saddle that training can leave, not a limit
    roomy, batches, _ = linear_run(seed, rank=2, n=10, inputs=8, outputs=6)
    place(roomy, "layer", u, v)
    room = certify(roomy, batches, lam=lam, tolerance=0.02)
    assert room.verdict == "not-converged" and room.training_gain_bound == pytest.approx(room.rank_gain_bound)
    # unbalanced factors: the update is the same, the penalty that was trained is not
    layer = model.base_model.model.layer
    place(model, "layer", u, v)
    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(3)
        layer.lora_B["default"].weight.div_(3)
    tilted = certify(model, batches, lam=lam, tolerance=0.02)
    assert tilted.objective == pytest.approx(bound.objective) and tilted.verdict == "not-converged"
    nuclear = float(torch.linalg.svdvals(u @ v.T).sum())  # was balanced: |u|^2 = |v|^2 = its nuclear norm
    assert tilted.imbalance == pytest.approx(lam * nuclear * (0.5 / 9 + 4.5 - 1), rel=1e-5)
    assert "not balanced" in " ".join(tilted.advice())


def test_what_a_probe_measures_is_the_network_s_own_objective(stuck):
    """The printed decreases again, from a model whose factors are changed by hand."""
    model, batches, problem, (u, v), seed = stuck
    lam = problem.penalty["layer"]
    place(model, "layer", u, v)
    found = certify(model, batches, lam=lam, tolerance=0.02)
    new, weakest = found.probes
    read = read_adapter(model)
    from ranksure.relinearised import module_states

    states = module_states(read.factors, gradients(model, batches).gradients, {"layer": lam})
    p, q = states["layer"].direction
    bigger, batches, _ = linear_run(seed, rank=2, n=10, inputs=8, outputs=6)

    def objective(factors):
        place(bigger, "layer", *factors)
        a, b = factors
        return mean_loss(bigger, batches) + lam * float(torch.linalg.svdvals(a @ b.T).sum())

    with_new = torch.cat([u, -math.sqrt(new.step) * p[:, None]], 1), torch.cat([v, math.sqrt(new.step) * q[:, None]], 1)
    assert new.decrease == pytest.approx(found.objective - objective(with_new), rel=1e-6)
    e = math.sqrt(weakest.step)
    both = [objective((u - sign * e * p[:, None], v + sign * e * q[:, None])) for sign in (1, -1)]
    assert weakest.decrease == pytest.approx(found.objective - sum(both) / 2, rel=1e-5)


def test_a_column_that_can_turn_is_a_saddle_not_a_limit(stuck):
    """A tiny second column, above what counts as unused: every residual is small, but a turn leads down."""
    _, _, problem, (u, v), seed = stuck
    lam = problem.penalty["layer"]
    roomy, batches, _ = linear_run(seed, rank=2, n=10, inputs=8, outputs=6)
    place(roomy, "layer", u, v)

    g = gradients(roomy, batches).gradients["layer"]
    left, s, right = torch.linalg.svd(g)
    # along a singular pair with sigma below lambda, so that the column is no way down by itself
    index = int((s < 0.9 * lam).nonzero()[0])
    size = 2e-3 * float(torch.linalg.svdvals(u @ v.T)[0])
    a = torch.cat([u, -math.sqrt(size) * left[:, index : index + 1]], 1)
    b = torch.cat([v, math.sqrt(size) * right[index][:, None]], 1)
    place(roomy, "layer", a, b)
    found = certify(roomy, batches, lam=lam, tolerance=0.02)
    assert found.modules["layer"].rank_used == 2 and found.training_gain_bound < 0.02 * found.objective
    assert found.verdict == found.modules["layer"].verdict == "not-converged"
    (probe,) = found.probes
    assert probe.kind == "weakest column" and probe.decrease > 0
    assert "saddle" in found.advice()[0]
    assert certify(roomy, batches, lam=lam, tolerance=0.02, probe=False).verdict == "not-checked"  # nor refuted


def test_two_limited_modules_one_of_which_can_turn(monkeypatch):
    """Where turning both goes up, the steepest is tried alone."""
    model, batches, _ = small_run(rank=1)
    read = read_adapter(model)
    from ranksure.relinearised import Gaps, module_states

    penalty = dict.fromkeys(read.blocks, 1e-4)
    states = module_states(read.factors, gradients(model, batches).gradients, penalty)
    point = Point(read, states, penalty, 1.0, Gaps(1.0, 0.0, 1.0, None), 0.05)
    steepest = max(states, key=point.slope)
    assert len(point.limited) == 2
    network = Network(model, batches, None, "token")
    asked = []

    def objective(self, point, change):
        asked.append(set(change))
        return point.objective * (1.1 if len(change) == 2 else 0.9)

    monkeypatch.setattr(Network, "objective", objective)
    verdict, probes = rank_or_saddle(point, network, True)
    assert verdict == "not-converged" and probes[0].decrease > 0
    assert asked == [set(states), set(states), {steepest}, {steepest}]


class TwoValleys(nn.Module):
    """Output ``0.1 + k |W - M|^2 |W - L|^2 + 0.4 s(t)``, ``t`` from 0 at M to 1 at L: two smooth valleys in 3 x 3.

    ``M`` is small and of rank one: the global minimum, 0.1. ``L`` is large and of rank two: 0.5 there, a strict local
    minimum over all matrices, because ``s(t) = t^2 (3 - 2 t)`` is flat at 0 and 1. At ``W = 0`` the output is below
    0.5.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)
        nn.init.zeros_(self.layer.weight)
        basis = torch.eye(3).double()
        self.small = 0.1 * torch.outer(basis[0], basis[1])
        self.large = 3 * torch.outer(basis[0], basis[0]) + 2 * torch.outer(basis[1], basis[2])

    def forward(self, x):
        w = self.layer(torch.eye(3, dtype=x.dtype)).T
        along = self.large - self.small
        t = ((w - self.small) * along).sum() / along.square().sum()
        valleys = 0.05 * (w - self.small).square().sum() * (w - self.large).square().sum()
        return (0.1 + valleys + 0.4 * t.square() * (3 - 2 * t)).expand(len(x), 1)


def test_worse_than_no_update_fails_loudly():
    """A second-order stationary point of full rank and large size, even re-linearised optimal, but worse than zero."""
    net = TwoValleys().double()
    model = get_peft_model(net, LoraConfig(r=2, lora_alpha=2, target_modules=["layer"]), autocast_adapter_dtype=False)
    batches = [{"x": torch.zeros(4, 1).double(), "labels": torch.zeros(4, 1).double()}] * 3
    left, s, right = torch.linalg.svd(net.large)
    u, v = left[:, :2] * s[:2].sqrt(), right[:2].T * s[:2].sqrt()
    place(model, "layer", u, v)

    def output(w):
        return torch.func.functional_call(
            net.eval(), {"layer.base_layer.weight": w - net.large}, torch.zeros(1, 1).double()
        )[0, 0]

    # with the adapter at L on top: gradient zero and curvature positive in every direction of the 3 x 3 matrices
    gradient = torch.func.grad(output)(net.large).detach()
    curvature = torch.func.hessian(output)(net.large).reshape(9, 9).detach()
    assert float(gradient.abs().max()) < 1e-12 and float(torch.linalg.eigvalsh(curvature)[0]) > 0.1
    bad = certify(model, batches)
    assert bad.loss == pytest.approx(0.25) and bad.objective_at_zero < 0.2
    assert bad.rank_gain_bound <= 1e-6  # the gap alone would have called it optimal
    assert bad.verdict == "failed-loudly"
    words = bad.advice()[0]
    assert "worse than no update" in words and "2 of 2 ranks" in words and "size 5 (nuclear norm)" in words
    place(model, "layer", 0.99 * u, v)
    assert certify(model, batches).verdict == "not-converged"
    small = torch.linalg.svd(net.small)
    place(model, "layer", small.U[:, :1] * 0.1, small.Vh[:1].T)
    fine = certify(model, batches)
    assert fine.loss == pytest.approx(0.01) and fine.verdict != "failed-loudly"


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def minimise(parameters, objective, steps: int) -> None:
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, max_eval=2 * steps, tolerance_grad=1e-10, tolerance_change=0, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)


@pytest.mark.parametrize("seed, lam, size", [(3, 3e-3, 3.0), (3, 1e-2, 1.0), (0, 3e-3, 3.0)])
def test_networks_trained_from_large_random_points(seed, lam, size, failed):
    """Where one ends bad it says so: stationary by autograd, above the pretrained network, full rank, and large."""
    torch.manual_seed(seed)
    net = MLP().double()
    x = torch.randn(16, 4).double()
    y = (x[:, 0] * x[:, 1] > 0).long()
    weights = list(net.parameters())
    minimise(weights, lambda: F.cross_entropy(net(x), y) + 1e-3 * sum(p.square().sum() for p in weights), 300)
    zero = float(F.cross_entropy(net(x), y).detach())
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["first", "second"])
    model = get_peft_model(net, config, autocast_adapter_dtype=False)
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in factors:
            p.copy_(size * torch.randn(p.shape, generator=generator))

    def objective():
        return F.cross_entropy(model(x), y) + lam / 2 * sum(p.square().sum() for p in factors)

    optimizer = torch.optim.SGD(factors, lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        objective().backward()
        optimizer.step()
    minimise(factors, objective, 600)
    final = objective()
    slope = max(float(g.abs().max()) for g in torch.autograd.grad(final, factors))
    assert slope < 1e-5  # trained to stationarity
    found = certify(model, [{"x": x[:9], "labels": y[:9]}, {"x": x[9:], "labels": y[9:]}], weight_decay=lam)
    assert found.objective == pytest.approx(float(final.detach()), rel=1e-5)
    assert (found.verdict == "failed-loudly") == (found.objective > zero)
    if found.verdict == "failed-loudly":
        assert found.objective_at_zero == pytest.approx(zero, rel=1e-9)
        assert max(state.rank_used for state in found.modules.values()) == 2
        failed.append(sum(state.nuclear_norm for state in found.modules.values()))
        assert failed[-1] > 1


@pytest.fixture(scope="module")
def failed():
    """Sizes of the updates of runs that ended bad: there have to be some."""
    out: list[float] = []
    yield out
    assert out


def trained(model, batches, lam: float, steps: int = 800):
    """Train the factors of a small nonlinear run to stationarity, full batch."""
    x, y = (torch.cat([batch[key] for batch in batches]) for key in ("x", "labels"))
    read = read_adapter(model)
    groups = [
        (lam * block.scale, [p for name, p in block.module.named_parameters() if "lora_" in name])
        for block in read.blocks.values()
    ]
    factors = [p for _, group in groups for p in group]

    def objective():
        half = sum(0.5 * decay * sum(p.square().sum() for p in group) for decay, group in groups)
        return F.cross_entropy(model(x), y) + half

    minimise(factors, objective, steps)


def test_a_nonlinear_network_at_too_small_and_at_sufficient_rank():
    """Rank-bound at rank 1, and optimal at the rank that is enough, with a lower objective; early, neither."""
    torch.manual_seed(0)
    lam, results = 3e-3, {}
    for rank in (1, 3):
        model, _, _ = small_run(rank=rank, k=6, seed=4)
        generator = torch.Generator().manual_seed(5)
        x = 2 * torch.randn(24, 4, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(6, (24,), generator=generator)
        batches = [{"x": x[:10], "labels": y[:10]}, {"x": x[10:], "labels": y[10:]}]
        assert certify(model, batches, lam=lam, tolerance=0.02).verdict == "not-converged"
        trained(model, batches, lam)
        results[rank] = certify(model, batches, lam=lam, tolerance=0.02)
    low, high = results[1], results[3]
    assert low.verdict == "rank-bound" and low.rank_bound_modules
    assert low.rank_gain_bound > 0.02 * low.objective >= low.training_gain_bound
    assert high.objective < low.objective - 0.02 * low.objective


def test_iterators_loaders_and_order():
    model, batches, (x, y) = small_run()
    expected = certify(model, batches, lam=0.01)
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    loader = DataLoader(rows, batch_size=4, shuffle=True)  # pyright: ignore[reportArgumentType]
    seen: list[int] = []
    for data in (iter(batches), loader):
        found = certify(model, data, lam=0.01, progress=seen.append)
        assert found.verdict == expected.verdict and found.n_samples == 9
        assert found.rank_gain_bound == pytest.approx(expected.rank_gain_bound, rel=1e-9)
    assert seen == [1, 2, 1, 2, 3]
    budget = certify(model, iter(batches), lam=0.01, memory_bytes=7 * 7 * 8)
    assert budget.passes == 2 and budget.rank_gain_bound == pytest.approx(expected.rank_gain_bound, rel=1e-12)
    assert set(budget.modules) == set(expected.modules)


def test_gradients_are_dropped_one_by_one(monkeypatch):
    """No more than a group's gradients are alive at a time."""
    import weakref

    alive: list[weakref.ref] = []
    most = 0
    real = certify_module.Examiner.__call__

    def watched(self, name, gradient):
        nonlocal most
        alive.append(weakref.ref(gradient))
        most = max(most, sum(ref() is not None for ref in alive))
        return real(self, name, gradient)

    monkeypatch.setattr(certify_module.Examiner, "__call__", watched)
    model, batches, _ = small_run()
    certify(model, batches, lam=0.01)
    assert len(alive) == 2 and most == 1


def test_an_untrained_adapter_without_a_penalty_is_not_checked():
    model, batches, _ = linear_run(0, rank=2)
    found = certify(model, batches)
    assert found.verdict == "not-checked" and "zero" in found.reasons[0]
    assert certify(model, batches, lam=1e-3).verdict == "not-converged"


def test_json_and_advice():
    model, batches, _ = small_run()
    for found in (certify(model, batches, lam=0.01), certify(model, batches)):
        data = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert data["verdict"] == found.verdict and data["schema"] == 2
        assert data["modules"]["first"]["rank"] == 2 and data["objective"] == found.objective
        text = " ".join(found.advice())
        assert "both are bounds" in text and "Below 5% of the objective a gain counts as none" in text
    assert "AdamW's decoupled decay is no penalty" in text


def test_what_is_refused():
    model, batches, _ = small_run()
    with pytest.raises(SettingError, match="not both"):
        certify(model, batches, lam=1.0, weight_decay=1.0)
    with pytest.raises(SettingError, match="weight decay must be"):
        certify(model, batches, weight_decay=-1.0)
    with pytest.raises(SettingError, match="lambda must be"):
        certify(model, batches, lam=math.nan)
    with pytest.raises(SettingError, match="tolerance"):
        certify(model, batches, tolerance=0.0)
    with pytest.raises(SettingError, match="certify has no such setting: 'rank'"):
        certify(model, batches, rank=1)
    with pytest.raises(DataError, match="label 3 is out of range"):
        certify(model, [{"x": batches[0]["x"], "labels": torch.tensor([0, 1, 2, 3])}])


def test_the_factors_are_read_once(monkeypatch):
    """Two modules: two reads by a certificate, and two by a growth with the certificate that it makes."""
    model, batches, _ = small_run()
    read, real = [], loaded.to_factors
    monkeypatch.setattr(loaded, "to_factors", lambda *matrices: read.append(1) or real(*matrices))
    certify(model, batches, lam=0.01)
    assert len(read) == 2
    grow(model, batches, lam=0.01, force=True)
    assert len(read) == 4


def test_the_model_is_left_as_it_was(stuck):
    """After probes and a pass without the adapter, too."""
    model, batches, problem, (u, v), _ = stuck
    place(model, "layer", u, v)
    model.train()
    before = copy.deepcopy(model.state_dict())
    scaling = dict(model.base_model.model.layer.scaling)
    found = certify(model, batches, lam=problem.penalty["layer"], tolerance=0.02)
    assert found.verdict == "rank-bound" and model.training
    assert model.base_model.model.layer.scaling == scaling
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("dtype", "margins"), [(torch.float16, (3, 20)), (torch.float32, (60, 120))])
def test_a_loss_whose_gradients_the_dtype_cannot_hold_is_not_checked(dtype, margins):
    """They come out as zero, which would look like an optimum; float64 holds them, and the loss can still fall."""
    for margin, held in zip(margins, (True, False), strict=True):
        for wide in (True, False):
            model, batches, _ = small_run(dtype=torch.float64 if wide else dtype)
            rows = [{**batch, "labels": torch.zeros_like(batch["labels"])} for batch in batches]
            with torch.no_grad():
                model.base_model.model.head.bias[0] += margin
            if not wide:
                rows = [{**batch, "x": batch["x"].to(dtype)} for batch in rows]
            found = certify(model, rows)
            assert found.verdict == ("not-converged" if held or wide else "not-checked")
            if not held and not wide:
                assert str(dtype)[6:] in found.reasons[0] and "`dtype`" in found.reasons[0]


class Unending:
    """Batches without a length, read anew each time; ``most`` of them, or for ever."""

    def __init__(self, batches, most=None):
        self.batches, self.most, self.read = batches, most, 0

    def __iter__(self):
        for batch in itertools.islice(itertools.cycle(self.batches), self.most):
            self.read += 1
            yield batch


@pytest.mark.parametrize("once", [True, False])
def test_batches_without_end(once):
    model, batches, _ = small_run()
    rows = sum(len(batch["labels"]) for batch in batches)
    for made, more in ((certify, {}), (grow, {"force": True})):
        data = Unending(batches)
        with pytest.raises(DataError, match=rf"more rows than the {rows + 1} .* `stream_rows`"):
            made(model, iter(data) if once else data, stream_rows=rows + 1, **more)
        assert data.read <= len(batches) + 1
    data = Unending(batches, len(batches))
    found = certify(model, iter(data) if once else data, stream_rows=rows, lam=0.01)
    assert found.objective == certify(model, batches, lam=0.01).objective and found.n_samples == rows
    assert grow(model, iter(Unending(batches, len(batches))), force=True, lam=0.01).added
    with pytest.raises(SettingError, match="stream_rows"):
        certify(model, batches, stream_rows=0)
