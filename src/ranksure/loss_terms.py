"""Terms of trained networks: which rows of a batch carry a loss, and the mean over them, measured or trained.

What a term is and what it costs, the loss itself knows (:mod:`ranksure.losses`).
"""

# pyright: strict

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.choices import Weighting
from ranksure.errors import DataError, SettingError
from ranksure.losses import LOSSES, CrossEntropy, Kind, Loss, get_loss, loss_meant

LossFunction = Callable[..., Tensor]

IGNORED = -100
"""Label of a token or sample that carries no loss, as everywhere in transformers."""

CHUNK_VALUES = 2**22
"""Logits looked at at a time: 16 MiB in float32."""

_ALIGNED = ("ForMaskedLM", "ForTokenClassification")  # position l predicts label l
_SHIFTED = ("ForCausalLM", "ForConditionalGeneration")  # position l predicts label l + 1


@dataclass(frozen=True)
class Terms:
    """Losses of all terms and their weights."""

    kind: Kind  # which loss
    losses: Tensor  # each term's loss, float64 `(T,)`
    weights: Tensor  # each term's share of the mean, float64 `(T,)`, summing to one

    @property
    def loss(self) -> Loss:
        return get_loss(self.kind)

    @property
    def mean(self) -> float:
        return float((self.losses * self.weights).sum())

    @property
    def steepness(self) -> float:
        """Mean of the terms' largest slopes."""
        return float((self.loss.steepness(self.losses) * self.weights).sum())

    @property
    def largest_step(self) -> float:
        """Largest ``c`` that keeps every conjugate's argument in its domain."""
        return self.loss.largest_step(self.losses)

    def dual_line(self, c: float) -> tuple[float, float]:
        """``sum_t w_t psi_t(c)`` (the dual but for ``-c <g, delta>``), and a bound on its rounding error."""
        return self.loss.dual_line(self.losses, self.weights, c)

    def dual_slope(self, c: float) -> float:
        """Derivative of the line; it falls as ``c`` grows."""
        return self.loss.dual_slope(self.losses, self.weights, c)


def kind_of(model_config: object, labels: Tensor, logits: Tensor) -> Kind:
    """Which loss a Hugging Face model trains with on such labels, by its own rules.

    Raises:
        SettingError: the labels fit none.
    """
    if logits.dim() == 3:  # a row of logits for every token
        return CrossEntropy.name
    stated: str | None = getattr(model_config, "problem_type", None)
    classes = labels.numel() == logits.shape[0] and not labels.is_floating_point()
    targets = labels.shape == logits.shape and labels.is_floating_point()
    if stated is None and logits.shape[-1] > 1 and not (classes or targets):
        raise SettingError(
            f"labels of shape {tuple(labels.shape)} and logits of shape {tuple(logits.shape)} fit no known loss: "
            f"say which ({', '.join(LOSSES)})"
        )
    return loss_meant(stated, logits.shape[-1], classes).name


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
    """Rows of logits ``(B, K)`` that carry a label, and their classes.

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
    """Rows and positions of ``(B, L, ...)`` logits or states whose logits carry a loss, and the token ids that are true
    there.

    Labels are ``(B, L)``, -100 where there is no loss; ``shifted``: position ``l`` predicts label ``l + 1``.

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
    """One batch's terms."""

    losses: Tensor  # float64 `(T,)`, on the CPU
    rows: Tensor  # the sample of the batch that each term belongs to, `(T,)`, on the CPU
    gradient: Tensor  # gradient of every term's loss in the logits, unweighted, in the logits' shape and dtype

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
    loss = get_loss(kind)
    logits, labels = logits.detach(), labels.to(logits.device)
    if loss.term == "output":
        losses, slopes = loss.terms(logits.clone(), labels)
        rows = torch.arange(len(losses)).repeat_interleave(losses[0].numel())
        return BatchTerms(losses.flatten().cpu(), rows, slopes.to(logits.dtype))
    index, truth = _labelled(logits.shape, labels, shifted)
    gradient = torch.zeros_like(logits)
    found = [torch.zeros(0, dtype=torch.float64)]
    step = max(1, CHUNK_VALUES // logits.shape[-1])
    for low in range(0, len(truth), step):
        part = tuple(i[low : low + step] for i in index)
        losses, slopes = loss.terms(logits[part], truth[low : low + step])  # indexing copies
        gradient[part] = slopes.to(gradient.dtype)
        found.append(losses.cpu())
    return BatchTerms(torch.cat(found), index[0].cpu(), gradient)


@dataclass(frozen=True)
class MeanLoss:
    """What :func:`mean_loss_function` gives: a loss that says which it is."""

    kind: Kind
    weighting: Weighting

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The mean loss of a batch; over ``num_items_in_batch`` terms where given."""
        logits = _logits(outputs)
        labels = labels.to(logits.device)
        total = _total_loss(get_loss(self.kind), self.weighting, logits, labels)
        count = count_terms(self.kind, self.weighting, labels) if num_items_in_batch is None else num_items_in_batch
        return total / count


def mean_loss_function(kind: Kind, weighting: Weighting = "token") -> LossFunction:
    """A ``compute_loss_func`` for ``Trainer``: a mean over all terms of an optimizer step, however it is accumulated.

    The terms are those of :func:`ranksure.certify`: labels of a classifier, tokens of a causal language model (or
    its samples), outputs of the two others. Without it, ``Trainer`` 5.23 adds up a classifier's micro-batch means
    instead of averaging them (its model takes the loss arguments, and ignores the number of items).

    Args:
        kind: which loss.
        weighting: of a causal language model's tokens. ``sample`` needs the number of samples of the step as
            ``num_items_in_batch``, which ``Trainer`` does not count by itself (``ranksure fit`` does).

    Returns:
        ``(outputs, labels, num_items_in_batch=None) -> loss``; without a number, that of the batch is taken.

    Raises:
        SettingError: an unknown loss.
    """
    return MeanLoss(get_loss(kind).name, weighting)


def count_terms(kind: Kind, weighting: Weighting, labels: Tensor) -> int:
    """Number of terms that a batch adds to the mean."""
    if get_loss(kind).term == "output":
        return labels.numel()
    if labels.dim() < 2:
        return int((labels != IGNORED).sum())
    told = labels[:, 1:] != IGNORED
    return int(told.any(1).sum() if weighting == "sample" else told.sum())


def _total_loss(loss: Loss, weighting: Weighting, logits: Tensor, labels: Tensor) -> Tensor:
    if loss.term == "sample" and logits.dim() == 3:
        (rows, places), truth = _labelled(logits.shape, labels, shifted=True)
        losses = loss.torch_loss(_wide(logits[rows, places]), truth, "none")  # a large vocabulary is wide
        return losses.sum() if weighting == "token" else (losses / torch.bincount(rows)[rows]).sum()
    return loss.torch_loss(_wide(logits), labels)


def _labelled(shape: torch.Size, labels: Tensor, shifted: bool) -> tuple[tuple[Tensor, ...], Tensor]:
    """Indices of the rows of logits that carry a label, and their classes."""
    if len(shape) == 3:
        rows, places, truth = token_places(shape, labels, shifted)
        return (rows, places), truth
    rows, truth = class_rows(shape, labels)
    return (rows,), truth


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _logits(outputs: Any) -> Tensor:
    logits: Any = getattr(outputs, "logits", None)
    if logits is None:
        logits = outputs["logits"] if hasattr(outputs, "keys") else outputs
    if not isinstance(logits, Tensor):  # a tuple
        logits = logits[0]
    assert isinstance(logits, Tensor)
    return logits[:, None] if logits.dim() == 1 else logits
