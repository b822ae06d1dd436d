"""Bounds of the re-linearised model against cvxpy and dense linear algebra, on networks that are linear."""

from __future__ import annotations

import math
import warnings

import cvxpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ranksure.adapters.loaded import read_adapter
from ranksure.loss_terms import Terms
from ranksure.relinearised import Examiner, ball_gaps, module_states, penalised_gaps
from ranksure.runs.certificate.certify import certify
from tests.runs.networks import gradients, largest_lambda, linear_run, place, reference, small_run

KINDS = ["cross-entropy", "logistic", "squared-error"]


def labelled(batches, kind, outputs: int, seed: int):
    """The batches with labels of the given loss."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for batch in batches:
        n = len(batch["x"])
        if kind == "logistic":
            labels = torch.randint(2, (n, outputs), generator=generator).double()
        elif kind == "squared-error":
            labels = torch.randn(n, outputs, generator=generator, dtype=torch.float64)
        else:
            labels = batch["labels"]
        out.append({"x": batch["x"], "labels": labels})
    return out


def convex_minimum(model, batches, kind, penalty=None, radius=None, around=None, spaces=None) -> float:
    """Lowest objective found by cvxpy: any update; or of the tangent space ``spaces = (U, V)``; or within a ball.

    The point it returns is made feasible, and its objective evaluated anew: its accuracy does not matter.
    """
    base = model.base_model.model.layer.base_layer.weight.detach().double().numpy()
    x = torch.cat([batch["x"] for batch in batches]).numpy()
    y = torch.cat([batch["labels"] for batch in batches]).numpy()
    if spaces is None:
        move = cvxpy.Variable(base.shape)
    else:
        u, v = (part.numpy() for part in spaces)
        move = u @ cvxpy.Variable((u.shape[1], base.shape[1])) + cvxpy.Variable((base.shape[0], v.shape[1])) @ v.T
    origin = np.zeros_like(base) if around is None else around.numpy()
    constraints = [] if radius is None else [cvxpy.normNuc(move) <= radius]
    delta = origin + move
    z = x @ (base + delta).T
    if kind == "cross-entropy":
        hot = np.eye(z.shape[1])[y]
        loss = cvxpy.sum(cvxpy.log_sum_exp(z, axis=1) - cvxpy.sum(cvxpy.multiply(hot, z), axis=1)) / len(y)
    elif kind == "logistic":
        loss = cvxpy.sum(cvxpy.logistic(z) - cvxpy.multiply(y, z)) / y.size
    else:
        loss = cvxpy.sum_squares(z - y) / y.size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on its accuracy
        cvxpy.Problem(cvxpy.Minimize(loss + (penalty or 0.0) * cvxpy.normNuc(delta)), constraints).solve(
            solver=cvxpy.CLARABEL
        )
    found = torch.tensor(move.value)
    if radius is not None:
        found = found * min(1.0, radius / float(torch.linalg.svdvals(found).sum()))
    found = found + torch.tensor(origin)
    logits = torch.tensor(x) @ (torch.tensor(base) + found).T
    target = torch.tensor(y)
    function = {"cross-entropy": F.cross_entropy, "logistic": F.binary_cross_entropy_with_logits}.get(kind, F.mse_loss)
    return float(function(logits, target)) + (penalty or 0.0) * float(torch.linalg.svdvals(found).sum())


def random_update(seed: int, rank: int, size: float, m: int = 4, n: int = 6):
    generator = torch.Generator().manual_seed(seed)
    u = size * torch.randn(m, rank, generator=generator, dtype=torch.float64)
    return u, size * torch.randn(n, rank, generator=generator, dtype=torch.float64)


@settings(max_examples=5)
@given(seed=st.integers(0, 999), size=st.sampled_from([0.03, 0.3, 1.0, 3.0]), share=st.sampled_from([0.02, 0.3, 1.5]))
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_under_a_penalty(kind, seed, size, share):
    """Every update, and every update of the tangent space: none is better by more than the bound."""
    model, batches, _ = linear_run(seed, rank=2)
    batches = labelled(batches, kind, 4, seed)
    u, v = random_update(seed, 2, size)
    place(model, "layer", torch.zeros_like(u), torch.zeros_like(v))
    at_zero = gradients(model, batches, kind=kind).gradients["layer"]
    lam = share * float(torch.linalg.matrix_norm(at_zero, 2))
    place(model, "layer", u, v)
    found = certify(model, batches, lam=lam, loss=kind, probe=False)
    assert found.rank_gain_bound >= found.objective - convex_minimum(model, batches, kind, lam) - 1e-10
    spaces = torch.linalg.qr(u).Q, torch.linalg.qr(v).Q
    best = convex_minimum(model, batches, kind, lam, spaces=spaces)
    assert found.training_gain_bound >= found.objective - best - 1e-10
    assert 0 <= found.training_gain_bound <= found.rank_gain_bound


@settings(max_examples=4)
@given(seed=st.integers(0, 999), size=st.sampled_from([0.1, 1.0]))
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_without_a_penalty(kind, seed, size):
    """Every update of the ball, and every move of its radius along the tangent space."""
    model, batches, _ = linear_run(seed, rank=2)
    batches = labelled(batches, kind, 4, seed)
    u, v = random_update(seed, 2, size)
    place(model, "layer", u, v)
    found = certify(model, batches, loss=kind, probe=False)
    place(model, "layer", 0 * u, v)
    first = gradients(model, batches, kind=kind)
    length = first.terms.mean / float(torch.linalg.matrix_norm(first.gradients["layer"], 2))
    assert found.radius == pytest.approx(max(float(torch.linalg.svdvals(u @ v.T).sum()), length), rel=1e-9)
    assert 0 <= max(found.rank_gain_bound, found.training_gain_bound) <= found.loss
    own = found.radius * found.modules["layer"].gradient_norm
    assert found.training_gain_bound <= own * (1 + 1e-9)  # never above the Frank-Wolfe gap, the dual at c = 1
    best = convex_minimum(model, batches, kind, radius=found.radius)
    assert found.rank_gain_bound >= found.loss - best - 1e-10
    spaces = torch.linalg.qr(u).Q, torch.linalg.qr(v).Q
    best = convex_minimum(model, batches, kind, radius=found.radius, around=u @ v.T, spaces=spaces)
    assert found.training_gain_bound >= found.loss - best - 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_update_is_not_optimal_in_its_own_ball(kind):
    """Right after the start the update's own ball is tiny, and no gain in it says anything."""
    model, batches, _ = linear_run(1, rank=2)
    batches = labelled(batches, kind, 4, 1)
    u, v = random_update(1, 2, 1e-3)
    place(model, "layer", u, v)
    found = certify(model, batches, loss=kind)
    best = convex_minimum(model, batches, kind, radius=found.radius)
    assert found.loss - best > 0.2 * found.loss  # much can be gained
    assert found.verdict == "not-converged" and found.modules["layer"].verdict == "not-converged"
    assert found.loss - best <= found.rank_gain_bound + 1e-10


