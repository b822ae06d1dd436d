"""Losses, each whole: on linearised logits, term by term of a trained network, and in training.

The mean is that of transformers everywhere. A *term* is one loss that it is taken over: a row of logits (a sample, a
token) under cross-entropy, one output under the others. A sample's loss is the mean of its own terms.

Shapes: logits ``z`` are ``(..., N, K)`` with any leading batch dimensions; class labels are ``(N,)`` integers,
regression and binary targets ``(N, K)`` floats. Per-sample results are ``(..., N)``. The conjugate is
``f*(a; y) = sup_z <a, z> - f(z; y)`` and infinite outside its domain. Lipschitz and smoothness constants are with
respect to the Euclidean norm of one sample's logits.

For the certificate of a re-linearised network one number per term is enough, its loss, so that logits are dropped as
soon as they are seen. With ``a`` a term's gradient, ``psi(c) = c <a, z> - f*(c a)``. Derived in docs/is-my-run-done.md.
"""

# pyright: strict

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ranksure.errors import DataError, SettingError

Kind = str
"""The name of a loss, one of ``LOSSES``."""

_EPS = torch.finfo(torch.float64).eps
_NOT_FINITE = "the network's logits are not finite (NaN or infinity) on this data"


class Loss(ABC):
    """A convex, differentiable, nonnegative loss.

    Attributes:
        name: for settings, files and people.
        term: what a term of the mean is: a ``sample`` (one row of logits, labelled by a class) or an ``output``.
        of_classes: whether labels are classes; else numbers.
        problem_type: how the config of a transformers model calls it; None if it has no name there.
        self_concordance: ``M`` such that the third derivative along ``h`` is at most ``M ||h||`` times the second.
    """

    name: ClassVar[str]
    term: ClassVar[Literal["sample", "output"]]
    of_classes: ClassVar[bool]
    problem_type: ClassVar[str | None] = None
    self_concordance: ClassVar[float] = math.inf

    # ---- of one sample's K logits

    @abstractmethod
    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """Loss of each sample, shape ``(..., N)``."""

    @abstractmethod
    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """Gradient with respect to the logits, shape ``(..., N, K)``."""

    @abstractmethod
    def hessian(self, z: Tensor, y: Tensor) -> Tensor:
        """Hessian with respect to each sample's logits, shape ``(..., N, K, K)``."""

    @abstractmethod
    def hessian_vector(self, z: Tensor, y: Tensor, dz: Tensor) -> Tensor:
        """Hessian times ``dz``, shape ``(..., N, K)``."""

    @abstractmethod
    def conjugate(self, a: Tensor, y: Tensor) -> Tensor:
        """Fenchel conjugate at ``a`` of shape ``(..., N, K)``; infinite outside the domain."""

    @abstractmethod
    def max_dual_step(self, a: Tensor, y: Tensor) -> float:
        """Largest ``c`` with ``c * a`` in the conjugate's domain, for a gradient ``a`` of every sample."""

    @abstractmethod
    def lipschitz(self, n_outputs: int) -> float:
        """Lipschitz constant in the logits; infinite if there is none."""

    @abstractmethod
    def smoothness(self, n_outputs: int) -> float:
        """Lipschitz constant of the gradient in the logits."""

    def effective_outputs(self, n_outputs: int) -> int:
        """Dimension ``C`` of the logits that the loss can see."""
        return n_outputs

    def contrasts(self, n_outputs: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Orthonormal basis ``E``, shape ``(K, C)``, of the logits that the loss can see."""
        return torch.eye(n_outputs, dtype=dtype)

    # ---- term by term

    @abstractmethod
    def terms(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Losses of all terms, and their gradients in the logits.

        Args:
            logits: ``(B, K)`` in any dtype; may be overwritten.
            labels: classes ``(B,)``, or targets ``(B, K)`` (``(B,)`` for one output).
            weights: factors of the rows' gradients, ``(B,)``; one by default.

        Returns:
            Losses, float64 ``(B,)`` or ``(B, K)``, and gradients ``(B, K)`` in float32 or wider.

        Raises:
            DataError: labels that do not fit, or logits that are not finite.
        """

    @abstractmethod
    def torch_loss(self, logits: Tensor, labels: Tensor, reduction: Literal["none", "sum"] = "sum") -> Tensor:
        """The terms, or their sum, for autograd: the loss of training. Labels as for :meth:`terms`."""

    @abstractmethod
    def largest_step(self, losses: Tensor) -> float:
        """Largest ``c`` that keeps every term's dual variable ``c a`` in the conjugate's domain."""

    @abstractmethod
    def steepness(self, losses: Tensor) -> Tensor:
        """The largest entry of each term's gradient in the logits, from its loss."""

    @abstractmethod
    def dual_line(self, losses: Tensor, weights: Tensor, c: float) -> tuple[float, float]:
        """``sum_t w_t psi_t(c)`` of float64 losses ``(T,)``, and a bound on its rounding error."""

    @abstractmethod
    def dual_slope(self, losses: Tensor, weights: Tensor, c: float) -> float:
        """Derivative of the line in ``c``; it falls as ``c`` grows."""

    # ---- labels

    def outputs_for(self, n_classes: int | None) -> int:
        """Logits ``K`` per sample for labels of so many classes; None where labels are numbers.

        Raises:
            SettingError: the loss is not one for such labels.
        """
        return 1

    def targets(self, labels: Sequence[float]) -> Tensor:
        """Labels as the loss takes them: class ids ``(N,)``, or float64 targets ``(N, 1)`` for one output."""
        if self.term == "sample":
            return torch.tensor(labels, dtype=torch.long)
        return torch.tensor(labels, dtype=torch.float64)[:, None]

    def right(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """Whether each guess is right, boolean; None where labels are no classes."""
        return None


class OutputLoss(Loss):
    """The mean over a sample's outputs of a loss of one number, given by its value, derivatives and conjugate."""

    term = "output"
    steepest: ClassVar[float]  # Lipschitz constant of one term
    curviest: ClassVar[float]  # largest second derivative of one term

    @abstractmethod
    def each(self, z: Tensor, y: Tensor) -> Tensor:
        """Every term."""

    @abstractmethod
    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        """Every term's derivative."""

    @abstractmethod
    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        """Every term's second derivative."""

    @abstractmethod
    def each_conjugate(self, a: Tensor, y: Tensor) -> Tensor:
        """Every term's conjugate."""

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return self.each(z, y).mean(-1)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return self.slope(z, y) / z.shape[-1]

    def hessian(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.diag_embed(self.curvature(z, y) / z.shape[-1])

    def hessian_vector(self, z: Tensor, y: Tensor, dz: Tensor) -> Tensor:
        return self.curvature(z, y) * dz / z.shape[-1]

    def conjugate(self, a: Tensor, y: Tensor) -> Tensor:
        # sup_z sum_k a_k z_k - f_k(z_k) / K, output by output
        return self.each_conjugate(a.shape[-1] * a, y).mean(-1)

    def lipschitz(self, n_outputs: int) -> float:
        return self.steepest / math.sqrt(n_outputs)

    def smoothness(self, n_outputs: int) -> float:
        return self.curviest / n_outputs

    def terms(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if labels.numel() != logits.numel() or labels.shape[0] != logits.shape[0]:
            raise DataError(f"targets of shape {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
        z = logits.detach().double()
        y = labels.reshape(z.shape).to(z)
        if not bool(torch.isfinite(z).all()):
            raise DataError(_NOT_FINITE)
        if not bool(torch.isfinite(y).all()):
            raise DataError("targets hold a value that is not finite (NaN or infinity)")
        slopes = self.slope(z, y)
        return self.each(z, y), slopes if weights is None else slopes * weights.to(slopes)[:, None]

    def torch_loss(self, logits: Tensor, labels: Tensor, reduction: Literal["none", "sum"] = "sum") -> Tensor:
        found = self.each(logits, labels.to(logits).reshape(logits.shape))
        return found.sum() if reduction == "sum" else found


class _LogLoss(Loss):
    """What losses ``-log p`` of the true label's probability share.

    ``psi(c) = -c (1 - p)(log p + log c) - q log q`` with ``q = 1 - c (1 - p)``.
    """

    of_classes = True

    def steepness(self, losses: Tensor) -> Tensor:
        return -torch.expm1(-losses)  # 1 - p

    def largest_step(self, losses: Tensor) -> float:
        return _inverse(self.steepness(losses))

    def dual_line(self, losses: Tensor, weights: Tensor, c: float) -> tuple[float, float]:
        if c == 0:
            return 0.0, 0.0
        off = c * self.steepness(losses)
        if bool((off > 1).any()):
            return -math.inf, 0.0
        keep = off < 1  # q log q -> 0 at q = 0
        own = torch.where(keep, (1 - off) * torch.log1p(-off.where(keep, off.new_zeros(()))), 0.0)
        parts = torch.stack([off * losses, -off * math.log(c), -own])
        # 1 - off is wrong by eps off, not by eps q, and log q is at least log eps: hence 64 off beside |q log q|.
        size = parts.abs().sum(0) + off
        return float((parts.sum(0) * weights).sum()), (len(off) + 64) * _EPS * float((size * weights).sum())

    def dual_slope(self, losses: Tensor, weights: Tensor, c: float) -> float:
        """``sum_t w_t (1 - p_t)(log q_t - log p_t - log c)``."""
        wrong = self.steepness(losses)
        inner = losses - math.log(c) + torch.log1p(-(c * wrong).clamp(max=1))
        return float((weights * wrong * inner).where(wrong > 0, 0.0).sum())


class CrossEntropy(_LogLoss):
    """Softmax cross-entropy of K >= 2 logits with integer labels."""

    name = "cross-entropy"
    term = "sample"
    problem_type = "single_label_classification"
    self_concordance = math.sqrt(2)  # a third central moment is at most the range times the variance

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.logsumexp(z, -1) - _pick(z, y)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        p = torch.softmax(z, -1)
        return p.sub_(_one_hot(z, y))

    def hessian(self, z: Tensor, y: Tensor) -> Tensor:
        p = torch.softmax(z, -1)
        return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)

    def hessian_vector(self, z: Tensor, y: Tensor, dz: Tensor) -> Tensor:
        p = torch.softmax(z, -1)
        return p * (dz - (p * dz).sum(-1, keepdim=True))

    def conjugate(self, a: Tensor, y: Tensor) -> Tensor:
        p = a + _one_hot(a, y)
        off = (p.sum(-1) - 1).abs() > _domain_tolerance(a)
        return torch.where(off, math.inf, _negative_entropy(p).sum(-1))

    def max_dual_step(self, a: Tensor, y: Tensor) -> float:
        return _inverse(-_pick(a, y))  # 1 - p_y

    def lipschitz(self, n_outputs: int) -> float:
        return math.sqrt(2)

    def smoothness(self, n_outputs: int) -> float:
        return 0.5

    def effective_outputs(self, n_outputs: int) -> int:
        return n_outputs - 1

    def contrasts(self, n_outputs: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Helmert contrasts: orthonormal, each summing to zero."""
        k = torch.arange(1, n_outputs, dtype=dtype)
        basis = torch.triu(torch.ones(n_outputs, n_outputs - 1, dtype=dtype))
        basis[torch.arange(1, n_outputs), torch.arange(n_outputs - 1)] = -k
        return basis / torch.sqrt(k * (k + 1))

    def terms(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As everywhere, made for vocabularies: few passes over the memory, and none beside the gradient's own.

        ``loss = log(1 + exp(l - z_y))``, ``l`` the logsumexp of the *other* logits, which keeps its relative
        precision where ``p`` is near one.
        """
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= logits.shape[-1]):
            bad = int(labels.max()) if int(labels.max()) >= logits.shape[-1] else int(labels.min())
            raise DataError(f"label {bad} is out of range: the model has {logits.shape[-1]} outputs")
        index = labels[:, None]
        z = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
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

    def torch_loss(self, logits: Tensor, labels: Tensor, reduction: Literal["none", "sum"] = "sum") -> Tensor:
        return F.cross_entropy(logits, labels, reduction=reduction)  # leaves -100 out

    def outputs_for(self, n_classes: int | None) -> int:
        if n_classes is None:
            raise SettingError(f"{self.name} needs class labels; for float targets use `loss` {SquaredError.name}")
        return n_classes

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.argmax(-1) == labels


class Logistic(OutputLoss, _LogLoss):
    """Binary logistic loss with 0/1 targets, of independent outputs.

    It is the cross-entropy of the two logits (0, z).
    """

    name = "logistic"
    problem_type = "multi_label_classification"
    self_concordance = 1.0
    steepest, curviest = 1.0, 0.25

    def each(self, z: Tensor, y: Tensor) -> Tensor:
        # Not softplus(z) - z y, which loses the small loss of a sure answer; torch's own threshold of 20 loses it too.
        return y * F.softplus(-z, threshold=40) + (1 - y) * F.softplus(z, threshold=40)

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        return (1 - y) * torch.sigmoid(z) - y * torch.sigmoid(-z)

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(z) * torch.sigmoid(-z)

    def each_conjugate(self, a: Tensor, y: Tensor) -> Tensor:
        p = a + y
        return _negative_entropy(p) + _negative_entropy(1 - p)

    def max_dual_step(self, a: Tensor, y: Tensor) -> float:
        return _inverse(a.shape[-1] * a.abs())

    def terms(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not bool(((labels == 0) | (labels == 1)).all()):
            raise DataError("targets of the logistic loss must be 0 or 1")
        return super().terms(logits, labels, weights)

    def outputs_for(self, n_classes: int | None) -> int:
        if n_classes != 2:
            found = "float targets" if n_classes is None else f"{n_classes} classes"
            raise SettingError(
                f"the logistic loss needs two classes, but the data has {found}: use `loss` "
                f"{SquaredError.name if n_classes is None else CrossEntropy.name}"
            )
        return 1

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits > 0) == (labels.reshape(logits.shape) > 0.5)


class SquaredError(OutputLoss):
    """The squared distance ``(z - y)^2`` of every output, without a half."""

    name = "squared-error"
    of_classes = False
    problem_type = "regression"
    self_concordance = 0.0
    steepest, curviest = math.inf, 2.0

    def each(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).square()

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        return 2 * (z - y)

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(z, 2.0)

    def each_conjugate(self, a: Tensor, y: Tensor) -> Tensor:
        return 0.25 * a.square() + a * y

    def max_dual_step(self, a: Tensor, y: Tensor) -> float:
        return math.inf

    def steepness(self, losses: Tensor) -> Tensor:
        return 2 * losses.sqrt()

    def largest_step(self, losses: Tensor) -> float:
        return math.inf

    def dual_line(self, losses: Tensor, weights: Tensor, c: float) -> tuple[float, float]:
        """``psi(c) = (2 c - c^2) loss``."""
        mean = float((losses * weights).sum())
        return (2 * c - c * c) * mean, (len(losses) + 8) * _EPS * (2 * c + c * c) * mean

    def dual_slope(self, losses: Tensor, weights: Tensor, c: float) -> float:
        return (2 - 2 * c) * float((losses * weights).sum())


LOSSES: dict[str, Loss] = {loss.name: loss for loss in (CrossEntropy(), Logistic(), SquaredError())}


def get_loss(name: str) -> Loss:
    """The loss of that name: ``cross-entropy``, ``logistic`` or ``squared-error``.

    Raises:
        SettingError: for another name.
    """
    if name not in LOSSES:
        raise SettingError(f"unknown loss {name!r}: use one of {', '.join(LOSSES)}")
    return LOSSES[name]


def loss_meant(problem_type: str | None, n_outputs: int, classes: bool = True) -> Loss:
    """The loss that transformers trains a sequence classifier with, by its own rules.

    Args:
        problem_type: of the model's config, which may state none.
        n_outputs: logits per sample.
        classes: labels are class ids.

    Raises:
        SettingError: a problem type that no loss has.
    """
    if problem_type is None:
        return get_loss(SquaredError.name if n_outputs == 1 else CrossEntropy.name if classes else Logistic.name)
    for loss in LOSSES.values():
        if loss.problem_type == problem_type:
            return loss
    raise SettingError(f"no loss is known for problem_type {problem_type!r}: say which ({', '.join(LOSSES)})")


def accuracy(logits: Tensor, labels: Tensor, loss: Loss) -> float | None:
    """Share of guesses that are right; None where labels are no classes."""
    right = loss.right(logits, labels)
    return None if right is None else float(right.double().mean())


def _inverse(sizes: Tensor) -> float:
    """One over the largest; infinite where none is positive."""
    largest = float(sizes.max()) if sizes.numel() else 0.0
    return 1 / largest if largest > 0 else math.inf


def _domain_tolerance(a: Tensor) -> float:
    return 64 * a.shape[-1] * torch.finfo(a.dtype).eps


def _one_hot(z: Tensor, y: Tensor) -> Tensor:
    return F.one_hot(y, z.shape[-1]).to(z.dtype)


def _pick(z: Tensor, y: Tensor) -> Tensor:
    return z.gather(-1, y.expand(z.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def _negative_entropy(p: Tensor) -> Tensor:
    """``p log p`` with 0 at 0; infinite below zero, but for rounding."""
    outside = p < -_domain_tolerance(p)
    p = p.clamp(min=0)
    return torch.where(outside, math.inf, torch.xlogy(p, p))
