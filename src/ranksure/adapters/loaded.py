"""What a PEFT LoRA adapter holds, as factors by module; and which adapters can be certified at all.

An L2 penalty ``(wd / 2)(||A||^2 + ||B||^2)`` on PEFT's matrices is ``(lambda_j / 2)(||u||^2 + ||v||^2)`` on the
factors (see ``adapters/matrices.py``), with ``lambda_j = wd / s_j``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ranksure.adapters.fields import pattern_notes, trains_one_half, untested_fields
from ranksure.adapters.matrices import (
    PREFIX,
    active_adapters,
    adapted_layers,
    chosen_adapter,
    is_factor,
    matrices,
    scale_of,
    to_factors,
)
from ranksure.errors import AdapterError
from ranksure.factors import Factors
from ranksure.network.targets import base_layer, is_supported

_HALF = (
    "One matrix of each pair was not trained (MiCA, LoRA-FA): what training can still gain is bounded as if both were."
)
_HOMES = ("torch.nn.", "transformers.pytorch_utils.", "transformers.models.")
"""Where layers that hold plain weights come from; whether they apply them as such is seen when they run."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LoraBlock:
    """One adapted module.

    Attributes:
        module: PEFT's wrapper, with the scale ``s``.
        factors: ``u`` (m, r) and ``v`` (n, r), float64 on the CPU, with ``u v^T`` the update.
    """

    module: nn.Module
    factors: tuple[Tensor, Tensor]
    scale: float

    @property
    def rank(self) -> int:
        """Rank given, ``r``."""
        return self.factors[0].shape[1]


@dataclass(frozen=True)
class Adapter:
    """A model's LoRA adapter; its blocks by qualified name in the base network.

    Attributes:
        outside: what else was trained with it, in words: not covered by any certificate.
        untested: reasons why it cannot be certified; empty when it can.
        frozen_half: whether one matrix of each pair was not trained (MiCA, LoRA-FA).
        notes: sentences for the reader.
    """

    name: str
    config: LoraConfig
    blocks: dict[str, LoraBlock]
    outside: list[str]
    untested: list[str]
    frozen_half: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def factors(self) -> Factors:
        """Factors of every block."""
        return {name: block.factors for name, block in self.blocks.items()}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Wrappers of every block."""
        return {name: block.module for name, block in self.blocks.items()}

    def penalties(self, weight_decay: float) -> dict[str, float]:
        """``lambda_j = weight_decay / s_j`` by block."""
        return {name: weight_decay / block.scale for name, block in self.blocks.items()}

    @contextmanager
    def without(self) -> Iterator[None]:
        """The network without this adapter's updates, exactly: its scales are zero meanwhile.

        What else was trained (a head, biases, other adapters) stays.
        """
        scalings: list[dict[str, float]] = [block.module.scaling for block in self.blocks.values()]  # pyright: ignore
        before = [scaling[self.name] for scaling in scalings]
        try:
            for scaling in scalings:
                scaling[self.name] = 0.0
            yield
        finally:
            for scaling, value in zip(scalings, before, strict=True):
                scaling[self.name] = value


def read_adapter(model: nn.Module, adapter: str | None = None) -> Adapter:
    """Read the active LoRA adapter of a model.

    Args:
        model: a ``PeftModel``, or a Hugging Face model with an adapter loaded into it.
        adapter: its name; needed where several are active. Others that are active count as part of the base.

    Raises:
        AdapterError: no LoRA adapter, an unknown or inactive name, several without a name, merged or disabled
            adapters, or a value that is not finite.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        raise AdapterError("the model has no PEFT adapter: load one with PeftModel.from_pretrained")
    layers = adapted_layers(model)
    active = active_adapters(layers)
    adapter = chosen_adapter(layers, adapter, next(iter(configs)))
    if adapter not in configs:
        raise AdapterError(f"the model has no adapter {adapter!r}; it has {', '.join(configs)}")
    config = configs[adapter]
    if not isinstance(config, LoraConfig):
        kind = getattr(getattr(config, "peft_type", None), "value", type(config).__name__)
        raise AdapterError(f"adapter {adapter!r} is a {kind} adapter; only LoRA adapters can be read")
    if adapter not in active:
        raise AdapterError(f"adapter {adapter!r} is not active: call model.set_adapter({adapter!r}) first")
    blocks: dict[str, LoraBlock] = {}
    untested = untested_fields(config) + _untested_network(model)
    for name, layer in layers.items():
        if adapter not in layer.scaling or adapter not in layer.active_adapters:
            continue
        if layer.merged:
            raise AdapterError(f"the adapter is merged into the weights of {name}: call model.unmerge_adapter() first")
        if layer.disable_adapters:
            raise AdapterError("the adapters are disabled: call model.enable_adapter_layers() first")
        if (reason := _untested_layer(name, layer)) is not None:
            untested.append(reason)
        else:
            blocks[name] = _block(name, layer, adapter)
    if not blocks and not untested:
        raise AdapterError(f"adapter {adapter!r} adapts no module of the model")
    untested += _shared_matrices(blocks, adapter)
    half = trains_one_half(config) or any(_half_frozen(block.module, adapter) for block in blocks.values())
    notes = [] if config.target_parameters else pattern_notes(config, _named_as_matched(model, blocks))
    return Adapter(
        adapter,
        config,
        blocks,
        _outside(model, config, adapter, active),
        list(dict.fromkeys(untested)),
        half,
        notes + [_HALF] * half,
    )