@pytest.mark.parametrize("penalised", [True, False])
def test_an_unused_rank_can_take_up_any_direction(penalised):
    """LoRA's own start and a zero column are saddles: what training can gain there is what any rank can."""
    model, batches, problem = linear_run(3, rank=2)
    lam = 0.1 * largest_lambda(problem) if penalised else None
    u, v = random_update(3, 1, 0.5)
    place(model, "layer", u, v)  # the second column is zero
    found = certify(model, batches, lam=lam, probe=False)
    state = found.modules["layer"]
    assert (state.rank_used, state.rank) == (1, 2)
    if penalised:
        assert found.training_gain_bound == pytest.approx(found.rank_gain_bound)
        start = torch.zeros(4, 2).double(), torch.randn(6, 2).double()
        place(model, "layer", *start)
        found = certify(model, batches, lam=lam, probe=False)
        assert found.training_gain_bound == pytest.approx(found.rank_gain_bound) and found.training_gain_bound > 0.01
        assert found.verdict == "not-converged"
    else:
        terms, steepest = gradients(model, batches).terms, found.radius * state.gradient_norm
        dual = max(terms.dual_line(c)[0] - c * steepest for c in np.linspace(0, 1, 4001))
        assert found.training_gain_bound == pytest.approx(found.loss - dual, rel=1e-4)


def test_a_rank_above_the_module_s_size_is_used_up_at_that_size():
    model, batches, _ = linear_run(0, rank=7)  # a 4 x 6 module
    u, v = random_update(0, 7, 0.5)
    place(model, "layer", u, v)
    read = read_adapter(model)
    found = gradients(model, batches)
    state = module_states(read.factors, found.gradients, None)["layer"]
    assert state.rank == 7 and state.rank_used == 4 and state.full
    assert state.outside_norm <= 1e-12 * state.gradient_norm and state.followed == pytest.approx(1)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), rank=st.integers(1, 5), used=st.integers(0, 5))
