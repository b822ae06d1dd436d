"""An existing PEFT adapter with new factors, and so new ranks, per module; all else as it was.

Every module keeps its scale ``s_j``, so that ``lambda_j = wd / s_j`` of an L2 decay on PEFT's matrices stays the
same when training goes on. PEFT derives the scale from rank and alpha (``alpha / r``, or ``alpha / sqrt(r)`` for
rsLoRA), hence a new rank needs a new alpha: ``alpha_j = s_j r_j`` or ``s_j sqrt(r_j)``.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ranksure.adapters import matrices
from ranksure.adapters.aliasing import alias_model, load_back, quietly
from ranksure.adapters.config import exact_pattern, exact_targets
from ranksure.adapters.fields import leaves_base
from ranksure.adapters.matrices import PREFIX, zero_column
from ranksure.adapters.readme import auto_class, base_settings, labels_of, loading_snippet, moved_readme, uneven
from ranksure.adapters.saved import HEADER, SAFE
from ranksure.errors import AdapterError
from ranksure.factors import Factors, ranks_of
from ranksure.files import staged_folder
from ranksure.network.side_path import check_factors
from ranksure.network.targets import base_layer, base_network

PathLike = str | os.PathLike[str]
_MARK = "<!-- ranksure: ranks changed -->"
_OWN_TAGS = "tags: [lora, ranksure]"

# Not copied from the source folder: rewritten, or about the factors as they were (an optimizer's state).
_STALE = ("adapter_config.json", "adapter_model.", "README.md", "optimizer.", "scheduler.", "scaler.", "rng_state")
_STALE += ("trainer_state.json", "training_args.bin", "certificate.json", "fit.json", "grow.json", "compress.json")
_STALE += ("plan.json", "report.html")


@dataclass(frozen=True)
class Rewritten:
    """What was written: folder, configuration, and by module that stayed rank, scale and cost.

    Attributes:
        dtype: of the stored factors.
        rounding: ``||stored - meant||_F / ||meant||_F`` of each update: what the stored dtype costs.
    """

    folder: Path
    config: LoraConfig
    ranks: dict[str, int]
    scales: dict[str, float]
    dtype: torch.dtype
    rounding: dict[str, float]


def rewrite_adapter(
    model: nn.Module,
    factors: Factors,
    out_dir: PathLike,
    *,
    adapter: str = "default",
    source: PathLike | None = None,
    prefix: str = "",
    dtype: torch.dtype | None = None,
    dropout: float | None = None,
    title: str = "Ranks changed",
    text: str = "",
    write_more: Callable[[Path], None] = lambda stage: None,
) -> Rewritten:
    """Write a loaded LoRA adapter again with other factors, verified by loading it onto its base network.

    Kept: every module's scale, trained heads and biases, all other fields of the configuration, and (from
    ``source``) the other files of the folder but for training state. A module of rank 0 is left out; where biases
    were trained it stays, with one column of zeros. The folder appears whole, replacing an earlier adapter, or not
    at all; ``source`` may be the same folder.

    Args:
        model: the network with the adapter loaded; it stays as it is.
        factors: ``u`` (m, r) and ``v`` (n, r) with ``u v^T`` the update, for every adapted module.
        out_dir: the folder.
        adapter: the adapter's name in the model.
        source: the folder that the adapter was loaded from: its stored dtype and its other files.
        prefix: of the names in ``factors``, where they are of a network around ``model``.
        dtype: of the stored factors; by default the source's, or else the loaded adapter's.
        dropout: of the new adapter, where it is another than the source's.
        title: heading of the README's new section.
        text: Markdown below it.
        write_more: writes further files into the folder before it takes its place.

    Raises:
        AdapterError: no plain LoRA (DoRA, a base changed at initialisation); factors that do not fit, or are not those
            of all its modules; no rank left; a folder that cannot be written, or does not load back as written.
    """
    config, layers = _layers(model, adapter)
    kept = _kept({name.removeprefix(prefix): pair for name, pair in factors.items()}, layers, config)
    others = _other_tensors(model, adapter, source, set(layers) - set(kept))
    stored = dtype or stored_dtype(model, adapter, source)
    ranks = ranks_of(kept)
    new, scales = _with_ranks(config, ranks, layers, adapter, base_of(model, adapter))
    new.lora_dropout = new.lora_dropout if dropout is None else dropout
    tensors, rounding = dict[str, Tensor](), dict[str, float]()
    for name, (u, v) in kept.items():
        own = matrices.stored(layers[name], name, u, v, scales[name], stored)
        rounding[name] = _rounding(u, v, scales[name], *own.values())
        tensors |= own
    out = Path(out_dir)
    written = Rewritten(out, new, ranks, scales, stored, rounding)
    with staged_folder(out, "adapter_config.json") as stage:
        _copy_others(source, stage)
        new.save_pretrained(str(stage))
        save_file(tensors | others, stage / SAFE, metadata=HEADER)
        (stage / "README.md").write_text(_readme(model, written, source, title, text), encoding="utf-8")
        write_more(stage)
        _verify(model, adapter, stage, tensors | others, scales)
    return written


def _kept(factors: Factors, layers: dict[str, nn.Module], config: LoraConfig) -> Factors:
    """The factors of the modules that stay in the adapter."""
    if set(factors) != set(layers):
        odd = sorted(set(factors) ^ set(layers))[0]
        raise AdapterError(f"factors and adapter differ in {odd}: give one pair for every adapted module")
    check_factors(layers, factors)
    kept = {name: pair for name, pair in factors.items() if pair[0].shape[1]}
    if not kept:
        raise AdapterError("nothing is left to write: every module has rank 0 (the base network alone does the same)")
    if config.bias != "none":  # a bias is stored under its wrapper's name
        kept = {name: pair if pair[0].shape[1] else zero_column(*pair) for name, pair in factors.items()}
    return kept


def base_of(model: nn.Module, adapter: str) -> nn.Module:
    """The network without any adapter, trained heads and biases in place, sharing all weights with ``model``."""
    inner = base_network(alias_model(model))
    for name, module in list(inner.named_modules()):
        found: nn.Module | None = None
        if isinstance(module, LoraLayer):
            found = base_layer(module)  # pyright: ignore[reportArgumentType]
        elif isinstance(module, ModulesToSaveWrapper):
            own = dict(module.modules_to_save.items())
            found = own.get(adapter, module.original_module)
        if found is not None:
            parent, _, attribute = name.rpartition(".")
            setattr(inner.get_submodule(parent), attribute, found)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in vars(inner):
            delattr(inner, attribute)
    return inner


def stored_dtype(model: nn.Module, adapter: str = "default", source: PathLike | None = None) -> torch.dtype:
    """Dtype of the adapter's factors in its folder's file; without a folder, of those loaded.

    Raises:
        AdapterError: the file cannot be read, or the model has no such adapter.
    """
    path = None if source is None else Path(source) / SAFE
    if path is not None and path.is_file():
        return next(value.dtype for key, value in _read(path).items() if matrices.is_factor(key))
    return matrices.matrices(next(iter(_layers(model, adapter)[1].values())), adapter)[0].dtype


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None


def _layers(model: nn.Module, adapter: str) -> tuple[LoraConfig, dict[str, nn.Module]]:
    """The adapter's configuration and its wrappers by qualified name in the base network."""
    config = getattr(model, "peft_config", {}).get(adapter)
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"the model has no LoRA adapter {adapter!r} to rewrite")
    if config.use_dora or config.lora_bias or not leaves_base(config):
        raise AdapterError(
            "only plain LoRA adapters can be rewritten (no DoRA, no lora_bias, no initialisation that changes the "
            f"base weights): init_lora_weights={config.init_lora_weights!r}, use_dora={config.use_dora}"
        )
    layers = {n: layer for n, layer in matrices.adapted_layers(model).items() if adapter in layer.scaling}
    for name, module in layers.items():
        if module.merged:
            raise AdapterError(f"the adapter is merged into the weights of {name}: call unmerge_adapter() first")
    return config, layers