def _named_as_matched(model: nn.Module, blocks: Mapping[str, LoraBlock]) -> dict[str, float]:
    """Scales by the names that PEFT matched: those in the network that it was given, which may sit in a frame."""
    inner = max((n for n, module in model.named_modules() if "peft_config" in vars(module)), key=len, default="")
    start = inner.removeprefix(PREFIX.rstrip(".")).strip(".")
    return {name.removeprefix(f"{start}."): block.scale for name, block in blocks.items()}


def _half_frozen(layer: Any, adapter: str) -> bool:
    a, b = matrices(layer, adapter)
    return a.requires_grad != b.requires_grad


def _shared_matrices(blocks: Mapping[str, LoraBlock], adapter: str) -> list[str]:
    """Modules whose matrices are those of another one: no independent blocks."""
    owners: dict[int, str] = {}
    out = []
    for name, block in blocks.items():
        for matrix in matrices(block.module, adapter):
            owner = owners.setdefault(matrix.data_ptr(), name)
            if owner != name:
                out.append(f"{name} shares its matrices with {owner} (ensure_weight_tying), which was not tested")
    return out


def _block(name: str, layer: Any, adapter: str) -> LoraBlock:
    a, b = matrices(layer, adapter)
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterError(f"the adapter's matrices for {name} hold a value that is not finite (NaN or infinity)")
    scale = scale_of(name, layer, adapter)
    return LoraBlock(layer, to_factors(a, b, scale), scale)


def _untested_network(model: nn.Module) -> list[str]:
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        bytes_ = isinstance(weight, nn.Parameter) and weight.dtype.itemsize == 1
        foreign = type(weight).__module__.partition(".")[0] != "torch"
        if bytes_ or foreign or name.endswith("qweight"):  # whatever is adapted: what goes through it is rounded
            return [f"the network is quantised ({name} is {_described(weight)}), which was not tested"]
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    # A classifier on such a model's encoder keeps the setting, but has no decoder.
    if both and any(name.rpartition(".")[2] == "decoder" for name, _ in model.named_modules()):
        return ["the network is an encoder-decoder, which was not tested"]
    return []


def _untested_layer(name: str, layer: Any) -> str | None:
    inner = base_layer(layer)
    weight = getattr(inner, "weight", None)
    home = type(inner).__module__ + "."
    if not is_supported(layer):
        return f"{name} is a {type(inner).__name__}, which is not a tested kind of module"
    # A quantised weight is a class of layer (bitsandbytes), a subclass of Tensor (torchao), or a narrow dtype.
    plain = isinstance(weight, Tensor) and type(weight) in (Tensor, nn.Parameter) and weight.dtype in _DTYPES
    if not home.startswith(_HOMES) or not plain:
        what = "quantised?" if plain else f"quantised? its weight is {_described(weight)}"
        return f"{name} is a {type(inner).__module__}.{type(inner).__name__} ({what}), which was not tested"
    if isinstance(inner, nn.Conv2d) and any(size != 1 for size in inner.dilation):
        return f"{name} is a dilated convolution, whose dilation PEFT leaves out of the update"
    return None


def _described(weight: Any) -> str:
    return f"{type(weight).__name__} of {str(getattr(weight, 'dtype', 'no dtype')).removeprefix('torch.')}"


def _outside(model: nn.Module, config: LoraConfig, adapter: str, active: list[str]) -> list[str]:
    """What was, or may have been, trained beside the adapter's matrices."""
    out = []
    if config.bias != "none":
        out.append(f"biases trained with bias={config.bias!r}")
    saved = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    if saved:
        out.append(f"modules_to_save ({', '.join(sorted({name.rsplit('.', 1)[-1] for name in saved}))})")
    if others := [name for name in active if name != adapter]:
        out.append(f"other active adapters ({', '.join(others)})")
    inside = {id(p) for module in saved.values() for p in module.parameters()}
    free = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad
        and not is_factor(name)
        and id(p) not in inside
        and not (config.bias != "none" and name.endswith("bias"))
    ]
    if free:
        more = f" and {len(free) - 3} more" if len(free) > 3 else ""
        out.append(f"parameters that require gradients ({', '.join(free[:3])}{more})")
    return out
