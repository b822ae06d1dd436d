"""Whether a second-order stationary point is a strict minimum modulo rotations, and how near a minimum is.

Derived in docs/theory/stationarity.md.
"""

from __future__ import annotations

import math

import torch

from ranksure.theory.stationary_point import Point, norm_of


def rotations(here: Point, least: float) -> tuple[int, int, float]:
    """Dimension of the rotations' directions, and how flat the Hessian is along them.

    With ``Q_j = [u_j; v_j]`` and ``S`` skew, ``H (Q_j S) = gradient_j S``. In the singular basis of ``Q_j`` the
    directions ``Q_j (e_a e_b^T - e_b e_a^T)`` are orthogonal, of norm ``(s_a^2 + s_b^2)^{1/2}``. Those with
    ``s_a`` at least some ``s`` have ``||H t|| <= sqrt2 ||gradient_j||_op ||t|| / s``; ``s`` is chosen so that this
    is at most a quarter of ``least``.

    Returns:
        How many directions are proved flat, how many rotations move the point at all, and the bound on
        ``||H t|| / ||t||`` over the former.
    """
    count, most, flatness = 0, 0, 0.0
    for name, pair in here.moving.items():
        s = torch.linalg.svdvals(torch.cat(pair))
        s = torch.cat([s, s.new_zeros(pair[0].shape[1] - len(s))])
        slope = float(torch.linalg.matrix_norm(torch.cat(here.gradient[name]), 2)) + here.gradient_error
        sure = s[(s > 0) & (s >= 4 * math.sqrt(2) * slope / least)]
        rank, columns = len(sure), len(s)
        moved = int((s > 1e-14 * s[0]).sum()) if float(s[0]) > 0 else 0
        count += math.comb(columns, 2) - math.comb(columns - rank, 2)
        most += math.comb(columns, 2) - math.comb(columns - moved, 2)
        if rank:
            flatness = max(flatness, math.sqrt(2) * slope / float(sure[-1]))
    return count, most, flatness


def radius_of(here: Point, least: float, flatness: float, margin: float) -> float | None:
    """A radius within which, modulo rotations, a local minimum is proved to lie above ``Phi - margin``.

    On the sphere of radius ``rho`` across the rotations, ``Phi`` exceeds its value at the centre by at least
    ``-e rho + (a mu - (1 - a) m) rho^2 / 2 - a L rho^4 / (8 theta)`` (derived, with the symbols, in
    docs/theory/stationarity.md); where that is positive, the ball holds a local minimum in its interior.
    """
    problem, loss = here.working, here.problem.loss
    error = norm_of(here.gradient) + here.gradient_error
    sine = flatness / least
    mu = least * (1 - sine**2) - flatness * sine**2
    excess = max(float(torch.linalg.matrix_norm(g, 2)) - problem.penalty[n] for n, g in here.state.gradients.items())
    m = max(excess, 0.0) + 1e-9 * max(problem.penalty.values())
    gram = problem.operator.gram()
    root = problem.weights.sqrt().repeat_interleave(problem.operator.n_outputs)
    smooth = (
        (1 + 1e-9) * loss.smoothness(problem.n_logits) * float(torch.linalg.eigvalsh(gram * root[:, None] * root)[-1])
    )
    steepest = math.sqrt(float(gram.diagonal().view(problem.operator.n_samples, -1).sum(1).max()))
    spectral = [[float(torch.linalg.matrix_norm(part, 2)) for part in pair] for pair in here.moving.values()]
    widest = max((math.hypot(*pair) for pair in spectral), default=0.0)
    rho = 2.1 * error / mu
    for _ in range(60):
        theta = rho * math.sqrt(smooth / (4 * (mu + m)))
        change = loss.self_concordance * steepest * (widest * rho + rho**2 / 2)
        if theta >= 1 or not change <= 1 or error * rho >= margin:
            return None
        # 2 (exp(-s) + s - 1) / s^2 >= 1 - s / 3
        a = (1 - change / 3) * (1 - theta)
        quartic = a * smooth * rho**4 / (8 * theta) if theta > 0 else 0.0
        if (a * mu - (1 - a) * m) * rho**2 / 2 - quartic > error * rho:
            return rho
        rho *= 1.3
    return None
