"""Target modules: which ones, their block shape, and how a block's update maps to their weight.

A *block* is the matrix of one target module, always written as out x in (``m x n``) so that a LoRA
update is ``delta = u v^T`` with ``u`` of shape ``(m, r)`` (PEFT's ``lora_B``) and ``v`` of shape
``(n, r)`` (PEFT's ``lora_A`` transposed):

===============  =======================  ==========================
module           stored weight            block (m, n)
===============  =======================  ==========================
``nn.Linear``    ``(out, in)``            ``(out, in)``
``Conv1D``       ``(in, out)`` (GPT-2)    ``(out, in)``
``nn.Conv2d``    ``(out, in, kh, kw)``    ``(out, in * kh * kw)``
``nn.Embedding`` ``(num, dim)``           ``(dim, num)``
===============  =======================  ==========================
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ranksure.errors import TargetError

ALL_LINEAR = "all-linear"
_CLASSIFIER_NAMES = ("score", "classifier")  # as PEFT knows them
_LAYER_INDEX = re.compile(r"^(?:.*?\.)?[^.]*\.(\d+)\.")  # the first numbered segment, as PEFT reads it

_MOST_LAYERS = 100_000
_MOST_NAMES = 12  # in an error


def base_layer(module: nn.Module) -> nn.Module:
    """The module that holds the weight: ``module`` itself, or the layer inside a PEFT wrapper."""
    inner = getattr(module, "base_layer", None)
    return base_layer(inner) if isinstance(inner, nn.Module) else module


def base_network(model: nn.Module) -> nn.Module:
    """The network inside a ``PeftModel``; any other as it is."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def parameter_users(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold a parameter, one for each module, by the parameter's ``id``."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    return users


def is_supported(module: nn.Module) -> bool:
    """Whether ``module`` (or the layer inside its PEFT wrapper) has a block that LoRA can update."""
    layer = base_layer(module)
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    if isinstance(layer, nn.Embedding):
        return layer.max_norm is None and not layer.scale_grad_by_freq
    return isinstance(layer, (nn.Linear, Conv1D))


def block_shape(module: nn.Module) -> tuple[int, int]:
    """Shape ``(m, n)`` of a module's block (see the table in this module's docstring).

    Raises:
        TargetError: for a module of an unsupported kind.
    """
    layer = base_layer(module)
    if not is_supported(module):
        raise TargetError(f"{type(layer).__name__} modules cannot be targets: use Linear, Conv1D, Conv2d or Embedding")
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(layer, (Conv1D, nn.Embedding)):
        return weight.shape[1], weight.shape[0]
    return weight.shape[0], weight[0].numel()


