"""Write low-rank updates as PEFT adapters that load back exactly.

Public here: :func:`export_adapter`, :func:`export_mean_pooled`, :func:`export_merged`,
:func:`lora_config`, :func:`config_snippet`, :func:`axolotl_yaml`.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from ranksure.adapters.aliasing import alias_model, quietly, refuse_adapted
from ranksure.adapters.config import axolotl_yaml, config_snippet, kept_ranks, lora_config
from ranksure.adapters.export_merged import export_merged
from ranksure.adapters.readme import (
    MEAN_POOLING,
    adapter_readme,
    auto_class,
    base_settings,
    dtype_of,
    labels_of,
    loading_snippet,
)
from ranksure.errors import AdapterError
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
_PREFIX = "base_model.model."  # how PEFT's files name the base network


def export_adapter(
    model: nn.Module,
    factors: Factors,
    out_dir: PathLike,
    *,
    head: str | Sequence[str] | None = None,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    uniform: bool = False,
    task_type: str | None = "SEQ_CLS",
    dtype: torch.dtype | None = None,
    extra_readme: str = "",
    shown_path: PathLike | None = None,
) -> LoraConfig:
    """Write ``factors`` as a PEFT adapter folder for ``model``, verified by loading it back.

    The folder holds ``adapter_config.json``, ``adapter_model.safetensors`` and ``README.md``; it
    appears whole, replacing an earlier adapter, or (on any failure, Ctrl-C included) not at all.
    ``model`` stays as it is: PEFT works on an alias that shares its weights, so the memory needed is
    that of the adapter and of the head, a few times over.

    PEFT adds ``classifier`` and ``score`` to ``modules_to_save`` by itself for ``SEQ_CLS`` (and wraps
    by the ending of the name). Where that would wrap, and demand at load, anything but the head
    named here, the adapter is written without ``task_type``, which changes nothing in its logits.

    Args:
        model: the base network, with the fitted head in place; without adapters.
        factors: ``{qualified name: (u of shape (m, r), v of shape (n, r))}``; rank 0 is left out.
        out_dir: the folder to create, or an earlier adapter's to replace.
        head: qualified name of the new head, or several. Name all that the base checkpoint does not
            hold: a classifier of two layers whose first one is random must be named whole. None
            when the base network's own head is used.
        base_model_name_or_path: recorded, and used in the README's loading snippet.
        revision: the base model's revision, likewise.
        num_labels: needed at load; read from the head, ``id2label`` or the model's config by default.
        id2label: label names; the model's config's by default.
        uniform: zero-pad all modules to the largest rank, and write no patterns. (Padded columns
            are zero in both factors: training on from there leaves them zero.)
        task_type: as PEFT's; None for none.
        dtype: of the stored factors. Default: float32, or float64 for a float64 model, as PEFT
            computes after loading. A head keeps its own dtype.
        extra_readme: Markdown to append to the README.
        shown_path: the adapter's path in the README's snippet, if it is not ``out_dir`` (when a
            caller writes into a folder that it will move).

    Returns:
        The configuration (trainable: ``inference_mode`` is False here, True in the file, as PEFT does).

    Raises:
        AdapterError: nothing to export; factors that do not fit; a dilated convolution (PEFT leaves
            the dilation out) or a module in several places (PEFT adapts one); a head that is not
            there, or has another number of outputs than labels; a network in which PEFT cannot tell
            the head or the targets from other modules; a folder that cannot be written; an adapter
            that does not load back as written.
    """
    heads = [head] if isinstance(head, str) else list(head or [])
    saved = _head_tensors(model, heads)
    config, tensors = _prepare(
        model, factors, heads, task_type, base_model_name_or_path, revision, uniform=uniform, dtype=dtype
    )
    classifier = task_type in ("SEQ_CLS", "TOKEN_CLS") or num_labels or id2label
    outputs = _head_outputs(model, heads, num_labels, id2label)
    labels = labels_of(model, num_labels or outputs, id2label) if classifier else {}
    notes = [f"`{key}` at load: `{value!r}`" for key, value in labels.items() if key != "label2id"]
    if config.task_type != task_type:
        notes.append(
            f"`task_type` is not set: for {task_type} PEFT would also save, and demand at load, modules that are "
            "no part of this adapter. The logits are the same without it."
        )
    settings = base_settings(model, revision, labels)
    shown = str(shown_path or out_dir)
    snippet = loading_snippet(model, auto_class(model), base_model_name_or_path, settings, shown)
    ranks = kept_ranks(factors)
    text = adapter_readme(config, ranks, snippet, heads=heads, notes=notes, extra=extra_readme)
    _write(model, config, tensors | saved, out_dir, text, ranks, heads)
    return config


def export_mean_pooled(
    encoder: nn.Module,
    factors: Factors,
    head_weight: Tensor,
    head_bias: Tensor | None,
    out_dir: PathLike,
    *,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    id2label: Mapping[int, str] | None = None,
    uniform: bool = False,
    dtype: torch.dtype | None = None,
    extra_readme: str = "",
    shown_path: PathLike | None = None,
) -> LoraConfig:
    """Write an adapter for an encoder (``AutoModel``) and, beside it, a head on its mean-pooled states.

    As :func:`export_adapter` with task type ``FEATURE_EXTRACTION``, plus ``head.safetensors`` with
    ``weight`` and ``bias``. The README's snippet averages the last hidden states over the tokens of
    the attention mask and applies the head.

    Args:
        encoder: the network that ``AutoModel`` loads; without adapters.
        factors: by module name within the encoder.
        head_weight: shape (K, d).
        head_bias: shape (K,), or None.
        out_dir: the folder to create, or an earlier adapter's to replace.
        base_model_name_or_path: see :func:`export_adapter`, as for all that follow.
        revision: likewise.
        id2label: label names, written to the README and the head's metadata.
        uniform: likewise.
        dtype: of the stored factors and head.
        extra_readme: likewise.
        shown_path: likewise.

    Returns:
        The adapter's configuration.

    Raises:
        AdapterError: as :func:`export_adapter`; also for a head whose shapes do not fit together.
    """
    if head_weight.ndim != 2 or (head_bias is not None and head_bias.shape != head_weight.shape[:1]):
        raise AdapterError(
            f"head of shapes {tuple(head_weight.shape)} and {None if head_bias is None else tuple(head_bias.shape)}: "
            "expected (K, d) and (K,)"
        )
    config, tensors = _prepare(
        encoder, factors, [], "FEATURE_EXTRACTION", base_model_name_or_path, revision, uniform=uniform, dtype=dtype
    )
    stored = dtype or _compute_dtype(encoder)
    head = {"weight": head_weight} | ({} if head_bias is None else {"bias": head_bias})
    head = {key: tensor.detach().to("cpu", stored).contiguous() for key, tensor in head.items()}
    if not all(torch.isfinite(tensor).all() for tensor in head.values()):
        raise AdapterError("the head holds a value that is not finite")
    names = {int(key): value for key, value in (id2label or {}).items()}
    metadata = {"format": "pt", "pooling": "mean", "id2label": json.dumps(names)}

    shown = str(shown_path or out_dir)
    settings = base_settings(encoder, revision, {})
    snippet = loading_snippet(encoder, "AutoModel", base_model_name_or_path, settings, shown)
    snippet += "\n" + MEAN_POOLING.format(head=os.path.join(shown, "head.safetensors"))
    ranks = kept_ranks(factors)
    notes = [
        "Head on the mean-pooled last hidden states: `head.safetensors` (`weight`, `bias`), applied as below; "
        "it is no module of the network, so PEFT alone does not load it."
    ]
    labels = {"num_labels": head_weight.shape[0]} | ({"id2label": names} if names else {})
    notes += [f"`{key}` of the head: `{value!r}`" for key, value in labels.items()]
    text = adapter_readme(config, ranks, snippet, heads=[], notes=notes, extra=extra_readme)

    def write_head(stage: Path) -> None:
        save_file(head, stage / "head.safetensors", metadata=metadata)

    _write(encoder, config, tensors, out_dir, text, ranks, [], write_head)
    return config


def _prepare(
    model: nn.Module,
    factors: Factors,
    heads: list[str],
    task_type: str | None,
    base: str | None,
    revision: str | None,
    *,
    uniform: bool,
    dtype: torch.dtype | None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Check everything that can be checked before writing; the configuration and the adapter's tensors."""
    refuse_adapted(model)
    check_factors(dict(model.named_modules()), factors)
    ranks = kept_ranks(factors)
    _refuse_shared(model, ranks)
    config = lora_config(
        ranks,
        model=model,
        task_type=task_type,
        modules_to_save=heads,
        base_model_name_or_path=base,
        revision=revision,
        uniform=uniform,
    )
    expected = dict.fromkeys(ranks, config.r) if uniform else ranks
    config = _with_settled_task(model, config, expected, heads)
    stored = dtype or _compute_dtype(model)
    tensors = {}
    for name, rank in expected.items():
        tensors |= _factor_tensors(model.get_submodule(name), name, *factors[name], rank, stored)
    return config, tensors


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


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which PEFT computes an adapter of this model (half precision is cast to float32)."""
    return torch.promote_types(dtype_of(model), torch.float32)


def _factor_tensors(
    module: nn.Module, name: str, u: Tensor, v: Tensor, rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """One module's factors under PEFT's file keys and in its shapes, zero-padded to ``rank`` columns."""
    layer = base_layer(module)
    padding = rank - u.shape[1]
    a = nn.functional.pad(v.detach(), (0, padding)).T.to("cpu", dtype).contiguous()
    b = nn.functional.pad(u.detach(), (0, padding)).to("cpu", dtype).contiguous()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterError(f"factors of {name} overflow {dtype}: store them in float32")
    if isinstance(layer, nn.Embedding):
        return {f"{_PREFIX}{name}.lora_embedding_A": a, f"{_PREFIX}{name}.lora_embedding_B": b}
    if isinstance(layer, nn.Conv2d):
        if any(step != 1 for step in layer.dilation):
            raise AdapterError(f"{name} is a dilated convolution; PEFT drops the dilation: export it merged instead")
        a, b = a.reshape(rank, *layer.weight.shape[1:]), b[:, :, None, None]
    return {f"{_PREFIX}{name}.lora_A.weight": a, f"{_PREFIX}{name}.lora_B.weight": b}


def _head_tensors(model: nn.Module, heads: list[str]) -> dict[str, Tensor]:
    modules = dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    for head in heads:
        if not head or head not in modules:
            raise AdapterError(f"head {head!r} is not a module of {type(model).__name__}")
        own = {f"{_PREFIX}{head}.{key}": value.detach() for key, value in modules[head].state_dict().items()}
        if not own:
            raise AdapterError(f"head {head!r} has no parameters to save")
        for key, value in own.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise AdapterError(f"head {key.removeprefix(_PREFIX)} holds a value that is not finite")
            tensors[key] = value.to("cpu").clone(memory_format=torch.contiguous_format)
    return tensors


def _head_outputs(
    model: nn.Module, heads: list[str], num_labels: int | None, id2label: Mapping[int, str] | None
) -> int | None:
    """Outputs of a new linear head (None for other heads), checked against the labels given."""
    module = model.get_submodule(heads[0]) if len(heads) == 1 else None
    if not isinstance(module, nn.Linear):
        return None
    for count in (num_labels, len(id2label) if id2label else None):
        if count and count != module.out_features:
            raise AdapterError(f"head {heads[0]} has {module.out_features} outputs, but there are {count} labels")
    return module.out_features


def _with_settled_task(model: nn.Module, config: LoraConfig, ranks: Mapping[str, int], heads: list[str]) -> LoraConfig:
    """The configuration with its task type if PEFT then wraps exactly what is meant, else without one."""
    problem: str | None = None
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
            return settled
    raise AdapterError(f"PEFT cannot hold this adapter, export it merged instead: {problem}")


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


def _write(
    model: nn.Module,
    config: LoraConfig,
    tensors: dict[str, Tensor],
    out_dir: PathLike,
    text: str,
    ranks: Mapping[str, int],
    heads: list[str],
    write_more: Callable[[Path], None] | None = None,
) -> None:
    with staged_folder(out_dir, "adapter_config.json") as stage:
        stored = copy.deepcopy(config)
        stored.inference_mode = True
        if stored.task_type is None:  # what AutoPeftModel needs to find the base class
            kind = type(model)
            stored.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        stored.save_pretrained(str(stage))
        save_file(tensors, stage / "adapter_model.safetensors", metadata={"format": "pt"})
        (stage / "README.md").write_text(text, encoding="utf-8")
        if write_more is not None:
            write_more(stage)
        expected = ranks if config.rank_pattern else dict.fromkeys(ranks, config.r)
        _verify(model, stage, tensors, expected, heads)


def _verify(
    model: nn.Module, folder: Path, tensors: Mapping[str, Tensor], ranks: Mapping[str, int], heads: list[str]
) -> None:
    """Load the folder onto the base network (an alias of it) and compare all of it with what was meant."""
    try:
        with quietly():
            loaded = PeftModel.from_pretrained(alias_model(model), str(folder), torch_device="cpu")
        problem = _difference(loaded, ranks, heads)
        state = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise AdapterError(f"the adapter does not load back: {error}") from error
    if problem is None and set(state) != set(tensors):
        problem = f"tensor {sorted(set(state) ^ set(tensors))[0]} is not in both"
    if problem is None:
        changed = [key for key, value in tensors.items() if not torch.equal(value.to(state[key]), state[key])]
        problem = f"tensor {changed[0]} has other values" if changed else None
    if problem is not None:
        raise AdapterError(f"the adapter does not load back as written: {problem}")
