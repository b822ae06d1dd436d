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

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksure.errors import DataError, SettingError
from ranksure.losses import Kind

IGNORED = -100
"""Label of a token or sample that carries no loss, as everywhere in transformers."""

CHUNK_VALUES = 2**22
"""Logits looked at at a time: 16 MiB in float32."""

_ALIGNED = ("ForMaskedLM", "ForTokenClassification")  # position l predicts label l
_SHIFTED = ("ForCausalLM", "ForConditionalGeneration")  # position l predicts label l + 1
_EPS = torch.finfo(torch.float64).eps


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

    def dual_line(self, c: float) -> tuple[float, float]:
        """``sum_t w_t psi_t(c)`` (the dual but for ``-c <g, delta>``), and a bound on its rounding error."""
        if self.kind == "squared-error":
            value = (2 * c - c * c) * self.mean
            return value, (len(self.losses) + 8) * _EPS * (2 * c + c * c) * self.mean
        if c == 0:
            return 0.0, 0.0
        wrong = -torch.expm1(-self.losses)  # 1 - p
        off = c * wrong
        if bool((off > 1).any()):
            return -math.inf, 0.0
        keep = off < 1  # q log q -> 0 at q = 0
        own = torch.where(keep, (1 - off) * torch.log1p(-off.where(keep, off.new_zeros(()))), 0.0)
        parts = torch.stack([off * self.losses, -off * math.log(c), -own])
        # 1 - off is wrong by eps off, not by eps q, and log q is at least log eps: hence 64 off beside |q log q|.
        size = parts.abs().sum(0) + off
        return float((parts.sum(0) * self.weights).sum()), (len(off) + 64) * _EPS * float((size * self.weights).sum())

    def dual_slope(self, c: float) -> float:
        """Derivative of the line, ``sum_t w_t (1 - p_t)(log q_t - log p_t - log c)``; it falls as ``c`` grows."""
        if self.kind == "squared-error":
            return (2 - 2 * c) * self.mean
        wrong = -torch.expm1(-self.losses)
        inner = self.losses - math.log(c) + torch.log1p(-(c * wrong).clamp(max=1))
        return float((self.weights * wrong * inner).where(wrong > 0, 0.0).sum())


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
    if labels.numel() == logits.shape[0] and not labels.is_floating_point():
        return "cross-entropy"
    if labels.shape == logits.shape and labels.is_floating_point():
        return "logistic"
    raise SettingError(
        f"labels of shape {tuple(labels.shape)} and logits of shape {tuple(logits.shape)} fit no known loss: "
        "say which (cross-entropy, logistic, squared-error)"
    )


def is_shifted(model: nn.Module) -> bool:
    """Whether a network with one row of logits per token predicts the *next* label, as causal ones do.

    By the loss that a transformers model names as its own; a network that names none counts as causal.

    Raises:
        SettingError: it names a loss that is not one term per token.
    """
    loss_type = getattr(model, "loss_type", None)
    if loss_type is None or loss_type in _SHIFTED:
        return True
    if loss_type in _ALIGNED:
        return False
    raise SettingError(f"the loss of a model {loss_type} is not one that a certificate knows")


