"""``CertificateCallback``: the certificate of a LoRA run while ``transformers.Trainer`` trains it.

It changes nothing in the run: evaluation mode, parameters frozen for the pass, no gradient written, random
states put back. So the final weights are bitwise those of a run without it, unless it is told to stop the run.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ranksure.adapters.loaded import read_adapter
from ranksure.errors import DataError, SettingError
from ranksure.network.logits import Batch
from ranksure.records.certificate import RunCertificate, Verdict
from ranksure.runs.certificate.certify import certify_adapter
from ranksure.runs.certificate.settings import CertifySettings

STOPPED = "ranksure/stopped"
"""Key that is logged, with the value 1, in the step at which the callback stops the run."""

_VERDICTS: tuple[str, ...] = get_args(Verdict)


class CertificateCallback(TrainerCallback):
    """Certifies the run every so many steps, through ``trainer.log``, to whatever the Trainer reports to.

    Usage, before ``trainer.train()``::

        callback = CertificateCallback(every=200, lam=0.01)
        callback.attach(trainer)

    A full pass logs ``ranksure/loss``, ``ranksure/objective``, ``ranksure/spectral_ratio`` (the largest of all
    modules), ``ranksure/rank_gain_bound``, ``ranksure/training_gain_bound``, and 1 or 0 under each verdict's name
    (``ranksure/rank_bound``). A pass over a sample logs the first five as ``ranksure/sample_*`` and gives no
    verdict: a sample's gradient is far from the data's (docs/training.md).

    Args:
        batches: the training data in batches with ``labels``, in a fixed order; held in memory. By default the
            Trainer's own training set, in order, once, through its collator.
        every: steps between full passes; 0 for none.
        sample_every: steps between passes over a sample; 0 for none.
        sample_rows: rows of the sample, the first ones; whole batches are taken.
        stop: verdicts of a full pass that end the run (``{"first-order-optimal", "rank-bound"}``); none by default.
        **settings: as for :func:`ranksure.certify`.

    Attributes:
        certificates: every full pass, as ``(step, certificate)``.
        stopped: the verdict that ended the run, or None.

    Raises:
        SettingError: nothing to do, a negative number, an unknown verdict, or as ``certify``.
    """

    def __init__(
        self,
        batches: Iterable[Batch] | None = None,
        *,
        every: int = 0,
        sample_every: int = 0,
        sample_rows: int = 256,
        stop: Collection[Verdict] = (),
        **settings: Any,
    ) -> None:
        if min(every, sample_every) < 0 or sample_rows < 1:
            raise SettingError("every and sample_every must be at least 0, and sample_rows at least 1")
        if every == 0 and sample_every == 0:
            raise SettingError("a CertificateCallback needs every= (full passes) or sample_every= (a sample), in steps")
        for verdict in stop:
            if verdict not in _VERDICTS:
                raise SettingError(f"unknown verdict {verdict!r} in stop: use {', '.join(_VERDICTS)}")
        if stop and every == 0:
            raise SettingError("stopping needs a verdict, and a verdict needs full passes: give every=")
        self.every, self.sample_every, self.sample_rows, self.stop = every, sample_every, sample_rows, frozenset(stop)
        self.certificates: list[tuple[int, RunCertificate]] = []
        self.stopped: Verdict | None = None
        self._sampled: list[RunCertificate] = []
        self._settings = CertifySettings.of("CertificateCallback", settings)
        self._given = batches
        self._batches: Sequence[Batch] | None = batches if isinstance(batches, Sequence) else None
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> CertificateCallback:
        """Add the callback to a Trainer, through which it logs; once is enough.

        Raises:
            SettingError: it is attached to another Trainer already.
        """
        if self._trainer is not None and self._trainer is not trainer:
            raise SettingError("this CertificateCallback is attached to another Trainer: make a new one")
        if self._trainer is None:
            if self not in trainer.callback_handler.callbacks:  # given in callbacks= as well: it must not run twice
                trainer.add_callback(self)
            self._trainer = trainer
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse before the first step what could not be certified later."""
        trainer = self._attached()
        self.certificates, self.stopped = [], None
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise SettingError(
                "the certificate needs whole weights in one process: leave it out under FSDP or DeepSpeed"
            )
        if self._given is None and args.world_size > 1:
            raise SettingError("with several processes give CertificateCallback all training batches (batches=)")

    def on_step_end(  # pyright: ignore[reportIncompatibleMethodOverride]  (transformers uses what is returned)
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Certify where it is due, and log."""
        step = state.global_step
        full = self.every > 0 and step % self.every == 0
        sample = self.sample_every > 0 and step % self.sample_every == 0
        if not full and not sample:
            return None
        trainer = self._attached()
        model: nn.Module = kwargs["model"]
        logs: dict[str, float] = {}
        with preserved_randomness():
            batches, read = self._materialised(trainer), read_adapter(model, self._settings.adapter)
            read.untested.extend(_other_decay(trainer.optimizer, bool(self._settings.weight_decay)))
            if sample:
                first = _first_rows(batches, self.sample_rows)
                found = certify_adapter(model, read, first, self._settings, probe=False, before=self._sampled)
                self._sampled = [found]
                logs |= {f"ranksure/sample_{key}": value for key, value in _figures(found).items()}
            if full:
                before = [found for _, found in self.certificates[-1:]]
                found = certify_adapter(model, read, batches, self._settings, before=before)
                self.certificates.append((step, found))
                logs |= {f"ranksure/{key}": value for key, value in _figures(found).items()}
                logs |= {f"ranksure/{name.replace('-', '_')}": float(name == found.verdict) for name in _VERDICTS}
                if found.verdict in self.stop:
                    self.stopped = found.verdict
                    logs[STOPPED] = 1.0
        # Trainer.log clears the request to log that the Trainer's own flow has made for this step.
        wanted = control.should_log
        trainer.log(logs)
        control = trainer.control
        control.should_log = wanted
        if self.stopped is not None:
            control.should_training_stop = control.should_save = True
        return control

    def _attached(self) -> Trainer:
        if self._trainer is None:
            raise SettingError(
                "CertificateCallback is not attached: call callback.attach(trainer) before trainer.train() (it logs "
                "through trainer.log, which a callback alone cannot reach)"
            )
        return self._trainer

    def _materialised(self, trainer: Trainer) -> Sequence[Batch]:
        """The batches as a list, made once: a loader shuffles, draws seeds, and keeps its state in accelerate."""
        if self._batches is None:
            given = self._given
            if given is None:
                if trainer.train_dataset is None:
                    raise SettingError("the Trainer has no training set: give CertificateCallback its batches=")
                data: Any = trainer.train_dataset  # a Dataset of torch or of datasets
                given = trainer.get_test_dataloader(data)
            self._batches = [
                {key: value.cpu() if isinstance(value, Tensor) else value for key, value in batch.items()}
                for batch in given
            ]
        if not self._batches:
            raise DataError("CertificateCallback was given no batch")
        return self._batches


def _other_decay(optimizer: Any, stated: bool) -> list[str]:
    """Why what an optimizer of PEFT's minimises is no nuclear norm, where it (or the user's ``stated`` decay) decays.

    LoRA+ is not among these: learning rates of their own leave the stationary points of an L2 penalty where they are.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    kinds = {kind.__module__.rpartition(".")[2]: kind for kind in type(optimizer).__mro__}
    kind = kinds.get("riemannian") or kinds.get("lorafa")
    decays = stated or any(group.get("weight_decay") for group in getattr(optimizer, "param_groups", []))
    if kind is None or not decays:
        return []
    return [
        f"the optimizer ({kind.__module__}.{kind.__name__}) preconditions the gradient but not the weight decay, so "
        "what it minimises is no nuclear norm: train without decay, or with SGD's or Adam's L2 decay"
    ]


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Put the random states of Python, NumPy and torch (all devices) back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _first_rows(batches: Sequence[Batch], rows: int) -> list[Batch]:
    out: list[Batch] = []
    for batch in batches:
        out.append(batch)
        rows -= len(batch["labels"]) if isinstance(batch.get("labels"), Tensor) else 1
        if rows <= 0:
            break
    return out


def _figures(found: RunCertificate) -> dict[str, float]:
    """Numbers of a certificate; none where nothing was checked."""
    ratios = [state.spectral_ratio for state in found.modules.values() if state.spectral_ratio is not None]
    values = {
        "loss": found.loss,
        "objective": found.objective,
        "spectral_ratio": max(ratios, default=None),
        "rank_gain_bound": found.rank_gain_bound,
        "training_gain_bound": found.training_gain_bound,
    }
    return {key: float(value) for key, value in values.items() if value is not None}