def _with_ranks(
    config: LoraConfig, ranks: Mapping[str, int], layers: Mapping[str, Any], adapter: str, base: nn.Module
) -> tuple[LoraConfig, dict[str, float]]:
    """The configuration at these ranks, and the scale that PEFT computes from it, by module."""
    new = copy.deepcopy(config)
    alphas = {name: _alpha(layers[name].scaling[adapter], rank, config.use_rslora) for name, rank in ranks.items()}
    new.r = max(ranks.values())
    new.lora_alpha = next(alphas[name] for name, rank in ranks.items() if rank == new.r)  # pyright: ignore
    uniform = set(ranks.values()) == {new.r} and set(alphas.values()) == {new.lora_alpha}
    new.rank_pattern = {} if uniform else {exact_pattern(name): rank for name, rank in ranks.items()}
    new.alpha_pattern = {} if uniform else {exact_pattern(name): alpha for name, alpha in alphas.items()}  # pyright: ignore
    new.target_modules = exact_targets(list(ranks), base)
    new.exclude_modules = new.layers_to_transform = new.layers_pattern = None
    new.inference_mode = True
    if new.init_lora_weights not in (True, False, "gaussian"):  # made for the old factors (MiCA would freeze the new B)
        new.init_lora_weights, new.eva_config = True, None
    return new, {name: alphas[name] / _divisor(rank, config.use_rslora) for name, rank in ranks.items()}


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    """Alpha from which PEFT computes this scale: exactly where a float does, else within its last bit."""
    by = _divisor(rank, rslora)
    near = scale * by
    tries = (float(round(near)), near, math.nextafter(near, 0), math.nextafter(near, math.inf))
    alpha = next((alpha for alpha in tries if alpha / by == scale), near)
    return int(alpha) if alpha.is_integer() else alpha


