"""Certificates of LoRA runs: exact on linear networks, against dense autograd on small nonlinear ones."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from ranksure.errors import AdapterError, DataError, SettingError
from ranksure.losses import get_loss
from ranksure.operators.dense import DenseOperator
from ranksure.problem import Problem
from ranksure.runs.certify import certify
from ranksure.runs.gradient import gradient_pass, mean_loss
from ranksure.runs.lora import read_adapter
from ranksure.solvers.burer_monteiro import solve
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
    model = get_peft_model(
        net, LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=["layer"]), autocast_adapter_dtype=False
    )
    x = torch.randn(n, inputs, dtype=torch.float64)
    y = torch.randint(outputs, (n,))
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
    assert state.stationarity <= 1e-3
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
    true = found.objective - optimum.certificate.dual
    assert found.rank_gain_bound >= found.objective - optimum.certificate.objective >= -1e-9
    assert 0 <= found.training_gain_bound <= found.rank_gain_bound
    assert true >= -1e-9
    # the same point by the certificate of the stored problem
    from ranksure.certificate import certify as certify_point

    own = certify_point(problem.with_penalty(lam), {"layer": (u, v)}).certificate
    assert found.rank_gain_bound == pytest.approx(own.gap, rel=1e-5, abs=1e-9)
    assert found.modules["layer"].spectral_ratio == pytest.approx(own.spectral_ratio, rel=1e-9)


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), size=st.sampled_from([0.1, 1.0]))
def test_the_ball_gap_bounds_what_the_ball_can_gain(seed, size):
    """Against projected points of the ball: no update of the same nuclear norm is better by more than the gap."""
    model, batches, problem = linear_run(seed, rank=2)
    generator = torch.Generator().manual_seed(seed)
    u = size * torch.randn(4, 2, generator=generator, dtype=torch.float64)
    v = size * torch.randn(6, 2, generator=generator, dtype=torch.float64)
    place(model, "layer", u, v)
    found = certify(model, batches, tolerance=0.01)
    radius = float(torch.linalg.svdvals(u @ v.T).sum())
    assert found.radius == pytest.approx(radius)
    for lam in (0.3, 0.1, 0.03, 0.01):  # solutions of every lambda, scaled into the ball
        best = solve(problem.with_penalty(lam * largest_lambda(problem)), tolerance=1e-8)
        a, b = best.factors["layer"]
        delta = a @ b.T
        norm = float(torch.linalg.svdvals(delta).sum())
        delta = delta * min(1.0, radius / max(norm, 1e-300))
        value = float(problem.data_loss(problem.logits(problem.operator.apply({"layer": delta}))))
        assert found.rank_gain_bound >= found.loss - value - 1e-9


def test_verdicts_on_a_linear_network():
    """Optimal, too small a rank (a spurious stationary point), stopped early."""
    found = None
    for seed in range(30):  # a problem whose rank-1 run is stuck well above the optimum
        model, batches, problem = linear_run(seed, rank=1, n=10, inputs=8, outputs=6)
        problem = problem.with_penalty(0.05 * largest_lambda(problem))
        stuck = solve_fixed_rank(problem, {"layer": 1}, random_starts=4)
        if stuck.solution.certificate.relative_gap > 0.1 and stuck.stationary:
            found = (model, batches, problem, stuck)
            break
    assert found is not None
    model, batches, problem, stuck = found
    lam = problem.penalty["layer"]
    place(model, "layer", *stuck.solution.factors["layer"])
    bound = certify(model, batches, lam=lam, tolerance=0.02)
    assert bound.verdict == "rank-bound" and bound.rank_bound_modules == ["layer"]
    new, weakest = bound.probes
    assert new.kind == "new direction" and new.decrease > 0 and weakest.decrease <= 0
    assert bound.training_gain_bound <= 1e-5 < bound.rank_gain_bound
    assert "grow" in " ".join(bound.advice())
    u, v = stuck.solution.factors["layer"]
    place(model, "layer", 0.5 * u, 0.5 * v)
    assert certify(model, batches, lam=lam, tolerance=0.02).verdict == "not-converged"
    # at one rank more, with an empty column: a saddle that training can leave, not a limit
    roomy, batches, _ = linear_run(seed, rank=2, n=10, inputs=8, outputs=6)
    place(roomy, "layer", u, v)
    assert certify(roomy, batches, lam=lam, tolerance=0.02).verdict == "not-converged"


class TwoValleys(nn.Module):
    """Output ``a(w) = 0.1 + w^2 (w - 3)^2 + 0.4 s(w / 3)``: 0.1 at w = 0, and a local minimum of 0.5 at w = 3."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x):
        w = self.layer(torch.ones_like(x))
        t = w / 3
        return 0.1 + w.square() * (w - 3).square() + 0.4 * t.square() * (3 - 2 * t)


