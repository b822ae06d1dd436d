"""``plan.json``: what ``ranksure plan`` found."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from ranksure.records.record import Count, Ranks, Record

LINEARITY_WARNING = 0.5
"""Relative difference between the real network and its linearisation above which a linearised answer warns.

Set before, and kept after, ``benchmarks.advice``: of its cases that choose the threshold every plan up to 0.67
transferred and the first failure is at 0.96; among its scored cases one failed at 0.63, and none below 0.5.
"""

FIRST_ORDER = 0.05
"""How near stationarity and ``w_j <= 1`` a point of the network is called first-order optimal."""

Interval = tuple[float, float]
Positive = Annotated[float, Meta(gt=0)]


class Source(Struct, kw_only=True, frozen=True):
    """Where rows came from; ``rows`` is how many it holds in all."""

    source: str
    rows: Count
    sha256: str | None = None


class Bound(Struct, kw_only=True, frozen=True):
    """A bound on ranks by the dimension that it counts; see :class:`ranksure.theory.bounds.Bounds`."""

    paper: Count
    effective: Count
    numerical: Count | None = None

    @property
    def best(self) -> int:
        """The sharpest."""
        return self.effective if self.numerical is None else self.numerical


class PlanBounds(Struct, kw_only=True, frozen=True):
    """What theory says, whatever the data."""

    existence: Bound
    landscape: Bound
    operator_rank: Count | None = None


class PathStep(Struct, kw_only=True, frozen=True):
    """One point of the path of lambda."""

    weight_decay: float
    ranks: Ranks
    selection_loss: float | None = None
    objective: float | None = None
    relative_gap: float | None = None


class Optimum(Struct, kw_only=True, frozen=True):
    """The certified optimum of the linearised problem."""

    objective: float
    dual: float
    gap: float
    relative_gap: float
    objective_at_zero: float
    ranks: Ranks
    status: str
    spectral_ratio: float | None = None
    remedy: str = ""

    @property
    def is_zero(self) -> bool:
        return not any(self.ranks.values())

    @property
    def largest_rank(self) -> int:
        """Of any module."""
        return max(self.ranks.values(), default=0)


class RankRow(Struct, kw_only=True, frozen=True):
    """What one rank, the same in every target, reaches.

    Attributes:
        gap: no rank can be lower than the objective by more.
        captured: share of what any rank could gain, as an interval that holds the true share.
        requested: asked for, and not added to find the smallest sufficient rank.
    """

    rank: Count
    objective: float
    captured: Interval
    verdict: str
    parameters: Count
    gap: float | None = None
    spectral_ratio: float | None = None
    heldout_loss: float | None = None
    heldout_accuracy: float | None = None
    starts: Count | None = None
    stationary: bool | None = None
    negative_curvature: Count | None = None
    requested: bool = True


class HeldOutFigures(Struct, kw_only=True, frozen=True):
    """Rows that chose nothing; figures of the linearised network."""

    rows: Count
    loss_without_adapter: float
    accuracy_without_adapter: float | None = None
    best_rank: Count | None = None
    note: str = ""


class Recommended(Struct, kw_only=True, frozen=True):
    """The advice.

    Attributes:
        r: one rank for every target: the network's where the plan has one, else the linearised network's.
        rank_pattern: the same by module.
        linear_r: smallest uniform rank found for the linearised network.
        linear_pattern: smallest pattern found for the linearised network; it may leave targets out.
        peft: the first as fields of ``LoraConfig`` that match these modules only; ``pattern_peft`` the network's
            pattern, ``linear_peft`` the linearised network's.
        heldout_r: smallest rank within one standard error of the best on held-out rows.
    """

    r: Count
    rank_pattern: Ranks
    lora_alpha: Count = 0
    alpha_pattern: Ranks = {}
    target_modules: list[str] = []
    peft: dict[str, Any] | None = None
    pattern_peft: dict[str, Any] | None = None
    linear_r: Count | None = None
    linear_pattern: Ranks = {}
    linear_peft: dict[str, Any] | None = None
    weight_decay: float | None = None
    heldout_r: Count | None = None
    parameters_uniform: Count = 0
    parameters_pattern: Count = 0
    captured_uniform: float | None = None
    captured_pattern: float | None = None
    note: str = ""


class Subset(Struct, kw_only=True, frozen=True):
    """The answer on the first ``n_samples`` rows; ``captured`` by requested rank."""

    n_samples: Count
    largest_rank: Count
    rank_needed: Count | None = None
    relative_gap: float | None = None
    weight_decay: float | None = None
    ranks: Ranks = {}
    captured: dict[str, float] = {}


class Extrapolation(Struct, kw_only=True, frozen=True):
    """A power law through the subsets; not certified."""

    n_samples: Count
    rank_needed: float
    exponent: float
    rms_log_residual: float | None = None
    points: list[tuple[int, int]] = []
    note: str = ""


class Linearity(Struct, kw_only=True, frozen=True):
    """``||z(W0 + delta) - z_lin|| / ||z_lin - z(W0)||`` on training and held-out rows, and the losses behind it."""

    train: float | None = None
    heldout: float | None = None
    note: str | None = None
    train_real_loss: float | None = None
    train_linear_loss: float | None = None
    train_real_accuracy: float | None = None
    heldout_real_loss: float | None = None
    heldout_linear_loss: float | None = None
    heldout_real_accuracy: float | None = None

    @property
    def worst(self) -> float:
        """The larger of the two."""
        return max((v for v in (self.train, self.heldout) if v is not None), default=0.0)

    @property
    def far(self) -> bool:
        """Whether the linearised answer warns."""
        return self.worst > LINEARITY_WARNING


class Generalization(Struct, kw_only=True, frozen=True):
    """Theorem 5.1: the bound, and the lambda that it prescribes beside the one that was used.

    ``theorem``, ``sharper`` and ``data_dependent`` each hold ``kappa``, ``slope`` and ``prescribed``; see
    :class:`ranksure.theory.generalization.GeneralizationBound`. What is infinite is null.
    """

    theorem: dict[str, float | None]
    sharper: dict[str, float | None]
    data_dependent: dict[str, float | None]
    lipschitz: float | None
    norm: float
    total_norm: float
    norm_from: Literal["given", "rows"]
    n_samples: Count
    n_outputs: Count
    n_contrasts: Count
    eta: float
    rademacher: float
    rademacher_error: float
    rademacher_upper: float
    draws: Count
    heuristic: list[str]
    prescribed_weight_decay: float | None
    prescribed_over_used: float | None
    prescribed_over_lambda_max: float | None


class Head(Struct, kw_only=True, frozen=True):
    """The head: whether it is new, and accuracies before any adapter by pooling."""

    new: bool = False
    accuracy: dict[str, float | None] = {}
    ridge: float | None = None
    cross_validated_loss: float | None = None


class NetworkStep(Struct, kw_only=True, frozen=True):
    """One lambda of the path on the network itself; the losses and accuracies are the network's."""

    weight_decay: Positive
    ranks: Ranks
    objective: float
    relative_gap: float | None = None
    selection_loss: float | None = None
    selection_accuracy: float | None = None
    gradients: Count = 0