def class_rows(logits_shape: torch.Size, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that carry a label, and their classes.

    Args:
        logits_shape: ``(B, K)``.
        labels: class ids, ``B`` of them.

    Raises:
        DataError: labels that do not fit.
    """
    if labels.numel() != logits_shape[0] or labels.is_floating_point():
        kind = "float" if labels.is_floating_point() else "class"
        raise DataError(f"{kind} labels of shape {tuple(labels.shape)} do not fit logits {tuple(logits_shape)}")
    labels = labels.reshape(-1)
    rows = (labels != IGNORED).nonzero()[:, 0]
    return rows, labels[rows].long()


def token_places(shape: torch.Size, labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and positions whose logits carry a loss, and the token ids that are true there.

    Args:
        shape: ``(B, L, ...)`` of logits or hidden states.
        labels: ``(B, L)``, -100 where there is no loss.
        shifted: position ``l`` predicts label ``l + 1``.

    Raises:
        DataError: labels that do not fit.
    """
    if labels.shape != shape[:2] or labels.is_floating_point():
        raise DataError(f"token labels of shape {tuple(labels.shape)} do not fit logits {tuple(shape)}")
    found = (labels[:, 1:] if shifted else labels) != IGNORED
    where = found.nonzero()
    rows, places = where[:, 0], where[:, 1]
    return rows, places, labels[rows, places + int(shifted)].long()


@dataclass(frozen=True)
class BatchTerms:
    """One batch's terms.

    Attributes:
        losses: float64 ``(T,)``, on the CPU.
        rows: the sample of the batch that each term belongs to, ``(T,)``, on the CPU.
        gradient: gradient of every term's loss in the logits, unweighted, in the logits' shape and dtype.
    """

    losses: Tensor
    rows: Tensor
    gradient: Tensor

    def seed(self, weights: Tensor) -> Tensor:
        """The gradient with its terms weighted, ``weights`` ``(rows,)``."""
        shape = (-1,) + (1,) * (self.gradient.dim() - 1)
        return self.gradient * weights.to(self.gradient).view(shape)


def batch_terms(kind: Kind, logits: Tensor, labels: Tensor, shifted: bool = True) -> BatchTerms:
    """Losses and gradients of one batch.

    Args:
        kind: which loss.
        logits: ``(B, K)``, or ``(B, L, V)`` with one row per token.
        labels: class ids ``(B,)``, float targets like the logits (or ``(B,)`` for one output), or token ids
            ``(B, L)``; -100 where there is no loss.
        shifted: position ``l`` predicts label ``l + 1`` (a causal language model).

    Raises:
        DataError: labels that do not fit, a class out of range, or logits that are not finite.
    """
    logits, labels = logits.detach(), labels.to(logits.device)
    if kind != "cross-entropy":
        losses, slopes = elementwise(kind, logits, labels)
        rows = torch.arange(len(losses)).repeat_interleave(losses[0].numel())
        return BatchTerms(losses.flatten().cpu(), rows, slopes.to(logits.dtype))
    if logits.dim() == 3:
        rows, places, truth = token_places(logits.shape, labels, shifted)
        index: tuple[Tensor, ...] = (rows, places)
    else:
        rows, truth = class_rows(logits.shape, labels)
        index = (rows,)
    gradient = torch.zeros_like(logits)
    found = [torch.zeros(0, dtype=torch.float64)]
    step = max(1, CHUNK_VALUES // logits.shape[-1])
    for low in range(0, len(rows), step):
        part = tuple(i[low : low + step] for i in index)
        losses, slopes = cross_entropy(logits[part], truth[low : low + step], overwrite=True)  # indexing copies
        gradient[part] = slopes.to(gradient.dtype)
        found.append(losses.cpu())
    return BatchTerms(torch.cat(found), rows.cpu(), gradient)


def cross_entropy(
    logits: Tensor, truth: Tensor, weights: Tensor | None = None, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Losses, float64 ``(T,)``, and their gradients in the logits, ``(T, K)`` in float32 or wider.

    ``loss = log(1 + exp(l - z_y))``, ``l`` the logsumexp of the *other* logits, which keeps its relative precision
    where ``p`` is near one. Few passes over the memory, and no memory beside the gradient's own.

    Args:
        logits: ``(T, K)``.
        truth: classes ``(T,)``.
        weights: factors of the gradients, ``(T,)``; one by default.
        overwrite: the logits are not needed any more.

    Raises:
        DataError: a class out of range, or logits that are not finite.
    """
    if len(truth) and (int(truth.min()) < 0 or int(truth.max()) >= logits.shape[-1]):
        bad = int(truth.max()) if int(truth.max()) >= logits.shape[-1] else int(truth.min())
        raise DataError(f"label {bad} is out of range: the model has {logits.shape[-1]} outputs")
    index = truth[:, None]
    z = logits.detach().to(torch.promote_types(logits.dtype, torch.float32), copy=not overwrite)
    own = z.gather(1, index)
    z.scatter_(1, index, -math.inf)
    top = z.amax(1, keepdim=True)
    top = top.where(top > -math.inf, 0.0)
    z.sub_(top).exp_()
    others = (z.sum(1, keepdim=True).log() + (top - own))[:, 0]
    losses = F.softplus(others.double(), threshold=40)
    if not bool(torch.isfinite(own).all() and torch.isfinite(losses).all()):
        raise DataError(_NOT_FINITE)
    weights = torch.ones_like(losses) if weights is None else weights.to(losses)
    share = weights * torch.exp((top - own)[:, 0].double() - losses)
    z.mul_(share.to(z)[:, None]).scatter_(1, index, -(weights * torch.sigmoid(others.double())).to(z)[:, None])
    return losses, z


def elementwise(kind: Kind, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of every output, float64, and their gradients, float64, both ``(B, K)``: logistic or squared error.

    Args:
        kind: ``logistic``, or ``squared-error`` (without a half, as torch's ``mse_loss``).
        logits: ``(B, K)``.
        labels: targets of the same shape, or ``(B,)`` for one output.

    Raises:
        DataError: targets that do not fit, or logits that are not finite.
    """
    if labels.numel() != logits.numel() or labels.shape[0] != logits.shape[0]:
        raise DataError(f"targets of shape {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
    z = logits.detach().double()
    y = labels.reshape(z.shape).to(z)
    if not bool(torch.isfinite(z).all()):
        raise DataError(_NOT_FINITE)
    if kind == "logistic":
        if not bool(((y == 0) | (y == 1)).all()):
            raise DataError("targets of the logistic loss must be 0 or 1")
        signed = torch.where(y == 1, z, -z)
        return F.softplus(-signed, threshold=40), torch.where(y == 1, -1.0, 1.0) * torch.sigmoid(-signed)
    if not bool(torch.isfinite(y).all()):
        raise DataError("targets hold a value that is not finite (NaN or infinity)")
    return (z - y).square(), 2 * (z - y)


_NOT_FINITE = "the network's logits are not finite (NaN or infinity) on this data"
