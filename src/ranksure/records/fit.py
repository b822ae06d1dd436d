"""``fit.json``: what was trained and how, what came of it, and what the plan predicted."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from msgspec import Struct

from ranksure.records.record import SCHEMA, Count, Ranks, Record


class FitData(Struct, kw_only=True, frozen=True):
    """Where the training rows came from."""

    source: str
    sha256: str | None = None


class Final(Struct, kw_only=True, frozen=True):
    """The certificate's figures at the end; null where nothing was checked."""

    loss: float | None = None
    penalty: float | None = None
    objective: float | None = None
    imbalance: float | None = None
    rank_gain_bound: float | None = None
    training_gain_bound: float | None = None


class Prediction(Struct, kw_only=True, frozen=True):
    """The linearised problem's figures for what was trained.

    Attributes:
        of: what was predicted, in words.
        optimum: the certified optimum's objective.
        captured: share of what any rank could gain.
        linearity: relative difference of the real network from the linearised one, as the plan measured it.
    """

    of: str
    objective: float
    objective_at_zero: float
    optimum: float | None = None
    captured: float | None = None
    heldout_loss: float | None = None
    heldout_accuracy: float | None = None
    linearity: float | None = None


class FitHeldOut(Struct, kw_only=True, frozen=True):
    """Held-out rows on the real network, with the adapter and without it."""

    rows: Count
    loss: float
    loss_without_adapter: float
    accuracy: float | None = None
    accuracy_without_adapter: float | None = None


class Stage(Struct, kw_only=True, frozen=True):
    """A stage before the last one of a grown fit."""

    ranks: Ranks
    verdict: str
    steps: Count = 0
    objective: float | None = None
    loss: float | None = None
    history: list[dict[str, Any]] = []


class Solved(Struct, kw_only=True, frozen=True):
    """How the network's own solver ended; its rounds are the fit's history.

    Attributes:
        status: ``converged`` where the gap is at most ``tolerance`` of what was gained, else ``not-converged``.
        remedy: what to do where it is not.
        objective: of the network at the point, measured by the solver.
        gap: the network re-linearised at the point could gain no more at any rank of any target: a bound.
        relative_gap: the same as a share of what was gained; null where nothing was.
        spectral_ratio: the largest one, over all targets.
        noise: how much the loss changes with the order of the rows.
        gradients: passes forward and back over the rows, ``forwards`` passes forward alone; ``captures`` of the network
            re-linearised at a point.
        start: ``nothing``, ``plan`` or ``adapter``.
        skipped: frozen layers that ran once.
        without: targets that need no update, and are not in the adapter.
    """

    status: Literal["converged", "not-converged"]
    remedy: str
    objective: float
    objective_at_zero: float
    gap: float
    tolerance: float
    spectral_ratio: float
    noise: float
    gradients: Count
    forwards: Count
    captures: Count
    start: Literal["nothing", "plan", "adapter"]
    relative_gap: float | None = None
    skipped: list[str] = []
    without: list[str] = []

    def said(self) -> list[str]:
        """In sentences: what is certified, and what is only measured."""
        share = "" if self.relative_gap is None else f", {self.relative_gap:.2g} of what was gained"
        bound = (
            "on the network re-linearised at this point, no update of any rank in any target gains more than "
            f"{self.gap:.3g}{share}"
        )
        out = [f"Certified: {bound} ({self.tolerance:g} was asked for)."]
        if self.status != "converged":
            out = [f"Not certified to the {self.tolerance:g} that was asked for: {bound}. Because {self.remedy}."]
        out.append("Measured: the objective on these rows. That no update far from here does better is not claimed.")
        if self.without:
            names = ", ".join(self.without[:4]) + (f" and {len(self.without) - 4} more" * (len(self.without) > 4))
            out.append(f"Targets that need no update, and have none in the adapter: {names}.")
        return out


class Fit(Record, kw_only=True, rename={"lam": "lambda"}):
    """The content of ``fit.json``.

    Attributes:
        loss: which one; ``mean_per`` what it is averaged over.
        mode: ``train`` or ``linear``.
        lam: lambda, the penalty on factors of scale one.
        scale_in_training: PEFT's scale while it was trained; the adapter written has scale one.
        parameters: numbers in the factors.
        objective_at_zero: mean loss without the adapter.
        stages: those before the last, of a grown fit.
        history: what the Trainer logged; of method ``certified`` the rounds: gradients (``step``), ``objective`` and
            ``gap``.
        method: ``trainer`` or ``certified``; ``solved`` is how the latter ended.
    """

    SCHEMA: ClassVar[int] = SCHEMA
    schema: int = SCHEMA
    model: str
    data: FitData
    n_samples: Count
    mode: str
    ranks: Ranks
    lam: float
    parameters: Count
    optimizer: str
    steps: Count
    verdict: str
    final: Final
    stages: list[Stage]
    history: list[dict[str, Any]]
    settings: dict[str, Any]
    objective_at_zero: float | None = None
    revision: str | None = None
    n_outputs: Count | None = None
    loss: str | None = None
    mean_per: str | None = None
    pooling: str | None = None
    init: str = "default"
    scale_in_training: float = 1.0
    gradient_clipping: float = 0.0
    head_trained: bool = False
    method: str = "trainer"
    solved: Solved | None = None
    prediction: Prediction | None = None
    heldout: FitHeldOut | None = None
    resumed: bool = False
    seconds: dict[str, float] = {}
