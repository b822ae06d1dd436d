"""``certificate.json``, which ``ranksure.certify`` returns: a verdict, the bounds behind it, and advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ranksure.choices import Verdict
from ranksure.records.record import SCHEMA, DataSource, RunSource, plain


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
        seconds: time that its spectral norms took.
        parameters: numbers in its factors, where the adapter is a file.
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
    seconds: float = 0.0
    parameters: int | None = None


@dataclass(frozen=True)
class Probe:
    """A change that was measured on the network itself.

    Attributes:
        kind: ``new direction`` (beside the factors) or ``weakest column`` (turned towards it).
        step: size of the change, a nuclear norm; of a new direction the one that did best.
        decrease: how far the objective fell; negative where it rose. For the weakest column the mean of both senses of
            the turn.
    """

    kind: str
    step: float
    decrease: float


@dataclass(frozen=True)
class FirstSlope:
    """At the base weights, without the adapter's update; what the ball of a run without a penalty is measured by.

    Attributes:
        loss: mean loss.
        slope: ``max_j ||g_j||_op``, an upper bound.
        key: checksum of the weights and rows; None where they were read from a stream.
    """

    loss: float
    slope: float
    key: str | None = None

    @property
    def length(self) -> float:
        """The nuclear norm at which this slope would use up this loss; 0 where there is no slope."""
        return self.loss / self.slope if self.slope > 0 else 0.0


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
        rank_gain_bound: no update of any rank (in the ball, without a penalty) lowers the re-linearised objective by
            more (a bound).
        training_gain_bound: no update that training at this rank can follow from here to first order (by at most the
            radius, without a penalty) lowers it by more (a bound).
        radius: radius of the nuclear-norm ball searched; None where a penalty takes its place.
        inner: ``sum_j <g_j, delta_j>``, an upper bound.
        first: where the run began; taken without a penalty only.
        tolerance: share of the objective below which a gain counts as none.
        passes: gradient passes over the data.
        forward_passes: forward passes beside them: without the adapter, and of the probes.
        probes: what was measured on the network itself.
        outside: what was trained and is outside the certificate.
        unreached: modules that the loss does not depend on.
        reasons: why nothing was checked.
        run: adapter and base, where they are files; ``data`` the rows.
        schema: number of the layout of ``certificate.json``.
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
    inner: float | None = None
    first: FirstSlope | None = None
    weight_decay: float | None = None
    lam: float | None = None
    loss_kind: str | None = None
    weighting: str | None = None
    n_samples: int = 0
    n_terms: int = 0
    passes: int = 0
    forward_passes: int = 0
    probes: list[Probe] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0
    run: RunSource | None = None
    data: DataSource | None = None
    command: str | None = None
    notes: list[str] = field(default_factory=list)
    ranksure_version: str | None = None
    SCHEMA: ClassVar[int] = SCHEMA
    schema: int = SCHEMA

    @classmethod
    def not_checked(
        cls, adapter: str, outside: list[str], reasons: list[str], tolerance: float, notes: Sequence[str] = ()
    ) -> RunCertificate:
        """A certificate that says why there is none."""
        return cls("not-checked", adapter, tolerance, outside=outside, reasons=reasons, notes=list(notes))

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
        return {**plain(self), **plain({"objective": self.objective, "advice": self.advice()})}

    def advice(self) -> list[str]:
        """Two or three sentences in plain language."""
        if self.verdict == "not-checked":
            return [f"Nothing was checked: {reason}." for reason in self.reasons]
        out = [_VERDICT[self.verdict].format(**self._words()), self._gains()]
        if self.radius is not None:
            out.append(
                "Without a weight decay the second bound is over updates of a nuclear norm of at most "
                f"{self.radius:.3g}, put anywhere: this run's own, or the length at which the slope at its start would "
                "use up the loss, if that is more. The first is over moves of at most that size from here. AdamW's "
                "decoupled decay is no penalty and counts as none."
            )
        if self.objective and self.imbalance > 0.1 * self.tolerance * self.objective:
            out.append(
                f"The factors are not balanced: {self.imbalance:.3g} of the penalty that was trained would go without "
                "any change of the update."
            )
        if self.outside:
            out.append(f"Outside the certificate, as if they were fixed: {'; '.join(self.outside)}.")
        if self.unreached:
            out.append(f"The loss does not depend on: {_list(self.unreached)}. Their updates do nothing.")
        return out

    def says_nothing(self, gain: float | None) -> bool:
        """Whether a bound allows all of the objective to go, which is never negative."""
        return gain is not None and self.objective is not None and gain >= 0.999 * self.objective > 0

    def _gains(self) -> str:
        training, rank = self.training_gain_bound or 0.0, self.rank_gain_bound or 0.0
        share = f" ({rank / self.objective:.1%} of it)" if self.objective else ""
        text = (
            "On the network re-linearised at these weights, training on at this rank can lower the objective by at "
            f"most {training:.3g} to first order, and any update of any rank by at most {rank:.3g}{share}: both are "
            f"bounds. Below {self.tolerance:.0%} of the objective a gain counts as none."
        )
        empty = [name for name, gain in (("first", training), ("second", rank)) if self.says_nothing(gain)]
        if empty:
            text += f" The {' and the '.join(empty)} says nothing: the objective cannot fall by more than itself."
        return text

    def _unfinished(self) -> str:
        """Why training on can still gain."""
        if any(probe.kind == "weakest column" and probe.decrease > 0 for probe in self.probes):
            return "it is near a saddle, and turning a column that it has towards a new direction leads down"
        return "its present factors, or ranks that it does not use, can still move to a lower objective"

    def _words(self) -> dict[str, str]:
        names = self.rank_bound_modules
        shown = _list(names)
        best = max((probe.decrease for probe in self.probes if probe.kind == "new direction"), default=None)
        measured = ""
        if best is not None and best > 0:
            measured = f" One new direction lowered the objective of the network itself by {best:.3g}."
        used = sum(state.rank_used for state in self.modules.values())
        given = sum(state.rank for state in self.modules.values())
        size = sum(state.nuclear_norm for state in self.modules.values())
        return {
            "modules": shown or "none alone",
            "size": f"{size:.3g}",
            "why": self._unfinished(),
            "measured": measured,
            "tolerance": f"{self.tolerance:.0%}",
            "used": str(used),
            "given": str(given),
            "objective": _known(self.objective),
            "zero": _known(self.objective_at_zero),
        }


def _known(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _list(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


_VERDICT: dict[str, str] = {
    "first-order-optimal": (
        "The run is done: to first order no rank would do better by more than {tolerance} of the objective. "
        "It uses {used} of the {given} ranks that it was given."
    ),
    "rank-bound": (
        "The run is stationary, and its rank is the limit in: {modules}.{measured} Raise the rank there "
        "(`ranksure grow`) and train on."
    ),
    "not-converged": ("The run is not finished: {why}. Train on before judging the rank."),
    "failed-loudly": (
        "The run is stationary, but worse than no update at all: objective {objective}, against {zero} without the "
        "adapter. It uses {used} of {given} ranks, and its update is of size {size} (nuclear norm): a bad solution, if "
        "training ends in one, is of full rank and large (Kim, Kim and Ryu 2025). Start again from a smaller "
        "initialisation or a lower learning rate."
    ),
}
