"""L-BFGS on LoRA factors, many starts at once.

All starts share every matrix product (they are extra columns), so a batch of random starts costs
little more than one. The two-loop recursion is replaced by the compact form (Nocedal and Wright
2006, equation 7.24), whose work is two matrix products; the line search is the weak Wolfe bisection
of Lewis and Overton (2013) with the approximate Wolfe test of Hager and Zhang (2005), which works
down to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ranksure.factors import FactorLayout
from ranksure.problem import Problem

Function = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Minimum:
    """Result of :func:`minimize` for ``S`` starts.

    Attributes:
        x: ``(S, D)`` points.
        value: ``(S,)`` function values.
        gradient_norm: ``(S,)`` Euclidean norms of the gradient.
        converged: ``(S,)`` whether the norm reached the tolerance.
        evaluations: function evaluations (one serves all starts).
    """

    x: Tensor
    value: Tensor
    gradient_norm: Tensor
    converged: Tensor
    evaluations: int


def objective_on(problem: Problem, layout: FactorLayout) -> Function:
    """Objective and gradient of the rows of a layout."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = problem.value_and_gradient(layout.unflatten(x))
        return value.reshape(-1).to(x.dtype), layout.flatten(gradient)

    return evaluate


def minimize(
    function: Function,
    x: Tensor,
    *,
    tolerance: float,
    max_evaluations: int = 2000,
    history: int = 20,
    stop_below: float | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Minimum:
    """Minimise from each row of ``x``.

    Args:
        function: rows ``(S, D)`` -> values ``(S,)`` and gradients ``(S, D)``.
        x: starts, ``(S, D)``.
        tolerance: a start has converged when its gradient norm is at most this.
        max_evaluations: most function evaluations.
        history: stored pairs.
        stop_below: stop as soon as any value is at most this.
        stop: asked before every evaluation but the first: whether there is time for no more.

    Returns:
        The last accepted points; rows that stalled at rounding are reported as not converged.
    """
    starts, dimension = x.shape
    x = x.clone()
    f, g = function(x)
    evaluations = 1
    memory = _Memory(starts, dimension, history, x)
    alive = torch.ones(starts, dtype=torch.bool, device=x.device)
    stalls = torch.zeros(starts, dtype=torch.long, device=x.device)
    while True:
        norm = g.norm(dim=1)
        alive &= (norm > tolerance) & (stalls < 2) & torch.isfinite(f)
        if not bool(alive.any()) or evaluations >= max_evaluations or stop():
            break
        if stop_below is not None and bool((f <= stop_below).any()):
            break
        direction = memory.direction(g)
        slope = (direction * g).sum(1)
        uphill = ~(slope < 0)
        if bool(uphill.any()):
            direction[uphill], slope[uphill] = -g[uphill], -norm[uphill].square()
            memory.forget(uphill)
        if memory.count == 0:
            step = (1 / norm.clamp(min=1e-300)).clamp(max=1.0)
        else:
            step = torch.ones_like(f)
        x_new, f_new, g_new, used, moved = _line_search(function, x, f, g, direction, slope, step, alive, stop)
        evaluations += used
        memory.store(torch.where(moved[:, None], x_new - x, 0), torch.where(moved[:, None], g_new - g, 0))
        stalls = torch.where(moved, 0, stalls + 1)
        memory.forget(alive & ~moved)
        x, f, g = x_new, f_new, g_new
    norm = g.norm(dim=1)
    return Minimum(x, f, norm, norm <= tolerance, evaluations)


def _line_search(
    function: Function,
    x: Tensor,
    f: Tensor,
    g: Tensor,
    direction: Tensor,
    slope: Tensor,
    step: Tensor,
    alive: Tensor,
    stop: Callable[[], bool] = lambda: False,
    armijo: float = 1e-4,
    wolfe: float = 0.9,
    most: int = 30,
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Weak Wolfe bisection for every live row; rows that find no acceptable step stay where they are."""
    low, high = torch.zeros_like(step), torch.full_like(step, torch.inf)
    best_x, best_f, best_g = x.clone(), f.clone(), g.clone()
    moved = torch.zeros_like(alive)
    open_ = alive.clone()
    noise = max(1e-14, 2 * torch.finfo(x.dtype).eps) * f.abs()
    used = 0
    while bool(open_.any()) and used < most and not (used and stop()):
        trial = torch.where(open_[:, None], x + step[:, None] * direction, best_x)
        f_new, g_new = function(trial)
        used += 1
        slope_new = (g_new * direction).sum(1)
        decrease = f_new <= f + armijo * step * slope
        flat = (f_new <= f + noise) & (slope_new <= (2 * armijo - 1) * slope)
        enough = (decrease | flat) & torch.isfinite(f_new)
        steep = slope_new < wolfe * slope
        done = open_ & enough & ~steep
        # A point of sufficient decrease is kept even if the curvature test never passes.
        better = open_ & enough & (done | (f_new < best_f))
        best_x[better], best_f[better], best_g[better] = trial[better], f_new[better], g_new[better]
        moved |= better
        open_ &= ~done
        high = torch.where(open_ & ~enough, step, high)
        low = torch.where(open_ & enough, step, low)
        # Quadratic interpolation inside a bracket, safeguarded; doubling while there is none.
        width = high - low
        curve = f_new - f - step * slope
        guess = torch.where(curve > 0, -0.5 * slope * step.square() / curve.clamp(min=1e-300), low + 0.5 * width)
        inside = torch.where(
            ~enough & (low == 0), guess.clamp(min=low + 0.1 * width, max=low + 0.5 * width), low + 0.5 * width
        )
        step = torch.where(open_, torch.where(torch.isinf(high), 2 * step, inside), step)
    return best_x, best_f, best_g, used, moved


class _Memory:
    """Compact inverse BFGS approximation for a batch of rows (ring buffer of pairs)."""

    def __init__(self, starts: int, dimension: int, history: int, like: Tensor) -> None:
        self.history, self.count, self.next = history, 0, 0
        make = lambda *shape: torch.zeros(*shape, dtype=like.dtype, device=like.device)  # noqa: E731
        self.s, self.y = make(starts, history, dimension), make(starts, history, dimension)
        self.sy, self.yy = make(starts, history, history), make(starts, history, history)
        self.gamma = torch.ones(starts, dtype=like.dtype, device=like.device)

    def store(self, s: Tensor, y: Tensor) -> None:
        curvature = (s * y).sum(1)
        good = curvature > 1e-12 * s.norm(dim=1) * y.norm(dim=1)
        s, y = torch.where(good[:, None], s, 0), torch.where(good[:, None], y, 0)
        k = self.next
        self.s[:, k], self.y[:, k] = s, y
        self.sy[:, :, k] = (self.s @ y[:, :, None]).squeeze(2)
        self.sy[:, k, :] = (self.y @ s[:, :, None]).squeeze(2)
        yy = (self.y @ y[:, :, None]).squeeze(2)
        self.yy[:, :, k] = self.yy[:, k, :] = yy
        squared = yy[:, k].clamp(min=1e-300)
        self.gamma = torch.where(good, curvature / squared, self.gamma)
        self.next = (k + 1) % self.history
        self.count = min(self.count + 1, self.history)

    def forget(self, rows: Tensor) -> None:
        if bool(rows.any()):
            for buffer in (self.s, self.y, self.sy, self.yy):
                buffer[rows] = 0
            # symmetric buffers: a forgotten row's products with itself are all its own
            self.gamma[rows] = 1.0

    def direction(self, g: Tensor) -> Tensor:
        if self.count == 0:
            return -g
        oldest = self.next if self.count == self.history else 0
        order = (torch.arange(self.count, device=g.device) + oldest) % self.history
        sg = (self.s @ g[:, :, None])[:, order]
        yg = (self.y @ g[:, :, None])[:, order]
        sy, yy = self.sy[:, order][:, :, order], self.yy[:, order][:, :, order]
        diagonal = torch.diagonal(sy, dim1=1, dim2=2)
        upper = torch.triu(sy) + torch.diag_embed((diagonal == 0).to(g.dtype))  # empty pairs: identity
        gamma = self.gamma[:, None, None]
        p = torch.linalg.solve_triangular(upper, sg, upper=True)
        middle = diagonal[:, :, None] * p + gamma * (yy @ p) - gamma * yg
        left = torch.linalg.solve_triangular(upper.mT, middle, upper=False)
        full = g.new_zeros(g.shape[0], self.history, 2)
        full[:, order, 0], full[:, order, 1] = left[:, :, 0], -p[:, :, 0]
        along_s, along_y = (self.s.mT @ full[:, :, :1])[:, :, 0], (self.y.mT @ full[:, :, 1:])[:, :, 0]
        return -(gamma[:, 0] * (g + along_y) + along_s)
