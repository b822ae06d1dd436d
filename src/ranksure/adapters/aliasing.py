"""A second skeleton over the same weights, so that PEFT can rebuild a network that must not change.

PEFT replaces modules in place, freezes parameters and edits the config of the model that it is
given. Giving it an alias leaves the caller's network alone, for the memory of a few Python objects.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from ranksure.errors import AdapterError
from ranksure.network.checkpoints import quiet


def alias_model(model: nn.Module) -> nn.Module:
    """Copy a network's modules and settings while sharing the storage of every parameter and buffer.

    The alias may be wrapped, frozen, or have whole parameters replaced; only writing *into* one of its parameters would
    reach the original. Sharing between modules (tied weights, layers used several times) is kept. Its own parameters
    are frozen; the original's ``requires_grad`` stays.

    Raises:
        AdapterError: the network holds something that cannot be copied.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        # Quantised parameter classes carry state beyond the tensor: those are shared as they are.
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise AdapterError(f"{type(model).__name__} cannot be copied to write an adapter for it: {error}") from error


def refuse_adapted(model: nn.Module) -> None:
    """Raise AdapterError if the network already carries adapters (its names would not be the base's)."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise AdapterError(
                f"module {name} already carries an adapter: export onto the base network (merge or unload it first)"
            )


@contextmanager
def quietly() -> Iterator[None]:
    """Trial runs on an alias: no warnings or progress bars, and the global random stream stays as it is."""
    with quiet(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield


def load_back(base: nn.Module, folder: Path) -> tuple[PeftModel, dict[str, Tensor]]:
    """Load an adapter's folder onto a network (an alias, which it changes): the model, and what PEFT would save of it.

    Raises:
        AdapterError: PEFT fails.
    """
    try:
        with quietly():
            loaded = PeftModel.from_pretrained(base, str(folder), torch_device="cpu")
            return loaded, get_peft_model_state_dict(loaded, save_embedding_layers=False)
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise AdapterError(f"the adapter does not load back: {error}") from error
