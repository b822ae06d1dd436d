"""Explicit problems whose landscape is known on paper: a trap just below the threshold, and one of several blocks.

Both are derived in docs/theory/landscape.md. They were found for this project; Waldspurger and Waters (2020) show the
same kind of tightness for the rank of the Burer-Monteiro factorisation of semidefinite programs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ranksure.certificate import lambda_max
from ranksure.errors import SettingError
from ranksure.factors import Factors
from ranksure.losses import get_loss
from ranksure.operators.dense import DenseOperator
from ranksure.problem import Problem


@dataclass(frozen=True)
class Trap:
    """A problem with a strict spurious local minimum (up to rotations) that is known in closed form.

    Attributes:
        problem: the problem; float64, dense.
        ranks: rank by block at which the trap is a local minimum.
        factors: the trap, ``(m, r)`` and ``(n, r)`` by block.
        optimum: factors of a global minimiser, of rank 1.
        excess: ``F(trap) - F*`` in closed form, in units of the objective.
        spectral_ratio: ``rho`` at the trap.
    """

    problem: Problem
    ranks: dict[str, int]
    factors: Factors
    optimum: Factors
    excess: float
    spectral_ratio: float


def spurious_instance(
    r: int, *, lam: float = 0.1, c: float = math.sqrt(2), s: float = 1.0, rho: float = 2.0, extra: int = 0
) -> Trap:
    """One block, ``N = r (r + 3) / 2`` equations, a trap at rank ``r`` and none at ``r + 1``.

    ``N + 1 = (r + 1)(r + 2) / 2``, so rank ``r + 1`` is the smallest above the threshold of Theorem 4.1 and ``r`` the
    largest below: the threshold is tight. With ``e = e_{r+1}``, squared error and zero base logits,

    - ``G_a = c (e_a e_a^T + (rho / r) e e^T)``, ``y_a = c s + N lambda / (2 c)`` for ``a <= r``,
    - ``G_ab = c (e_a e_b^T + e_b e_a^T) / sqrt 2``, ``y_ab = 0`` for ``a < b <= r``,
    - ``G_a' = c (e e_a^T + e_a e^T) / sqrt 2``, ``y_a' = 0`` for ``a <= r``.

    The trap is ``u = v = sqrt(s) [I_r; 0]``, of spectral ratio ``rho > 1``; an optimum is ``t e e^T``. No measurement
    sees the ``extra`` rows and columns of the block; with none the block is ``r + 1`` square, and rank ``r + 1`` is
    also clipped to the block's size.

    Raises:
        SettingError: ``r < 1``, ``extra < 0``, ``rho <= 1``, a value that is not positive and finite, or
            ``2 c^2 s / N <= lambda (rho - 1)``, where the point is a saddle.
    """
    n = r * (r + 3) // 2
    _check(r, n, lam, c, s, rho, extra)
    size = r + 1 + extra
    unit = torch.eye(size, dtype=torch.float64)
    last = torch.outer(unit[r], unit[r])
    gradients = [c * (torch.outer(unit[a], unit[a]) + rho / r * last) for a in range(r)]
    pairs = [(a, b) for a in range(r) for b in range(a + 1, r)] + [(a, r) for a in range(r)]
    gradients += [c * (torch.outer(unit[a], unit[b]) + torch.outer(unit[b], unit[a])) / math.sqrt(2) for a, b in pairs]
    labels = torch.zeros(n, 1, dtype=torch.float64)
    labels[:r] = c * s + n * lam / (2 * c)
    trap = math.sqrt(s) * unit[:, :r]
    t = (c * s + n * lam / (2 * c) * (1 - 1 / rho)) * r / (c * rho)
    best = math.sqrt(t) * unit[:, r : r + 1]
    return Trap(
        squared_error_problem({"w": torch.stack(gradients)}, labels, {"w": lam}),
        {"w": r},
        {"w": (trap, trap.clone())},
        {"w": (best, best.clone())},
        _excess(r, n, lam, c, s, rho),
        rho,
    )


def two_block_instance(
    *, lam: float = 0.1, c: float = math.sqrt(2), s: float = 1.0, rho: float = 2.0, share: float = 0.5, extra: int = 1
) -> Trap:
    """Two blocks, two equations, ranks (1, 3): the sum over blocks passes the threshold, block "first" does not.

    Block "first" is :func:`spurious_instance` at ``r = 1``; block "second" (3 x 3, rank 3) sees the two equations by
    ``c share e_i e_i^T``. ``1 + 6 = 7 > 2`` in the sum over blocks, but block "first" alone has ``1 <= 2``, and the
    point with the trap in "first" and zero in "second" is a strict local minimum: ``share``, in (0, 1), is the spectral
    ratio of "second" there.

    Raises:
        SettingError: a ``share`` outside (0, 1), or see :func:`spurious_instance`.
    """
    if not 0 < share < 1:
        raise SettingError(f"the share of the second block must be between 0 and 1, not {share}")
    one = spurious_instance(1, lam=lam, c=c, s=s, rho=rho, extra=extra)
    unit = torch.eye(3, dtype=torch.float64)
    second = torch.stack([c * share * torch.outer(unit[i], unit[i]) for i in range(2)])
    problem = squared_error_problem(
        {"first": one.problem.operator.jacobians()["w"][:, 0], "second": second},
        one.problem.labels,
        {"first": lam, "second": lam},
    )
    nothing = (torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64))
    return Trap(
        problem,
        {"first": 1, "second": 3},
        {"first": one.factors["w"], "second": nothing},
        {"first": one.optimum["w"], "second": (nothing[0][:, :0], nothing[1][:, :0])},
        one.excess,
        rho,
    )


def gaussian_problem(n: int, shape: tuple[int, int], *, share: float = 0.1, seed: int = 0) -> Problem:
    """One block, ``n`` Gaussian measurements, Gaussian labels, squared error, ``K = 1``, base logits zero.

    ``lambda`` is a ``share`` of the smallest one whose optimum is zero.

    Raises:
        SettingError: ``n < 1``, or a share outside (0, 1).
    """
    if n < 1 or not 0 < share < 1:
        raise SettingError(f"a Gaussian problem needs N >= 1 and 0 < share < 1, not N = {n} and share = {share}")
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    labels = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    problem = squared_error_problem({"w": gradients}, labels, {"w": 1.0})
    return problem.with_penalty(share * lambda_max(problem))


def squared_error_problem(gradients: dict[str, Tensor], labels: Tensor, penalty: dict[str, float]) -> Problem:
    """Gradients ``(N, m, n)`` by block, labels ``(N, 1)``, base logits zero."""
    operator = DenseOperator({name: g[:, None] for name, g in gradients.items()})
    return Problem(operator, torch.zeros_like(labels), labels, get_loss("squared-error"), penalty)


def _excess(r: int, n: int, lam: float, c: float, s: float, rho: float) -> float:
    away = 1 - 1 / rho
    return r * away * (lam * s + n * lam**2 / (4 * c**2) * away)


def _check(r: int, n: int, lam: float, c: float, s: float, rho: float, extra: int) -> None:
    if r < 1 or extra < 0:
        raise SettingError(f"the instance needs r >= 1 and extra >= 0, not r = {r} and extra = {extra}")
    if not all(0 < value < math.inf for value in (lam, c, s, rho)):
        raise SettingError("lambda, c, s and rho must be positive and finite")
    if rho <= 1:
        raise SettingError(f"the spectral ratio of a spurious minimum is above 1, not {rho}")
    if not 2 * c**2 * s / n > lam * (rho - 1):
        raise SettingError(
            f"2 c^2 s / N = {2 * c**2 * s / n:g} must be above lambda (rho - 1) = {lam * (rho - 1):g}: at r = {r} the "
            "point is a saddle; take a larger c or s"
        )
