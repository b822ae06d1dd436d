"""The perturbed objective of Theorem 4.1, and the ordinary problem that it is in other coordinates.

``F_P(u, v) = F(u, v) + sum_j <P_j, Q_j Q_j^T>`` with ``Q_j = [u_j; v_j]`` and ``P_j`` positive
semidefinite. Write ``(lambda_j / 2) I + P_j = [[C_u, C_x], [C_x^T, C_v]]`` and factorise
``(2 / lambda_j) C_u = L_u L_u^T``, ``(2 / lambda_j) C_v = L_v L_v^T``. With ``u' = L_u^T u`` and
``v' = L_v^T v`` the quadratic terms are ``(lambda_j / 2)(||u'||^2 + ||v'||^2)``, the cross term is linear
in the update ``u' v'^T``, and the gradients become ``L_u^{-1} G L_v^{-T}``. So ``F_P`` is the objective of
an ordinary :class:`~ranksure.problem.Problem` with a linear term: every solver, certificate and
curvature check holds for it as it is (derived in docs/theory/perturbation.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ranksure.certificate import PointState, certify_point
from ranksure.errors import SettingError
from ranksure.factors import Factors
from ranksure.operators.base import cast_factors
from ranksure.problem import Problem

_LARGEST_SIDE = 8192  # m + n of a block whose P is stored and factorised


class Perturbation:
    """Positive semidefinite matrices ``P_j`` on a problem's blocks.

    Args:
        problem: the unperturbed problem; its operator must be factored or dense.
        matrices: ``P_j`` by block name, symmetric ``(m + n, m + n)``; blocks left out have ``P_j = 0``.

    Raises:
        SettingError: a matrix that has the wrong shape, is not symmetric or not positive semidefinite, a block
            that is unknown or too large, a problem with a linear term, or a matrix-free operator.
    """

    def __init__(self, problem: Problem, matrices: Mapping[str, Tensor]) -> None:
        if not problem.operator.is_stored:
            raise SettingError("a perturbation needs a factored or dense operator")
        if problem.linear:
            raise SettingError("a perturbation is of a problem without a linear term")
        self.unperturbed = problem.exact
        self.matrices: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            self.matrices[name] = _checked(problem, name, matrix)

    @cached_property
    def norms(self) -> dict[str, float]:
        """``||P_j||_op`` by block."""
        return {name: float(torch.linalg.matrix_norm(p, 2)) for name, p in self.matrices.items()}

    def penalty_of(self, factors: Factors) -> Tensor:
        """``sum_j <P_j, Q_j Q_j^T>``, one value for each leading batch entry."""
        u0 = next(iter(factors.values()))[0]
        value = u0.new_zeros(u0.shape[:-2])
        for name, p in self.matrices.items():
            if name in factors:
                q = torch.cat(factors[name], -2)
                value = value + (q * (p.to(q) @ q)).sum((-2, -1))
        return value

    def gradient(self, factors: Factors) -> Factors:
        """``2 P_j Q_j`` as a pair by block; zero where there is no ``P_j``."""
        out: Factors = {}
        for name, (u, v) in factors.items():
            if name not in self.matrices:
                out[name] = (torch.zeros_like(u), torch.zeros_like(v))
                continue
            q = torch.cat((u, v), -2)
            moved = 2 * (self.matrices[name].to(q) @ q)
            out[name] = (moved[..., : u.shape[-2], :], moved[..., u.shape[-2] :, :])
        return out

    def objective(self, factors: Factors) -> Tensor:
        """``F_P`` at the factors themselves, in float64, one value for each leading batch entry."""
        problem = self.unperturbed
        factors = cast_factors(factors, problem.operator)
        loss = problem.data_loss(problem.logits(problem.operator.apply_factors(factors)))
        return loss + problem.penalty_of(factors) + self.penalty_of(factors)

    @cached_property
    def problem(self) -> Problem:
        """The ordinary problem in transformed coordinates; float64."""
        base = self.unperturbed
        maps = {name: (inverse_u, inverse_v) for name, (_, inverse_u, _, inverse_v) in self._roots.items()}
        linear = {}
        for name, p in self.matrices.items():
            m = base.operator.shapes[name][0]
            left, right = maps[name]
            linear[name] = 2 * left @ p[:m, m:] @ right.T
        return replace(base, operator=base.operator.congruent(maps), linear=linear)

    def inward(self, factors: Factors) -> Factors:
        """Factors of the original problem in the coordinates of :attr:`problem`."""
        return self._mapped(factors, into=True)

    def outward(self, factors: Factors) -> Factors:
        """Factors of :attr:`problem` in the original coordinates."""
        return self._mapped(factors, into=False)

    def certify(self, factors: Factors, best_dual: float = float("-inf")) -> PointState:
        """Certify the perturbed objective at an update, given by factors in the original coordinates.

        The certificate's objective is the lowest ``F_P`` over all factorisations of the same update; it is
        that of the factors themselves only where they are balanced under ``P`` (:meth:`objective`).
        """
        return certify_point(self.problem, self.inward(factors), best_dual)

    @cached_property
    def _roots(self) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """``L_u, L_u^{-1}, L_v, L_v^{-1}`` by block."""
        out = {}
        for name, p in self.matrices.items():
            m, _ = self.unperturbed.operator.shapes[name]
            scaled = torch.eye(len(p)).to(p) + (2 / self.unperturbed.penalty[name]) * p
            roots = (torch.linalg.cholesky(scaled[:m, :m]), torch.linalg.cholesky(scaled[m:, m:]))
            inverses = [torch.linalg.solve_triangular(r, torch.eye(len(r)).to(r), upper=False) for r in roots]
            out[name] = (roots[0], inverses[0], roots[1], inverses[1])
        return out

    def _mapped(self, factors: Factors, into: bool) -> Factors:
        out: Factors = {}
        for name, (u, v) in cast_factors(factors, self.unperturbed.operator).items():
            if name not in self._roots:
                out[name] = (u, v)
                continue
            root_u, inverse_u, root_v, inverse_v = self._roots[name]
            left, right = (root_u, root_v) if into else (inverse_u, inverse_v)
            out[name] = (left.T @ u, right.T @ v)
        return out


def random_perturbation(problem: Problem, size: float, seed: int = 0, rank: int | None = None) -> Perturbation:
    """Random ``P_j`` for every block: Gaussian ``W W^T``, scaled so that ``||P_j||_op = size``.

    Args:
        problem: the unperturbed problem.
        size: spectral norm of every ``P_j``; ``lambda_j`` is its natural unit. Zero gives ``P_j = 0``.
        seed: seed of the random numbers, drawn on the CPU in float64.
        rank: columns of ``W``; ``m + n`` by default, so that ``P_j`` is positive definite almost surely.

    Raises:
        SettingError: a negative size, a rank below 1, or see :class:`Perturbation`.
    """
    if not 0 <= size < float("inf"):
        raise SettingError(f"the size of a perturbation is its spectral norm: at least 0 and finite, not {size}")
    if rank is not None and rank < 1:
        raise SettingError(f"the rank of a perturbation is at least 1, not {rank}")
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for name, (m, n) in problem.operator.shapes.items():
        _check_side(name, m + n)
        w = torch.randn(m + n, rank or m + n, generator=generator, dtype=torch.float64).to(problem.operator.device)
        p = w @ w.T
        matrices[name] = size * p / torch.linalg.matrix_norm(p, 2)
    return Perturbation(problem, matrices)


def _checked(problem: Problem, name: str, matrix: Tensor) -> Tensor:
    shape = problem.operator.shapes.get(name)
    if shape is None:
        raise SettingError(f"the perturbation names the unknown block {name}")
    side = sum(shape)
    _check_side(name, side)
    matrix = matrix.to(problem.operator.device, torch.float64)
    if tuple(matrix.shape) != (side, side):
        raise SettingError(f"the perturbation of {name} must be ({side}, {side}), not {tuple(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()):
        raise SettingError(f"the perturbation of {name} is not finite")
    largest = float(matrix.abs().max())
    if float((matrix - matrix.T).abs().max()) > 1e-10 * largest:
        raise SettingError(f"the perturbation of {name} is not symmetric")
    matrix = 0.5 * (matrix + matrix.T)
    if float(torch.linalg.eigvalsh(matrix)[0]) < -1e-10 * largest * side:
        raise SettingError(f"the perturbation of {name} is not positive semidefinite")
    return matrix


def _check_side(name: str, side: int) -> None:
    if side > _LARGEST_SIDE:
        raise SettingError(
            f"the perturbation of {name} would be a {side} x {side} matrix; the limit is {_LARGEST_SIDE}"
        )
