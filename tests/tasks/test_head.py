"""The fitted head against independent optima, and its features against what the head reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from ranksure.data.texts import load_rows
from ranksure.losses import get_loss
from ranksure.tasks.head import RIDGES, HeadFit, fit_head, head_features, install_head
from ranksure.tasks.text import load_text_task
from tests.helpers import generator_of, randn
from tests.tiny_text import frame, save_bert, save_gpt2, save_roberta


def problem(loss: str, n: int = 60, d: int = 7, k: int = 2, seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    g = generator_of(seed)
    x = randn(n, d, generator=g) * torch.logspace(0, -1, d, dtype=torch.float64) + 3 * randn(1, d, generator=g)
    z = (x - x.mean(0)) @ randn(d, k, generator=g) + noise * randn(n, k, generator=g)
    if loss == "cross-entropy":
        return x, z.argmax(1)
    return x, ((z > 0).double() if loss == "logistic" else z + 5)


def strength(x: Tensor, fit: HeadFit, bias: bool) -> float:
    """The ridge in units of the weights: RIDGES are in units of the mean squared (centred) feature norm."""
    centred = x - x.mean(0) if bias else x
    return fit.ridge * float(centred.square().sum(1).mean())


def ridge_objective(x: Tensor, y: Tensor, loss: str, w: np.ndarray, b: np.ndarray, mu: float) -> float:
    z = x.numpy() @ w.T + b
    if loss == "cross-entropy":
        top = z.max(1)
        each = np.log(np.exp(z - top[:, None]).sum(1)) + top - z[np.arange(len(z)), y.numpy()]
    elif loss == "logistic":
        each = (np.logaddexp(0, z) - z * y.numpy()).mean(1)
    else:
        each = ((z - y.numpy()) ** 2).mean(1)
    return float(each.mean() + 0.5 * mu * (w**2).sum())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_squared_error_is_ridge_regression(bias, k):
    x, y = problem("squared-error", k=k)
    fit = fit_head(x, y, get_loss("squared-error"), k, bias=bias)
    n, d = x.shape
    mu = strength(x, fit, bias)
    xc, yc = (x - x.mean(0), y - y.mean(0)) if bias else (x, y)
    # The gradient of the mean over n k terms is 2 / (n k) times that of half the sum.
    w = torch.linalg.solve(2 / k * xc.T @ xc / n + mu * torch.eye(d, dtype=torch.float64), 2 / k * xc.T @ yc / n).T
    torch.testing.assert_close(fit.weight, w, rtol=1e-5, atol=1e-7)
    if bias:
        torch.testing.assert_close(fit.bias, y.mean(0) - w @ x.mean(0), rtol=1e-5, atol=1e-6)
    else:
        assert fit.bias is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("loss", "k"), [("cross-entropy", 2), ("cross-entropy", 3), ("logistic", 1)])
def test_classification_is_the_ridge_optimum(loss, k, bias):
    x, y = problem(loss, k=k)
    fit = fit_head(x, y, get_loss(loss), k, bias=bias)
    d, mu = x.shape[1], strength(x, fit, bias)

    def split(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        w = flat[: k * d].reshape(k, d)
        return w, (flat[k * d :] if bias else np.zeros(k))

    found = minimize(
        lambda flat: ridge_objective(x, y, loss, *split(flat), mu),
        np.zeros(k * (d + bias)),
        options={"maxiter": 2000, "gtol": 1e-8},
    )
    b = np.zeros(k) if fit.bias is None else fit.bias.numpy()
    ours = ridge_objective(x, y, loss, fit.weight.numpy(), b, mu)
    assert ours == pytest.approx(found.fun, abs=1e-8)
    assert ours < ridge_objective(x, y, loss, np.zeros((k, d)), np.zeros(k), mu) - 1e-2
    # The bias of a softmax is free up to a constant; the logits' differences are not.
    w, b = split(found.x)
    theirs = torch.from_numpy(x.numpy() @ w.T + b)
    contrasts = get_loss(loss).contrasts(k)
    torch.testing.assert_close(fit.logits(x) @ contrasts, theirs @ contrasts, rtol=1e-3, atol=1e-3)


def test_more_features_than_rows():
    """The solution lies in the span of the features, and the ridge makes it unique."""
    x, y = problem("squared-error", n=12, d=50, k=1)
    fit = fit_head(x, y, get_loss("squared-error"), 1, bias=True)
    mu = strength(x, fit, True)
    xc, yc = x - x.mean(0), y - y.mean(0)
    w = (xc.T @ torch.linalg.solve(xc @ xc.T / 6 + mu * torch.eye(12, dtype=torch.float64), yc / 6)).T
    torch.testing.assert_close(fit.weight, w, rtol=1e-5, atol=1e-7)


def test_scores_are_those_of_cross_validation_and_the_choice_is_the_rule():
    """Every fold solved again by the closed form; the weakest ridge within one paired standard error is taken."""
    x, y = problem("squared-error", n=30, k=1, noise=2.0)
    fit = fit_head(x, y, get_loss("squared-error"), 1, bias=True)
    centred = x - x.mean(0)
    unit = float(centred.square().sum(1).mean())
    losses = torch.zeros(len(RIDGES), 30, dtype=torch.float64)
    for fold in range(5):
        out = torch.arange(30) % 5 == fold
        xi, yi = centred[~out], y[~out]
        a, b = xi - xi.mean(0), yi - yi.mean(0)
        for i, ridge in enumerate(RIDGES):
            w = torch.linalg.solve(
                2 * a.T @ a / len(a) + ridge * unit * torch.eye(7, dtype=torch.float64), 2 * a.T @ b / len(a)
            )
            z = (centred[out] - xi.mean(0)) @ w + yi.mean(0)
            losses[i, out] = (z - y[out]).square().sum(1)
    np.testing.assert_allclose(fit.scores, losses.mean(1), rtol=1e-5)
    difference = losses - losses[int(losses.mean(1).argmin())]
    allowed = [r for r, d in zip(RIDGES, difference, strict=True) if d.mean() <= d.std() / 30**0.5]
    assert fit.ridge == min(allowed)


def test_deterministic():
    x, y = problem("cross-entropy", k=3)
    fits = [fit_head(x, y, get_loss("cross-entropy"), 3, bias=True) for _ in range(2)]
    assert torch.equal(fits[0].weight, fits[1].weight)
    assert torch.equal(fits[0].bias, fits[1].bias)
    assert fits[0].scores == fits[1].scores


def test_constant_features_give_the_class_shares():
    """Nothing to read: the bias alone is fitted, and it is the log odds."""
    x, y = torch.ones(40, 3, dtype=torch.float64), (torch.arange(40) % 4 == 0).long()
    fit = fit_head(x, y, get_loss("cross-entropy"), 2, bias=True)
    torch.testing.assert_close(
        torch.softmax(fit.logits(x), 1)[0], torch.tensor([0.75, 0.25], dtype=torch.float64), rtol=1e-4, atol=1e-4
    )


# ---------------------------------------------------------------------------------------------------------------------
# features


def real_tokens(batch: dict[str, Tensor], row: int) -> int:
    return int(batch["attention_mask"][row].sum())


@pytest.fixture(scope="module")
def rows():
    return load_rows(frame(14))


def read_by_head(model: nn.Module, head: str, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """The inputs of the head by a plain forward hook, ``(rows, d)`` or ``(rows, tokens, d)`` for each batch."""
    seen: list[Tensor] = []
    handle = model.get_submodule(head).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return seen


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "mean"])
def test_features_are_what_the_head_reads(tmp_path, rows, kind):
    save = {"bert": save_bert, "roberta": save_roberta, "gpt2": save_gpt2, "mean": save_bert}[kind]
    task = load_text_task(save(tmp_path / "m"), rows, pooling="mean" if kind == "mean" else "model", batch_size=4)
    batches = task.batches(rows)
    assert len({real_tokens(b, i) for b in batches for i in range(len(b["input_ids"]))}) > 2  # padding matters
    task.model.eval()
    seen = read_by_head(task.model, task.head, batches)
    if kind == "gpt2":  # the head reads every token; the class is told by the last real one
        expected = [s[i, real_tokens(b, i) - 1] for s, b in zip(seen, batches, strict=True) for i in range(len(s))]
        expected = torch.stack(expected)
    else:
        expected = torch.cat(seen)
    if kind == "mean":
        with torch.no_grad():
            hidden = [task.model.encoder(**b).last_hidden_state.double() for b in batches]
        means = [h[i, : real_tokens(b, i)].mean(0) for h, b in zip(hidden, batches, strict=True) for i in range(len(h))]
        torch.testing.assert_close(expected, torch.stack(means), rtol=1e-5, atol=1e-6)
    features = head_features(task.model, task.head, batches, task.n_outputs)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    assert features.std(0).max() > 1e-3


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_installed_head_gives_the_fitted_logits(tmp_path, rows, kind):
    task = load_text_task({"bert": save_bert, "gpt2": save_gpt2}[kind](tmp_path / "m"), rows)
    batches = task.batches(rows)
    features = head_features(task.model, task.head, batches, 2)
    layer = task.model.get_submodule(task.head)
    fit = fit_head(features, task.labels(rows), get_loss("cross-entropy"), 2, bias=layer.bias is not None)
    install_head(task.model, task.head, fit)
    task.model.eval()
    with torch.no_grad():
        logits = torch.cat([task.model(**batch).logits for batch in batches])
    torch.testing.assert_close(logits.double(), fit.logits(features), rtol=1e-4, atol=1e-4)
    assert (logits.argmax(1) == task.labels(rows)).double().mean() > 0.6


def test_features_leave_the_model_as_it_was(tmp_path: Path, rows):
    task = load_text_task(save_bert(tmp_path / "m"), rows)
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    flags = [p.requires_grad for p in task.model.parameters()]
    head_features(task.model, task.head, task.batches(rows), 2)
    assert all(torch.equal(before[key], value) for key, value in task.model.state_dict().items())
    assert [p.requires_grad for p in task.model.parameters()] == flags
    assert all(p.grad is None for p in task.model.parameters())
