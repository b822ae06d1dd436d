"""Which modules of a network no target reaches: those that end, in a forward pass, before the first target begins.

Found by running one batch, so nothing is assumed of an architecture: nested stacks, encoders before decoders, whatever
lies before a head. A module that runs several times in a pass (ALBERT's shared layers) counts as one that a target
reaches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.network.logits import Batch, device_of, frozen, to_device, unlabelled


def mapped(value: Any, function: Callable[[Any], Any], leaf: type = Tensor) -> Any:
    """A module's arguments or output with every tensor replaced: tuples, lists, dictionaries and outputs of models.

    ``leaf`` is what stands for a tensor in a nest that was replaced before.

    Raises:
        TypeError: it holds an object of another kind, such as a cache for generation.
    """
    if isinstance(value, leaf):
        return function(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        parts = {key: mapped(part, function, leaf) for key, part in value.items()}
        return parts if type(value) is dict else type(value)(**parts)
    if isinstance(value, (tuple, list)):
        parts = [mapped(part, function, leaf) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    raise TypeError(f"a {type(value).__name__} holds no tensors that can be listed")


def starts(targets: Mapping[str, nn.Module], stack: ExitStack, begin: Callable[[], None]) -> None:
    """Until the stack is left, ``begin`` is called whenever a target, or a part of one, starts to run."""
    for part in {part for target in targets.values() for part in target.modules()}:
        stack.callback(part.register_forward_pre_hook(lambda *_: begin()).remove)


def modules_below(model: nn.Module, batch: Batch, targets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The largest modules that run once and end before a target begins, by name, in the order in which they end."""
    calls: Counter[str] = Counter()
    early: list[str] = []
    begun: list[bool] = []
    reached = _holders(model, targets)

    def ended(name: str) -> Any:
        def hook(_: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            calls[name] += 1
            if begun or name in reached:
                return
            try:
                mapped(output, lambda x: x)
            except TypeError:
                return
            early.append(name)

        return hook

    with frozen(model), torch.no_grad(), ExitStack() as stack:
        starts(targets, stack, lambda: begun.append(True))
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(ended(name)).remove)
        model(**to_device(unlabelled(batch), device_of(model)))
    found = {name for name in early if calls[name] == 1} if begun else set()
    return {
        name: model.get_submodule(name)
        for name in early
        if name in found and not any(parent in found for parent in _parents(name))
    }


def layers_among(model: nn.Module, below: Mapping[str, nn.Module]) -> list[str]:
    """Names of the layers among the modules below the targets; empty where it is no use to leave those out.

    Layers are the elements of lists of modules. Where such a list lies inside one of the modules (a head alone is
    adapted), or the network has none, the modules that multiply by a matrix are named.
    """
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    elements = {layer for each in lists for layer in each if multiplies(layer)}
    found = [name for name, module in below.items() if module in elements]
    heavy = [name for name, module in below.items() if multiplies(module)]
    inside = any(not elements.isdisjoint(below[name].modules()) for name in heavy)
    return found or (heavy if inside or not elements else [])


def multiplies(module: nn.Module) -> bool:
    """Whether a module holds a matrix that it multiplies by; looking up rows of one is cheap."""
    plain = (part for part in module.modules() if not isinstance(part, nn.Embedding))
    return any(p.dim() > 1 for part in plain for p in part.parameters(recurse=False))


def _holders(model: nn.Module, targets: Mapping[str, nn.Module]) -> set[str]:
    """Names of the modules that are, hold or belong to a target, and of the whole network."""
    parts = {part for target in targets.values() for part in target.modules()}
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module in parts]
    holding = {parent for name in names for parent in [name, *_parents(name)]} | {""}
    same = {model.get_submodule(name) for name in holding}
    return {name for name, module in model.named_modules() if module in same}


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
