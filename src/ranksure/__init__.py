"""Certified LoRA ranks in the NTK regime.

``plan`` answers which LoRA rank a fine-tuning needs, with a proof::

    import ranksure

    result = ranksure.plan("path/or/hub-id", "train.csv", target_modules=["query", "value"])
    print("\\n".join(result.sentences()))
    peft_config = result.lora_config      # a peft.LoraConfig
    result.save("plan")                   # plan.json and the solved adapter

The parts that it stands on are public too: ``capture`` a network, state a ``Problem``, ``solve`` it,
``certify`` any point. Blocks are addressed by qualified module names throughout.
"""

from ranksure.capture import Captured, capture
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
    "Captured",
    "Certificate",
    "PlanResult",
    "Problem",
    "RanksureError",
    "Solution",
    "capture",
    "certify",
    "get_loss",
    "lambda_max",
    "plan",
    "select_targets",
    "solve",
]