def _divisor(rank: int, rslora: bool) -> float:
    return math.sqrt(rank) if rslora else rank


def _rounding(u: Tensor, v: Tensor, scale: float, a: Tensor, b: Tensor) -> float:
    """Relative error of the stored matrices' update."""
    u, v = u.detach().to("cpu", torch.float64), v.detach().to("cpu", torch.float64)
    p, q = matrices.to_factors(a, b)
    size = _product_norm(u, v)
    return _product_norm(torch.cat([u, -scale * p], 1), torch.cat([v, q], 1)) / size if size > 0 else 0.0


def _product_norm(u: Tensor, v: Tensor) -> float:
    """``||u v^T||_F`` without forming it; by triangles, since the difference of two products cancels."""
    left, right = torch.linalg.qr(u, mode="r").R, torch.linalg.qr(v, mode="r").R
    return float((left @ right.T).norm())


def _other_tensors(model: nn.Module, adapter: str, source: PathLike | None, dropped: set[str]) -> dict[str, Tensor]:
    """What an adapter file holds beside the factors: trained heads, biases, resized embeddings."""
    path = None if source is None else Path(source) / SAFE
    if path is not None and path.is_file():
        found = _read(path)
    else:
        with quietly():
            found = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    out = {}
    for key, value in found.items():
        if matrices.is_factor(key):
            continue
        for name in dropped:  # no wrapper any more: what is stored of the layer inside has the layer's own name
            key = key.replace(f"{PREFIX}{name}.base_layer.", f"{PREFIX}{name}.")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise AdapterError(f"{key.removeprefix(PREFIX)} of the adapter holds a value that is not finite")
        out[key] = value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    return out


def _copy_others(source: PathLike | None, stage: Path) -> None:
    for path in sorted(Path(source).iterdir()) if source is not None else []:
        if path.is_file() and not path.name.startswith(_STALE):
            shutil.copy2(path, stage / path.name)


def _readme(model: nn.Module, written: Rewritten, source: PathLike | None, title: str, text: str) -> str:
    """The user's own README with a section added; a new one if there was none, or one that ranksure wrote."""
    config, out = written.config, written.folder
    rows = [f"| `{name}` | {rank} | {written.scales[name]:g} |" for name, rank in written.ranks.items()]
    section = [f"## {title}", *([text.strip()] if text.strip() else [])]
    section += ["\n".join(["| module | rank | scale |", "|---|---:|---:|", *rows])]
    section += [
        "Ranks and alphas are in `rank_pattern` and `alpha_pattern` where they differ; their keys are anchored regular "
        f"expressions. Written and verified with peft {peft.__version__}."
    ]
    section += uneven(written.ranks)
    old = None if source is None else Path(source) / "README.md"
    if old is not None and old.is_file():
        words = old.read_text(encoding="utf-8", errors="replace")
        if _OWN_TAGS not in words:
            own = words.partition(_MARK)[0].rstrip()  # less the section of an earlier change
            return own + f"\n\n{_MARK}\n\n" + "\n\n".join(section) + "\n"
        if (moved := moved_readme(words, str(out))) is not None:
            return "\n\n".join([moved, *section]) + "\n"
    base = config.base_model_name_or_path
    inner = base_network(model)
    labels = labels_of(inner, None, None) if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else {}
    snippet = loading_snippet(inner, auto_class(inner), base, base_settings(inner, config.revision, labels), str(out))
    named = [f"base_model: {json.dumps(base)}"] if base else []
    front = "\n".join(["---", "library_name: peft", *named, _OWN_TAGS, "---"])
    return "\n\n".join([front, "# LoRA adapter", "## Load", f"```python\n{snippet}```", *section]) + "\n"


def _verify(
    model: nn.Module, adapter: str, folder: Path, tensors: Mapping[str, Tensor], scales: Mapping[str, float]
) -> None:
    """Load the folder onto the base network (an alias of it) and compare all of it with what was meant."""
    loaded, state = load_back(base_of(model, adapter), folder)
    found = {name: layer.scaling["default"] for name, layer in matrices.adapted_layers(loaded).items()}
    problem = None
    if set(found) != set(scales):
        problem = f"module {sorted(set(found) ^ set(scales))[0]} is not in both"
    elif found != dict(scales):
        odd = next(name for name in scales if found[name] != scales[name])
        problem = f"module {odd} has scale {found[odd]} instead of {scales[odd]}"
    elif missing := set(state) - set(tensors):
        problem = f"tensor {sorted(missing)[0]} is not stored"
    else:
        whole = {**loaded.state_dict(), **state}
        for key, value in tensors.items():
            if key not in whole or not torch.equal(value.to(whole[key]), whole[key]):
                problem = f"tensor {key} {'has other values' if key in whole else 'has no place'}"
                break
    if problem is not None:
        raise AdapterError(f"the adapter does not load back as written: {problem}")
