"""Convex losses on logits: value, gradient, Hessian, conjugate, and their constants.

Shapes: logits ``z`` are ``(..., N, K)`` with any leading batch dimensions; class labels are ``(N,)``
integers, regression and binary targets ``(N, K)`` floats. Per-sample results are ``(..., N)``.
The conjugate is ``f*(a; y) = sup_z <a, z> - f(z; y)`` and infinite outside its domain.

Lipschitz and smoothness constants are with respect to the Euclidean norm of one sample's logits.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

from ranksure.errors import SettingError


class Loss(Protocol):
    """A convex, differentiable loss of one sample's K logits."""

    name: str

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """Loss of each sample, shape ``(..., N)``."""
        ...

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """Gradient with respect to the logits, shape ``(..., N, K)``."""
        ...

    def hessian(self, z: Tensor, y: Tensor) -> Tensor:
        """Hessian with respect to each sample's logits, shape ``(..., N, K, K)``."""
        ...

    def hessian_vector(self, z: Tensor, y: Tensor, dz: Tensor) -> Tensor:
        """Hessian times ``dz``, shape ``(..., N, K)``."""
        ...

    def conjugate(self, a: Tensor, y: Tensor) -> Tensor:
        """Fenchel conjugate at ``a`` of shape ``(..., N, K)``; infinite outside the domain."""
        ...

    def max_dual_step(self, a: Tensor, y: Tensor) -> float:
        """Largest ``c`` with ``c * a`` in the conjugate's domain, for a gradient ``a`` of every sample."""
        ...

    def lipschitz(self, n_outputs: int) -> float:
        """Lipschitz constant in the logits (infinite for squared error)."""
        ...

    def smoothness(self, n_outputs: int) -> float:
        """Lipschitz constant of the gradient in the logits."""
        ...

    def effective_outputs(self, n_outputs: int) -> int:
        """Dimension of the logits that the loss can see (K - 1 for softmax, else K)."""
        ...

    def contrasts(self, n_outputs: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Orthonormal basis ``E``, shape ``(K, C)``, of the logits that the loss can see."""
        ...


class CrossEntropy:
    """Softmax cross-entropy of K >= 2 logits with integer labels."""

    name = "cross-entropy"

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
        worst = float((-_pick(a, y)).max())  # 1 - p_y
        return 1 / worst if worst > 0 else math.inf

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


class Logistic:
    """Binary logistic loss with 0/1 targets, summed over K independent outputs."""

    name = "logistic"

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        # Not softplus(z) - z y: softplus is linear above 20, and the difference loses the small loss of a sure answer.
        zero = torch.zeros_like(z)
        return (y * torch.logaddexp(-z, zero) + (1 - y) * torch.logaddexp(z, zero)).sum(-1)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(z) - y

    def hessian(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.diag_embed(torch.sigmoid(z) * torch.sigmoid(-z))

    def hessian_vector(self, z: Tensor, y: Tensor, dz: Tensor) -> Tensor:
        return torch.sigmoid(z) * torch.sigmoid(-z) * dz

    def conjugate(self, a: Tensor, y: Tensor) -> Tensor:
        p = a + y
        return (_negative_entropy(p) + _negative_entropy(1 - p)).sum(-1)

    def max_dual_step(self, a: Tensor, y: Tensor) -> float:
        worst = float(a.abs().max())
        return 1 / worst if worst > 0 else math.inf

    def lipschitz(self, n_outputs: int) -> float:
        return math.sqrt(n_outputs)

    def smoothness(self, n_outputs: int) -> float:
        return 0.25

    def effective_outputs(self, n_outputs: int) -> int:
        return n_outputs

    def contrasts(self, n_outputs: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.eye(n_outputs, dtype=dtype)


class SquaredError:
    """Half the squared distance ``(1/2) ||z - y||^2`` over K outputs."""

    name = "squared-error"

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (z - y).square().sum(-1)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return z - y

    def hessian(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.eye(z.shape[-1], dtype=z.dtype, device=z.device).expand(*z.shape, z.shape[-1])

    def hessian_vector(self, z: Tensor, y: Tensor, dz: Tensor) -> Tensor:
        return dz

    def conjugate(self, a: Tensor, y: Tensor) -> Tensor:
        return (0.5 * a.square() + a * y).sum(-1)

    def max_dual_step(self, a: Tensor, y: Tensor) -> float:
        return math.inf

    def lipschitz(self, n_outputs: int) -> float:
        return math.inf

    def smoothness(self, n_outputs: int) -> float:
        return 1.0

    def effective_outputs(self, n_outputs: int) -> int:
        return n_outputs

    def contrasts(self, n_outputs: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.eye(n_outputs, dtype=dtype)


LOSSES: dict[str, type[CrossEntropy] | type[Logistic] | type[SquaredError]] = {
    loss.name: loss for loss in (CrossEntropy, Logistic, SquaredError)
}


def get_loss(name: str) -> Loss:
    """The loss of that name: ``cross-entropy``, ``logistic`` or ``squared-error``.

    Raises:
        SettingError: for another name.
    """
    if name not in LOSSES:
        raise SettingError(f"unknown loss {name!r}: use one of {', '.join(LOSSES)}")
    return LOSSES[name]()


def _domain_tolerance(a: Tensor) -> float:
    return 64 * a.shape[-1] * torch.finfo(a.dtype).eps


def _one_hot(z: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(y, z.shape[-1]).to(z.dtype)


def _pick(z: Tensor, y: Tensor) -> Tensor:
    return z.gather(-1, y.expand(z.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def _negative_entropy(p: Tensor) -> Tensor:
    """``p log p`` with 0 at 0; infinite below zero, but for rounding."""
    outside = p < -_domain_tolerance(p)
    p = p.clamp(min=0)
    return torch.where(outside, math.inf, torch.special.xlogy(p, p))


def accuracy(logits: Tensor, labels: Tensor, loss: Loss) -> float | None:
    """Share of rows whose largest logit (or sign) is the label; None for regression."""
    if loss.name == "squared-error":
        return None
    guess = logits.argmax(1) if loss.name == "cross-entropy" else (logits[:, 0] > 0).to(labels.dtype)
    truth = labels if labels.dim() == 1 else labels[:, 0]
    return float((guess == truth).double().mean())


Kind = Literal["cross-entropy", "logistic", "squared-error"]
