"""Write low-rank updates as PEFT adapters that load back exactly.

Public here: :func:`export_adapter`, :func:`export_mean_pooled`, :func:`export_merged`,
:func:`lora_config`, :func:`config_snippet`, :func:`axolotl_yaml`.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from ranksure.adapters.aliasing import alias_model, load_back, quietly, refuse_adapted
from ranksure.adapters.config import axolotl_yaml, config_snippet, kept_ranks, lora_config
from ranksure.adapters.export_merged import export_merged
from ranksure.adapters.matrices import PREFIX, stored
from ranksure.adapters.readme import (
    MEAN_POOLING,
    adapter_readme,
    auto_class,
    base_settings,
    dtype_of,
    labels_of,
    loading_snippet,
)
from ranksure.adapters.saved import HEADER, SAFE
from ranksure.errors import AdapterError, settings_of
from ranksure.factors import Factors
from ranksure.files import staged_folder
from ranksure.network.side_path import check_factors
from ranksure.network.targets import base_layer

__all__ = [
    "axolotl_yaml",
    "config_snippet",
    "export_adapter",
    "export_mean_pooled",
    "export_merged",
    "lora_config",
]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class ExportOptions:
    """What an exported adapter records and how it is stored.

    Attributes:
        base_model_name_or_path: recorded, and used in the README's loading snippet; so is the base's ``revision``.
        uniform: zero-pad all modules to the largest rank, and write no patterns. (Columns of zeros in both factors
            stay zero in training.)
        dtype: of the stored factors; float32 by default, or float64 for a float64 model, as PEFT computes.
        extra_readme: Markdown to append to the README.
        shown_path: the adapter's path in the README, where ``out_dir`` will be moved.
    """

    base_model_name_or_path: str | None = None
    revision: str | None = None
    uniform: bool = False
    dtype: torch.dtype | None = None
    extra_readme: str = ""
    shown_path: PathLike | None = None


def export_adapter(
    model: nn.Module,
    factors: Factors,
    out_dir: PathLike,
    *,
    head: str | Sequence[str] | None = None,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    task_type: str | None = "SEQ_CLS",
    **options: Any,
) -> LoraConfig:
    """Write ``factors`` as a PEFT adapter folder for ``model``, verified by loading it back.

    The folder appears whole, replacing an earlier adapter, or (on any failure, Ctrl-C included) not at all.
    ``model`` stays as it is: PEFT works on an alias that shares its weights.

    Args:
        model: the base network, with the fitted head in place; without adapters.
        factors: ``{qualified name: (u of shape (m, r), v of shape (n, r))}``; rank 0 is left out.
        out_dir: the folder to create, or an earlier adapter's to replace.
        head: qualified names of what the base checkpoint does not hold; None for the base network's own head.
        num_labels: needed at load; read from the head, ``id2label`` or the model's config by default.
        id2label: label names; the model's config's by default.
        task_type: as PEFT's, or None. Left out where PEFT would save more for it than the head named here.
        **options: see :class:`ExportOptions`.

    Returns:
        The configuration (trainable: ``inference_mode`` is False here, True in the file, as PEFT does).

    Raises:
        AdapterError: nothing to export; factors or a head that do not fit; what PEFT cannot hold (a dilated
            convolution, a module in several places); a folder that cannot be written, or does not load back.
    """
    heads = [head] if isinstance(head, str) else list(head or [])
    saved = _head_tensors(model, heads)
    made = _Export(model, factors, heads, task_type, settings_of(ExportOptions, "export_adapter", options))
    classifier = task_type in ("SEQ_CLS", "TOKEN_CLS") or num_labels or id2label
    outputs = _head_outputs(model, heads, num_labels, id2label)
    labels = labels_of(model, num_labels or outputs, id2label) if classifier else {}
    notes = [f"`{key}` at load: `{value!r}`" for key, value in labels.items() if key != "label2id"]
    if made.config.task_type != task_type:
        notes.append(
            f"`task_type` is not set: for {task_type} this adapter would not load back as it is ({made.unsettled}). "
            "The logits are the same without it."
        )
    made.tensors |= saved
    return made.write(out_dir, made.snippet(auto_class(model), labels, out_dir), notes)


def check_exportable(
    model: nn.Module, names: Sequence[str], *, head: Sequence[str] | None = None, task_type: str | None = "SEQ_CLS"
) -> None:
    """Refuse before any work modules that :func:`export_adapter` would refuse after it.

    Raises:
        AdapterError: PEFT would wrap or save other modules, or cannot hold one of these.
    """
    ranks, heads = dict.fromkeys(names, 1), list(head or [])
    refuse_adapted(model)
    _refuse_shared(model, ranks)
    for name in names:
        _refuse_dilated(name, base_layer(model.get_submodule(name)))
    config = lora_config(ranks, model=model, task_type=task_type, modules_to_save=heads)
    _with_settled_task(model, config, ranks, heads)


def export_mean_pooled(
    encoder: nn.Module,
    factors: Factors,
    head_weight: Tensor,
    head_bias: Tensor | None,
    out_dir: PathLike,
    *,
    id2label: Mapping[int, str] | None = None,
    **options: Any,
) -> LoraConfig:
    """Write an adapter for an encoder (``AutoModel``) and, beside it, a head on its mean-pooled states.

    As :func:`export_adapter` with task type ``FEATURE_EXTRACTION``, plus ``head.safetensors`` with ``weight`` and
    ``bias``, which the README's snippet applies to the mean of the last hidden states over the attention mask.

    Args:
        encoder: the network that ``AutoModel`` loads; without adapters.
        factors: by module name within the encoder.
        head_weight: shape (K, d).
        head_bias: shape (K,), or None.
        out_dir: the folder to create, or an earlier adapter's to replace.
        id2label: label names, written to the README and the head's metadata.
        **options: see :class:`ExportOptions`; ``dtype`` is the head's too.

    Raises:
        AdapterError: as :func:`export_adapter`; also for a head whose shapes do not fit together.
    """
    names = {int(key): value for key, value in (id2label or {}).items()}
    head = _pooled_head(head_weight, head_bias)
    chosen = settings_of(ExportOptions, "export_mean_pooled", options)
    made = _Export(encoder, factors, [], "FEATURE_EXTRACTION", chosen)
    head = {key: tensor.detach().to("cpu", made.dtype).contiguous() for key, tensor in head.items()}
    if not all(torch.isfinite(tensor).all() for tensor in head.values()):
        raise AdapterError("the head holds a value that is not finite")
    notes = [
        "Head on the mean-pooled last hidden states: `head.safetensors` (`weight`, `bias`), applied as below; "
        "it is no module of the network, so PEFT alone does not load it."
    ]
    labels = {"num_labels": head_weight.shape[0]} | ({"id2label": names} if names else {})
    notes += [f"`{key}` of the head: `{value!r}`" for key, value in labels.items()]
    place = os.path.join(str(chosen.shown_path or out_dir), "head.safetensors")
    snippet = made.snippet("AutoModel", {}, out_dir) + "\n" + MEAN_POOLING.format(head=place)
    metadata = {"format": "pt", "pooling": "mean", "id2label": json.dumps(names)}

    def write_head(stage: Path) -> None:
        save_file(head, stage / "head.safetensors", metadata=metadata)

    return made.write(out_dir, snippet, notes, write_head)


class _Export:
    """An adapter on its way to a folder: all that can be checked before writing is.

    Attributes:
        config: the configuration.
        tensors: what the file will hold.
        unsettled: why the configuration has no task type, where it should have one.
        dtype: of the stored factors.
    """

    def __init__(
        self, model: nn.Module, factors: Factors, heads: list[str], task_type: str | None, options: ExportOptions
    ) -> None:
        refuse_adapted(model)
        check_factors(dict(model.named_modules()), factors)
        ranks = kept_ranks(factors)
        _refuse_shared(model, ranks)
        config = lora_config(
            ranks,
            model=model,
            task_type=task_type,
            modules_to_save=heads,
            base_model_name_or_path=options.base_model_name_or_path,
            revision=options.revision,
            uniform=options.uniform,
        )
        self.model, self.heads, self.ranks, self.options = model, heads, ranks, options
        self.stored_ranks = dict.fromkeys(ranks, config.r) if options.uniform else ranks
        self.config, self.unsettled = _with_settled_task(model, config, self.stored_ranks, heads)
        # PEFT computes an adapter in the base's dtype, but casts half precision to float32.
        self.dtype = options.dtype or torch.promote_types(dtype_of(model), torch.float32)
        self.tensors: dict[str, Tensor] = {}
        for name, rank in self.stored_ranks.items():
            self.tensors |= _padded(model.get_submodule(name), name, *factors[name], rank, self.dtype)

    def snippet(self, auto: str | None, labels: Mapping[str, Any], out_dir: PathLike) -> str:
        """Source that loads the adapter."""
        base, shown = self.options.base_model_name_or_path, str(self.options.shown_path or out_dir)
        return loading_snippet(self.model, auto, base, base_settings(self.model, self.options.revision, labels), shown)

    def write(
        self,
        out_dir: PathLike,
        snippet: str,
        notes: list[str],
        write_more: Callable[[Path], None] = lambda stage: None,
    ) -> LoraConfig:
        """Write the folder, and load it back."""
        extra = self.options.extra_readme
        text = adapter_readme(self.config, self.ranks, snippet, heads=self.heads, notes=notes, extra=extra)
        with staged_folder(out_dir, "adapter_config.json") as stage:
            config = copy.deepcopy(self.config)
            config.inference_mode = True
            if config.task_type is None:  # what AutoPeftModel needs to find the base class
                kind = type(self.model)
                config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            config.save_pretrained(str(stage))
            save_file(self.tensors, stage / SAFE, metadata=HEADER)
            (stage / "README.md").write_text(text, encoding="utf-8")
            write_more(stage)
            self._verify(stage)
        return self.config

    def _verify(self, folder: Path) -> None:
        """Load the folder onto the base network (an alias of it) and compare all of it with what was meant."""
        loaded, state = load_back(alias_model(self.model), folder)
        problem = _difference(loaded, self.stored_ranks, self.heads)
        if problem is None and set(state) != set(self.tensors):
            problem = f"tensor {sorted(set(state) ^ set(self.tensors))[0]} is not in both"
        if problem is None:
            changed = [key for key, value in self.tensors.items() if not torch.equal(value.to(state[key]), state[key])]
            problem = f"tensor {changed[0]} has other values" if changed else None
        if problem is not None:
            raise AdapterError(f"the adapter does not load back as written: {problem}")


def _pooled_head(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise AdapterError(
            f"head of shapes {tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}: "
            "expected (K, d) and (K,)"
        )
    return {"weight": weight} | ({} if bias is None else {"bias": bias})


def _padded(module: nn.Module, name: str, u: Tensor, v: Tensor, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """One module's tensors as stored, zero-padded to ``rank`` columns."""
    layer = base_layer(module)
    _refuse_dilated(name, layer)
    padding = (0, rank - u.shape[1])
    return stored(layer, name, nn.functional.pad(u, padding), nn.functional.pad(v, padding), 1.0, dtype)


