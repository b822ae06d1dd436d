"""The objective of LoRA factors on a real network, and what one gradient pass says about a point of it.

``Phi(u, v) = loss(W0 + u v^T) + sum_j (lambda_j / 2)(||u_j||^2 + ||v_j||^2)``, evaluated through hooks: nothing in the
network changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.capture import capture
from ranksure.errors import DataError, SettingError, TargetError
from ranksure.factors import Factors, balanced, nuclear_norms
from ranksure.losses import Kind, get_loss
from ranksure.network.batch_losses import Forward, NotFiniteError, Weighting
from ranksure.network.gradient import gradient_pass, mean_loss
from ranksure.network.logits import Batch, device_of, frozen, logits_of, to_device, unlabelled
from ranksure.network.side_path import applied, check_factors
from ranksure.network.targets import base_layer, block_shape
from ranksure.problem import Problem
from ranksure.relinearised import USED, Examiner, ModuleState, penalised_gaps
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.growth import descent_pairs
from ranksure.spectral import outside


@dataclass(frozen=True)
class NetworkPoint:
    """A point and what one gradient pass says about it.

    Attributes:
        factors: balanced factors by module, float64.
        loss: mean loss.
        objective: ``loss + sum_j lambda_j ||delta_j||_*``.
        states: spectral facts by module.
        gap: what the model re-linearised here could still gain, at any rank: at most this.
        tangent: the same over updates in the tangent spaces of the factors.
        pairs: directions outside them that lower the objective, as factors of their first size.
        unreached: modules that the loss does not depend on; their gradient is zero.
    """

    factors: Factors
    loss: float
    objective: float
    states: dict[str, ModuleState]
    gap: float
    tangent: float
    pairs: Factors
    unreached: list[str]

    @property
    def slope(self) -> float:
        """Derivative of the objective when the update grows in proportion."""
        return self.objective - self.loss + sum(state.inner for state in self.states.values())


@dataclass
class Counts:
    """Work so far: passes forward and back over the data, passes forward alone, captures."""

    gradients: int = 0
    forwards: int = 0
    captures: int = 0

    def since(self, before: Counts) -> Counts:
        """What came after a copy was taken."""
        return Counts(*(mine - other for mine, other in zip(astuple(self), astuple(before), strict=True)))


class NetworkObjective:
    """``Phi`` of a network on labelled batches, and how often it was evaluated.

    Args:
        model: the network; nothing in it changes.
        batches: with ``labels``.
        targets: modules by name.
        penalty: ``lambda > 0``, for all modules or by name.
        kind: the loss.
        weighting: of a causal language model's tokens.
        whole: a context in which the network takes rows other than whole batches, and which gives the batches.
        memory_bytes: for a capture of the model re-linearised at a point.
        disorder: how much the loss was seen to change with the order of the rows.

    Attributes:
        counts: passes so far, shared by what :meth:`with_penalty` gives.
        skipped: frozen layers that ran once.

    Raises:
        SettingError: a penalty that is not positive.
        TargetError: a module whose weight is no plain matrix of numbers (quantised).
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        targets: Mapping[str, nn.Module],
        penalty: float | Mapping[str, float],
        kind: Kind,
        whole: Callable[[], AbstractContextManager[Sequence[Batch]]] | None = None,
        *,
        weighting: Weighting = "token",
        memory_bytes: float = math.inf,
        disorder: float = 0.0,
        skipped: Sequence[str] = (),
    ) -> None:
        self.model, self.batches, self.targets = model, batches, dict(targets)
        self.penalty, self.kind = _checked(penalty, targets), kind
        self.weighting: Weighting = weighting
        self.whole = whole or (lambda: nullcontext(batches))
        self.memory_bytes, self.disorder, self.skipped = memory_bytes, disorder, list(skipped)
        self.shapes = {name: _plain_shape(name, module) for name, module in targets.items()}
        self.counts = Counts()
        self.device = device_of(model)

    @property
    def precision(self) -> torch.dtype:
        """What the adapted modules compute in."""
        return min((_weight(module).dtype for module in self.targets.values()), key=lambda dtype: dtype.itemsize)

    @property
    def dtype(self) -> torch.dtype:
        """Of factors while they are descended."""
        return torch.promote_types(self.precision, torch.float32)

    def with_penalty(self, penalty: float | Mapping[str, float]) -> NetworkObjective:
        """The same network, rows and counts at another lambda.

        Raises:
            SettingError: a penalty that is not positive.
        """
        other = copy(self)
        other.penalty = _checked(penalty, self.targets)
        return other

    @cached_property
    def at_zero(self) -> float:
        """The mean loss without an update.

        Raises:
            DataError: it is not finite.
        """
        self.counts.forwards += 1
        value = mean_loss(self.model, self.batches, kind=self.kind, weighting=self.weighting)
        if not math.isfinite(value):
            raise DataError(
                f"the network's loss on these rows is {value}, without any update: check the model and data"
            )
        return value

    @property
    def noise(self) -> float:
        """How much of a value is rounding."""
        return self.disorder + 4 * torch.finfo(self.precision).eps * self.at_zero

    def zero(self) -> Factors:
        """No update."""
        return {
            name: tuple(torch.zeros(side, 0, dtype=torch.float64, device=self.device) for side in shape)
            for name, shape in self.shapes.items()
        }  # pyright: ignore[reportReturnType]

    def loss(self, factors: Factors) -> float:
        """Mean loss, by a forward pass; infinite where it is no number."""
        self.counts.forwards += 1
        try:
            with applied(self.targets, factors):
                value = mean_loss(self.model, self.batches, kind=self.kind, weighting=self.weighting)
        except NotFiniteError:
            return math.inf
        return value if math.isfinite(value) else math.inf

    def penalty_of(self, factors: Factors) -> float:
        """``sum_j lambda_j ||delta_j||_*``."""
        return sum(self.penalty[name] * norm for name, norm in nuclear_norms(factors).items())

    def value_and_gradient(self, factors: Factors) -> tuple[float, Factors]:
        """``Phi`` and its gradient in the factors, in their dtype; infinite, with slope zero, where it is no number."""
        self.counts.gradients += 1
        leaves = {
            name: (u.detach().clone().requires_grad_(), v.detach().clone().requires_grad_())
            for name, (u, v) in factors.items()
        }
        forward = Forward(self.model, self.kind, self.weighting)
        nothing: Factors = {name: (torch.zeros_like(u), torch.zeros_like(v)) for name, (u, v) in factors.items()}
        try:
            with frozen(self.model), applied(self.targets, leaves):
                for batch in self.batches:
                    forward.gradients(batch, lambda: None, lambda: None)
        except NotFiniteError:
            return math.inf, nothing
        value = forward.mean
        out: Factors = {}
        for name, pair in leaves.items():
            lam = self.penalty[name]
            value += 0.5 * lam * sum(float(x.detach().double().square().sum()) for x in pair)
            u, v = (self._slope(x, lam, forward.weight) for x in pair)
            out[name] = (u, v)
        return (value, out) if math.isfinite(value) else (math.inf, nothing)

    @staticmethod
    def _slope(x: Tensor, lam: float, weight: float) -> Tensor:
        own = lam * x.detach()
        return own if x.grad is None else own.add_(x.grad, alpha=1 / weight)

    def examine(self, factors: Factors) -> NetworkPoint:
        """The certificate of the model re-linearised at balanced factors, and the directions that they lack."""
        self.counts.gradients += 1
        examiner = Examiner(factors, self.penalty)
        states: dict[str, ModuleState] = {}
        pairs: Factors = {}

        def consume(name: str, gradient: Tensor) -> None:
            states[name] = examiner(name, gradient)
            pairs[name] = self._missing(name, gradient, examiner)

        with applied(self.targets, factors):
            asked: dict[str, Any] = {"kind": self.kind, "weighting": self.weighting, "consume": consume}
            found = gradient_pass(self.model, self.batches, self.targets, check_rows=False, **asked)
        # Growth asks what the columns that there are can follow, so that none of them counts as unused.
        own = {name: replace(state, full=True) for name, state in states.items()}
        gaps = penalised_gaps(own, found.terms, self.penalty)
        loss = found.terms.mean
        objective = loss + self.penalty_of(factors)
        return NetworkPoint(factors, loss, objective, states, gaps.total, gaps.tangent, pairs, found.unreached)

    def examine_start(self, factors: Factors) -> NetworkPoint:
        """:meth:`examine`, for factors that a caller gives: of any modules, balanced or not.

        Raises:
            AdapterError: they do not fit the modules.
            SettingError: the network's outputs are not finite there.
        """
        check_factors(self.targets, factors)
        wide = {name: (u.to(self.device).double(), v.to(self.device).double()) for name, (u, v) in factors.items()}
        try:
            return self.examine({**self.zero(), **balanced(wide)})
        except NotFiniteError as error:
            if not factors:
                raise
            raise SettingError(f"at `start`, {error}; start from smaller factors, or from none") from None

    def _missing(self, name: str, gradient: Tensor, examiner: Examiner) -> tuple[Tensor, Tensor]:
        """New directions of a module, outside the factors.

        A column far smaller than the module's others is no direction that descent can follow: it would take as long
        to grow as from nothing.
        """
        p, s, q = (part.to(gradient.device) for part in examiner.parts[name])
        kept = s > USED * s[:1]
        missing = outside(gradient.double(), p[:, kept], q[:, kept])
        return descent_pairs(missing, self.penalty[name], 1e-9)

    @property
    def by_row(self) -> bool:
        """Whether every row has one row of logits, as a capture needs; not one for each token."""
        labels = self.batches[0]["labels"]
        return labels.dim() < 2 or labels.is_floating_point()

    def relinearised_dual(self, point: NetworkPoint, tolerance: float) -> float:
        """A lower bound on the objective of the model re-linearised at a point: the dual of its own solution.

        Raises:
            MemoryBudgetError: its capture does not fit.
        """
        self.counts.captures += 1
        loss = get_loss(self.kind)
        labels = torch.cat([batch["labels"] for batch in self.batches]).cpu()
        with self.whole() as batches, applied(self.targets, point.factors):
            plain = [unlabelled(batch) for batch in batches]
            with frozen(self.model), torch.no_grad():
                n_logits = logits_of(self.model, to_device(plain[0], device_of(self.model))).shape[1]
            contrasts = loss.contrasts(n_logits)
            captured = capture(self.model, plain, self.targets, contrasts, memory_bytes=self.memory_bytes)
        operator = captured.operator
        moved = operator.to(torch.float64).apply_factors({n: (u.cpu(), v.cpu()) for n, (u, v) in point.factors.items()})
        base = captured.base_logits - moved @ contrasts.T
        problem = Problem(operator, base, labels, loss, self.penalty)
        return solve(problem, tolerance=tolerance, start=point.factors).certificate.dual


def _checked(penalty: float | Mapping[str, float], targets: Mapping[str, nn.Module]) -> dict[str, float]:
    every = dict(penalty) if isinstance(penalty, Mapping) else dict.fromkeys(targets, float(penalty))
    for name in targets:
        if not 0 < every.get(name, 0.0) < math.inf:
            raise SettingError(f"the penalty lambda of {name} is {every.get(name)}; it must be positive and finite")
    return every


def _weight(module: nn.Module) -> Tensor:
    weight = base_layer(module).weight
    assert isinstance(weight, Tensor)
    return weight


def _plain_shape(name: str, module: nn.Module) -> tuple[int, int]:
    """``(m, n)`` of a module whose weight is a matrix of numbers, not a code for one."""
    layer = base_layer(module)
    shape, weight = block_shape(layer), _weight(layer)
    stated = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else shape
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2 or shape != stated:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise TargetError(
            f"{name} is a {type(layer).__name__} whose weight is stored as {dtype} {tuple(weight.shape)} (quantised?), "
            "which was not tested; load the model without quantisation"
        )
    return shape
