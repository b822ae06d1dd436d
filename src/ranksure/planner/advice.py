"""The advice of a plan: ranks as a configuration of PEFT takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace
from torch import nn

from ranksure.adapters.config import lora_config
from ranksure.planner.prepare import Prepared
from ranksure.planner.ranks import RankTable, clipped, parameters
from ranksure.problem import Problem
from ranksure.records.plan import NetworkPlan, Recommended


@dataclass(frozen=True)
class FoundRanks:
    """What each rank reaches; the smallest uniform rank and the smallest pattern found, with the shares captured."""

    table: RankTable
    smallest: int
    captured_uniform: float
    pattern: dict[str, int]
    captured_pattern: float


def by_linearised(
    problem: Problem, ranks: FoundRanks, lam: float, heldout_rank: int | None, model: nn.Module | None
) -> Recommended:
    """The linearised network's advice; ``model`` tells which names are exact."""
    kept = {name: rank for name, rank in ranks.pattern.items() if rank > 0}
    return Recommended(
        **_uniform(ranks.smallest, problem, model),
        linear_r=ranks.smallest,
        linear_pattern=kept,
        linear_peft=_exact_fields(kept, model),
        weight_decay=lam,
        heldout_r=heldout_rank,
        parameters_pattern=parameters(problem, kept),
        captured_uniform=ranks.captured_uniform,
        captured_pattern=ranks.captured_pattern,
        note="smallest found; weight_decay is L2 on LoRA factors at scale lora_alpha / r = 1: SGD's, not AdamW's",
    )


def by_network(
    linear: Recommended, found: NetworkPlan, heldout_r: int | None, problem: Problem, prepared: Prepared
) -> Recommended:
    """The network's advice, the linearised one beside it."""
    model = None if prepared.settings.merged else prepared.task.adapted
    return replace(
        linear,
        **_uniform(found.r, problem, model),
        pattern_peft=_exact_fields(found.pattern, model),
        weight_decay=found.weight_decay,
        heldout_r=heldout_r,
        parameters_pattern=parameters(problem, found.pattern),
        captured_uniform=found.captured_uniform,
        captured_pattern=found.captured_pattern,
    )


def _uniform(rank: int, problem: Problem, model: nn.Module | None) -> dict[str, Any]:
    """The fields that one rank decides: in every target, for a trained network often uses those that need none."""
    ranks = clipped(problem, rank) if rank else {}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": dict(ranks),
        "target_modules": list(ranks),
        "peft": _exact_fields(ranks, model),
        "parameters_uniform": parameters(problem, ranks),
    }


def _exact_fields(kept: dict[str, int], model: nn.Module | None) -> dict[str, Any] | None:
    """Ranks as ``LoraConfig`` fields that match these modules only (a plain name also matches by suffix)."""
    if not kept:
        return None
    config = lora_config(kept, model=model, uniform=len(set(kept.values())) == 1)
    names = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
    fields = {name: getattr(config, name) for name in names}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
