"""Losses against automatic differentiation, numerical conjugates, and their stated constants."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from ranksure import losses
from ranksure.errors import SettingError
from ranksure.loss_terms import Terms, batch_terms, mean_loss_function
from ranksure.losses import LOSSES, Loss, accuracy, get_loss, loss_meant
from ranksure.solvers.burer_monteiro import solve
from tests.helpers import LOSS_NAMES, generator_of, randn, random_labels, random_problem
from tests.refusals import refusal
from tests.test_contributing import steps

CASES = [(name, k) for name in LOSS_NAMES for k in (1, 2, 4) if name != "cross-entropy" or k > 1]


def reference(name, z, y):
    """Each loss from its definition, for autograd."""
    if name == "cross-entropy":
        return -torch.log_softmax(z, -1).gather(-1, y.expand(z.shape[:-1])[..., None])[..., 0]
    if name == "logistic":
        return torch.log1p(torch.exp(-(2 * y - 1) * z)).mean(-1)
    return ((z - y) ** 2).mean(-1)


@pytest.mark.parametrize(("name", "k"), CASES)
def test_derivatives_match_autograd(name, k):
    loss, g = get_loss(name), generator_of(k)
    y = random_labels(name, 6, k, g)
    z = randn(6, k, generator=g).mul_(2).requires_grad_()
    dz = randn(6, k, generator=g)
    value = reference(name, z, y)
    torch.testing.assert_close(loss.value(z.detach(), y), value.detach(), rtol=1e-13, atol=1e-14)
    (grad,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    torch.testing.assert_close(loss.gradient(z.detach(), y), grad.detach(), rtol=1e-12, atol=1e-14)
    hessian = torch.stack(
        [torch.autograd.functional.hessian(lambda x, i=i: reference(name, x[None], y[i : i + 1])[0], z[i].detach())
         for i in range(6)]
    )  # fmt: skip
    torch.testing.assert_close(loss.hessian(z.detach(), y), hessian, rtol=1e-11, atol=1e-13)
    product = torch.einsum("ijk,ik->ij", hessian, dz)
    torch.testing.assert_close(loss.hessian_vector(z.detach(), y, dz), product, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("name", "k"), CASES)
def test_leading_batch_dimensions(name, k):
    loss, g = get_loss(name), generator_of(k)
    y = random_labels(name, 4, k, g)
    z, dz = randn(2, 3, 4, k, generator=g), randn(2, 3, 4, k, generator=g)
    for a in range(2):
        for b in range(3):
            torch.testing.assert_close(loss.value(z, y)[a, b], loss.value(z[a, b], y))
            torch.testing.assert_close(loss.gradient(z, y)[a, b], loss.gradient(z[a, b], y))
            torch.testing.assert_close(loss.hessian(z, y)[a, b], loss.hessian(z[a, b], y))
            torch.testing.assert_close(loss.hessian_vector(z, y, dz)[a, b], loss.hessian_vector(z[a, b], y, dz[a, b]))
            dual = loss.gradient(z, y)
            torch.testing.assert_close(loss.conjugate(dual, y)[a, b], loss.conjugate(dual[a, b], y))


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_extreme_logits_stay_finite(name):
    loss = get_loss(name)
    y = torch.tensor([1, 0]) if name == "cross-entropy" else torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    z = torch.tensor([[800.0, -800.0], [-800.0, 800.0]], dtype=torch.float64)
    for part in (loss.value(z, y), loss.gradient(z, y), loss.hessian(z, y), loss.conjugate(loss.gradient(z, y), y)):
        assert torch.isfinite(part).all()


@settings(max_examples=40)
@given(st.sampled_from(CASES), st.integers(0, 10_000), st.floats(0.1, 6))
def test_fenchel_young(case, seed, scale):
    """``f(z) + f*(a) >= <a, z>`` for all pairs, with equality at gradients."""
    name, k = case
    loss, g = get_loss(name), generator_of(seed)
    y = random_labels(name, 5, k, g)
    z, other = scale * randn(5, k, generator=g), scale * randn(5, k, generator=g)
    a = loss.gradient(z, y)
    conjugate = loss.conjugate(a, y)
    torch.testing.assert_close(loss.value(z, y) + conjugate, (a * z).sum(-1), rtol=1e-9, atol=1e-11)
    assert bool((loss.value(other, y) + conjugate >= (a * other).sum(-1) - 1e-10).all())


@pytest.mark.parametrize(("name", "k"), CASES)
def test_conjugate_is_the_supremum(name, k):
    loss, g = get_loss(name), generator_of(10 + k)
    for _ in range(3):
        y = random_labels(name, 1, k, g)
        a = 0.7 * loss.gradient(randn(1, k, generator=g), y)

        def negative(z, a=a, y=y):
            z = torch.from_numpy(z)[None].requires_grad_()
            value = reference(name, z, y).sum() - (a * z).sum()
            return float(value.detach()), torch.autograd.grad(value, z)[0][0].numpy()

        found = minimize(negative, np.zeros(k), jac=True, method="BFGS", options={"gtol": 1e-10})
        assert float(loss.conjugate(a, y)) == pytest.approx(-found.fun, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "y", "a"),
    [
        ("cross-entropy", [0], [0.1, -0.1]),  # p = (1.1, -0.1)
        ("cross-entropy", [1], [0.2, -0.1]),  # p sums to more than one
        ("cross-entropy", [1], [-0.01, 0.01]),
        ("logistic", [[1.0, 0.0]], [0.025, 0.25]),  # p = y + 2 a = 1.05
        ("logistic", [[1.0, 0.0]], [-0.25, -0.025]),  # p = -0.05
        ("logistic", [[1.0, 0.0]], [-0.505, 0.25]),
    ],
)
def test_conjugate_is_infinite_outside_its_domain(name, y, a):
    loss = get_loss(name)
    assert float(loss.conjugate(torch.tensor([a], dtype=torch.float64), torch.tensor(y).clone())) == math.inf


@pytest.mark.parametrize("name", ["cross-entropy", "logistic"])
def test_conjugate_at_the_edge_of_its_domain_is_finite(name):
    y = torch.tensor([0]) if name == "cross-entropy" else torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    corner = torch.tensor([[-1.0, 1.0]], dtype=torch.float64) / (1 if name == "cross-entropy" else 2)
    assert float(get_loss(name).conjugate(corner, y)) == 0
    assert float(get_loss(name).conjugate(0 * corner, y)) == 0


@pytest.mark.parametrize(("name", "k"), CASES)
def test_max_dual_step_is_the_largest(name, k):
    loss, g = get_loss(name), generator_of(20 + k)
    y = random_labels(name, 6, k, g)
    a = loss.gradient(randn(6, k, generator=g), y)
    step = loss.max_dual_step(a, y)
    if name == "squared-error":
        assert step == math.inf
        return
    assert 1 < step < math.inf
    assert bool(torch.isfinite(loss.conjugate(step * (1 - 1e-12) * a, y)).all())
    assert bool(torch.isinf(loss.conjugate(step * (1 + 1e-6) * a, y)).any())
    assert loss.max_dual_step(0 * a, y) == math.inf


@pytest.mark.parametrize(("name", "k"), CASES)
def test_constants_hold_and_are_nearly_attained(name, k):
    loss, g = get_loss(name), generator_of(30 + k)
    y = random_labels(name, 4000, k, g)
    z = 6 * randn(4000, k, generator=g)
    if name == "cross-entropy":  # the worst case has two equal logits and the rest far below
        z[0] = -40.0
        z[0, :2] = 0.0
    else:
        z[0] = 0.0
    wrong = randn(4000, k, generator=g)
    wrong[:] = -40.0
    if name == "cross-entropy":
        wrong.scatter_(1, ((y + 1) % k)[:, None], 40.0)
    elif name == "logistic":
        wrong = 40.0 * (1 - 2 * y)
    norms = torch.cat([loss.gradient(z, y), loss.gradient(wrong, y)]).norm(dim=1)
    curvature = torch.linalg.eigvalsh(loss.hessian(z, y))
    assert float(curvature.min()) >= -1e-12
    assert 0.999 * loss.smoothness(k) <= float(curvature.max()) <= loss.smoothness(k) + 1e-12
    if name == "squared-error":
        assert loss.lipschitz(k) == math.inf
    else:
        assert 0.999 * loss.lipschitz(k) <= float(norms.max()) <= loss.lipschitz(k) + 1e-12


@pytest.mark.parametrize(("name", "k"), CASES)
def test_the_third_derivative_is_bounded_by_the_second(name, k):
    """``|D^3 f[h, h, h]| <= M ||h|| D^2 f[h, h]`` by differentiating along lines, and nearly an equality somewhere."""
    loss, g = get_loss(name), generator_of(50 + k)
    y = random_labels(name, 300, k, g)
    z, h = 2 * randn(300, k, generator=g), randn(300, k, generator=g)
    z[0], h[0] = 0.0, 0.0
    z[0, 0], h[0, 0] = 10.0, 1.0
    if name == "cross-entropy":  # two classes, one of them nearly sure
        z[0, 1:-1], h[0, -1] = -40.0, -1.0
    t = torch.zeros(300, dtype=torch.float64, requires_grad=True)
    along = reference(name, z + t[:, None] * h, y).sum() + 0 * t.pow(4).sum()
    derivatives = []
    for _ in range(3):
        (along,) = torch.autograd.grad(along.sum(), t, create_graph=True)
        derivatives.append(along.detach())
    _, second, third = derivatives
    assert float(second.min()) > 0
    ratio = third.abs() / (second * h.norm(dim=1))
    m = loss.self_concordance
    assert 0.999 * m <= float(ratio.max()) <= m + 1e-9


@pytest.mark.parametrize(("name", "k"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_meaning(name, k, dtype):
    """The mean of the linearised problem, of terms, of training, and of torch's own function: one number, one gradient.

    That number is what a sequence classifier of transformers trains with.
    """
    loss, g = get_loss(name), generator_of(60 + k)
    y = random_labels(name, 7, k, g)
    z = (3 * randn(7, k, generator=g)).to(dtype)
    exact, tolerance = (
        z.double(),
        {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 2e-6}}[dtype],
    )
    terms, slopes = loss.terms(z.clone(), y)
    assert terms.numel() == 7 * (1 if loss.term == "sample" else k) and terms.dtype == torch.float64
    mean = loss.value(exact, y).mean()
    torch.testing.assert_close(terms.mean(), mean, **tolerance)
    torch.testing.assert_close(slopes.double() / terms.numel(), loss.gradient(exact, y) / 7, **tolerance)
    weights = torch.rand(7, generator=g)
    torch.testing.assert_close(loss.terms(z.clone(), y, weights)[1], slopes * weights.to(slopes)[:, None], **tolerance)
    x = z.clone().requires_grad_()
    trained = loss.torch_loss(x, y) / terms.numel()
    (gradient,) = torch.autograd.grad(trained, x)
    torch.testing.assert_close(trained.detach().double(), mean, **tolerance)
    torch.testing.assert_close(gradient.double(), loss.gradient(exact, y) / 7, **tolerance)
    torch.testing.assert_close(loss.torch_loss(z, y, "none").double(), terms, **tolerance)
    own = {
        "cross-entropy": torch.nn.CrossEntropyLoss(),
        "logistic": torch.nn.BCEWithLogitsLoss(),
        "squared-error": torch.nn.MSELoss(),
    }[name]
    torch.testing.assert_close(own(exact, y), mean, **tolerance)
    config = SimpleNamespace(problem_type=loss.problem_type, num_labels=k)
    whole = ForSequenceClassificationLoss(y, exact, config)
    torch.testing.assert_close(whole, mean, **tolerance)
    assert loss_meant(loss.problem_type, k) is loss


@pytest.mark.parametrize(("name", "k"), CASES)
def test_contrasts_are_orthonormal_and_span_what_the_loss_sees(name, k):
    loss, g = get_loss(name), generator_of(40 + k)
    basis = loss.contrasts(k)
    c = loss.effective_outputs(k)
    assert basis.shape == (k, c)
    torch.testing.assert_close(basis.T @ basis, torch.eye(c, dtype=torch.float64), rtol=0, atol=1e-14)
    y, z = random_labels(name, 5, k, g), randn(5, k, generator=g)
    torch.testing.assert_close(loss.value(z @ basis @ basis.T, y), loss.value(z, y))
    gradient = loss.gradient(z, y)  # so nothing of a gradient is lost
    torch.testing.assert_close(gradient @ basis @ basis.T, gradient)
    assert c == int(torch.linalg.matrix_rank(gradient.T @ gradient + loss.hessian(z, y).sum(0), atol=1e-10))


def test_get_loss():
    assert {get_loss(name).name for name in LOSSES} == set(LOSS_NAMES)
    assert all(LOSSES[name] is get_loss(name) and isinstance(LOSSES[name], Loss) for name in LOSS_NAMES)
    refusal(SettingError, "hinge.*cross-entropy, logistic, squared-error", get_loss, "hinge")


def test_the_logistic_loss_of_a_sure_answer_keeps_its_digits():
    """torch's softplus is linear above 20: the loss there would be exactly zero."""
    z = torch.tensor([[20.5], [-20.5], [35.0], [700.0]], dtype=torch.float64)
    y = torch.tensor([[1.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
    expected = torch.tensor([math.log1p(math.exp(-t)) for t in (20.5, 20.5, 35.0, 700.0)], dtype=torch.float64)
    assert torch.allclose(get_loss("logistic").value(z, y), expected, rtol=1e-14, atol=0)


def test_which_guess_is_right():
    z = torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, -3.0], [0.1, 0.0, 0.2]])
    cross, logistic, squared = (get_loss(name) for name in LOSS_NAMES)
    assert cross.right(z, torch.tensor([0, 2, 2])).tolist() == [True, False, True]
    assert accuracy(z, torch.tensor([0, 2, 2]), cross) == pytest.approx(2 / 3)
    column = torch.tensor([[0.3], [-0.2], [1.0], [-4.0]])
    for labels in (torch.tensor([[1.0], [1.0], [1.0], [0.0]]), torch.tensor([1.0, 1.0, 1.0, 0.0])):
        assert accuracy(column, labels, logistic) == 0.75
    assert accuracy(z[:1], torch.tensor([[1.0, 0.0, 0.0]]), logistic) == pytest.approx(2 / 3)  # of outputs
    assert accuracy(column, column, squared) is None