class NetworkModule(Struct, kw_only=True, frozen=True):
    """How near one module is to first-order optimal; see :class:`ranksure.relinearised.ModuleState`."""

    rank: Count
    spectral_ratio: float
    stationarity: float
    outside_norm: float


class NetworkOptimum(Struct, kw_only=True, frozen=True):
    """The certified point of the network itself.

    Attributes:
        objective: measured on the network; ``objective_at_zero`` is its loss without an update.
        gap: what the model re-linearised at the point could still gain at any rank; ``relative_gap`` as a share of what
            was gained. It bounds no optimum of the network.
        noise: how much an evaluation changes with the order of its rows.
        gradients: passes forward and back over the data; ``forwards`` forward alone.
        history: gradients so far, objective and gap, after every round.
    """

    objective: float
    objective_at_zero: float
    loss: float
    gap: float
    relative_gap: float | None
    noise: float
    modules: dict[str, NetworkModule]
    status: str
    remedy: str = ""
    gradients: Count
    forwards: Count = 0
    captures: Count = 0
    history: list[tuple[Count, float, float]] = []

    @property
    def ranks(self) -> Ranks:
        """By module."""
        return {name: module.rank for name, module in self.modules.items()}

    @property
    def is_zero(self) -> bool:
        return not any(self.ranks.values())

    @property
    def certified(self) -> bool:
        """Whether the gap is within the tolerance."""
        return self.status == "converged"


class NetworkRank(Struct, kw_only=True, frozen=True):
    """What one rank, the same in every target, reaches on the network itself.

    Attributes:
        captured: share of what the best point found gains: measured, no bound.
        start: what the descent started from.
        requested: asked for, and not added to find the smallest sufficient rank.
    """

    rank: Count
    objective: float
    captured: float
    verdict: str
    parameters: Count
    gap: float | None = None
    spectral_ratio: float | None = None
    heldout_loss: float | None = None
    heldout_accuracy: float | None = None
    gradients: Count = 0
    start: str = ""
    requested: bool = True