def test_worse_than_no_update_fails_loudly():
    """Stationary, even re-linearised optimal, but worse than the pretrained weights."""
    model = get_peft_model(TwoValleys().double(), LoraConfig(r=1, lora_alpha=1, target_modules=["layer"]))
    batches = [{"x": torch.zeros(4, 1).double(), "labels": torch.zeros(4, 1).double()}] * 3
    root = torch.tensor([[math.sqrt(3.0)]]).double()
    place(model, "layer", root, root)
    bad = certify(model, batches)
    assert bad.loss == pytest.approx(0.25) and bad.objective_at_zero == pytest.approx(0.01)
    assert bad.rank_gain_bound <= 1e-6  # the gap alone would have called it optimal
    assert bad.verdict == "failed-loudly"
    assert "worse than no update" in bad.advice()[0]
    place(model, "layer", 0.99 * root, root)
    assert certify(model, batches).verdict == "not-converged"


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


def dense_gradients(model, names, x, y):
    """Gradient of the mean loss with respect to the merged weights, by autograd."""
    merged = copy.deepcopy(model).merge_and_unload()
    weights = [dict(merged.named_modules())[name].weight for name in names]
    for weight in weights:
        weight.requires_grad_(True)
    loss = F.cross_entropy(merged.double()(x.double()), y)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True)), loss.item()


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"rank_pattern": {"first": 4}, "alpha_pattern": {"first": 1}}]
)
def test_gradients_of_a_nonlinear_network_agree_with_dense_autograd(config):
    model, batches, (x, y) = small_run(**config)
    read = read_adapter(model)
    expected, loss = dense_gradients(model, ["first", "second"], x, y)
    found = gradient_pass(model, batches, read.modules)
    assert found.terms.mean == pytest.approx(loss, rel=1e-10)
    assert mean_loss(model, batches) == pytest.approx(loss, rel=1e-10)
    for name, g in expected.items():
        assert torch.allclose(found.gradients[name], g, atol=1e-12)
        merged = dict(copy.deepcopy(model).merge_and_unload().named_modules())[name].weight
        base = dict(model.base_model.model.named_modules())[name].base_layer.weight
        u, v = read.blocks[name].factors
        assert torch.allclose(u @ v.T, (merged - base).detach(), atol=1e-12)


def test_facts_of_a_module_agree_with_dense_linear_algebra():
    model, batches, (x, y) = small_run()
    expected, loss = dense_gradients(model, ["first", "second"], x, y)
    wd = 0.01
    found = certify(model, batches, weight_decay=wd)
    read = read_adapter(model)
    inner = objective = 0.0
    for name, g in expected.items():
        u, v = read.blocks[name].factors
        p, s, qt = torch.linalg.svd(u @ v.T)
        p, s, q = p[:, :2], s[:2], qt[:2].T
        lam = wd / read.blocks[name].scale
        left, right = p @ p.T, q @ q.T
        outside = (torch.eye(len(left)) - left) @ g @ (torch.eye(len(right)) - right)
        tangent = g - outside
        state = found.modules[name]
        assert state.spectral_ratio == pytest.approx(float(torch.linalg.matrix_norm(g, 2)) / lam, rel=1e-9)
        assert state.outside == pytest.approx(float(torch.linalg.matrix_norm(outside, 2)) / lam, rel=1e-9)
        moved = torch.linalg.matrix_norm(tangent + lam * p @ q.T, 2)
        assert state.stationarity == pytest.approx(float(moved) / lam, rel=1e-8)
        assert state.followed == pytest.approx(float(tangent.square().sum() / g.square().sum()), rel=1e-9)
        inner += float((g * (u @ v.T)).sum())
        objective += lam * float(s.sum())
    assert found.objective == pytest.approx(loss + objective, rel=1e-9)
    # the gap by its definition, over a fine grid of c with the explicit conjugate
    ratio = max(state.spectral_ratio for state in found.modules.values())
    logits = model(x).detach()
    p = torch.softmax(logits, 1)
    hot = F.one_hot(y, 3)
    best = -math.inf
    limit = min(1 / ratio, float(1 / (1 - p[range(9), y]).max())) * (1 - 1e-12)
    for c in torch.linspace(0, limit, 20_001, dtype=torch.float64):
        mixed = (c * (p - hot) + hot).clamp(min=1e-300)
        conjugate = (mixed * mixed.log()).sum(1)
        line = c * ((p - hot) * logits).sum(1) - conjugate
        best = max(best, float(line.mean()) - float(c) * inner)
    assert found.rank_gain_bound == pytest.approx(found.objective - best, rel=1e-6)


