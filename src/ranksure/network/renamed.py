"""Module names that move between versions of transformers: what a name of an older one has become here.

Asked of transformers, which renames the weights of older checkpoints when it loads them: no name is written down here.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping


def renamed(network: nn.Module, name: str) -> str:
    """What a module of an older transformers is called in this network; the name itself where nothing is known."""
    if not isinstance(network, PreTrainedModel):
        return name
    key = f"{name}.weight"
    for rule in get_model_conversion_mapping(network) or []:
        if not hasattr(rule, "operations"):  # a renaming; others compute new weights
            key, _ = rule.rename_source_key(key)
    return key.removesuffix(".weight")
