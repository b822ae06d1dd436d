"""Second-order information on LoRA factors: Hessian products, an inertia proof, an escape direction.

At factors ``x = (u_j, v_j)`` the Hessian of the objective is ``H = M + J^T D J``: ``J`` is the
derivative of the contrasts, ``D`` the positive semidefinite Hessian of the loss, and ``M`` couples
each column of ``u_j`` with the same column of ``v_j`` by ``[[lambda_j I, g_j], [g_j^T, lambda_j I]]``,
whose eigenvalues are ``lambda_j`` and ``lambda_j +- sigma_i(g_j)``. So for any rank, the inertia of
``H + tau I`` follows from one singular value decomposition per block and one symmetric matrix of the
size of the data (Haynsworth's additivity; derived in docs/mathematics.md):

``n_-(H + tau I) = n_-(M + tau I) + n_+(I + D^{1/2} J (M + tau I)^{-1} J^T D^{1/2}) - N C``.

That is a factorisation, not an iteration: it cannot miss a direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ranksure.certificate import PointState
from ranksure.operators.base import Factors
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator
from ranksure.problem import Problem


@dataclass(frozen=True)
class Inertia:
    """Inertia of ``H + tau I`` at a point.

    Attributes:
        negative: number of negative eigenvalues, or None where it was not determined.
        tau: the shift.
        reason: why it was not determined, else empty.
    """

    negative: int | None
    tau: float
    reason: str = ""

    @property
    def no_negative_curvature(self) -> bool | None:
        """True when the lowest eigenvalue of ``H`` is proved at least ``-tau``; None if undetermined."""
        return None if self.negative is None else self.negative == 0


def hessian_vector(problem: Problem, factors: Factors, state: PointState, direction: Factors) -> Factors:
    """Hessian of the factored objective times a direction of the same shapes."""
    moved = {
        name: (torch.cat([du, u], 1), torch.cat([v, dv], 1))
        for (name, (u, v)), (du, dv) in zip(factors.items(), direction.values(), strict=True)
    }
    dz = problem.operator.apply_factors(moved).double() @ problem.contrasts.T
    curved = problem.loss.hessian_vector(state.logits, problem.labels, dz) * problem.weights[:, None]
    _, pullback = problem.operator.apply_factors_vjp(factors)
    data = pullback(problem.residual(curved))
    out: Factors = {}
    for name, (du, dv) in direction.items():
        g, lam = state.gradients[name], problem.penalty[name]
        out[name] = (data[name][0] + lam * du + g @ dv, data[name][1] + lam * dv + g.T @ du)
    return out


def inertia(
    problem: Problem, factors: Factors, state: PointState, relative_tau: float = 1e-4, max_size: int = 6000
) -> Inertia:
    """Count the negative eigenvalues of ``H + tau I`` exactly.

    Args:
        problem: float64 problem (see ``Problem.reduced``).
        factors: the point.
        state: its certificate state.
        relative_tau: ``tau`` in units of the smallest ``lambda_j``.
        max_size: largest ``N C`` that is factorised.

    Returns:
        The inertia; undetermined where the factorisation is too large.
    """
    tau = relative_tau * min(problem.penalty.values())
    size = problem.operator.n_samples * problem.operator.n_outputs
    if problem.operator.dtype != torch.float64:
        return Inertia(None, tau, f"an inertia proof needs a float64 operator, not {problem.operator.dtype}")
    if size > max_size:
        return Inertia(None, tau, f"the data matrix of {size} rows is larger than {max_size}")
    negative = 0
    schur = torch.zeros(size, size, dtype=torch.float64, device=problem.operator.device)
    for name, (u, v) in factors.items():
        rank = u.shape[1]
        if rank == 0:
            continue
        shifted = problem.penalty[name] + tau
        p, s, qt = torch.linalg.svd(state.gradients[name], full_matrices=False)
        if bool((s - shifted).abs().min() < 1e-9 * shifted):
            return Inertia(None, tau, f"a singular value of {name} meets the shift")
        negative += rank * int((s > shifted).sum())
        schur += _coupled_gram(problem, name, (u, v), (p, s, qt), shifted)
    root = _hessian_roots(problem, state.logits)
    n, c = problem.operator.n_samples, problem.operator.n_outputs
    schur = torch.einsum("iab,ibjc->iajc", root, schur.view(n, c, n, c))
    schur = torch.einsum("iajc,jcd->iajd", schur, root).reshape(size, size)
    values = torch.linalg.eigvalsh(0.5 * (schur + schur.T) + torch.eye(size, dtype=torch.float64, device=schur.device))
    if float(values.abs().min()) < 1e-10 * float(values.abs().max()):
        return Inertia(None, tau, "an eigenvalue of the Hessian meets the shift to rounding")
    return Inertia(negative + int((values > 0).sum()) - size, tau)


def _coupled_gram(
    problem: Problem, name: str, factor: tuple[Tensor, Tensor], svd: tuple[Tensor, Tensor, Tensor], shifted: float
) -> Tensor:
    """``J_j (M_j + tau)^{-1} J_j^T`` for one block, ``(N C, N C)``.

    Column ``c`` of the factors sees ``x_i = G_i v_c`` and ``y_i = G_i^T u_c``. In the singular bases
    of ``g_j``, ``(M_j + tau)^{-1}`` is ``[[s, -g], [-g^T, s]]`` over ``s^2 - sigma^2`` (and ``1/s``
    outside), with ``s = lambda_j + tau``.
    """
    u, v = factor
    p, s, qt = svd
    weight = 1 / (shifted**2 - s**2)
    size = problem.operator.n_samples * problem.operator.n_outputs
    total = torch.zeros(size, size, dtype=torch.float64, device=u.device)
    for column in range(u.shape[1]):
        x, y = _jacobian_products(problem, name, u[:, column], v[:, column])
        px, qy = x @ p, y @ qt.T
        cross = (px * (s * weight)) @ qy.T
        total += (px * (shifted * weight - 1 / shifted)) @ px.T + x @ x.T / shifted
        total += (qy * (shifted * weight - 1 / shifted)) @ qy.T + y @ y.T / shifted
        total -= cross + cross.T
    return total


def _jacobian_products(problem: Problem, name: str, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``G_i v`` and ``G_i^T u`` for every sample and contrast: ``(N C, m)`` and ``(N C, n)``."""
    operator = problem.operator
    if isinstance(operator, (FactoredOperator, DenseOperator)):
        return operator.jacobian_products(name, u, v)
    size = operator.n_samples * operator.n_outputs
    left, right = [], []
    for index in range(size):
        unit = torch.zeros(size, dtype=operator.dtype, device=operator.device)
        unit[index] = 1
        g = operator.adjoint(unit.view(operator.n_samples, -1))[name]
        left.append(g @ v)
        right.append(g.T @ u)
    return torch.stack(left), torch.stack(right)