def test_facts_of_one_module_are_those_of_dense_linear_algebra(seed, rank, used):
    """Any gradient, any used rank, columns below the threshold among them."""
    used = min(used, rank)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    left, right = torch.linalg.qr(random(7, rank)).Q, torch.linalg.qr(random(9, rank)).Q
    s = torch.cat([1 + torch.rand(used, generator=generator).double(), torch.full((rank - used,), 1e-5).double()])
    if used == 0:
        s = s * 0
    mix = random(rank, rank) + 3 * torch.eye(rank).double()  # factors that are not balanced
    u, v = (left * s) @ mix, right @ torch.linalg.inv(mix).T
    g, lam = random(7, 9), 0.7
    state = Examiner({"a": (u, v)}, {"a": lam})("a", g.clone())
    p, q = left[:, :used], right[:, :used]
    outside = (torch.eye(7) - p @ p.T).double() @ g @ (torch.eye(9) - q @ q.T).double()
    tangent = g - outside

    def norm(w):
        return float(torch.linalg.matrix_norm(w, 2))

    assert (state.rank, state.rank_used, state.full) == (rank, used, used == rank)
    assert state.nuclear_norm == pytest.approx(float(s.sum()), rel=1e-9)
    assert state.inner == pytest.approx(float((g * (u @ v.T)).sum()), rel=1e-8, abs=1e-11)
    assert norm(g) <= state.gradient_norm <= norm(g) * (1 + 1e-6)
    assert norm(tangent) * (1 - 1e-12) <= state.tangent_norm <= norm(tangent) * (1 + 1e-9) + 1e-15
    assert state.outside_norm == pytest.approx(norm(outside), rel=1e-9)
    assert state.stationarity == pytest.approx(norm(tangent + lam * p @ q.T) / lam, rel=1e-8, abs=1e-9)
    a, b = state.direction
    assert float(a @ outside @ b) == pytest.approx(state.outside_norm, rel=1e-9)
    assert float((p.T @ a).abs().sum() + (q.T @ b).abs().sum()) < 1e-8
    assert state.reach == (min(state.tangent_norm, state.gradient_norm) if used == rank else state.gradient_norm)
    # what the factors can follow counts every column of either factor, however small the update
    if used:
        rest = (torch.eye(7) - left @ left.T).double() @ g @ (torch.eye(9) - right @ right.T).double()
        assert state.followed == pytest.approx(1 - float(rest.square().sum() / g.square().sum()), abs=1e-9)
    else:
        rest = g @ (torch.eye(9) - right @ right.T).double()
        assert state.followed == pytest.approx(1 - float(rest.square().sum() / g.square().sum()), abs=1e-9)


def test_a_zero_gradient():
    u, v = random_update(0, 2, 1.0)
    state = Examiner({"a": (u, v)}, {"a": 0.5})("a", torch.zeros(4, 6))
    assert state.gradient_norm == state.outside_norm == state.inner == 0 and state.followed == 1
    assert state.stationarity == pytest.approx(1)
    terms = Terms("squared-error", torch.tensor([1.0]).double(), torch.tensor([1.0]).double())
    gaps = penalised_gaps({"a": state}, terms, {"a": 0.5})
    # nothing couples to the data: all of the penalty can go, and the loss stays
    assert gaps.total == pytest.approx(0.5 * state.nuclear_norm, rel=1e-9)
    assert ball_gaps({"a": state}, terms).total <= 1e-12