def scaled(module: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """An update's output times what an embedding multiplies its own by, and PEFT an adapter's (Gemma, BART)."""
    layer = base_layer(module)
    scale = getattr(layer, "embed_scale", None) if isinstance(layer, nn.Embedding) else None
    return output if scale is None else output * scale


def to_weight_shape(module: nn.Module, delta: torch.Tensor) -> torch.Tensor:
    """A block update ``(m, n)`` as an update of the module's stored weight."""
    layer = base_layer(module)
    if isinstance(layer, (Conv1D, nn.Embedding)):
        return delta.T
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return delta.reshape(weight.shape)


def parse_layers(layers: str | int | Sequence[int] | None) -> str | list[int] | None:
    """Read ``layers_to_transform``: ``"last"``, ``"all"``, ``"3"``, ``"0-5"``, ``"0,2,4"``, a list, or None."""
    if layers is None or layers == "all":
        return None
    if isinstance(layers, int):
        return [layers]
    if not isinstance(layers, str):
        return sorted(set(int(layer) for layer in layers))
    if layers == "last":
        return "last"
    chosen: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise TargetError(f"layers_to_transform {layers!r} is not understood: write last, all, 3, 0-5 or 0,2,4")
        low = int(match[1])
        high = int(match[2]) if match[2] else low
        if high < low:
            raise TargetError(f"layers_to_transform {layers!r}: the range {part.strip()!r} runs backwards")
        if high > _MOST_LAYERS:
            raise TargetError(f"layers_to_transform {layers!r}: no model has a layer {high}")
        chosen.update(range(low, high + 1))
    return sorted(chosen)


def select_targets(
    model: nn.Module,
    target_modules: str | Iterable[str],
    layers_to_transform: str | int | Sequence[int] | None = None,
    exclude: Iterable[str] = (),
) -> dict[str, nn.Module]:
    """Choose target modules by PEFT's rules.

    Args:
        model: the network; an adapted one is addressed by its wrappers, never by the layers inside.
        target_modules: ``"all-linear"`` (every Linear and Conv1D but the output head), a regular expression that the
            whole qualified name must match (a string), or names or their endings after a dot (an iterable).
        layers_to_transform: see :func:`parse_layers`; ``"last"`` is the highest layer number among the matches. Only
            modules with a layer number in their name remain.
        exclude: qualified names left out (the task head, as a rule).

    Returns:
        Modules by qualified name, in the network's order.

    Raises:
        TargetError: nothing matches (near matches are listed), or a match is of an unsupported kind.
    """
    excluded = set(exclude)
    candidates = {name: module for name, module in _outer_modules(model) if name and name not in excluded}
    matched = _in_layers(_matching(model, candidates, target_modules), layers_to_transform)
    for name, module in matched.items():
        if not is_supported(module):
            kind = type(base_layer(module)).__name__
            raise TargetError(
                f"target module {name} is a {kind}: only Linear, Conv1D, Conv2d (one group, zero padding) "
                "and Embedding (no max_norm) can be targets"
            )
    return matched


def _matching(
    model: nn.Module, candidates: dict[str, nn.Module], target_modules: str | Iterable[str]
) -> dict[str, nn.Module]:
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if target_modules == ALL_LINEAR:
        head = _output_head(model)
        inside = set(head.modules()) if head is not None else set()
        matched = {
            name: module
            for name, module in candidates.items()
            if isinstance(base_layer(module), (nn.Linear, Conv1D)) and module not in inside
        }
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise TargetError(f"target_modules {target_modules!r} is not a regular expression: {error}") from None
        matched = {name: module for name, module in candidates.items() if pattern.fullmatch(name)}
        if not matched and "," in target_modules:
            raise TargetError(
                f"no module of the model matches the regular expression {target_modules!r}; pass names as a list"
            )
    else:
        missing = [w for w in wanted if not any(_ends_with(name, w) for name in candidates)]
        if missing:
            raise TargetError(_no_match(missing[0], candidates))
        matched = {n: m for n, m in candidates.items() if any(_ends_with(n, w) for w in wanted)}
    if not matched:
        raise TargetError(_no_match(", ".join(wanted), candidates))
    return matched


def _in_layers(
    matched: dict[str, nn.Module], layers_to_transform: str | int | Sequence[int] | None
) -> dict[str, nn.Module]:
    layers = parse_layers(layers_to_transform)
    if layers is None:
        return matched
    index = {name: int(found[1]) for name in matched if (found := _LAYER_INDEX.match(name))}
    if not index:
        raise TargetError("layers_to_transform was given, but no target module has a layer number in its name")
    keep = [max(index.values())] if isinstance(layers, str) else layers
    unknown = sorted(set(keep) - set(index.values()))
    if unknown:
        present = sorted(set(index.values()))
        raise TargetError(
            f"layers_to_transform names layer {unknown[0]}, but the target modules have layers "
            f"{present[0]} to {present[-1]}"
        )
    return {name: module for name, module in matched.items() if name in index and index[name] in keep}


def _outer_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Named modules, not descending into PEFT wrappers (their inner layers never see a full pass)."""

    def walk(prefix: str, module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
        yield prefix, module
        if base_layer(module) is not module:
            return
        for name, child in module.named_children():
            yield from walk(f"{prefix}.{name}" if prefix else name, child)

    return walk("", model)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _output_head(model: nn.Module) -> nn.Module | None:
    """The output head that ``all-linear`` leaves out.

    For a Hugging Face model what PEFT leaves out: the output embeddings, or the classifier by its
    usual names (a bare encoder has neither). For another network its last Linear.
    """
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter):
        heads = [getter(), *(getattr(model, name, None) for name in _CLASSIFIER_NAMES)]
        return next((head for head in heads if isinstance(head, nn.Module)), None)
    linear = [m for _, m in _outer_modules(model) if isinstance(base_layer(m), (nn.Linear, Conv1D))]
    return linear[-1] if linear else None


def _no_match(wanted: str, candidates: dict[str, nn.Module]) -> str:
    names = [name for name, module in candidates.items() if is_supported(module)]
    endings = sorted({name.rsplit(".", 1)[-1] for name in names} - {""})
    near = difflib.get_close_matches(wanted, endings, n=4, cutoff=0.5)
    hint = f"near matches: {', '.join(near)}"
    if not near:
        called = ", ".join(endings[:_MOST_NAMES]) + ", ..." * (len(endings) > _MOST_NAMES)
        hint = f"its modules are called {called}" if endings else "it has no Linear, Conv1D, Conv2d or Embedding"
    return f"no module of the model matches target_modules {wanted!r}; {hint}"
