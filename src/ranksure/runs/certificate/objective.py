"""The objective that a ``Trainer`` trains, as far as it shows: what of it no certificate can be about."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler
from transformers import Trainer

from ranksure.loss_terms import MeanLoss

_METHODS = ("compute_loss", "training_step", "get_batch_samples")
_UNIFORM = ("LengthGroupedSampler", "DistributedLengthGroupedSampler", "BatchRebalanceSampler")
_SAME_LOSS = "_ranksure_same_loss"

Method = TypeVar("Method", bound=Callable[..., Any])


def same_loss(method: Method) -> Method:
    """Marks a Trainer's own ``compute_loss``, ``training_step`` or ``get_batch_samples`` that changes no loss."""
    setattr(method, _SAME_LOSS, True)
    return method


def departures(trainer: Trainer, optimizer: Any, loader: Any, penalised: bool) -> list[str]:
    """What a Trainer trains that is not the mean loss of its rows with the stated penalty, a reason each.

    The model's own loss is not looked at here: it needs rows.

    Args:
        trainer: the Trainer.
        optimizer: its optimizer.
        loader: its training batches.
        penalised: whether the certificate is given a weight decay or lambda.
    """
    return [*_methods(trainer), *_loss(trainer), *_noise(trainer), *_rows(loader), *_decay(optimizer, penalised)]


def _methods(trainer: Trainer) -> Iterator[str]:
    kind = type(trainer)
    for name in _METHODS:
        method = getattr(kind, name)
        known = method is getattr(Trainer, name) or getattr(method, _SAME_LOSS, False) or _of_trl_sft(method)
        if not known or name in vars(trainer):
            what = "its own loss" if name == "compute_loss" else f"by its own {name}"
            yield f"{kind.__name__} trains {what} ({name} is overridden), which cannot be read"


def _of_trl_sft(method: Any) -> bool:
    return getattr(method, "__module__", "") == "trl.trainer.sft_trainer"


def _loss(trainer: Trainer) -> Iterator[str]:
    args, own = trainer.args, trainer.compute_loss_func
    if own is not None and not isinstance(own, MeanLoss):
        name = getattr(own, "__qualname__", type(own).__name__)
        yield (
            f"the Trainer's compute_loss_func ({name}) is a loss that cannot be read (class weights?); "
            "ranksure.mean_loss_function gives one that can"
        )
    if own is None and getattr(trainer, "label_smoother", None) is not None:
        yield f"the labels are smoothed (label_smoothing_factor {args.label_smoothing_factor:g})"
    kind = getattr(args, "loss_type", None)
    if isinstance(kind, str) and kind not in ("nll", "chunked_nll"):
        yield f"the loss is {kind!r} (loss_type), not the mean negative log-likelihood"
    coefficient = getattr(trainer, "router_aux_loss_coef", None)
    if getattr(trainer, "aux_loss_enabled", False) and coefficient != 0:
        yield f"the router's auxiliary loss is trained too (router_aux_loss_coef {coefficient})"


def _noise(trainer: Trainer) -> Iterator[str]:
    alpha = getattr(trainer, "neftune_noise_alpha", None) or getattr(trainer.args, "neftune_noise_alpha", None)
    if alpha:
        yield f"noise is added to the embeddings in training (neftune_noise_alpha {alpha:g})"


def _rows(loader: Any) -> Iterator[str]:
    """Rows that are not drawn alike often."""
    if loader is None or isinstance(getattr(loader, "dataset", None), torch.utils.data.IterableDataset):
        return  # a stream is what it gives
    sampler = getattr(loader, "batch_sampler", None) or getattr(loader, "sampler", None)
    while (inner := getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)) is not None:
        sampler = inner
    kind = type(sampler)
    of_library = kind.__module__.split(".")[0] in ("torch", "accelerate", "transformers")
    uniform = isinstance(sampler, (RandomSampler, SequentialSampler, DistributedSampler)) or kind.__name__ in _UNIFORM
    if sampler is not None and not (of_library and uniform):
        yield f"rows are drawn by {kind.__name__}, not every row alike often"


def _decay(optimizer: Any, penalised: bool) -> Iterator[str]:
    """An L2 decay of the optimizer that the certificate was not told of."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    coupled = isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad))
    if penalised or not coupled or isinstance(optimizer, torch.optim.AdamW):
        return
    groups = [group for group in optimizer.param_groups if not group.get("decoupled_weight_decay")]
    decay = max((float(group["weight_decay"]) for group in groups), default=0.0)
    if decay > 0 and math.isfinite(decay):
        yield (
            f"{type(optimizer).__name__} trains an L2 penalty (weight_decay {decay:g}) that the certificate was not "
            "told of: give CertificateCallback weight_decay= or lam="
        )