def test_the_gap_of_a_nonlinear_network_by_its_definition():
    """Over a fine grid of c, with the explicit conjugate and dense gradients."""
    model, batches, (x, y) = small_run()
    wd = 0.01
    loss, gradients = reference(model, lambda base: F.cross_entropy(base(x), y))
    found = certify(model, batches, weight_decay=wd)
    read = read_adapter(model)
    inner = objective = 0.0
    for name, g in gradients.items():
        u, v = read.blocks[name].factors
        inner += float((g * (u @ v.T)).sum())
        objective += wd / read.blocks[name].scale * float(torch.linalg.svdvals(u @ v.T).sum())
    assert found.objective == pytest.approx(loss + objective, rel=1e-9)
    ratio = max(state.spectral_ratio for state in found.modules.values())
    logits = model(x).detach()
    p, hot = torch.softmax(logits, 1), F.one_hot(y, 3)
    best = -math.inf
    limit = min(1 / ratio, float(1 / (1 - p[range(9), y]).max())) * (1 - 1e-12)
    for c in torch.linspace(0, limit, 20_001, dtype=torch.float64):
        mixed = (c * (p - hot) + hot).clamp(min=1e-300)
        line = c * ((p - hot) * logits).sum(1) - (mixed * mixed.log()).sum(1)
        best = max(best, float(line.mean()) - float(c) * inner)
    assert found.rank_gain_bound == pytest.approx(found.objective - best, rel=1e-6)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    kind=st.sampled_from(KINDS),
    inner=st.floats(-3, 3),
    ratio=st.sampled_from([0.0, 1e-3, 0.5, 1.0, 3.0, 1e4, 1e12]),
    power=st.integers(-12, 2),
)
def test_the_best_step_is_that_of_a_fine_grid(seed, kind, inner, ratio, power):
    from ranksure.relinearised import _best_step

    generator = torch.Generator().manual_seed(seed)
    losses = 10.0**power * torch.rand(7, generator=generator, dtype=torch.float64) ** 4
    terms = Terms(kind, losses, torch.full((7,), 1 / 7, dtype=torch.float64))
    inner *= terms.mean
    c, best = _best_step(terms, inner, 0.0, ratio)
    limit = min(1 / ratio if ratio else math.inf, terms.largest_step, 1e6)
    assert 0 <= c <= limit
    grid = limit * torch.linspace(0, 1, 400, dtype=torch.float64) ** 3
    values = [terms.dual_line(float(step))[0] - float(step) * inner for step in grid[:-1]]
    assert best >= max(values) - 1e-6 * (abs(max(values)) + terms.mean)
    value, rounding = terms.dual_line(c)
    assert best <= value - c * inner + 1e-15 * abs(c * inner)
    assert best >= value - c * inner - rounding - 1e-12 * abs(c * inner)


@pytest.mark.parametrize("exponent", [-900, -500, -250, 250, 500, 900])
@pytest.mark.parametrize(("m", "n"), [(6, 9), (120, 100)])
def test_a_module_in_other_units(m, n, exponent):
    """Gradient and lambda times t, the update over t: every figure is in its units."""
    t, lam = 2.0**exponent, 0.7
    (u, v), g = random_update(1, 3, 1.0, m, n), torch.randn(m, n, dtype=torch.float64)
    known = Examiner({"x": (u, v)}, {"x": lam})("x", g)
    found = Examiner({"x": (u, v / t)}, {"x": t * lam})("x", t * g)
    units = {"nuclear_norm": 1 / t} | dict.fromkeys(("gradient_norm", "tangent_norm", "outside_norm"), t)
    same = ("rank_used", "inner", "inner_error", "stationarity", "followed")
    for key, unit in (units | dict.fromkeys(same, 1.0)).items():
        assert getattr(found, key) == pytest.approx(unit * getattr(known, key), rel=1e-6)


@pytest.mark.parametrize("exponent", [-480, -250, 250, 480])
@pytest.mark.parametrize("decay", [False, True])
def test_bounds_of_squared_errors_of_any_size(exponent, decay):
    """Weights, update, labels and lambda times t: every bound times t^2, and the same verdict."""
    t, found = 2.0**exponent, {}
    for size in (1.0, t):
        model, batches, _ = linear_run(4, rank=2)
        batches = [{**b, "labels": size * b["labels"]} for b in labelled(batches, "squared-error", 4, 4)]
        with torch.no_grad():
            model.base_model.model.layer.base_layer.weight.mul_(size)
        u, v = random_update(4, 2, 0.3)
        place(model, "layer", size * u, v)
        found[size] = certify(model, batches, loss="squared-error", **({"lam": 0.1 * size} if decay else {}))
    for key in ("objective", "rank_gain_bound", "training_gain_bound"):
        assert getattr(found[t], key) / t / t == pytest.approx(getattr(found[1.0], key), rel=1e-6)
    assert found[t].verdict == found[1.0].verdict == "not-converged"


def test_what_overflows_is_not_checked():
    """In float64: a loss, a penalty. Infinity is no more than a share of infinity."""
    model, batches, _ = linear_run(4, rank=2)
    batches = labelled(batches, "squared-error", 4, 4)
    place(model, "layer", *random_update(4, 2, 0.3))
    huge = [{**batch, "labels": 1e200 * batch["labels"]} for batch in batches]
    for more, rows in (({}, huge), ({"lam": 0.1}, huge), ({"lam": 1.7e308}, batches)):
        found = certify(model, rows, loss="squared-error", **more)
        assert found.verdict == "not-checked" and "overflows" in found.reasons[0]
