"""Running a network as a deterministic function from a batch to logits, and nothing else.

A batch is a mapping of tensors (a Hugging Face batch without labels). Networks are run in evaluation
mode with every parameter frozen; both are restored afterwards.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ranksure.errors import CaptureError, exhausted, one_line
from ranksure.network.targets import base_network

Batch: TypeAlias = Mapping[str, Any]


def logits_in(output: Any) -> Any:
    """The logits of a network's output: a Hugging Face output, a mapping, a tuple that starts with them, or themselves.

    A ``(rows,)`` tensor counts as K = 1.
    """
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None:
        logits = output
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    return logits[:, None] if isinstance(logits, Tensor) and logits.dim() == 1 else logits


class DoesNotRun(CaptureError):
    """A network that fails on a batch; what it raised is the cause."""


_FAILS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError)


def output_of(model: nn.Module, batch: Batch) -> Any:
    """What a network gives for a batch.

    Raises:
        DoesNotRun: it raises an error, other than for want of memory.
    """
    try:
        return model(**batch)
    except _FAILS as error:
        if exhausted(error):
            raise
        where = _innermost(base_network(model), error)
        raise DoesNotRun(
            f"the network does not run on this batch: {where}{type(error).__name__}: {one_line(error)}"
        ) from error


def _innermost(base: nn.Module, error: Exception) -> str:
    """The module in whose forward pass an error was raised, if any."""
    names = {id(module): name for name, module in base.named_modules()}
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((f"in {name}, " for module in reversed(frames) if (name := names.get(id(module)))), "")


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch, shape ``(rows, K)``.

    Raises:
        CaptureError: there are none, or of another shape.
        DoesNotRun: as :func:`output_of`.
    """
    output = output_of(model, batch)
    logits = logits_in(output)
    if not isinstance(logits, Tensor):
        raise CaptureError(f"the network returned {type(output).__name__}, which has no logits tensor")
    if logits.dim() != 2:
        raise CaptureError(
            f"the network's logits have shape {tuple(logits.shape)}; one row of K outputs per sample is needed"
        )
    return logits


def batch_rows(batch: Batch) -> int:
    """Number of samples in a batch: the leading size of its tensors.

    Raises:
        CaptureError: the tensors disagree, or there is none.
    """
    sizes = {value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0}
    if len(sizes) != 1:
        raise CaptureError(f"the tensors of a batch must share their leading size; found sizes {sorted(sizes)}")
    return sizes.pop()


def unlabelled(batch: Batch) -> dict[str, Any]:
    """What the network is given: all but the labels."""
    return {key: value for key, value in batch.items() if key not in ("labels", "label")}


def to_device(batch: Batch, device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on ``device``, apart from the caller's graph and gradients."""
    return {
        key: value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def device_of(model: nn.Module) -> torch.device:
    """Device of the network's first parameter."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with no parameter requiring gradients and no cache for generation; restores all.

    A recurrent network writes its cache in place, which no gradient can be taken through (RWKV in evaluation mode).
    """
    training = [(module, module.training) for module in model.modules()]
    requires = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    every: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in every if _caches(config)}
    try:
        model.eval()
        for config in configs.values():
            config.use_cache = False
        for parameter, _ in requires:
            parameter.requires_grad_(False)
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
        for module, mode in training:
            module.training = mode
        for parameter, flag in requires:
            parameter.requires_grad_(flag)


def _caches(config: Any) -> bool:
    return isinstance(config, PreTrainedConfig) and getattr(config, "use_cache", None) is True


def predict(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Logits of all batches in evaluation mode, float32 or wider, on the CPU."""
    device = device_of(model)
    with frozen(model), torch.no_grad():
        outputs = [logits_of(model, to_device(batch, device)).cpu() for batch in batches]
    logits = torch.cat(outputs)
    return logits if logits.dtype == torch.float64 else logits.float()


def not_finite(where: str, batch: Batch) -> str:
    """The refusal of logits that are NaN or infinite; padding can be why."""
    mask = batch.get("attention_mask")
    padded = isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all())
    why = (
        ": its rows are padded, and eager attention gives NaN where a place can look at padding only; load the model "
        'with attn_implementation="sdpa", or pad on the right'
    )
    return f"the network's logits {where} are not finite (NaN or infinity){why * padded}"