def test_labels_and_outputs():
    cross, logistic, squared = (get_loss(name) for name in LOSS_NAMES)
    assert (cross.outputs_for(5), logistic.outputs_for(2), squared.outputs_for(None)) == (5, 1, 1)
    refusal(SettingError, "needs class labels.*squared-error", cross.outputs_for, None)
    refusal(SettingError, "two classes, but the data has 3 classes: use `loss` cross-entropy", logistic.outputs_for, 3)
    refusal(SettingError, "float targets: use `loss` squared-error", logistic.outputs_for, None)
    assert torch.equal(cross.targets([1, 0]), torch.tensor([1, 0]))
    for loss in (logistic, squared):
        assert torch.equal(loss.targets([1, 0]), torch.tensor([[1.0], [0.0]], dtype=torch.float64))


def test_which_loss_a_config_means():
    assert [loss_meant(None, k, classes).name for k, classes in ((1, True), (3, True), (3, False))] == [
        "squared-error",
        "cross-entropy",
        "logistic",
    ]
    refusal(SettingError, "no loss is known for problem_type 'ranking'", loss_meant, "ranking", 2)


def test_a_loss_is_one_class_and_an_entry(monkeypatch):
    """That of CONTRIBUTING.md: the solver, terms, a run's dual line and the training loss ask the loss, no other."""
    added = next(code for _, name, code in steps() if name.endswith("losses.py"))
    entry: dict[str, Loss] = {}
    exec(added, {**vars(losses), "LOSSES": entry})
    monkeypatch.setitem(LOSSES, "huber", entry["huber"])
    loss, g = get_loss("huber"), generator_of(70)
    shapes, k = {"a": (4, 3)}, 2
    problem = random_problem(3, "huber", 6, k, shapes, 0.2)
    solution = solve(problem, tolerance=1e-8)
    assert solution.certificate.relative_gap <= 1e-8 and solution.ranks["a"] > 0
    z = 3 * randn(6, k, generator=g)
    y = problem.labels
    found = batch_terms("huber", z, y)
    x = z.clone().requires_grad_()
    expected = torch.nn.functional.huber_loss(x, y)
    assert float(mean_loss_function("huber")(z, y)) == pytest.approx(float(expected.detach()), rel=1e-12)
    terms = Terms("huber", found.losses, torch.full((12,), 1 / 12, dtype=torch.float64))
    assert terms.mean == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(found.gradient / 12, torch.autograd.grad(expected, x)[0])
    for c in (0.3, 1.0, terms.largest_step * (1 - 1e-12)):
        a = c * loss.gradient(z, y)
        line = ((a * z).sum(-1) - loss.conjugate(a, y)).mean()
        assert terms.dual_line(c)[0] == pytest.approx(float(line), rel=1e-10)