class NetworkSubset(Struct, kw_only=True, frozen=True):
    """The network's answer on the first ``n_samples`` rows."""

    n_samples: Count
    weight_decay: Positive
    ranks: Ranks
    loss: float
    objective: float
    relative_gap: float | None = None
    rank_needed: Count | None = None
    heldout_loss: float | None = None
    heldout_accuracy: float | None = None
    gradients: Count = 0
    seconds: float = 0.0


class NetworkHeldOut(Struct, kw_only=True, frozen=True):
    """Rows that chose nothing: the network without an adapter, and with the certified one."""

    rows: Count
    loss_without_adapter: float
    loss: float
    accuracy_without_adapter: float | None = None
    accuracy: float | None = None


class NetworkPlan(Struct, kw_only=True, frozen=True):
    """The answer for the network itself, which is the one that is recommended.

    Attributes:
        ranks: what each rank reaches, smallest first.
        r: smallest uniform rank found to capture the share asked for; an upper bound on the smallest there is.
        pattern: smallest ranks by module found to do so; a module left out has none.
        captured_uniform: share captured at ``r``; ``captured_pattern`` at ``pattern``.
        settled: whether rank, pattern and held-out loss no longer move from subset to subset; None with one subset.
        skipped: frozen layers that ran once.
        gradients: passes forward and back over the data, of everything here.
        stopped: why the work ended early, at its best point; empty where it did not.
    """

    n_samples: Count
    weight_decay: Positive
    weight_decay_chosen_by: str
    lambda_max: float
    optimum: NetworkOptimum
    r: Count
    captured_uniform: float
    pattern: Ranks
    captured_pattern: float
    path: list[NetworkStep] = []
    ranks: list[NetworkRank] = []
    subsets: list[NetworkSubset] = []
    settled: bool | None = None
    heldout: NetworkHeldOut | None = None
    skipped: list[str] = []
    gradients: Count = 0
    stopped: str = ""

    @property
    def first_order(self) -> tuple[float, float]:
        """The largest ``e_j`` and ``w_j``: how far the modules' own directions and new ones are from first-order
        optimal, in units of lambda.
        """
        modules = self.optimum.modules.values()
        stationarity = max((module.stationarity for module in modules), default=0.0)
        return stationarity, max((module.outside_norm for module in modules), default=0.0) / self.weight_decay

    @property
    def is_first_order(self) -> bool:
        """Whether both are within :data:`FIRST_ORDER`."""
        stationarity, outside = self.first_order
        return stationarity <= FIRST_ORDER and outside <= 1 + FIRST_ORDER


class Estimate(Struct, kw_only=True, frozen=True):
    """What the work was expected to take."""

    bytes: int
    seconds: float


class Plan(Record, kw_only=True):
    """The content of ``plan.json``.

    Attributes:
        mean_per: what the loss is averaged over: ``sample`` or ``output``.
        weight_decay: lambda of the linearised answer, an L2 decay of LoRA factors at scale one; the recommended one is
            ``recommended.weight_decay``.
        weight_decay_chosen_by: the user, or held-out loss on the path.
        lambda_max: at or above it the optimum is no update.
        shapes: ``(m, n)`` by module.
        ranks: what each rank reaches, smallest first.
        network: the answer for the network itself; None where only the linearised one was asked for. ``recommended`` is
            its advice where it is there.
        captured_target: the share asked for.
        seconds: by stage, and in total.
        sentences: the answer in plain language.
    """

    SCHEMA: ClassVar[int] = 3
    schema: int = SCHEMA
    model: str
    data: Source
    n_samples: Count
    n_outputs: Count
    loss: str
    weight_decay: Positive
    weight_decay_chosen_by: str
    lambda_max: float
    target_modules: list[str]
    shapes: dict[str, tuple[int, int]]
    bounds: PlanBounds
    optimum: Optimum
    ranks: list[RankRow]
    recommended: Recommended
    generalization: Generalization | None = None
    captured_target: float
    seed: int
    revision: str | None = None
    mean_per: str | None = None
    pooling: str = "model"
    task: dict[str, Any] = {}
    path: list[PathStep] = []
    heldout: HeldOutFigures | None = None
    subsets: list[Subset] = []
    extrapolation: Extrapolation | None = None
    linearity: Linearity = Linearity()
    network: NetworkPlan | None = None
    head: Head = Head()
    estimate: Estimate | None = None
    seconds: dict[str, float] = {}
    settings: dict[str, Any] = {}
    sentences: list[str] = []
    warnings: list[str] = []
