"""Certified LoRA ranks in the NTK regime.

``plan`` answers which LoRA rank a fine-tuning needs, with a proof::

    import ranksure

    result = ranksure.plan("path/or/hub-id", "train.csv", target_modules=["query", "value"])
    for sentence in result.sentences():
        print(sentence)
    peft_config = result.lora_config      # a peft.LoraConfig
    result.save("plan")                   # plan.json and the solved adapter

The parts that it stands on are public too: ``ranksure.capture.capture`` a network, state a ``Problem``,
``solve`` it, ``certify`` any point. Blocks are addressed by qualified module names throughout.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ranksure.certificate import Certificate, certify, lambda_max
    from ranksure.errors import RanksureError
    from ranksure.losses import get_loss
    from ranksure.modules import select_targets
    from ranksure.planner.result import PlanResult
    from ranksure.planner.run import plan
    from ranksure.problem import Problem
    from ranksure.solvers.burer_monteiro import solve
    from ranksure.solvers.solution import Solution

__all__ = [
    "Certificate",
    "PlanResult",
    "Problem",
    "RanksureError",
    "Solution",
    "certify",
    "get_loss",
    "lambda_max",
    "plan",
    "select_targets",
    "solve",
]

_WHERE = {
    "Certificate": "certificate",
    "PlanResult": "planner.result",
    "Problem": "problem",
    "RanksureError": "errors",
    "Solution": "solvers.solution",
    "certify": "certificate",
    "get_loss": "losses",
    "lambda_max": "certificate",
    "plan": "planner.run",
    "select_targets": "modules",
    "solve": "solvers.burer_monteiro",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: `ranksure --help` and a typing mistake should not wait for torch.
    if name not in _WHERE:
        raise AttributeError(f"module 'ranksure' has no attribute {name!r}")
    value = getattr(import_module(f"ranksure.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
