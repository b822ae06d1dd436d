"""What ``ranksure.certify`` returns: a verdict, the bounds behind it, and advice in plain language."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ranksure.runs.lora import Adapter

Verdict = Literal["first-order-optimal", "rank-bound", "not-converged", "failed-loudly", "not-checked"]


@dataclass(frozen=True)
class ModuleVerdict:
    """One module's part of a certificate.

    Attributes:
        verdict: as the whole run's, for this module alone.
        rank: rank given.
        rank_used: numerical rank of the update.
        spectral_ratio: ``rho_j = ||g_j||_op / lambda_j``; None without a penalty.
        gradient_norm: ``||g_j||_op``, an upper bound.
        stationarity: ``||P_T g_j + lambda_j U V^T||_op / lambda_j``; None without a penalty.
        outside: norm of the gradient outside the factors' spaces, in units of ``lambda_j`` where there is one.
        slope: decrease of the objective per unit of a new direction, at the start of it.
        followed: share of the squared gradient that the current factors can follow.
        nuclear_norm: ``||delta_j||_*``.
        lam: ``lambda_j``; None without a penalty.
    """

    verdict: Verdict
    rank: int
    rank_used: int
    spectral_ratio: float | None
    gradient_norm: float
    stationarity: float | None
    outside: float
    slope: float
    followed: float
    nuclear_norm: float
    lam: float | None


@dataclass(frozen=True)
class Probe:
    """A change that was measured on the network itself.

    Attributes:
        kind: ``new direction`` (beside the factors) or ``weakest column`` (turned towards it).
        step: size of the change that did best, a nuclear norm.
        decrease: how far the objective fell; negative where it rose at every size tried.
    """

    kind: str
    step: float
    decrease: float


@dataclass(frozen=True)
class RunCertificate:
    """The certificate of a LoRA run.

    Attributes:
        verdict: ``first-order-optimal``, ``rank-bound``, ``not-converged``, ``failed-loudly``, ``not-checked``.
        modules: by module.
        loss: mean loss at the point.
        penalty: ``sum_j lambda_j ||delta_j||_*``; 0 without a penalty.
        imbalance: what balancing the factors would take off the trained penalty, the update unchanged.
        objective_at_zero: mean loss without the update, or the part of it that proved it above the objective (a
            lower bound); None where the verdict did not need it.
        rank_gain_bound: no update of any rank lowers the re-linearised objective by more (a bound).
        training_gain_bound: nor one along the directions that the factors can follow by more (a bound).
        radius: radius of the nuclear-norm ball searched; None where a penalty takes its place.
        tolerance: share of the objective below which a gain counts as none.
        probes: what was measured on the network itself.
        outside: what was trained and is outside the certificate.
        reasons: why nothing was checked.
    """

    verdict: Verdict
    adapter: str
    tolerance: float
    modules: dict[str, ModuleVerdict] = field(default_factory=dict)
    loss: float | None = None
    penalty: float = 0.0
    imbalance: float = 0.0
    objective_at_zero: float | None = None
    rank_gain_bound: float | None = None
    training_gain_bound: float | None = None
    radius: float | None = None
    weight_decay: float | None = None
    lam: float | None = None
    loss_kind: str | None = None
    weighting: str | None = None
    n_samples: int = 0
    n_terms: int = 0
    passes: int = 0
    probes: list[Probe] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def not_checked(cls, read: Adapter, reasons: list[str], tolerance: float) -> RunCertificate:
        """A certificate that says why there is none."""
        return cls("not-checked", read.name, tolerance, outside=read.outside, reasons=reasons)

    @property
    def objective(self) -> float | None:
        """Mean loss and penalty."""
        return None if self.loss is None else self.loss + self.penalty

    @property
    def rank_bound_modules(self) -> list[str]:
        """Modules whose rank is the limit, the steepest first."""
        found = [(state.slope, name) for name, state in self.modules.items() if state.verdict == "rank-bound"]
        return [name for _, name in sorted(found, reverse=True)]

    def to_json(self) -> dict[str, Any]:
        """What ``certificate.json`` holds: plain numbers, no NaN."""
        data = {"schema": 1, **asdict(self), "objective": self.objective, "advice": self.advice()}
        return json.loads(json.dumps(data, default=str), parse_constant=lambda text: None)

    def advice(self) -> list[str]:
        """Two or three sentences in plain language."""
        if self.verdict == "not-checked":
            return [f"Nothing was checked: {reason}." for reason in self.reasons]
        out = [_VERDICT[self.verdict].format(**self._words())]
        out.append(self._gains())
        if self.radius is not None:
            out.append(
                "Without a weight decay the second bound is over updates whose nuclear norm is at most this run's own "
                f"({self.radius:.3g}): the same amount of change, put anywhere; the first is over moves of at most "
                "that size from here. AdamW's decoupled decay is no penalty and counts as none."
            )
        if self.outside:
            out.append(f"Outside the certificate, as if they were fixed: {'; '.join(self.outside)}.")
        return out

    def _gains(self) -> str:
        training, rank = self.training_gain_bound or 0.0, self.rank_gain_bound or 0.0
        share = rank / self.objective if self.objective else math.inf
        return (
            "On the network re-linearised at these weights, training on along the present directions can lower the "
            f"objective by at most {training:.3g}, and any update of any rank by at most {rank:.3g} ({share:.1%} of "
            "it): both are bounds."
        )

    def _words(self) -> dict[str, str]:
        names = self.rank_bound_modules
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        best = max((probe.decrease for probe in self.probes if probe.kind == "new direction"), default=None)
        measured = ""
        if best is not None and best > 0:
            measured = f" One new direction lowered the objective of the network itself by {best:.3g}."
        used = sum(state.rank_used for state in self.modules.values())
        given = sum(state.rank for state in self.modules.values())
        return {
            "modules": shown or "none alone",
            "measured": measured,
            "tolerance": f"{self.tolerance:.0%}",
            "used": str(used),
            "given": str(given),
            "objective": f"{self.objective:.4g}",
            "zero": "unknown" if self.objective_at_zero is None else f"{self.objective_at_zero:.4g}",
        }


_VERDICT: dict[str, str] = {
    "first-order-optimal": (
        "The run is done: to first order no rank would do better by more than {tolerance} of the objective. "
        "It uses {used} of the {given} ranks that it was given."
    ),
    "rank-bound": (
        "The run is stationary, and its rank is the limit in: {modules}.{measured} Raise the rank there "
        "(`ranksure grow`) and train on."
    ),
    "not-converged": (
        "The run is not finished: its present factors can still move to a lower objective. Train on before judging "
        "the rank."
    ),
    "failed-loudly": (
        "The run is stationary, but worse than no update at all: objective {objective}, against {zero} without the "
        "adapter, using {used} of {given} ranks. Start again from a smaller initialisation or a lower learning rate."
    ),
}