@pytest.mark.parametrize("loss", ["logistic", "squared-error"])
def test_other_losses(loss):
    model, batches, (x, _) = small_run(k=2)
    targets = torch.randint(2, (9, 2)).double() if loss == "logistic" else torch.randn(9, 2).double()
    batches = [{"x": x, "labels": targets}]
    merged = copy.deepcopy(model).merge_and_unload()
    weight = merged.first.weight.requires_grad_(True)
    function = F.binary_cross_entropy_with_logits if loss == "logistic" else F.mse_loss
    value = function(merged(x), targets)
    (expected,) = torch.autograd.grad(value, [weight])
    read = read_adapter(model)
    found = gradient_pass(model, batches, read.modules, kind=loss)
    assert found.terms.mean == pytest.approx(value.item(), rel=1e-10)
    assert torch.allclose(found.gradients["first"], expected, atol=1e-12)
    steps = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    line = found.terms.dual_line(steps)
    assert float(line[0]) == 0 and float(line[2]) == pytest.approx(value.item(), rel=1e-9)
    assert float(line[1]) >= 0.5 * value.item() - 1e-12  # concave


def test_groups_of_modules_under_a_memory_budget_give_the_same():
    model, batches, _ = small_run()
    read = read_adapter(model)
    whole = gradient_pass(model, batches, read.modules)
    parts = gradient_pass(model, batches, read.modules, memory_bytes=7 * 7 * 8)
    assert whole.passes == 1 and parts.passes == 2
    for name, g in whole.gradients.items():
        assert torch.equal(parts.gradients[name], g)
    with pytest.raises(SettingError, match="several passes"):
        gradient_pass(model, iter(batches), read.modules, memory_bytes=7 * 7 * 8)
    from ranksure.errors import MemoryBudgetError

    with pytest.raises(MemoryBudgetError, match="second alone"):
        gradient_pass(model, batches, read.modules, memory_bytes=300)


def test_the_network_is_left_as_it_was():
    model, batches, _ = small_run(lora_dropout=0.3)
    model.train()
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    first, second = certify(model, batches, lam=0.01), certify(model, batches, lam=0.01)
    assert first.rank_gain_bound == second.rank_gain_bound  # evaluation mode: no dropout
    assert model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1] and p.grad is None


def test_an_untrained_adapter_without_a_penalty_is_not_checked():
    model, batches, _ = linear_run(0, rank=2)
    found = certify(model, batches)
    assert found.verdict == "not-checked" and "zero" in found.reasons[0]
    assert certify(model, batches, lam=1e-3).verdict == "not-converged"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_untested_configurations_are_not_checked(config, reason):
    model, batches, _ = small_run(dtype=torch.float32, **config)
    found = certify(model, batches, lam=0.01)
    assert found.verdict == "not-checked"
    assert any(reason in text for text in found.reasons)
    assert json.loads(json.dumps(found.to_json()))["verdict"] == "not-checked"


def test_every_field_of_a_lora_config_is_either_tested_or_refused():
    """A field that PEFT adds later is refused at any value but its default."""
    import dataclasses

    from ranksure.runs import lora

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields >= lora._TESTED


def test_what_is_refused():
    model, batches, _ = small_run()
    with pytest.raises(SettingError, match="not both"):
        certify(model, batches, lam=1.0, weight_decay=1.0)
    with pytest.raises(SettingError, match="weight decay must be"):
        certify(model, batches, weight_decay=-1.0)
    with pytest.raises(SettingError, match="tolerance"):
        certify(model, batches, tolerance=0.0)
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        certify(model, batches, adapter="other")
    with pytest.raises(AdapterError, match="no PEFT adapter"):
        certify(Small(), batches)
    with pytest.raises(DataError, match="no 'labels'"):
        certify(model, [{"x": batches[0]["x"]}])
    with pytest.raises(DataError, match="label 3 is out of range"):
        certify(model, [{"x": batches[0]["x"], "labels": torch.tensor([0, 1, 2, 3])}])
    with torch.no_grad():
        model.base_model.model.first.lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(AdapterError, match="first hold a value that is not finite"):
        certify(model, batches)


def test_merged_weights_are_refused():
    model, batches, _ = small_run()
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged"):
        certify(model, batches)


def test_several_adapters():
    model, batches, _ = small_run()
    model.add_adapter("second", LoraConfig(r=1, lora_alpha=1, target_modules=["first"]))
    assert set(certify(model, batches, lam=0.01).modules) == {"first", "second"}
    with pytest.raises(AdapterError, match="not active"):
        certify(model, batches, adapter="second")
    model.set_adapter("second")
    found = certify(model, batches, lam=0.01)
    assert found.adapter == "second" and set(found.modules) == {"first"}
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match="several adapters are active"):
        certify(model, batches, lam=0.01)
    both = certify(model, batches, lam=0.01, adapter="default")
    assert both.adapter == "default" and both.objective != found.objective
