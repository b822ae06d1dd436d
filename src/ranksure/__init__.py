"""Certified LoRA ranks in the NTK regime.

``plan`` answers which LoRA rank a fine-tuning needs, with a proof::

    import ranksure

    result = ranksure.plan("path/or/hub-id", "train.csv", target_modules=["query", "value"])
    for sentence in result.sentences():
        print(sentence)
    peft_config = result.lora_config      # a peft.LoraConfig
    result.save("plan")                   # plan.json and the solved adapter

``certify`` answers whether a finished LoRA run of the real network is done, and whether its rank is the limit::

    verdict = ranksure.certify(peft_model, dataloader, weight_decay=0.01)
    print(verdict.verdict, *verdict.advice())

The parts that they stand on are public too: ``ranksure.capture.capture`` a network, state a ``Problem``,
``solve`` it, ``certify_point`` any point of it. Blocks are addressed by qualified module names throughout.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ranksure.certificate import Certificate, lambda_max
    from ranksure.certificate import certify as certify_point
    from ranksure.errors import RanksureError
    from ranksure.losses import get_loss
    from ranksure.network.targets import select_targets
    from ranksure.planner.result import PlanResult
    from ranksure.planner.run import plan
    from ranksure.problem import Problem
    from ranksure.records.certificate import RunCertificate
    from ranksure.report.page import write_report
    from ranksure.runs.certificate.callback import CertificateCallback
    from ranksure.runs.certificate.certify import certify
    from ranksure.runs.fitting.fit import fit
    from ranksure.runs.fitting.optimizer import l2_optimizer, parameter_groups
    from ranksure.runs.fitting.plan_folder import install_planned_head
    from ranksure.runs.fitting.result import FitResult
    from ranksure.runs.fitting.trainer import mean_loss_function
    from ranksure.runs.resizing.compress import compress
    from ranksure.runs.resizing.grow import grow
    from ranksure.solvers.burer_monteiro import solve
    from ranksure.solvers.solution import Solution
    from ranksure.theory.rank_reduction import reduce_rank

__all__ = [
    "Certificate",
    "CertificateCallback",
    "FitResult",
    "PlanResult",
    "Problem",
    "RanksureError",
    "RunCertificate",
    "Solution",
    "certify",
    "certify_point",
    "compress",
    "fit",
    "get_loss",
    "grow",
    "install_planned_head",
    "l2_optimizer",
    "lambda_max",
    "mean_loss_function",
    "parameter_groups",
    "plan",
    "reduce_rank",
    "select_targets",
    "solve",
    "write_report",
]

_WHERE = {
    "Certificate": "certificate:Certificate",
    "CertificateCallback": "runs.certificate.callback:CertificateCallback",
    "FitResult": "runs.fitting.result:FitResult",
    "PlanResult": "planner.result:PlanResult",
    "Problem": "problem:Problem",
    "RanksureError": "errors:RanksureError",
    "RunCertificate": "records.certificate:RunCertificate",
    "Solution": "solvers.solution:Solution",
    "certify": "runs.certificate.certify:certify",
    "certify_point": "certificate:certify",
    "compress": "runs.resizing.compress:compress",
    "fit": "runs.fitting.fit:fit",
    "get_loss": "losses:get_loss",
    "grow": "runs.resizing.grow:grow",
    "install_planned_head": "runs.fitting.plan_folder:install_planned_head",
    "l2_optimizer": "runs.fitting.optimizer:l2_optimizer",
    "lambda_max": "certificate:lambda_max",
    "mean_loss_function": "loss_terms:mean_loss_function",
    "parameter_groups": "runs.fitting.optimizer:parameter_groups",
    "plan": "planner.run:plan",
    "reduce_rank": "theory.rank_reduction:reduce_rank",
    "select_targets": "network.targets:select_targets",
    "solve": "solvers.burer_monteiro:solve",
    "write_report": "report.page:write_report",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: `ranksure --help` and a typing mistake should not wait for torch.
    if name not in _WHERE:
        raise AttributeError(f"module 'ranksure' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    value = getattr(import_module(f"ranksure.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
