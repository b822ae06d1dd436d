# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The linearised fine-tuning problem: operator, labels, loss and penalty together.

``F(delta) = sum_i w_i loss(z_i, y_i) + sum_j lambda_j ||delta_j||_*`` with linearised logits
``z = base + A(delta) E^T``. On LoRA factors the penalty is ``(lambda_j / 2)(||u_j||^2 + ||v_j||^2)``,
which is at least the nuclear norm and equal to it at balanced factors. A linear term
``sum_j <linear_j, delta_j>`` may be added: perturbed problems (Theorem 4.1) have one.

Logits, labels and weights stay in float64 whatever the operator is stored in: only what goes through
the operator is rounded to its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ranksure.errors import SettingError
from ranksure.factors import Factors
from ranksure.losses import Loss
from ranksure.operators.base import TangentOperator
from ranksure.operators.span import SpanBases

_FAR = 2.0**14  # of lambda from F(0): up to there steps of length one suit a factor's size


@dataclass(frozen=True)
class Problem:
    """A linearised problem; see the module's docstring for the objective.

    Attributes:
        operator: tangent operator with ``N`` samples and ``C`` contrasts.
        base_logits: pretrained logits, ``(N, K)``.
        labels: ``(N,)`` integers, or ``(N, K)`` floats.
        loss: convex loss of the logits.
        penalty: ``lambda_j > 0`` by block name.
        weights: positive sample weights, ``(N,)``; ``1 / N`` by default.
        linear: linear term by block name, each ``(m, n)`` with ``||linear_j||_op < lambda_j``; none by default.

    Raises:
        SettingError: a penalty or a weight is missing, not positive or not finite, or a linear term is too large.
    """

    operator: TangentOperator
    base_logits: Tensor
    labels: Tensor
    loss: Loss
    penalty: Mapping[str, float]
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    linear: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        op = self.operator
        for name in op.shapes:
            value = self.penalty.get(name)
            if value is None or not 0 < value < float("inf"):
                raise SettingError(
                    f"the penalty lambda of {name} is {value}; it must be positive and finite (at 0 the dual is "
                    "trivial and cross-entropy may have no minimiser)"
                )
        weights = self.weights
        if weights.numel() == 0:
            weights = torch.full((op.n_samples,), 1 / op.n_samples, dtype=torch.float64)
        if weights.shape != (op.n_samples,) or not bool(((weights > 0) & torch.isfinite(weights)).all()):
            raise SettingError(f"sample weights must be {op.n_samples} positive, finite numbers")
        for name, term in self.linear.items():
            if name not in op.shapes or tuple(term.shape) != op.shapes[name]:
                raise SettingError(f"the linear term of {name} does not fit the operator's blocks")
            if not float(torch.linalg.matrix_norm(term.double(), 2)) < self.penalty[name]:
                raise SettingError(
                    f"the linear term of {name} has a spectral norm of at least lambda = {self.penalty[name]:g}: "
                    "the objective would not be bounded below"
                )
        object.__setattr__(self, "linear", {n: t.to(op.device, torch.float64) for n, t in self.linear.items()})
        labels = self.labels.to(op.device)
        object.__setattr__(self, "weights", weights.to(op.device, torch.float64))
        object.__setattr__(self, "labels", labels.double() if labels.is_floating_point() else labels)
        object.__setattr__(self, "base_logits", self.base_logits.to(op.device, torch.float64))

    @property
    def n_logits(self) -> int:
        """Number of logits ``K`` per sample."""
        return self.base_logits.shape[1]

    @cached_property
    def contrasts(self) -> Tensor:
        """``E``, shape ``(K, C)``."""
        return self.loss.contrasts(self.n_logits).to(self.operator.device)

    @cached_property
    def objective_at_zero(self) -> float:
        """``F(0)``, the loss of the pretrained network."""
        return float(self.data_loss(self.base_logits))

    def with_penalty(self, penalty: float | Mapping[str, float]) -> Problem:
        """The same problem at another lambda; what was prepared for the operator is kept."""
        other = replace(self, penalty=uniform_penalty(self.operator, penalty))
        other.__dict__["objective_at_zero"] = self.objective_at_zero
        if "reduced" in self.__dict__:
            reduced, bases = self.reduced
            other.__dict__["reduced"] = (replace(reduced, penalty=other.penalty), bases)
        if self.scales == other.scales:
            penalty = {name: lam / self.scales.get(name, 1.0) for name, lam in other.penalty.items()}
            if "working" in self.__dict__:
                working, bases = self.working
                other.__dict__["working"] = (replace(working, penalty=penalty), bases)
            if "single" in self.__dict__:
                other.__dict__["single"] = replace(self.single, penalty=penalty)
        return other

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem with the operator in another dtype (itself if nothing changes)."""
        return self if dtype == self.operator.dtype else replace(self, operator=self.operator.to(dtype))

    @property
    def exact(self) -> Problem:
        """The problem in float64; in the network's own dtype where the operator holds no gradients."""
        return self.to(torch.float64) if self.operator.is_stored else self

    def subset(self, samples: Tensor, weights: Tensor | None = None) -> Problem:
        """The problem on some samples.

        Args:
            samples: their distinct numbers, in the order wanted.
            weights: of these samples, in that order; equal ones by default.

        Raises:
            SettingError: an operator that holds no gradients, or weights that are not positive.
        """
        samples = samples.to(self.operator.device)
        return replace(
            self,
            operator=self.operator.select(samples),
            base_logits=self.base_logits[samples],
            labels=self.labels[samples],
            weights=torch.empty(0) if weights is None else weights,
        )

    @cached_property
    def reduced(self) -> tuple[Problem, SpanBases]:
        """The same problem in float64 on the span of its tokens, and the way back.

        A linear term need not lie in the span, so problems that have one are only promoted.
        """
        if self.linear:
            return self.exact, SpanBases()
        operator, bases = self.operator.reduced()
        return (self if operator is self.operator else replace(self, operator=operator)), bases

    @cached_property
    def scales(self) -> dict[str, float]:
        """``s_j = lambda_j / F(0)``, by which the updates are to be multiplied for descent.

        With ``s_j delta_j`` for ``delta_j``, ``A_j / s_j`` for ``A_j`` and ``lambda_j / s_j`` for ``lambda_j`` it is
        the same problem, and a solver's work no longer depends on the units of the blocks. Empty where the lambdas
        are alike and not far from ``F(0)``: then nothing would be won.
        """
        unit, lams = self.objective_at_zero, [self.penalty[name] for name in self.operator.shapes]
        if not 0 < unit < math.inf or (max(lams) <= 2 * min(lams) and unit / _FAR <= min(lams) <= _FAR * unit):
            return {}
        scales = {name: lam / unit for name, lam in zip(self.operator.shapes, lams, strict=True)}
        return scales if all(0 < scale < math.inf for scale in scales.values()) else {}

    @cached_property
    def equilibrated(self) -> Problem:
        """The same problem in updates multiplied by :attr:`scales` (itself where there are none)."""
        if not self.scales:
            return self
        return replace(
            self,
            operator=self.operator.scaled({name: 1 / scale for name, scale in self.scales.items()}),
            penalty={name: self.penalty[name] / scale for name, scale in self.scales.items()},
            linear={name: term / self.scales[name] for name, term in self.linear.items()},
        )

    @cached_property
    def working(self) -> tuple[Problem, SpanBases]:
        """The problem that solvers descend, :attr:`reduced` and :attr:`equilibrated`, and the way back."""
        reduced, bases = self.reduced
        return reduced.equilibrated, replace(bases, scales=self.scales)

    @cached_property
    def single(self) -> Problem:
        """The working problem with its operator in float32; shares the stored one where it can."""
        working, bases = self.working
        if bases.is_trivial and self.operator.dtype == torch.float32:
            return self
        return working.to(torch.float32)

    # ---- values in the space of logits

    def logits(self, contrast_values: Tensor) -> Tensor:
        """Linearised logits ``(..., N, K)`` from contrast values ``(..., N, C)``."""
        return self.base_logits + contrast_values.double() @ self.contrasts.T

    def data_loss(self, logits: Tensor) -> Tensor:
        """Weighted loss, one value for each leading batch entry."""
        return (self.loss.value(logits, self.labels) * self.weights).sum(-1)

    def dual_variable(self, logits: Tensor) -> Tensor:
        """Weighted gradient ``R`` with respect to the logits, ``(..., N, K)``."""
        return self.loss.gradient(logits, self.labels) * self.weights[:, None]

    def dual_value(self, dual: Tensor) -> float:
        """``D(R) = <R, base> - sum_i w_i conj(R_i / w_i; y_i)``; feasibility is the caller's to check."""
        linear = (dual * self.base_logits).sum()
        conjugate = self.loss.conjugate(dual / self.weights[:, None], self.labels)
        return float(linear - (self.weights * conjugate).sum())

    def residual(self, dual: Tensor) -> Tensor:
        """``R`` in contrast coordinates, ``(..., N, C)``, in the operator's dtype: what the adjoint takes."""
        return (dual @ self.contrasts).to(self.operator.dtype)

    # ---- values and gradients on factors

    def penalty_of(self, factors: Factors) -> Tensor:
        """``sum_j (lambda_j / 2)(||u_j||^2 + ||v_j||^2)``, one value for each leading batch entry."""
        terms = [
            0.5 * self.penalty[name] * (u.square().sum((-2, -1)) + v.square().sum((-2, -1)))
            for name, (u, v) in factors.items()
        ]
        return torch.stack(terms).sum(0)

    def linear_of(self, factors: Factors) -> Tensor:
        """``sum_j <linear_j, u_j v_j^T>``, one value for each leading batch entry."""
        u0 = next(iter(factors.values()))[0]
        value = u0.new_zeros(u0.shape[:-2])
        for name, term in self.linear.items():
            if name in factors:
                u, v = factors[name]
                value = value + (u * (term.to(u) @ v)).sum((-2, -1))
        return value

    def value_and_gradient(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Objective on factors and its gradient, for one start or a batch of starts."""
        contrast_values, pullback = self.operator.apply_factors_vjp(factors)
        logits = self.logits(contrast_values)
        value = self.data_loss(logits).to(self.operator.dtype) + self.penalty_of(factors)
        gradient = pullback(self.residual(self.dual_variable(logits)))
        for name, (u, v) in factors.items():
            gu, gv = gradient[name]
            if name in self.linear:
                term = self.linear[name].to(u)
                gu, gv = gu + term @ v, gv + term.T @ u
            gradient[name] = (gu.add(u, alpha=self.penalty[name]), gv.add(v, alpha=self.penalty[name]))
        return (value + self.linear_of(factors) if self.linear else value), gradient


def uniform_penalty(operator: TangentOperator, penalty: float | Mapping[str, float]) -> dict[str, float]:
    """One lambda for every block, or the mapping as given."""
    if isinstance(penalty, Mapping):
        return dict(penalty)
    return {name: float(penalty) for name in operator.shapes}
