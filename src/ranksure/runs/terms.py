"""Losses of trained networks, term by term: what a pass over the data has to keep of each.

A *term* is one loss that the mean is taken over: a sample's cross-entropy, a token's, one output's
binary cross-entropy or squared error. For the certificate of the re-linearised model one number per
term is enough (derived in docs/is-my-run-done.md): with ``p`` the probability of the true label,
``psi(c) = -c (1 - p)(log p + log c) - q log q`` with ``q = 1 - c (1 - p)``; for squared error
``psi(c) = (2 c - c^2) loss``. Logits are dropped as soon as they are seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ranksure.errors import DataError, SettingError

Kind = Literal["cross-entropy", "logistic", "squared-error"]
IGNORED = -100
"""Label of a token that carries no loss, as everywhere in transformers."""

_CHUNK = 128


@dataclass(frozen=True)
class Terms:
    """Losses of all terms and their weights.

    Attributes:
        kind: which loss.
        losses: each term's loss, float64 ``(T,)``; ``-log p`` for the two entropies.
        weights: each term's share of the mean, float64 ``(T,)``, summing to one.
    """

    kind: Kind
    losses: Tensor
    weights: Tensor

    @property
    def mean(self) -> float:
        """The mean loss."""
        return float((self.losses * self.weights).sum())

    @property
    def largest_step(self) -> float:
        """Largest ``c`` that keeps every conjugate's argument in its domain."""
        if self.kind == "squared-error":
            return math.inf
        wrong = float((-torch.expm1(-self.losses)).max()) if len(self.losses) else 0.0
        return 1 / wrong if wrong > 0 else math.inf

    def dual_line(self, steps: Tensor) -> Tensor:
        """``sum_t w_t psi_t(c)`` for every ``c`` of ``steps`` ``(S,)``: the dual but for ``-c <g, delta>``."""
        out = torch.empty_like(steps)
        for index, c in enumerate(steps.tolist()):
            if self.kind == "squared-error":
                out[index] = (2 * c - c * c) * self.mean
                continue
            wrong = -torch.expm1(-self.losses)  # 1 - p
            q = 1 - c * wrong
            own = torch.where(q > 0, q * torch.log(q.clamp(min=1e-300)), torch.where(q < 0, math.inf, 0.0))
            shift = math.log(c) if c > 0 else 0.0
            line = c * wrong * (self.losses - shift) - own
            out[index] = (line * self.weights).sum()
        return out


def kind_of(model_config: object, labels: Tensor, logits: Tensor) -> Kind:
    """Which loss a Hugging Face model trains with on such labels, by its own rules.

    Raises:
        SettingError: the labels fit none.
    """
    stated = getattr(model_config, "problem_type", None)
    if logits.dim() == 3 or stated == "single_label_classification":
        return "cross-entropy"
    if stated == "regression":
        return "squared-error"
    if stated == "multi_label_classification":
        return "logistic"
    if logits.shape[-1] == 1:
        return "squared-error"
    if labels.dim() == 1 and not labels.is_floating_point():
        return "cross-entropy"
    if labels.shape == logits.shape and labels.is_floating_point():
        return "logistic"
    raise SettingError(
        f"labels of shape {tuple(labels.shape)} and logits of shape {tuple(logits.shape)} fit no known loss: "
        "say which (cross-entropy, logistic, squared-error)"
    )


@dataclass(frozen=True)
class BatchTerms:
    """One batch's terms.

    Attributes:
        losses: float64 ``(T,)``.
        rows: the sample of the batch that each term belongs to, ``(T,)``.
        gradient: gradient of every term's loss in the logits, unweighted, in the logits' shape.
    """

    losses: Tensor
    rows: Tensor
    gradient: Tensor

    def seed(self, weights: Tensor) -> Tensor:
        """The gradient with its terms weighted, ``weights`` ``(rows,)``."""
        shape = (-1,) + (1,) * (self.gradient.dim() - 1)
        return self.gradient * weights.to(self.gradient).view(shape)


def batch_terms(kind: Kind, logits: Tensor, labels: Tensor) -> BatchTerms:
    """Losses and gradients of one batch.

    Args:
        kind: which loss.
        logits: ``(B, K)``, or ``(B, L, V)`` of a causal language model (position ``l`` predicts label ``l + 1``).
        labels: class ids ``(B,)``, float targets like the logits (or ``(B,)`` for one output), or token ids
            ``(B, L)`` with -100 where there is no loss.

    Raises:
        DataError: labels that do not fit, a class out of range, no label at all, or logits that are not finite.
    """
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(wide.device)
    if kind != "cross-entropy":
        return _elementwise(kind, wide, labels)
    gradient = torch.zeros_like(wide)
    if wide.dim() == 3:
        if labels.shape != wide.shape[:2]:
            raise DataError(f"token labels of shape {tuple(labels.shape)} do not fit logits {tuple(wide.shape)}")
        where = (labels[:, 1:] != IGNORED).nonzero()
        rows, places = where[:, 0], where[:, 1]
        truth = labels[:, 1:][rows, places]
    else:
        if labels.shape != wide.shape[:1]:
            raise DataError(f"class labels of shape {tuple(labels.shape)} do not fit logits {tuple(wide.shape)}")
        rows = torch.arange(len(labels), device=wide.device)
        places, truth = None, labels.long()
    if len(truth) and (int(truth.min()) < 0 or int(truth.max()) >= wide.shape[-1]):
        bad = int(truth.max()) if int(truth.max()) >= wide.shape[-1] else int(truth.min())
        raise DataError(f"label {bad} is out of range: the model has {wide.shape[-1]} outputs")
    losses: list[Tensor] = []
    for low in range(0, len(truth), _CHUNK):  # a large vocabulary is wide: float64 for a few rows at a time
        part = slice(low, low + _CHUNK)
        chosen = (wide[part] if places is None else wide[rows[part], places[part]]).double()
        _check_finite(chosen)
        log_p = F.log_softmax(chosen, -1)
        top = log_p.gather(1, truth[part, None])
        slope = log_p.exp_().scatter_(1, truth[part, None], torch.expm1(top)).to(gradient)
        if places is None:
            gradient[part] = slope
        else:
            gradient[rows[part], places[part]] = slope
        losses.append(-top[:, 0])
    found = torch.cat(losses).clamp(min=0) if losses else torch.zeros(0, dtype=torch.float64)
    return BatchTerms(found.cpu(), rows.cpu(), gradient)


def _elementwise(kind: Kind, wide: Tensor, labels: Tensor) -> BatchTerms:
    targets = labels.to(wide).reshape(wide.shape) if labels.numel() == wide.numel() else None
    if targets is None:
        raise DataError(f"targets of shape {tuple(labels.shape)} do not fit logits {tuple(wide.shape)}")
    _check_finite(wide)
    rows = torch.arange(wide.shape[0]).repeat_interleave(wide[0].numel())
    z, y = wide.double(), targets.double()
    if kind == "logistic":
        if not bool(((y == 0) | (y == 1)).all()):
            raise DataError("targets of the logistic loss must be 0 or 1")
        losses = F.softplus(torch.where(y == 1, -z, z))
        gradient = torch.sigmoid(z) - y
    else:
        losses, gradient = (z - y).square(), 2 * (z - y)  # as torch's mse_loss, without the half
    return BatchTerms(losses.flatten().cpu(), rows, gradient.to(wide))


def _check_finite(logits: Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise DataError("the network's logits are not finite (NaN or infinity) on this data")
