"""What a fit is asked: every option, its default, and the checks that need no data or model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ranksure.errors import SettingError
from ranksure.network.gradient import Weighting
from ranksure.records.certificate import Verdict
from ranksure.runs.fitting.optimizer import OptimizerKind
from ranksure.tasks.load import KINDS

_NO_PART_OF_THE_RESULT = {"save_steps", "report_to", "keep_checkpoints", "memory"}


@dataclass(frozen=True)
class FitSettings:
    """Options of a fit; names and meanings follow PEFT and transformers where they have one.

    Attributes:
        rank: one rank for every target; by default the plan's recommended pattern.
        lora_alpha: numerator of the scale ``lora_alpha / rank``; the rank by default, for scale 1.
        target_modules: names, a regular expression or ``"all-linear"``; the plan's, or PEFT's default for the model.
        layers_to_transform: ``"last"``, ``"all"``, ``"0-5"``, a number or a list.
        lam: the penalty ``lambda`` on factors of scale one; the plan's, or 0.
        weight_decay: in its place, the L2 decay of PEFT's matrices A and B (``lambda = weight_decay / scale``).
        mode: ``train``, or ``linear`` for the plan's optimum without any training.
        init: ``default`` (PEFT's) or ``linear`` (the plan's optimum).
        train_head: train the head (``modules_to_save``) too; frozen by default.
        lora_dropout: as PEFT's.
        model_dropout: leave the network's own dropout on while training; off, so that the loss that is trained is
            the one that is certified.
        optim: ``adam`` or ``sgd``, with true L2 decay.
        learning_rate: the highest.
        lr_scheduler_type: as the Trainer's.
        warmup_steps: as the Trainer's.
        max_steps: optimizer steps; by default those of ``num_train_epochs``.
        num_train_epochs: as the Trainer's.
        batch_size: rows per batch; by default 32, and 4 for causal language models.
        gradient_accumulation_steps: batches per optimizer step, or ``"full"`` for all of them.
        max_grad_norm: gradients are clipped to it; 0 for no clipping.
        weighting: of a causal language model's tokens: every ``token`` or every ``sample`` alike.
        save_steps: steps between checkpoints (rounded up to a multiple of ``logging_steps``).
        logging_steps: steps between logs of the loss.
        report_to: integrations of the Trainer, such as ``tensorboard``; ``none``.
        certify_every: steps between certificates in the run (full passes); 0 for none.
        stop: verdicts of those that end the run.
        tolerance: share of the objective below which a possible gain counts as none.
        seed: seed of every random choice.
        grow: raise ranks and train on, each time the verdict is rank-bound.
        grow_stages: most times to do so.
        keep_checkpoints: keep the checkpoints of a finished run.
        task: ``text`` (or ``SEQ_CLS``), ``prompt``, ``image``, ``speech``, or ``CAUSAL_LM`` for language modelling.
        prompt_column: of a causal language model's data, as are the four that follow.
        completion_column: column of completions.
        messages_column: column of conversations.
        loss_on: ``completion`` or ``all`` tokens.
        packing: join rows into long sequences that are kept apart.
        text_column: column of texts, as for a plan, as are those that follow.
        label_column: column of labels.
        text_pair_column: column of second texts.
        image_column: column of images or their paths.
        audio_column: column of recordings or their paths.
        split: split of a Hub or saved data set.
        eval_data: rows to report held-out figures on.
        eval_split: their split.
        samples: training rows; the plan's, or all.
        heldout: most held-out rows.
        loss: ``cross-entropy``, ``logistic`` or ``squared-error``.
        pooling: ``model`` or ``mean``.
        template: of prompts: text around ``{text}`` (and ``{pair}``).
        verbalizers: of prompts: a word per class.
        calibrate: of prompts: shift the classes' logits so that the training rows have the classes' shares.
        image_size: of images: pixels per side.
        max_seconds: of speech: longer recordings are cut there.
        max_length: tokens per text.
        memory: budget for the certificate's gradients and for a plan, such as ``"8GB"``.
        device: ``auto`` or a torch device.
        dtype: of the model.
        revision: of the model.
        trust_remote_code: run code from the model's repository.
    """

    rank: int | None = None
    lora_alpha: float | None = None
    target_modules: str | Sequence[str] | None = None
    layers_to_transform: str | int | Sequence[int] | None = None
    lam: float | None = None
    weight_decay: float | None = None
    mode: Literal["train", "linear"] = "train"
    init: Literal["default", "linear"] = "default"
    train_head: bool = False
    lora_dropout: float = 0.0
    model_dropout: bool = False
    optim: OptimizerKind = "adam"
    learning_rate: float = 2e-3
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    max_steps: int | None = None
    num_train_epochs: float = 3.0
    batch_size: int | None = None
    gradient_accumulation_steps: int | Literal["full"] = 1
    max_grad_norm: float = 0.0
    weighting: Weighting = "token"
    save_steps: int = 100
    logging_steps: int = 10
    report_to: str | Sequence[str] = "none"
    certify_every: int = 0
    stop: Sequence[Verdict] = ()
    tolerance: float = 0.05
    seed: int = 0
    grow: bool = False
    grow_stages: int = 4
    keep_checkpoints: bool = False
    task: str = "text"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    messages_column: str = "messages"
    loss_on: str = "completion"
    packing: bool = False
    text_column: str = "text"
    label_column: str = "label"
    text_pair_column: str | None = None
    image_column: str = "image"
    audio_column: str = "audio"
    split: str | None = None
    eval_data: Any = None
    eval_split: str | None = None
    samples: int | None = None
    heldout: int = 512
    loss: str = "cross-entropy"
    pooling: str = "model"
    template: str | None = None
    verbalizers: str | Sequence[str] | None = None
    calibrate: bool = True
    image_size: int | None = None
    max_seconds: float | None = None
    max_length: int | None = None
    memory: float | str = "8GB"
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("train", "linear"):
            raise SettingError(f"unknown mode {self.mode!r}: use train or linear")
        if self.init not in ("default", "linear"):
            raise SettingError(f"unknown init {self.init!r}: use default or linear")
        if self.optim not in get_args(OptimizerKind):
            why = " (decoupled decay is no L2 penalty)" if str(self.optim).startswith("adamw") else ""
            raise SettingError(f"unknown optimizer {self.optim!r}{why}: use adam or sgd")
        if self.task == "SEQ_CLS":
            object.__setattr__(self, "task", "text")
        if self.task not in (*KINDS, "CAUSAL_LM"):
            raise SettingError(f"unknown task {self.task!r}: use {', '.join(KINDS)} or CAUSAL_LM")
        if self.packing and self.weighting == "sample":
            raise SettingError("--packing joins rows, which --weighting sample counts: leave one out")
        if self.weighting not in get_args(Weighting):
            raise SettingError(f"unknown weighting {self.weighting!r}: use token or sample")
        if self.linear and self.rank is not None:
            raise SettingError(
                "--rank has no meaning with the linear optimum, which brings its own ranks: leave it out"
            )
        if self.lam is not None and self.weight_decay is not None:
            raise SettingError("give --lambda or --weight-decay, not both")
        for verdict in self.stop:
            if verdict not in get_args(Verdict):
                raise SettingError(f"unknown verdict {verdict!r} in --stop: use {', '.join(get_args(Verdict))}")
        if self.stop and not self.certify_every:
            raise SettingError("--stop needs verdicts during the run: give --certify-every")
        if self.gradient_accumulation_steps != "full":
            self._at_least("gradient-accumulation-steps", self.gradient_accumulation_steps, 1)
        for name, least in (("save-steps", 1), ("logging-steps", 1), ("warmup-steps", 0)):
            self._at_least(name, getattr(self, name.replace("-", "_")), least)
        for name, least in (("certify-every", 0), ("grow-stages", 0), ("heldout", 0)):
            self._at_least(name, getattr(self, name.replace("-", "_")), least)
        for name in ("rank", "max_steps", "samples", "batch_size"):
            if (value := getattr(self, name)) is not None:
                self._at_least(name.replace("_", "-"), value, 1)
        for name in ("lam", "weight_decay", "max_grad_norm", "lora_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                shown = "lambda" if name == "lam" else name.replace("_", "-")
                raise SettingError(f"--{shown} {value} must be at least 0 and finite")
        for name in ("learning_rate", "num_train_epochs", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingError(f"--{name.replace('_', '-')} {value} must be positive and finite")
        if not 0 <= self.seed < 2**32:
            raise SettingError(f"--seed {self.seed} is out of range: use 0 to {2**32 - 1}")
        if not 0 < self.tolerance < 1:
            raise SettingError(f"--tolerance {self.tolerance} is a share of the objective: use a number in (0, 1)")

    @property
    def linear(self) -> bool:
        """Whether the linear optimum is needed."""
        return self.mode == "linear" or self.init == "linear"

    def to_json(self) -> dict[str, Any]:
        """Every option, plain."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def deciding(self) -> dict[str, Any]:
        """The options that the result depends on: what a run that is taken up again must share."""
        return {key: value for key, value in self.to_json().items() if key not in _NO_PART_OF_THE_RESULT}

    @staticmethod
    def _at_least(name: str, value: Any, least: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingError(f"--{name} {value} must be a whole number of at least {least}")


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    return type(value).__name__
