"""What ``ranksure fit`` adds to ``transformers.Trainer``: the loss as an exact mean, checkpoints to be trusted."""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ranksure.errors import DataError, SettingError
from ranksure.loss_terms import Weighting, count_terms, mean_loss_function
from ranksure.losses import Kind
from ranksure.runs.certificate.objective import same_loss


class FitTrainer(Trainer):
    """``Trainer`` with the loss of :func:`mean_loss_function`, in one process.

    With ``model_dropout`` the network's own dropout stays on. Off, the loss that is trained is the one that is
    certified; the adapter's dropout stays as configured.
    """

    def __init__(
        self, *args: Any, kind: Kind, weighting: Weighting, model_dropout: bool = False, **kwargs: Any
    ) -> None:
        self._kind: Kind = kind
        self._weighting: Weighting = weighting
        self._model_dropout = model_dropout
        super().__init__(*args, compute_loss_func=mean_loss_function(kind, weighting), **kwargs)

    @same_loss
    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The loss, in evaluation mode but for the adapter's dropout (``Trainer`` has just set training mode)."""
        if not self._model_dropout:
            model.eval()
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module.lora_dropout.train()
        return super().compute_loss(model, *args, **kwargs)

    @same_loss
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of one optimizer step, and the number of terms in them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(count_terms(self._kind, self._weighting, batch["labels"]) for batch in batches)
        if batches and not count:
            raise DataError("a step of training holds no label: raise the batch size, or remove rows without labels")
        return batches, torch.tensor(count, device=device)


class Watch(TrainerCallback):
    """Keeps frozen what is to stay frozen, reports (steps done, steps in all), and stops a run that diverges.

    Loading a checkpoint makes PEFT thaw ``modules_to_save``.
    """

    def __init__(self, frozen: list[nn.Parameter], advance: Callable[[int, int], None]) -> None:
        self._frozen, self._advance = frozen, advance

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze again after a checkpoint was loaded."""
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report."""
        self._advance(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Stop where the loss is no number any more."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise SettingError(
                f"training diverged: the loss is {loss} at step {state.global_step}; lower the learning rate"
            )


def last_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a folder, and its ``trainer_state.json``; damaged newer ones are deleted.

    ``Trainer`` writes a checkpoint file by file, so a kill can leave half of one.
    """
    found = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rpartition("-")[2]
        if path.is_dir() and step.isdigit():
            found.append((int(step), path))
    for step, path in sorted(found, reverse=True):
        state = _whole(path, step)
        if state is not None:
            return path, state
        shutil.rmtree(path, ignore_errors=True)
    return None


def _whole(path: Path, step: int) -> dict[str, Any] | None:
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                file.get_tensor(key)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            with zipfile.ZipFile(path / name) as file:
                if file.testzip() is not None:
                    return None
    except (OSError, ValueError, RecursionError, SafetensorError, zipfile.BadZipFile):
        return None
    return state if isinstance(state, dict) and state.get("global_step") == step else None
