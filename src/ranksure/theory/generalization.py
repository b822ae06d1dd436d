"""Generalisation of the linearised problem: Theorem 5.1 of Jang, Lee and Ryu (2024), with every constant.

For N independent rows, a loss that is G-Lipschitz in the logits and a population minimiser
``delta_true``, the minimiser of ``(1/N) sum_i loss + lambda ||delta||_*`` at ``lambda = 2 kappa`` has,
with probability at least ``1 - eta``, an excess risk of at most ``slope * ||delta_true||_*``. Here
``||delta||_* = sum_j ||delta_j||_*`` over all blocks, and three values of ``kappa`` are computed:

- ``theorem``: ``kappa = sqrt2 sqrt(C) G R (2 + sqrt(log(1/eta))) / sqrt(N)`` and ``slope = 6 kappa``.
- ``sharper``: the same argument with smaller constants.
- ``data_dependent``: from the Rademacher average of the rows' own gradients, by Monte Carlo; its
  sampling error is part of the bound.

The derivation, and what "heuristic" means, are in ``docs/theory/generalization.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ranksure.errors import SettingError
from ranksure.operators.base import TangentOperator
from ranksure.problem import Problem

Form = Literal["theorem", "sharper", "data_dependent"]
FORMS: tuple[Form, ...] = ("theorem", "sharper", "data_dependent")

ROWS_NORM = "R is the largest among these rows"
NOT_LIPSCHITZ = "the loss is not Lipschitz, G is its largest slope at the pretrained logits of these rows"


@dataclass(frozen=True)
class Guarantee:
    """One form of the bound.

    Attributes:
        kappa: bound on the deviation of the empirical from the true risk, per unit of nuclear norm.
        slope: excess risk per unit of ``||delta_true||_*`` at ``lambda = 2 kappa``.
        gap_slope: excess risk per unit of a gap ``F(delta) - F*`` that the point is allowed (a number
            fixed before the rows are drawn).
    """

    kappa: float
    slope: float
    gap_slope: float

    @property
    def prescribed(self) -> float:
        """The lambda of the theorem, ``2 kappa``."""
        return 2 * self.kappa

    def excess_risk(self, nuclear_norm: float, gap: float = 0.0) -> float:
        """Bound at ``lambda = 2 kappa``, from ``||delta_true||_*`` and the gap to which the problem is solved."""
        return self.slope * nuclear_norm + self.gap_slope * gap


@dataclass(frozen=True)
class GeneralizationBound:
    """The bound of Theorem 5.1 for one set of rows.

    Attributes:
        theorem: the theorem's constants, in the ``C`` outputs that the loss can see.
        sharper: smaller constants, by the argument in the docs.
        data_dependent: from the rows' own Rademacher average.
        lipschitz: ``G``, in the Euclidean norm of one row's logits.
        norm: ``R``, bounding ``(sum_j ||G_ijc||_F^2)^(1/2)`` over all blocks together, for every output.
        total_norm: ``S``, bounding ``(sum_jc ||G_ijc||_F^2)^(1/2)``; at most ``sqrt(C) R``.
        norm_from: ``"given"``, or ``"rows"`` where both are the largest among the rows.
        n_samples: ``N``.
        n_outputs: logits ``K``.
        n_contrasts: outputs that the loss can see, ``C`` (``K - 1`` under softmax).
        eta: probability with which the bound may fail.
        rademacher: mean of ``max_j ||(1/N) sum_ic sigma_ic G_ijc||_op`` over random signs.
        rademacher_error: its standard error.
        rademacher_upper: upper limit on the population's average, which is what the bound uses.
        draws: number of sign draws.
        block_weights: ``lambda_j`` as a share of the largest; norms are divided by it, and a prescribed
            lambda is that of the blocks of weight one.
        heuristic: why the number is not a proof; empty where the theorem applies as it stands.
    """

    theorem: Guarantee
    sharper: Guarantee
    data_dependent: Guarantee
    lipschitz: float
    norm: float
    total_norm: float
    norm_from: Literal["given", "rows"]
    n_samples: int
    n_outputs: int
    n_contrasts: int
    eta: float
    rademacher: float
    rademacher_error: float
    rademacher_upper: float
    draws: int
    block_weights: dict[str, float]
    heuristic: tuple[str, ...]

    @property
    def is_heuristic(self) -> bool:
        """Whether an assumption of the theorem fails or is not known to hold."""
        return bool(self.heuristic)

    def excess_risk(self, nuclear_norm: float, form: Form = "theorem", gap: float = 0.0) -> float:
        """Bound on the excess risk at that form's prescribed lambda; see :meth:`Guarantee.excess_risk`."""
        guarantee: Guarantee = getattr(self, form)
        return guarantee.excess_risk(nuclear_norm, gap)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; every form also carries its prescribed lambda."""
        out = asdict(self)
        for form in FORMS:
            out[form]["prescribed"] = getattr(self, form).prescribed
        return {**out, "heuristic": list(self.heuristic)}


def theorem_guarantee(lipschitz: float, norm: float, n_samples: int, n_outputs: int, eta: float) -> Guarantee:
    """Theorem 5.1: ``kappa = sqrt2 sqrt(n_outputs) G R (2 + sqrt(log(1/eta))) / sqrt(N)``, excess at most 6 kappa.

    ``n_outputs`` is ``K``, or ``C`` where ``R`` (``norm``) bounds the gradients of contrasts.
    """
    kappa = math.sqrt(2 * n_outputs / n_samples) * lipschitz * norm * (2 + math.sqrt(math.log(1 / eta)))
    return Guarantee(kappa, 6 * kappa, 2.0)


def sharper_guarantee(lipschitz: float, total_norm: float, n_samples: int, n_outputs: int, eta: float) -> Guarantee:
    """The theorem on a ball around zero, with ``S`` for ``sqrt(C) R`` and scalar contraction where C = 1."""
    scale = lipschitz * total_norm / math.sqrt(n_samples)
    deviation = math.sqrt(2 * math.log(1 / eta)) * scale
    kappa = 2 * contraction(n_outputs) * scale + deviation
    return Guarantee(kappa, 4 * kappa + 2 * deviation, 2.0)


def rademacher_upper(rademacher: float, total_norm: float, draws: int, n_samples: int, eta: float) -> float:
    """Upper limit on the population's Rademacher average from a Monte Carlo mean, failing with probability eta / 2.

    Half of that pays for the signs (bounded differences), half for the rows (the average is self-bounding:
    Boucheron, Lugosi and Massart 2000); it never exceeds ``S / sqrt(N)``, which always holds.
    """
    level = math.log(4 / eta)
    own = rademacher + total_norm * math.sqrt(2 * level / (draws * n_samples))  # that of these rows
    spread = total_norm / n_samples * level
    return min(own + spread + math.sqrt(spread * (spread + 2 * own)), total_norm / math.sqrt(n_samples))


def data_dependent_guarantee(
    lipschitz: float, total_norm: float, rademacher: float, draws: int, n_samples: int, n_outputs: int, eta: float
) -> Guarantee:
    """The theorem from a Monte Carlo estimate of the rows' Rademacher average.

    ``kappa = 2 c G U + sqrt2 G S sqrt(log(2/eta) / N)`` with ``U`` of :func:`rademacher_upper` and ``c`` of
    :func:`contraction`.
    """
    deviation = lipschitz * total_norm * math.sqrt(2 * math.log(2 / eta) / n_samples)
    upper = rademacher_upper(rademacher, total_norm, draws, n_samples, eta)
    kappa = 2 * contraction(n_outputs) * lipschitz * upper + deviation
    # 5 and not 4: the ball of the argument must not depend on the rows, as kappa does.
    return Guarantee(kappa, 5 * kappa + deviation, 1 + (kappa / deviation if deviation > 0 else 1.0))


def contraction(n_outputs: int) -> float:
    """Constant of the contraction inequality: 1 for one output (Talagrand), sqrt2 for more (Maurer 2016)."""
    return 1.0 if n_outputs == 1 else math.sqrt(2)


def generalization_bound(
    problem: Problem,
    *,
    eta: float = 0.05,
    norm: float | None = None,
    total_norm: float | None = None,
    draws: int = 64,
    seed: int = 0,
    reasons: Sequence[str] = (),
    advance: Callable[[int, int], None] | None = None,
) -> GeneralizationBound:
    """The generalisation bound of a problem's rows (Theorem 5.1), in three forms.

    Args:
        problem: the bound is for ``sum_j w_j ||delta_j||_*`` with ``w_j = lambda_j / max_i lambda_i``.
        eta: probability with which the bound may fail.
        norm: a bound ``R`` on ``(sum_j ||G_ijc||_F^2 / w_j^2)^(1/2)`` for every row that can occur and every
            contrast; the largest among the rows where neither norm is given, which is a heuristic.
        total_norm: a bound ``S`` on the same root with all contrasts summed too; ``sqrt(C) norm`` by default.
        draws: sign draws, one adjoint each.
        seed: of the draws.
        reasons: further reasons why the assumptions fail (a head fitted on the same rows).
        advance: called with (done, total) after each draw.

    Raises:
        SettingError: eta outside (0, 1), fewer than two draws, unequal sample weights, a linear term, or a
            given norm that a row exceeds.
    """
    _check(problem, eta, draws)
    operator = problem.reduced[0].operator  # equal gradients in orthonormal bases, so all norms are the same
    largest = max(problem.penalty[name] for name in operator.shapes)
    shares = {name: problem.penalty[name] / largest for name in operator.shapes}
    r, s = _norms(operator, shares, norm, total_norm)
    given = not (norm is None and total_norm is None)
    why = [] if given else [ROWS_NORM]
    lipschitz = problem.loss.lipschitz(problem.n_logits)
    if not math.isfinite(lipschitz):
        lipschitz = float(problem.loss.gradient(problem.base_logits, problem.labels).norm(dim=1).max())
        why.append(NOT_LIPSCHITZ)
    values = rademacher_draws(operator, draws, seed=seed, block_weights=shares, advance=advance)
    rademacher, n, c = float(values.mean()), operator.n_samples, operator.n_outputs
    return GeneralizationBound(
        theorem_guarantee(lipschitz, r, n, c, eta),
        sharper_guarantee(lipschitz, s, n, c, eta),
        data_dependent_guarantee(lipschitz, s, rademacher, draws, n, c, eta),
        lipschitz,
        r,
        s,
        "given" if given else "rows",
        n,
        problem.n_logits,
        c,
        eta,
        rademacher,
        float(values.std()) / math.sqrt(draws),
        rademacher_upper(rademacher, s, draws, n, eta),
        draws,
        shares,
        (*why, *reasons),
    )


def _check(problem: Problem, eta: float, draws: int) -> None:
    if not 0 < eta < 1:
        raise SettingError(f"eta must lie between 0 and 1, not {eta}")
    if draws < 2:
        raise SettingError(f"the Rademacher average needs at least 2 draws, not {draws}")
    weights = problem.weights
    if problem.linear or not bool((weights - 1 / len(weights)).abs().max() <= 1e-9 / len(weights)):
        raise SettingError("Theorem 5.1 is about the mean of the rows' losses: no sample weights, no linear term")


def _norms(
    operator: TangentOperator, shares: dict[str, float], norm: float | None, total_norm: float | None
) -> tuple[float, float]:
    """``R`` and ``S`` as given, each from the other where only one is; where none is, the largest among the rows."""
    by_block = (values.square() / shares[name] ** 2 for name, values in operator.sample_norms().items())
    squares = sum(by_block, torch.zeros((), dtype=torch.float64, device=operator.device))
    seen, seen_total = math.sqrt(float(squares.max())), math.sqrt(float(squares.sum(1).max()))
    if norm is None and total_norm is None:
        r, s = seen, seen_total
    else:
        r = norm if norm is not None else total_norm or 0.0
        s = total_norm if total_norm is not None else math.sqrt(operator.n_outputs) * r
    for name, bound, found in (("norm", r, seen), ("total_norm", s, seen_total)):
        if not found <= bound * (1 + 1e-6) < math.inf:
            raise SettingError(f"a row's gradient has {name} {found:.6g}, which is above the bound given, {bound:.6g}")
    return r, s


def rademacher_draws(
    operator: TangentOperator,
    draws: int,
    *,
    seed: int = 0,
    block_weights: Mapping[str, float] | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draws of ``max_j ||(1/N) sum_ic sigma_ic G_ijc||_op / w_j`` over random signs, shape ``(draws,)``, float64.

    Their mean estimates the Rademacher average of the ball ``sum_j w_j ||delta_j||_* <= 1`` on these rows.
    Each draw takes one adjoint, and one eigenvalue problem per block. The weights ``w_j`` are one by default.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (operator.n_samples, operator.n_outputs)
    out = torch.zeros(draws, dtype=torch.float64)
    for index in range(draws):
        signs = 2 * torch.randint(2, shape, generator=generator) - 1
        sums = operator.adjoint(signs.to(operator.device, operator.dtype))
        scaled = [g.double() / (block_weights[name] if block_weights else 1.0) for name, g in sums.items()]
        out[index] = _largest_norm(scaled) / operator.n_samples
        if advance is not None:
            advance(index + 1, draws)
    return out


def _largest_norm(matrices: Sequence[Tensor]) -> float:
    """Largest spectral norm, exact to rounding: eigenvalues of a smaller Gram matrix, where a Cholesky test asks."""
    best = 0.0
    for size, g in sorted(((float(g.norm()), g) for g in matrices), key=lambda pair: -pair[0]):
        if size <= best:
            break
        gram = g @ g.T if g.shape[0] <= g.shape[1] else g.T @ g
        if best > 0:
            shifted = -gram
            shifted.diagonal().add_(best**2)
            if int(torch.linalg.cholesky_ex(shifted).info) == 0:  # positive definite: this block is below the best
                continue
        best = max(best, math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0)))
    return best
