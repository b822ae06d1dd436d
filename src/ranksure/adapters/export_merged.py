"""Write W0 + delta as a full checkpoint that loads without PEFT."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ranksure.adapters.aliasing import alias_model, quietly, refuse_adapted
from ranksure.adapters.config import kept_ranks
from ranksure.adapters.readme import auto_class, dtype_of, loading_snippet
from ranksure.errors import AdapterError
from ranksure.factors import Factors
from ranksure.files import staged_folder
from ranksure.network.side_path import check_factors
from ranksure.network.targets import base_layer, parameter_users, to_weight_shape


def export_merged(
    model: nn.Module,
    factors: Factors,
    out_dir: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    id2label: Mapping[int, str] | None = None,
    shown_path: str | os.PathLike[str] | None = None,
) -> None:
    """Write the whole network at W0 + delta, head included, loadable with its Auto class, without PEFT.

    ``delta = u v^T`` is formed and added in the wider of the weight's and the factors' dtypes (float32 at least) and
    rounded to the weight's dtype once. ``model`` stays as it is: an alias shares all weights but the updated ones.
    Memory: those, and for the check that follows one more copy of the network.

    Args:
        model: a ``transformers`` network with the fitted head in place; without adapters.
        factors: ``{qualified name: (u of shape (m, r), v of shape (n, r))}``.
        out_dir: the folder to create, or an earlier checkpoint's to replace; appears whole or not at all.
        tokenizer: saved along (anything with ``save_pretrained``).
        id2label: label names for the config.
        shown_path: the checkpoint's path in the README's snippet, if it is not ``out_dir``.

    Raises:
        AdapterError: nothing to export; factors that do not fit; a weight that is quantised or tied to another module;
            a folder that cannot be written, or does not load back.
    """
    if not isinstance(model, PreTrainedModel):
        raise AdapterError(f"{type(model).__name__} is no transformers model: only those have a merged checkpoint")
    refuse_adapted(model)
    check_factors(dict(model.named_modules()), factors)
    kept = kept_ranks(factors)
    _refuse_tied(model, kept)

    alias = alias_model(model)
    assert isinstance(alias, PreTrainedModel)
    for name in kept:
        _merge(alias.get_submodule(name), name, *factors[name])
    if id2label is not None:
        alias.config.id2label = {int(key): value for key, value in id2label.items()}
        alias.config.label2id = {value: key for key, value in alias.config.id2label.items()}
    shown = str(shown_path or out_dir)
    snippet = loading_snippet(model, auto_class(model), shown, {"dtype": dtype_of(model)}, None)
    with staged_folder(out_dir, "config.json") as stage:
        with quietly():
            alias.save_pretrained(str(stage))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(stage))
        listing = "\n".join(f"- `{name}`: rank {rank}" for name, rank in kept.items())
        parts = [
            "# Merged checkpoint",
            "W0 + delta, without adapters.",
            f"```python\n{snippet}```",
            "Updated:",
            listing,
        ]
        (stage / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        _verify(alias, stage)


def _refuse_tied(model: nn.Module, targets: Mapping[str, int]) -> None:
    users = parameter_users(model)
    for name in targets:
        weight = base_layer(model.get_submodule(name)).weight
        others = [other for other in users[id(weight)] if other != name]
        if others:
            raise AdapterError(
                f"the weight of {name} is tied to {others[0]}: merged, its update would change that module too; "
                "export an adapter instead, or leave this module out"
            )


def _merge(module: nn.Module, name: str, u: torch.Tensor, v: torch.Tensor) -> None:
    """Give the layer a new weight parameter at W0 + u v^T (the old one is shared with the original)."""
    layer = base_layer(module)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if not weight.is_floating_point():
        raise AdapterError(f"the weight of {name} is quantised: load the base network in float to merge")
    dtype = torch.promote_types(torch.promote_types(weight.dtype, u.dtype), torch.float32)
    with torch.no_grad():
        delta = u.to(weight.device, dtype) @ v.to(weight.device, dtype).T
        merged = (weight.to(dtype) + to_weight_shape(module, delta)).to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise AdapterError(f"the merged weight of {name} is not finite in {weight.dtype}")
    layer.weight = nn.Parameter(merged.contiguous(), requires_grad=False)


def _verify(alias: PreTrainedModel, folder: Path) -> None:
    try:
        with quietly():
            loaded = type(alias).from_pretrained(str(folder), dtype=dtype_of(alias))
    except (ValueError, KeyError, RuntimeError) as error:
        raise AdapterError(f"the merged checkpoint does not load back: {error}") from error
    state = loaded.state_dict()
    for key, value in alias.state_dict().items():
        if key not in state or not torch.equal(value.to(state[key]), state[key]):
            raise AdapterError(f"the merged checkpoint does not load back as written: {key}")
