"""Second-order information on LoRA factors: Hessian products, an inertia proof, an escape direction.

At factors ``x = (u_j, v_j)`` the Hessian of the objective is ``H = M + J^T D J``: ``J`` is the
derivative of the contrasts, ``D`` the positive semidefinite Hessian of the loss, and ``M`` couples
each column of ``u_j`` with the same column of ``v_j`` by ``[[lambda_j I, g_j], [g_j^T, lambda_j I]]``,
whose eigenvalues are ``lambda_j`` and ``lambda_j +- sigma_i(g_j)``. So for any rank and any shift, the
inertia of ``H + tau I`` follows from one singular value decomposition per block and one symmetric
matrix of the size of the data (Haynsworth's additivity; derived in docs/mathematics.md):

``n_-(H + tau I) = n_-(M + tau I) + n_+(I + D^{1/2} J (M + tau I)^{-1} J^T D^{1/2}) - N C``.

Where the factors have fewer entries than the data has rows, the eigenvalues of ``H`` itself are
computed instead. Both are factorisations, not iterations: they cannot miss a direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ranksure.certificate import PointState
from ranksure.errors import SettingError
from ranksure.factors import FactorLayout, Factors, ranks_of
from ranksure.problem import Problem

_MOST_ENTRIES = 1 << 27  # float64 entries of J that are held at once (1 GiB)
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Inertia:
    """Inertia of ``H + tau I`` at a point.

    Attributes:
        negative: number of negative eigenvalues, or None where it was not determined.
        tau: the shift.
        reason: why it was not determined, else empty.
        allowance: bound on the rounding, as a change of ``H`` in spectral norm: the count is exact for a matrix
            this close to ``H``, so it is at least that of ``H + (tau + allowance) I`` and at most that of
            ``H + (tau - allowance) I``. At most a tenth of ``|tau|``, else nothing is determined.
        direction: factors along which the curvature is below ``-tau``, from the factorisation; only where it was
            asked for and ``negative`` is positive.
    """

    negative: int | None
    tau: float
    reason: str = ""
    allowance: float = 0.0
    direction: Factors | None = None

    @property
    def no_negative_curvature(self) -> bool | None:
        """True when the lowest eigenvalue of ``H`` is proved at least ``-tau`` (less the allowance); None if open."""
        return None if self.negative is None else self.negative == 0


@dataclass(frozen=True)
class EscapeDirection:
    """What an iteration found at the lower end of the Hessian's spectrum.

    Attributes:
        value: Rayleigh quotient ``d^T H d`` of the direction: an upper bound on the lowest eigenvalue, whether
            converged or not.
        direction: unit factors ``d``; zero where the iteration returned none.
        converged: whether the iteration met its tolerance. Even then an eigenvalue below may have been missed.
        residual: ``||H d - value d||``: some eigenvalue lies this close to ``value``.
    """

    value: float
    direction: Factors
    converged: bool
    residual: float


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
    problem: Problem,
    factors: Factors,
    state: PointState,
    relative_tau: float = 1e-4,
    max_size: int = 6000,
    direction: bool = False,
) -> Inertia:
    """Count the negative eigenvalues of ``H + tau I`` by a factorisation.

    Args:
        problem: float64 problem (see ``Problem.reduced``).
        factors: the point.
        state: its certificate state.
        relative_tau: ``tau`` in units of the smallest ``lambda_j``; above -1. A negative one counts the
            eigenvalues below ``|tau|``: how many directions are flat or worse.
        max_size: largest matrix that is factorised, of ``N C`` rows or of the entries of the factors.
        direction: where the count is positive, also return a direction of curvature below ``-tau``.

    Returns:
        The inertia; undetermined where the factorisation is too large or rounding could change the count.

    Raises:
        SettingError: a shift that is not above ``-min lambda``.
    """
    if not -1 < relative_tau < math.inf:
        raise SettingError(f"the shift of an inertia, in units of lambda, must be above -1, not {relative_tau}")
    tau = relative_tau * min(problem.penalty.values())
    size = problem.operator.n_samples * problem.operator.n_outputs
    entries = sum(u.numel() + v.numel() for u, v in factors.values())
    if entries == 0:
        return Inertia(0, tau)
    if problem.operator.dtype != torch.float64:
        return Inertia(None, tau, f"an inertia proof needs a float64 operator, not {problem.operator.dtype}")
    direct = entries <= size
    if min(size, entries) > max_size:
        return Inertia(None, tau, f"the data matrix of {size} rows is larger than {max_size}")
    if direct and size * entries > _MOST_ENTRIES:
        return Inertia(None, tau, f"the derivative of {size} by {entries} entries is too large to hold")
    data = _Data(problem, factors, state)
    found = _from_hessian(data, tau, direction) if direct else _from_data_matrix(data, tau, direction)
    if found.negative is not None and found.allowance > 0.1 * abs(tau):
        return Inertia(None, tau, f"rounding of up to {found.allowance:.1e} is not small against the shift {tau:.1e}")
    return found


class _Data:
    """Rows of ``B = D^{1/2} J`` by column of the factors, and how far rounding may have moved ``H``."""

    def __init__(self, problem: Problem, factors: Factors, state: PointState) -> None:
        self.problem, self.factors, self.state = problem, factors, state
        self.columns = [(name, c) for name, (u, _) in factors.items() for c in range(u.shape[1])]
        hessian = problem.loss.hessian(state.logits, problem.labels) * problem.weights[:, None, None]
        values, vectors = torch.linalg.eigh(problem.contrasts.T @ hessian @ problem.contrasts)
        self.root = (vectors * values.clamp(min=0).sqrt()[:, None, :]) @ vectors.mT  # (N, C, C)
        # The largest root that the loss can have: what the rounding of J is weighed with.
        self.scale = (problem.weights * problem.loss.smoothness(problem.n_logits)).sqrt()
        self.squares = 0.0

    def rows(self, name: str, column: int) -> tuple[Tensor, Tensor]:
        """``D^{1/2}`` times ``G_i v_c`` and ``G_i^T u_c``: ``(N C, m)`` and ``(N C, n)``."""
        u, v = self.factors[name]
        n, c = self.root.shape[:2]
        out = []
        for part in self.problem.operator.jacobian_products(name, u[:, column], v[:, column]):
            self.squares += float((self.scale.repeat_interleave(c)[:, None] * part).square().sum())
            out.append((self.root @ part.view(n, c, -1)).flatten(0, 1))
        return out[0], out[1]

    def allowance(self) -> float:
        """Bound on the rounding of ``g``, ``J`` and ``D``, as a change of ``H`` in spectral norm.

        To be called when all rows have been made. The constants have room to spare, like those of the certificate.
        """
        problem, state, operator = self.problem, self.state, self.problem.operator
        c, widest = operator.n_outputs, max(max(shape) for shape in operator.shapes.values())
        sizes = state.logits.norm(dim=1) + problem.base_logits.norm(dim=1)
        own = operator.adjoint_error(problem.residual(problem.dual_variable(state.logits)))
        logits = operator.adjoint_error((64 * self.scale.square() * sizes)[:, None].expand(-1, c))
        coupling = max(own[n] + logits[n] + 16 * widest * _EPS * float(g.norm()) for n, g in state.gradients.items())
        products = operator.adjoint_error(self.scale[:, None].expand(-1, c))
        norms = {name: math.hypot(float(u.norm()), float(v.norm())) for name, (u, v) in self.factors.items()}
        moved = math.hypot(*(products[name] * norm for name, norm in norms.items()))
        moved += 64 * (widest + problem.n_logits) * _EPS * math.sqrt(self.squares)
        return coupling + 2 * math.sqrt(self.squares) * moved + moved**2 + 16 * _EPS * max(problem.penalty.values())


def _from_hessian(data: _Data, tau: float, direction: bool) -> Inertia:
    """Eigenvalues of ``H`` itself, in the order of columns ``[u_c; v_c]``."""
    jacobian = torch.cat([part for name, c in data.columns for part in data.rows(name, c)], 1)
    hessian = jacobian.T @ jacobian
    low = 0
    for name, _ in data.columns:
        g, lam = data.state.gradients[name], data.problem.penalty[name]
        mid, high = low + g.shape[0], low + sum(g.shape)
        hessian[low:mid, mid:high] += g
        hessian[mid:high, low:mid] += g.T
        hessian.diagonal()[low:high] += lam
        low = high
    allowance = data.allowance() + 16 * (len(hessian) + 2) * _EPS * float(hessian.norm())
    allowance += 2 * (len(jacobian) + 2) * _EPS * data.squares
    values, vectors = torch.linalg.eigh(hessian) if direction else (torch.linalg.eigvalsh(hessian), hessian)
    negative = int((values < -tau).sum())
    found = _from_columns(data, vectors[:, 0]) if direction and negative else None
    return Inertia(negative, tau, "", allowance, found)


def _from_data_matrix(data: _Data, tau: float, direction: bool) -> Inertia:
    """Haynsworth's additivity: eigenvalues of ``E = I + B (M + tau)^{-1} B^T``.

    In the singular bases of ``g_j``, ``(p, q)/sqrt2`` and ``(p, -q)/sqrt2`` are eigenvectors of ``M_j``
    with eigenvalues ``lambda_j + sigma`` and ``lambda_j - sigma``; what is outside has ``lambda_j``.
    """
    size = data.root.shape[0] * data.root.shape[1]
    matrix = torch.eye(size, dtype=torch.float64, device=data.root.device)
    bases = {name: torch.linalg.svd(data.state.gradients[name], full_matrices=False) for name, _ in data.columns}
    below: list[Tensor] = []  # B times the eigenvectors of M whose eigenvalue is below -tau, and those eigenvalues
    depths: list[Tensor] = []
    rounding = 0.0
    for name, c in data.columns:
        p, s, qt = bases[name]
        shifted = data.problem.penalty[name] + tau
        if bool((s - shifted).abs().min() < 1e-9 * shifted):
            return Inertia(None, tau, f"a singular value of {name} meets the shift")
        x, y = data.rows(name, c)
        px, qy = x @ p, y @ qt.T
        parts = [((px + qy) / math.sqrt(2), shifted + s), ((px - qy) / math.sqrt(2), shifted - s)]
        for part, inside, basis in ((x, px, p), (y, qy, qt.T)):
            if basis.shape[0] > basis.shape[1]:
                parts.append((part - inside @ basis.T, torch.tensor(shifted).to(s)))
        for rows, values in parts:
            matrix += (rows / values) @ rows.T
            weighed = rows.abs() / values.abs().sqrt()
            bound = min(float(weighed.square().sum()), float(weighed.sum(0).max() * weighed.sum(1).max()))
            rounding += 2 * (rows.shape[1] + len(data.columns) + 8) * _EPS * bound
        below.append(parts[1][0][:, s > shifted])
        depths.append((shifted - s)[s > shifted])
    matrix = 0.5 * (matrix + matrix.T)
    rounding += 16 * (size + 2) * _EPS * float(matrix.norm())
    values = torch.linalg.eigvalsh(matrix)
    if float(values.abs().min()) <= rounding:
        return Inertia(None, tau, "an eigenvalue of the Hessian meets the shift to rounding")
    negative = sum(len(depth) for depth in depths) + int((values > 0).sum()) - size
    found = None
    if direction and negative:
        found = _negative_direction(data, bases, tau, matrix, torch.cat(below, 1), torch.cat(depths))
    return Inertia(negative, tau, "", data.allowance(), found)


def _negative_direction(
    data: _Data,
    bases: dict[str, tuple[Tensor, Tensor, Tensor]],
    tau: float,
    matrix: Tensor,
    below: Tensor,
    depths: Tensor,
) -> Factors:
    """``y`` with ``y^T (H + tau) y < 0`` from the factors of the inertia (docs/theory/stationarity.md).

    With ``a`` in the negative eigenspace of ``M + tau`` and ``B a`` orthogonal to the negative eigenvectors of
    ``E``, ``y = a - (M + tau)^{-1} B^T E^{-1} B a`` has ``y^T (H + tau) y = a^T (M + tau) a - (B a)^T E^{-1} B a``,
    and both terms are negative. Such ``a`` form a space of dimension at least ``n_-(H + tau)``.
    """
    values, vectors = torch.linalg.eigh(matrix)
    inside = vectors.T @ below  # coordinates of B a, by eigenvector of E
    blocked, free = inside[values < 0], inside[values > 0]
    count = below.shape[1] - blocked.shape[0]
    space = torch.linalg.svd(blocked, full_matrices=True).Vh[-count:].T if len(blocked) else torch.eye(count).to(below)
    form = torch.diag(depths) - free.T @ (free / values[values > 0][:, None])
    a = space @ torch.linalg.eigh(space.T @ form @ space).eigenvectors[:, 0]
    pulled = vectors[:, values > 0] @ ((free @ a) / values[values > 0])  # E^{-1} B a
    pieces, low = [], 0
    for name, c in data.columns:
        p, s, qt = bases[name]
        shifted = data.problem.penalty[name] + tau
        x, y = data.rows(name, c)
        du, dv = x.T @ pulled, y.T @ pulled
        pu, qv = p.T @ du, qt @ dv
        plus, minus = (pu + qv) / (shifted + s), (pu - qv) / (shifted - s)
        du = (du - p @ pu) / shifted + 0.5 * p @ (plus + minus)
        dv = (dv - qt.T @ qv) / shifted + 0.5 * qt.T @ (plus - minus)
        deep = s > shifted
        part = a[low : low + int(deep.sum())] / math.sqrt(2)
        pieces += [p[:, deep] @ part - du, -(qt.T[:, deep] @ part) - dv]
        low += int(deep.sum())
    return _from_columns(data, torch.cat(pieces))


def _from_columns(data: _Data, x: Tensor) -> Factors:
    """Unit factors from a vector in the order of columns ``[u_c; v_c]``."""
    x = x / x.norm()
    out: Factors = {}
    low = 0
    for name, (u, v) in data.factors.items():
        m, n, rank = u.shape[0], v.shape[0], u.shape[1]
        part = x[low : low + (m + n) * rank].view(rank, m + n)
        out[name] = (part[:, :m].T.contiguous(), part[:, m:].T.contiguous())
        low += (m + n) * rank
    return out


def escape_direction(
    problem: Problem,
    factors: Factors,
    state: PointState,
    seed: int = 0,
    max_iterations: int = 6000,
    tolerance: float = 1e-3,
) -> EscapeDirection:
    """Lowest Rayleigh quotient of the Hessian found by Lanczos (ARPACK, implicitly restarted), and its direction.

    The value bounds the lowest eigenvalue from above, so a negative one proves negative curvature;
    a positive one proves nothing (see :func:`inertia`).

    Args:
        problem: the problem.
        factors: the point.
        state: its certificate state.
        seed: of the Gaussian start.
        max_iterations: most Lanczos vectors, in restarts of up to 20.
        tolerance: residual to reach, relative to the distance of the eigenvalue from the smallest ``lambda_j``.
            (Not to the eigenvalue: at a minimum it is zero, along rotations.)

    Raises:
        SettingError: factors without columns, or a limit or tolerance that is not positive.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    layout = FactorLayout(problem.operator.shapes, ranks_of(factors))
    size, moving = layout.size, {name: factors[name] for name in layout.parts}
    if size == 0 or max_iterations < 1 or not tolerance > 0:
        raise SettingError("an escape direction needs factors with columns, and a positive limit and tolerance")
    like, offset = problem.operator, min(problem.penalty.values())

    def product(vector: Tensor) -> Tensor:
        return layout.flatten(hessian_vector(problem, moving, state, layout.unflatten(vector[None])))[0]

    def shifted(x: object) -> object:
        vector = torch.as_tensor(x, dtype=like.dtype, device=like.device).reshape(-1)
        return (product(vector) - offset * vector).double().cpu().numpy()

    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator, dtype=torch.float64).numpy()
    operator = LinearOperator((size, size), matvec=shifted, dtype="float64")  # pyright: ignore[reportCallIssue]
    width = min(size, 20, max_iterations + 1)
    options = {"ncv": width, "maxiter": max(1, max_iterations // width), "tol": tolerance}
    converged = True
    try:
        vectors = eigsh(operator, k=1, which="SA", v0=start, **options)[1]  # pyright: ignore[reportArgumentType]
    except ArpackNoConvergence as error:
        vectors, converged = error.eigenvectors, False
    nothing = {name: (torch.zeros_like(u), torch.zeros_like(v)) for name, (u, v) in factors.items()}
    if vectors is None or vectors.shape[1] == 0:
        return EscapeDirection(0.0, nothing, False, math.inf)
    vector = torch.from_numpy(vectors[:, 0].copy()).to(like.device, like.dtype)
    vector = vector / vector.norm()
    image = product(vector)
    value = float(vector @ image)
    direction = {**nothing, **layout.unflatten(vector[None])}
    return EscapeDirection(value, direction, converged, float((image - value * vector).norm()))
