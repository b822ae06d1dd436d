"""What a plan is asked: every option, its default, and the checks that need no data or model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from ranksure.errors import SettingError
from ranksure.options import COMMON, DATA, MODEL, OUTPUT, SEED, SOLVER, Option, plain, whole
from ranksure.quantities import parse_effort, parse_memory, parse_share
from ranksure.tasks.options import TaskOptions, values_of


def parse_ranks(text: str) -> list[int]:
    """``1,2,4,8`` as integers.

    Raises:
        SettingError: an entry is not a whole number.
    """
    try:
        return sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise SettingError(f"`ranks` {text!r} is not understood: write whole numbers such as 1,2,4,8") from None


def _captured(value: float) -> str | None:
    return None if 0 < value < 1 else "must lie between 0 and 1, such as 0.99"


def _gap(value: float) -> str | None:
    return None if 1e-12 <= value <= 1e-3 else "must lie between 1e-12 and 1e-3"


def _network_gap(value: float) -> str | None:
    return None if 1e-9 <= value <= 0.5 else "must lie between 1e-9 and 0.5, such as 0.01"


def _ranks(value: Sequence[int]) -> str | None:
    return None if value and min(value) >= 1 else "are no ranks: give ranks of at least 1, such as 1,2,4,8"


def _decay(value: float | str) -> str | None:
    if isinstance(value, str):
        known = value == "auto" or parse_share(value) is not None
        return None if known else "is neither auto, nor a number, nor a share such as 10%"
    if not math.isfinite(value) or value < 0:
        return "must be a positive number, or auto"
    if value == 0:
        return (
            "is refused: without a penalty the dual is trivial, cross-entropy may have no minimiser, and no rank can "
            "be certified; use auto or a small positive number"
        )
    return None


@dataclass(frozen=True, kw_only=True)
class PlanSettings(TaskOptions):
    """Options of a plan; names and meanings follow PEFT and transformers where they have one."""

    samples: Annotated[int, Option("Training rows to solve on.", COMMON, check=whole(4))] = 64
    weight_decay: Annotated[
        float | str,
        Option(
            "auto (by held-out loss), lambda (the L2 decay on factors of scale 1), or a share of lambda_max (10%).",
            COMMON,
            check=_decay,
        ),
    ] = "auto"
    ranks: Annotated[Sequence[int], Option("Uniform ranks to examine.", COMMON, parse=parse_ranks, check=_ranks)] = (
        1,
        2,
        4,
        8,
        16,
    )
    captured: Annotated[
        float, Option("Share of the possible gain that a recommended rank must capture.", SOLVER, check=_captured)
    ] = 0.99
    memory: Annotated[float | str, Option("Memory budget, such as 8GB.", SOLVER, parse=str)] = "8GB"
    tolerance: Annotated[
        float, Option("Gap of the network's solution, as a share of what it gains.", SOLVER, check=_network_gap)
    ] = 0.01
    linear_tolerance: Annotated[
        float, Option("Relative gap of the linearised network's solution.", SOLVER, check=_gap)
    ] = 1e-6
    linearised: Annotated[
        bool, Option("Stop after the answer for the linearised network (seconds, and a guide only).", SOLVER)
    ] = False
    budget: Annotated[
        int | str | None,
        Option(
            "Most work on the network itself, in passes over the rows (300) or time (10min); the best point so far is "
            "the answer then.",
            SOLVER,
            parse=str,
        ),
    ] = None
    random_starts: Annotated[
        int | None, Option("Random starts per rank (default: as the size allows).", SOLVER, check=whole(0))
    ] = None
    batch_size: Annotated[int, Option("Rows per batch.", MODEL, check=whole(1))] = 32
    seed: Annotated[int, Option("Seed of the shuffle and of random starts.", DATA, check=SEED)] = 0
    uniform: Annotated[
        bool, Option("Zero-pad the adapter to one rank (for vLLM and others that ignore patterns).", OUTPUT)
    ] = False
    merged: Annotated[bool, Option("Write a merged checkpoint instead of an adapter.", OUTPUT)] = False

    def __post_init__(self) -> None:
        from ranksure.network.targets import parse_layers  # with torch: not for a command line that shows its help

        super().__post_init__()
        parse_layers(self.layers_to_transform)
        parse_memory(self.memory)
        if self.budget is not None:
            parse_effort(self.budget)
        if self.uniform and self.merged:
            raise SettingError("`uniform` and `merged` exclude each other: a merged checkpoint has no adapter")
        if self.merged and self.task == "prompt":
            raise SettingError("`merged` needs a head: a prompt's verbalizers are no part of a checkpoint")
        if self.merged and self.pooling == "mean":
            raise SettingError(
                "`merged` needs `pooling` model: a mean-pooled head is not part of the checkpoint's class"
            )

    @property
    def memory_bytes(self) -> int:
        """The memory budget in bytes."""
        return parse_memory(self.memory)

    def to_json(self) -> dict[str, Any]:
        """Every option, for ``plan.json``; data in memory as ``{"in_memory": type}``."""
        given = values_of(self, PlanSettings)
        return {name: plain(value, lambda kind: {"in_memory": kind}) for name, value in given.items()}
