"""Fitting a new head: a convex, deterministic, ridge-penalised problem on fixed features.

A LoRA run on an untrained head would spend its rank on the head's noise, so a new head is fitted
first and the network is linearised around it. The features come from the head's own gradients
(``dz_0 / dW_0`` is the input that the head reads), so whatever a model does around its head, such as
picking the last token, is respected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ranksure.capture import Progress, capture
from ranksure.losses import Loss
from ranksure.network.logits import Batch
from ranksure.solvers.lbfgs import minimize

RIDGES = tuple(10 ** (1 - 0.5 * k) for k in range(11))
"""Candidate ridge strengths, 10 to 1e-4, in units of the mean squared feature norm."""


@dataclass(frozen=True)
class HeadFit:
    """A fitted head.

    Attributes:
        weight: ``(K, d)``, float64.
        bias: ``(K,)``, float64, or None.
        ridge: the chosen strength.
        scores: mean held-out loss of every candidate in ``RIDGES`` over the folds.
    """

    weight: Tensor
    bias: Tensor | None
    ridge: float
    scores: list[float]

    def logits(self, features: Tensor) -> Tensor:
        """Logits of features ``(N, d)``."""
        z = features @ self.weight.T
        return z if self.bias is None else z + self.bias


def head_features(
    model: nn.Module, head: str, batches: Sequence[Batch], n_outputs: int, progress: Progress | None = None
) -> Tensor:
    """What the head reads for each sample, ``(N, d)``, float64."""
    first_logit = torch.zeros(n_outputs, 1, dtype=torch.float64)
    first_logit[0] = 1
    operator = capture(
        model, batches, {head: model.get_submodule(head)}, first_logit, dtype=torch.float64, progress=progress
    ).operator
    m, n = operator.shapes[head]
    unit = torch.zeros(m, dtype=torch.float64)
    unit[0] = 1
    return operator.jacobian_products(head, unit, torch.zeros(n, dtype=torch.float64))[1]


def fit_head(features: Tensor, labels: Tensor, loss: Loss, n_outputs: int, bias: bool, folds: int = 5) -> HeadFit:
    """Fit by ridge-penalised minimisation; the strength is chosen by cross-validation.

    The weakest ridge within one paired standard error of the best is taken. Among heads that cannot be
    told apart, the least shrunken one passes the largest gradients on to the network, so the update
    stays small and the linearisation holds; a head shrunk to nothing would ask for huge updates.

    Args:
        features: ``(N, d)`` float64.
        labels: ``(N,)`` class ids or ``(N, K)`` floats.
        loss: the loss.
        n_outputs: ``K``.
        bias: whether the head has a bias (not penalised).
        folds: folds, taken by position (rows come stratified and shuffled).
    """
    features, labels = features.cpu(), labels.cpu()
    n = features.shape[0]
    centre = features.mean(0) if bias else torch.zeros(features.shape[1], dtype=torch.float64)
    # The ridge solution lies in the span of the features: work in min(N, d) coordinates of unit mean square.
    _, s, basis = torch.linalg.svd(features - centre, full_matrices=False)
    basis = basis[: max(1, int((s > 1e-10 * s[0]).sum()))]
    reduced = (features - centre) @ basis.T
    unit = float(reduced.square().sum(1).mean().sqrt().clamp(min=1e-150))
    reduced = reduced / unit
    folds = min(folds, n)
    outside = torch.arange(n) % folds == torch.arange(folds)[:, None]
    # Every fold at every strength is one row of a single batched problem.
    ridges = torch.tensor(RIDGES, dtype=torch.float64)
    inside = (~outside).double().repeat(len(RIDGES), 1)
    x = _minimise(reduced, labels, loss, n_outputs, bias, ridges.repeat_interleave(folds), inside, 1e-5)
    held = loss.value(_apply(reduced, x, bias), labels).view(len(RIDGES), folds, n)
    losses = (held * outside).sum(1)  # each row's loss from the fold that left it out
    scores = losses.mean(1)
    difference = losses - losses[int(scores.argmin())]
    error = difference.std(1) / n**0.5
    ridge = RIDGES[int((difference.mean(1) <= error).nonzero().max())]
    everything = torch.ones(1, n, dtype=torch.float64)
    x = _minimise(reduced, labels, loss, n_outputs, bias, torch.tensor([ridge]), everything, 1e-8)[0]
    weight = (x[:, : basis.shape[0]] / unit) @ basis
    return HeadFit(weight, x[:, -1] - weight @ centre if bias else None, ridge, scores.tolist())


def install_head(model: nn.Module, head: str, fit: HeadFit) -> None:
    """Write a fitted head into the model, in the model's dtype."""
    layer = model.get_submodule(head)
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(fit.weight)
        if layer.bias is not None and fit.bias is not None:
            layer.bias.copy_(fit.bias)


def _apply(features: Tensor, x: Tensor, bias: bool) -> Tensor:
    """Logits ``(S, N, K)`` of heads ``(S, K, d + bias)``."""
    width = features.shape[1]
    z = features @ x[:, :, :width].mT
    return z + x[:, None, :, width] if bias else z


def _minimise(
    features: Tensor,
    labels: Tensor,
    loss: Loss,
    n_outputs: int,
    bias: bool,
    ridges: Tensor,
    rows: Tensor,
    tolerance: float,
) -> Tensor:
    """Heads ``(S, K, d + bias)`` for ``S`` ridge strengths and row selections ``(S, N)``."""
    width = features.shape[1]
    weights = (rows / rows.sum(1, keepdim=True)).unsqueeze(-1)
    strength = ridges.double()[:, None, None]

    def function(flat: Tensor) -> tuple[Tensor, Tensor]:
        x = flat.view(-1, n_outputs, width + bias)
        z = _apply(features, x, bias)
        weight = x[:, :, :width]
        value = (loss.value(z, labels) * weights[:, :, 0]).sum(1) + 0.5 * (strength * weight.square()).sum((1, 2))
        dz = loss.gradient(z, labels) * weights
        gradient = dz.mT @ features + strength * weight
        if bias:
            gradient = torch.cat([gradient, dz.sum(1)[:, :, None]], 2)
        return value, gradient.flatten(1)

    start = torch.zeros(len(ridges), n_outputs * (width + bias), dtype=torch.float64)
    found = minimize(function, start, tolerance=tolerance, max_evaluations=1000)
    return found.x.view(-1, n_outputs, width + bias)
