"""Adapters whose names of modules are those of another transformers: their weights go by names, and names move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import transformers
from torch import nn

from ranksure.adapters.matrices import PREFIX, is_factor
from ranksure.adapters.saved import AdapterFiles
from ranksure.errors import AdapterError
from ranksure.network.renamed import renamed

_RENAMED_IN = {
    "5.9": ("vit", "beit", "deit", "audio-spectrogram-transformer", "swin", "segformer"),
    "5.18": ("dinov2",),
}
"""Versions of transformers with other names than the one before, and the model types that they renamed."""


@contextmanager
def names_of_versions(network: nn.Module, files: AdapterFiles) -> Iterator[None]:
    """Where an adapter is refused for names of another transformers, say of which, and what they have become.

    Raises:
        AdapterError: instead of another one.
    """
    try:
        yield
    except AdapterError:
        if told := _told(network, files):
            raise AdapterError(told) from None
        raise


def _told(network: nn.Module, files: AdapterFiles) -> str:
    """The refusal in terms of versions; empty where names are not the reason."""
    present = {name for name, _ in network.named_modules()}
    names = [name.removeprefix(PREFIX).partition(".lora_")[0] for name in files.tensors if is_factor(name)]
    lost = sorted(name for name in names if name.removesuffix(".base_layer") not in present)
    here, written = transformers.__version__, files.transformers
    if not lost:
        return ""
    start, cure = f"{files.folder} adapts {lost[0]}", ""
    if (new := renamed(network, lost[0])) in present:
        kind = getattr(getattr(network, "config", None), "model_type", "")
        since = next((version for version, kinds in _RENAMED_IN.items() if kind in kinds), None)
        named = f"transformers {written}" if written else f"transformers before {since or here}"
        cure = f", or rename it in its tensors and in target_modules; transformers {here} calls it {new}"
    elif written not in (None, here):
        named = f"transformers {written}"
    else:
        return ""
    return f"{start}, a name of {named}, which {here} does not have: load it with that version{cure}"