def _hessian_roots(problem: Problem, logits: Tensor) -> Tensor:
    """Symmetric roots of each sample's weighted loss Hessian in contrast coordinates, ``(N, C, C)``."""
    hessian = problem.loss.hessian(logits, problem.labels) * problem.weights[:, None, None]
    reduced = problem.contrasts.T @ hessian @ problem.contrasts
    values, vectors = torch.linalg.eigh(reduced)
    return (vectors * values.clamp(min=0).sqrt()[:, None, :]) @ vectors.mT


def escape_direction(problem: Problem, factors: Factors, state: PointState, seed: int = 0) -> tuple[float, Factors]:
    """Lowest Rayleigh quotient of the Hessian found by Lanczos, and its direction (unit norm).

    The value bounds the lowest eigenvalue from above, so a negative one proves a descent direction;
    a positive one proves nothing (see :func:`inertia`).
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    shapes = {name: (u.shape, v.shape) for name, (u, v) in factors.items()}
    size = sum(a.numel() + b.numel() for a, b in shapes.values())
    like = problem.operator

    def unflatten(x: Tensor) -> Factors:
        out: Factors = {}
        low = 0
        for name, (a, b) in shapes.items():
            mid, high = low + a.numel(), low + a.numel() + b.numel()
            out[name] = (x[low:mid].view(a), x[mid:high].view(b))
            low = high
        return out

    def product(x: object) -> object:
        vector = torch.as_tensor(x, dtype=torch.float64, device=like.device).reshape(-1)
        image = hessian_vector(problem, factors, state, unflatten(vector))
        return torch.cat([part.reshape(-1) for pair in image.values() for part in pair]).cpu().numpy()

    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator, dtype=torch.float64).numpy()
    operator = LinearOperator((size, size), matvec=product, dtype="float64")  # pyright: ignore[reportCallIssue]
    try:
        _, vectors = eigsh(operator, k=1, which="SA", v0=start, maxiter=300, tol=1e-3)  # pyright: ignore[reportArgumentType]
        vector = torch.from_numpy(vectors[:, 0].copy()).to(like.device)
    except ArpackNoConvergence as error:
        if error.eigenvectors is None or error.eigenvectors.shape[1] == 0:
            return 0.0, unflatten(torch.zeros(size, dtype=torch.float64, device=like.device))
        vector = torch.from_numpy(error.eigenvectors[:, 0].copy()).to(like.device)
    vector = vector / vector.norm()
    direction = unflatten(vector)
    image = hessian_vector(problem, factors, state, direction)
    pairs = [(a, b) for name in direction for a, b in zip(direction[name], image[name], strict=True)]
    return sum(float((a * b).sum()) for a, b in pairs), direction
