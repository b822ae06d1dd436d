"""One stage of a fit: ``transformers.Trainer`` on fixed ranks, gone on with from its last whole checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from ranksure.errors import SettingError, one_line
from ranksure.network.logits import Batch
from ranksure.progress import Clock
from ranksure.runs.certificate.callback import STOPPED, CertificateCallback
from ranksure.runs.certificate.settings import CertifySettings
from ranksure.runs.fitting.inputs import Setup
from ranksure.runs.fitting.optimizer import l2_optimizer
from ranksure.runs.fitting.settings import FitSettings
from ranksure.runs.fitting.trainer import FitTrainer, Watch, last_checkpoint


def train_stage(
    model: PeftModel,
    setup: Setup,
    options: FitSettings,
    asks: CertifySettings,
    folder: Path,
    batches: Sequence[Batch],
    callbacks: Sequence[TrainerCallback],
    clock: Clock,
) -> tuple[list[dict[str, Any]], int]:
    """Train to the end of the schedule (or until a verdict stops the run), from the last checkpoint if there is one.

    What requires gradients in ``model`` is trained. ``asks`` holds the penalty, and how certificates during the run are
    made of all training rows in ``batches``; ``folder`` is that of the checkpoints.

    Returns:
        The log (without how long things took), and the steps made.

    Raises:
        SettingError: settings that the Trainer refuses, or a run that diverges.
    """
    found = last_checkpoint(folder)
    arguments = _arguments(setup, options, folder)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    if found is not None and _ended(found[1], arguments.max_steps):
        model.load_adapter(str(found[0]), "default", is_trainable=True)
        for parameter in frozen:
            parameter.requires_grad_(False)
        return _log(found[1]["log_history"]), int(found[1]["global_step"])
    optimizer = l2_optimizer(model, lam=asks.lam or 0.0, lr=options.learning_rate, kind=options.optim)
    with clock.stage("train", "Training") as advance:
        try:
            with _event_files_in(folder.parents[1] / "runs" / folder.name):
                trainer = FitTrainer(
                    model,
                    arguments,
                    train_dataset=setup.features,  # pyright: ignore[reportArgumentType]
                    data_collator=setup.collator,  # pyright: ignore[reportArgumentType]
                    optimizers=(optimizer, None),
                    callbacks=[*callbacks, Watch(frozen, advance)],
                    kind=setup.kind,
                    weighting=options.weighting,
                    model_dropout=options.model_dropout,
                )
        except (RuntimeError, ImportError, ValueError) as error:
            raise SettingError(f"the Trainer refuses its settings: {one_line(error)}") from None
        trainer.remove_callback(PrinterCallback)
        if options.certify_every:
            every, stop = options.certify_every, options.stop
            CertificateCallback(batches, every=every, stop=stop, **vars(asks)).attach(trainer)
        trainer.train(resume_from_checkpoint=None if found is None else str(found[0]))
    return _log(trainer.state.log_history), trainer.state.global_step


@contextmanager
def _event_files_in(folder: Path) -> Iterator[None]:
    """Have the Trainer's TensorBoard reporter, which reads this when it is made, write where nothing is tidied away."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        del os.environ[name]


def _arguments(setup: Setup, options: FitSettings, folder: Path) -> TrainingArguments:
    size = 1 if setup.own_length else setup.batch_size  # the Trainer would pad rows of several lengths
    batches = math.ceil(len(setup.features) / size)
    asked = options.gradient_accumulation_steps
    together = batches if asked == "full" else min(int(asked) * (setup.batch_size // size), batches)
    epochs = math.ceil(options.num_train_epochs * math.ceil(batches / together))
    device = next(setup.base.parameters()).device
    try:
        arguments = TrainingArguments(
            str(folder),
            max_steps=options.max_steps or epochs,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=together,
            learning_rate=options.learning_rate,
            lr_scheduler_type=options.lr_scheduler_type,
            warmup_steps=options.warmup_steps,
            max_grad_norm=options.max_grad_norm,
            weight_decay=0.0,  # the optimizer is given, with its own
            logging_steps=options.logging_steps,
            logging_nan_inf_filter=False,
            save_steps=options.logging_steps * math.ceil(options.save_steps / options.logging_steps),
            save_total_limit=2,
            report_to=[options.report_to] if isinstance(options.report_to, str) else list(options.report_to),
            remove_unused_columns=False,
            label_names=["labels"],
            seed=options.seed,
            data_seed=options.seed,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type != "cpu",
            average_tokens_across_devices=False,
            disable_tqdm=True,
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise SettingError(f"the Trainer refuses its settings: {one_line(error)}") from None
    if arguments.n_gpu > 1 or arguments.world_size > 1:
        raise SettingError("fit trains on one device in one process: choose one GPU with CUDA_VISIBLE_DEVICES")
    return arguments


def _ended(state: dict[str, Any], max_steps: int) -> bool:
    """Whether a checkpoint is the last of its run: all steps made, or stopped by a verdict there."""
    step = state["global_step"]
    return step >= max_steps or any(STOPPED in entry and entry["step"] == step for entry in state["log_history"])


def _log(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log without how long things took."""
    return [entry for entry in log if not any(key.startswith("train_") for key in entry)]
