"""What a fit is asked: every option, its default, and the checks that need no data or model."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from ranksure.choices import LossOn, OptimizerKind, Verdict, Weighting
from ranksure.errors import SettingError
from ranksure.options import (
    COMMON,
    DATA,
    MODEL,
    OUTPUT,
    SOLVER,
    TARGETS,
    TRAINING,
    Option,
    not_negative,
    options_of,
    plain,
    positive,
    whole,
)
from ranksure.runs.options import LOSS_ON, WEIGHTING, CertificateOptions, ConversationOptions, share
from ranksure.tasks.options import TASKS, TaskOptions, values_of


def _task(value: str) -> None:
    from ranksure.tasks.load import check_kind  # with torch: not for the words that are known here

    try:
        check_kind(value)
    except SettingError as error:
        raise SettingError(f"{error}; or CAUSAL_LM") from None


def _optimizer(value: Any) -> str | None:
    return "is unknown (decoupled decay is no L2 penalty): use adam or sgd" if str(value).startswith("adamw") else None


GAP = 0.01
"""Of what was gained: the gap that the certified method reaches."""

# What the certified method does, and the options that it leaves without a meaning.
_NOT_CERTIFIED = {
    "finds the ranks": ("rank", "grow", "grow_stages"),
    "takes steps of its own, over all rows": (
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "optim",
        "num_train_epochs",
        "gradient_accumulation_steps",
        "max_grad_norm",
    ),
    "runs the network without dropout": ("lora_dropout", "model_dropout"),
    "has factors of scale 1": ("lora_alpha",),
    "leaves the head as it is": ("train_head",),
    "certifies every round": ("certify_every", "stop"),
    "starts from the plan's solution, an adapter or nothing": ("mode", "init"),
    "keeps its last round only, until it is done": ("save_steps", "keep_checkpoints"),
    "tells its rounds in fit.json": ("logging_steps", "report_to"),
}
_OF_ADAPTER = {  # the same with an adapter to start from
    "is that of the adapter to start from": ("pooling", "target_modules", "layers_to_transform", "calibrate"),
    "has no meaning with `adapter`, with which the training rows alone are read": (
        "eval_data",
        "eval_split",
        "heldout",
    ),
}


@dataclass(frozen=True, kw_only=True)
class FitSettings(CertificateOptions, ConversationOptions, TaskOptions):
    """Options of a fit; names and meanings follow PEFT and transformers where they have one."""

    task: Annotated[
        str,
        Option(
            "text, prompt, image, speech (the plan's), or CAUSAL_LM (language modelling).",
            COMMON,
            words=(*TASKS, "CAUSAL_LM"),
            check=_task,
        ),
    ] = "text"
    loss_on: Annotated[LossOn, LOSS_ON] = "completion"
    weighting: Annotated[Weighting, WEIGHTING] = "token"
    rank: Annotated[int | None, Option("One rank for every target (default: the plan's).", COMMON, check=whole(1))] = (
        None
    )
    lam: Annotated[
        float | None,
        Option("Penalty on factors of scale 1 (default: the plan's, or 0).", COMMON, "--lambda", check=not_negative),
    ] = None
    num_train_epochs: Annotated[float, Option("Passes over the data.", COMMON, check=positive)] = 3.0
    grow: Annotated[bool, Option("While the verdict is rank-bound, raise ranks there and train on.", COMMON)] = False

    samples: Annotated[int | None, Option("Training rows (default: the plan's, or all).", DATA, check=whole(1))] = None

    calibrate: Annotated[
        bool,
        Option("Shift the classes' logits so that the training rows have the classes' shares (task prompt).", MODEL),
    ] = True
    adapter: Annotated[
        Path | None,
        Option("Folder of an adapter to start from, with its model, head and targets (method certified).", MODEL),
    ] = None
    train_head: Annotated[bool, Option("Train the head too (frozen otherwise).", MODEL)] = False
    lora_alpha: Annotated[
        float | None, Option("Scale times rank (default: the rank, for scale 1).", TARGETS, check=positive)
    ] = None
    lora_dropout: Annotated[float, Option("As PEFT's.", TARGETS, check=not_negative)] = 0.0
    init: Annotated[
        Literal["default", "linear"], Option("default (PEFT's), or linear: the plan's optimum.", TARGETS)
    ] = "default"

    weight_decay: Annotated[
        float | None,
        Option("In place of `lam`, the L2 decay of PEFT's matrices A and B.", SOLVER, check=not_negative),
    ] = None
    tolerance: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]  # None: the method's own default
        float | None,
        Option(
            "Gain that counts as none: a share of the objective (default: 0.05); with method certified the gap to "
            "reach, a share of what was gained (default: 0.01).",
            SOLVER,
            check=share,
        ),
    ] = None
    method: Annotated[
        Literal["trainer", "certified"],
        Option(
            "trainer (SGD or Adam, at a given rank), or certified: the network's own solver, which finds the ranks.",
            SOLVER,
        ),
    ] = "trainer"
    mode: Annotated[
        Literal["train", "linear"], Option("train, or linear: the plan's optimum, certified and exported.", SOLVER)
    ] = "train"
    certify_every: Annotated[
        int, Option("Steps between certificates in the run; 0 for none.", SOLVER, check=whole(0))
    ] = 0
    stop: Annotated[
        Sequence[Verdict], Option("Verdicts that end the run, such as first-order-optimal,rank-bound.", SOLVER)
    ] = ()
    grow_stages: Annotated[int, Option("Most times to grow.", SOLVER, check=whole(0))] = 4

    optim: Annotated[OptimizerKind, Option("adam or sgd, both with true L2 decay.", TRAINING, check=_optimizer)] = (
        "adam"
    )
    learning_rate: Annotated[float, Option("The highest learning rate.", TRAINING, check=positive)] = 2e-3
    lr_scheduler_type: Annotated[str, Option("As the Trainer's.", TRAINING)] = "linear"
    warmup_steps: Annotated[int, Option("As the Trainer's.", TRAINING, check=whole(0))] = 0
    max_steps: Annotated[
        int | None,
        Option(
            "Optimizer steps (default: those of `num_train_epochs`); with method certified gradients (default: 700).",
            TRAINING,
            check=whole(1),
        ),
    ] = None
    batch_size: Annotated[
        int | None, Option("Rows per batch (default: 32; 4 for causal models).", TRAINING, check=whole(1))
    ] = None
    gradient_accumulation_steps: Annotated[
        int | Literal["full"], Option("Batches per step, or full for all of them.", TRAINING, check=whole(1))
    ] = 1
    max_grad_norm: Annotated[float, Option("Clip gradients; 0: no clipping.", TRAINING, check=not_negative)] = 0.0
    model_dropout: Annotated[bool, Option("Leave the network's own dropout on (off otherwise).", TRAINING)] = False
    save_steps: Annotated[int, Option("Steps between checkpoints.", TRAINING, check=whole(1), decides=False)] = 100
    logging_steps: Annotated[int, Option("Steps between logs of the loss.", TRAINING, check=whole(1))] = 10
    report_to: Annotated[
        str | Sequence[str], Option("none, tensorboard, wandb, ... (comma list).", TRAINING, decides=False)
    ] = "none"
    keep_checkpoints: Annotated[bool, Option("Keep the checkpoints of the finished run.", OUTPUT, decides=False)] = (
        False
    )

    def __post_init__(self) -> None:
        if self.task == "SEQ_CLS":
            object.__setattr__(self, "task", "text")
        super().__post_init__()
        if self.linear and self.rank is not None:
            raise SettingError(
                "`rank` has no meaning with the linear optimum, which brings its own ranks: leave it out"
            )
        if self.stop and not self.certify_every:
            raise SettingError("`stop` needs verdicts during the run: give `certify_every`")
        if self.method == "certified":
            self._refuse_meaningless()
        elif self.adapter is not None:
            raise SettingError("`adapter` is a start for `method` certified: give that, or leave it out")

    def _refuse_meaningless(self) -> None:
        """Refuse what the certified method does not have, for what it does instead."""
        reasons = {f"has no meaning with `method` certified, which {why}": of for why, of in _NOT_CERTIFIED.items()}
        if self.adapter is not None:
            reasons |= _OF_ADAPTER
        defaults = {each.name: each.default for each in fields(FitSettings)}
        for why, names in reasons.items():
            for name in names:
                if plain(getattr(self, name)) != plain(defaults[name]):
                    raise SettingError(f"`{name}` {why}: leave it out")

    @property
    def certified(self) -> bool:
        """Whether the network's own solver trains."""
        return self.method == "certified"

    @property
    def gain(self) -> float:
        """The tolerance, its default filled in."""
        return self.tolerance or (GAP if self.certified else CertificateOptions.tolerance)

    @property
    def linear(self) -> bool:
        """Whether the linear optimum is needed."""
        return self.mode == "linear" or self.init == "linear"

    def to_json(self) -> dict[str, Any]:
        """Every option that has a meaning, plain."""
        none = [name for names in _NOT_CERTIFIED.values() for name in names] if self.certified else []
        return {name: plain(value) for name, value in values_of(self, FitSettings, *none).items()}

    def deciding(self) -> dict[str, Any]:
        """The options that the result depends on: what a run that is taken up again must share."""
        decides = {stated.name: stated.option.decides for stated in options_of(FitSettings)}
        return {name: value for name, value in self.to_json().items() if decides[name]} | {"tolerance": self.gain}
