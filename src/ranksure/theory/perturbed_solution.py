"""The perturbed problem solved and certified, and how far its solution is from the unperturbed optimum.

Theorem 4.1 is about ``F_P``, not ``F``: for almost every positive semidefinite ``P`` a second-order
stationary point of ``F_P`` above the rank threshold is global. What that buys for ``F`` is the distance
bound below. Derivations in docs/theory/perturbation.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ranksure.certificate import certify_point
from ranksure.factors import Factors, nuclear_norms
from ranksure.perturbation import Perturbation
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.solution import Solution


@dataclass(frozen=True)
class LiftedCertificate:
    """Dual feasibility of the lifted problem, checked on the matrices themselves.

    The perturbed problem is convex in ``X_j = Q_j Q_j^T``. ``R`` is feasible for its dual when
    ``S_j = (lambda_j / 2) I + P_j + (1/2) [[0, W_j], [W_j^T, 0]]`` is positive semidefinite for every
    block, ``W_j = A_j^*(R)``; then ``D(R)`` is a lower bound on ``F_P`` over all ranks.

    Attributes:
        dual: ``D(c R)`` at the point's own dual variable and the certificate's scale ``c``.
        lowest_eigenvalues: lowest eigenvalue of ``S_j`` by block, in units of ``lambda_j``.
    """

    dual: float
    lowest_eigenvalues: dict[str, float]

    @property
    def feasible(self) -> bool:
        """Whether every ``S_j`` is positive semidefinite, up to rounding."""
        return all(value >= -1e-12 for value in self.lowest_eigenvalues.values())


@dataclass(frozen=True)
class PerturbedSolution:
    """The certified solution of a perturbed problem.

    Attributes:
        factors: minimisers of ``F_P``, in the original coordinates.
        solution: the solution in the transformed coordinates; its certificate is about ``F_P``.
        lifted: the certificate's dual point checked on the lifted problem.
        unperturbed_objective: ``F`` (nuclear norms) at the same update.
        distance_bound: upper bound on ``F(delta_P) - F*``; see :func:`distance_bound`.
        a_priori_bound: ``2 max_j (||P_j|| / lambda_j) F(0)`` plus the gap: known before solving.
    """

    factors: Factors
    solution: Solution
    lifted: LiftedCertificate
    unperturbed_objective: float
    distance_bound: float
    a_priori_bound: float


def solve_perturbed(
    perturbation: Perturbation, *, reference: Factors | None = None, tolerance: float = 1e-8
) -> PerturbedSolution:
    """Solve ``min F_P`` over all ranks, and bound the distance of its solution to the optimum of ``F``.

    The distance bound goes by a reference, any good point of the unperturbed problem: its optimum is the best choice,
    and is solved for when None. The tolerance is the relative gap of both solutions.
    """
    solution = solve(perturbation.problem, tolerance=tolerance)
    factors = perturbation.outward(solution.factors)
    if reference is None:
        reference = solve(perturbation.unperturbed, tolerance=tolerance).factors
    plain = certify_point(perturbation.unperturbed, factors).certificate
    gap = solution.certificate.gap
    size = max((norm / perturbation.unperturbed.penalty[name] for name, norm in perturbation.norms.items()), default=0)
    return PerturbedSolution(
        factors,
        solution,
        lifted_certificate(perturbation, factors),
        plain.objective,
        distance_bound(perturbation, reference, gap),
        2 * size * perturbation.unperturbed.objective_at_zero + gap,
    )


def distance_bound(perturbation: Perturbation, reference: Factors, gap: float = 0.0) -> float:
    """Upper bound on ``F(delta) - F*`` at any ``delta`` within ``gap`` of the lowest ``F_P``.

    ``F(delta) <= F_P(delta) <= F_P(Q') + gap = F(delta') + sum_j <P_j, Q'_j Q'_j^T> + gap`` for the balanced
    factors ``Q'`` of any reference ``delta'``, and ``<P, Q' Q'^T> <= ||P|| tr(Q' Q'^T) = 2 ||P|| ||delta'||_*``.
    At the optimum this is ``2 sum_j ||P_j|| ||delta*_j||_* + gap``; a reference that is only near the optimum
    adds its own duality gap. Factors are in the original coordinates.
    """
    norms = nuclear_norms(reference)
    moved = 2 * sum(perturbation.norms.get(name, 0.0) * norm for name, norm in norms.items())
    return moved + certify_point(perturbation.unperturbed, reference).certificate.gap + gap


def lifted_certificate(perturbation: Perturbation, factors: Factors) -> LiftedCertificate:
    """Check the dual of a point (in the original coordinates) on the lifted matrices ``S_j`` themselves."""
    state = perturbation.certify(factors)
    problem = perturbation.unperturbed
    dual = state.certificate.dual_step * problem.dual_variable(state.logits)
    lowest = {}
    for name, w in problem.operator.adjoint(problem.residual(dual)).items():
        m, lam = w.shape[0], problem.penalty[name]
        s = 0.5 * lam * torch.eye(sum(w.shape), dtype=w.dtype, device=w.device)
        s = s + perturbation.matrices.get(name, torch.zeros_like(s))
        s[:m, m:] += 0.5 * w
        s[m:, :m] += 0.5 * w.T
        lowest[name] = float(torch.linalg.eigvalsh(s)[0]) / lam
    return LiftedCertificate(problem.dual_value(dual), lowest)