def _refuse_dilated(name: str, layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d) and any(step != 1 for step in layer.dilation):
        raise AdapterError(f"{name} is a dilated convolution; PEFT drops the dilation: export it merged instead")


def _refuse_shared(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Raise for a target that sits in several places of the network: PEFT would wrap it in one of them only."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, dict[tuple[int, str], str]] = {}
    for name, module in modules.items():
        parent, _, attribute = name.rpartition(".")
        places.setdefault(id(module), {}).setdefault((id(modules[parent]), attribute), name)
    for name in ranks:
        names = list(places[id(modules[name])].values())
        if len(names) > 1:
            raise AdapterError(
                f"{' and '.join(names)} are one module in several places, of which PEFT adapts only the first: "
                "export it merged instead"
            )


def _head_tensors(model: nn.Module, heads: list[str]) -> dict[str, Tensor]:
    modules = dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    for head in heads:
        if not head or head not in modules:
            raise AdapterError(f"head {head!r} is not a module of {type(model).__name__}")
        own = {f"{PREFIX}{head}.{key}": value.detach() for key, value in modules[head].state_dict().items()}
        if not own:
            raise AdapterError(f"head {head!r} has no parameters to save")
        for key, value in own.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise AdapterError(f"head {key.removeprefix(PREFIX)} holds a value that is not finite")
            tensors[key] = value.to("cpu").clone(memory_format=torch.contiguous_format)
    return tensors


def _head_outputs(
    model: nn.Module, heads: list[str], num_labels: int | None, id2label: Mapping[int, str] | None
) -> int | None:
    """Outputs of a new linear head (None for other heads, and a pooler), checked against the labels given."""
    behind = len(heads) == 1 and not heads[0].startswith(f"{getattr(model, 'base_model_prefix', '')}.")
    module = model.get_submodule(heads[0]) if behind else None
    if not isinstance(module, nn.Linear):
        return None
    for count in (num_labels, len(id2label) if id2label else None):
        if count and count != module.out_features:
            raise AdapterError(f"head {heads[0]} has {module.out_features} outputs, but there are {count} labels")
    return module.out_features


def _with_settled_task(
    model: nn.Module, config: LoraConfig, ranks: Mapping[str, int], heads: list[str]
) -> tuple[LoraConfig, str | None]:
    """The configuration with its task type if PEFT then wraps exactly what is meant, else without one; and why."""
    problems: list[str] = []
    for task in dict.fromkeys([config.task_type, None]):
        trial = copy.deepcopy(config)
        trial.task_type = task
        settled = copy.deepcopy(trial)  # PEFT edits the configuration that it is given
        try:
            with quietly():
                problem = _difference(get_peft_model(alias_model(model), trial, low_cpu_mem_usage=True), ranks, heads)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            problem = f"PEFT fails: {error}"
        if problem is None:
            return settled, (problems or [None])[0]
        problems.append(problem)
    raise AdapterError(f"PEFT cannot hold this adapter, export it merged instead: {problems[-1]}")


def _difference(adapted: PeftModel, ranks: Mapping[str, int], heads: list[str]) -> str | None:
    """What is wrong with the set of wrapped modules, their ranks, scales or heads; None if nothing."""
    modules = dict(adapted.get_base_model().named_modules())
    wrapped = {name: module for name, module in modules.items() if isinstance(module, LoraLayer)}
    saved = {name for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)}
    if set(wrapped) != set(ranks):
        odd = sorted(set(wrapped) ^ set(ranks))[0]
        return f"module {odd} is {'wrapped too' if odd in wrapped else 'not wrapped'}"
    if saved != set(heads):
        odd = sorted(saved ^ set(heads))[0]
        return f"module {odd} is {'saved too' if odd in saved else 'not saved'} (modules_to_save matches name endings)"
    for name, layer in wrapped.items():
        if layer.r != {"default": ranks[name]}:
            return f"module {name} has rank {layer.r.get('default')} instead of {ranks[name]}"
        if layer.scaling != {"default": 1}:
            return f"module {name} has scale {layer.scaling.get('default')} instead of 1"
    return None
