"""The README beside an exported adapter: how to load it, and who reads what."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

_AUTO_CLASSES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForAudioClassification": "AutoModelForAudioClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
}

_CONSUMERS = """\
## Who reads what

{patterns}
- vLLM's LoRA loader reads only `r` and `lora_alpha`, ignores `rank_pattern` and `alpha_pattern`, and
  refuses an adapter with `modules_to_save`. {advice}
- Merging rounds W0 + delta to the base model's dtype; in half precision the merged logits differ a little.
"""


_PATTERNS = """\
- Every module's scale is exactly 1: `alpha_pattern` equals `rank_pattern`.
- The pattern keys are anchored regular expressions (`^...`), so that a module is never matched by the
  ending of its name. Written and verified with peft {version}."""
_NO_PATTERNS = "- Every module's scale is exactly 1 (`lora_alpha` = `r`, no patterns). Verified with peft {version}."


_UNEVEN = (
    "Ranks differ between modules: only what reads `rank_pattern` and `alpha_pattern`, as PEFT does, gives each its "
    "scale. llama.cpp's converter divides the one `lora_alpha` by each tensor's own rank, and vLLM and other servers "
    "read `r` and `lora_alpha` alone: there this is another adapter. Merge it into the base with PEFT for those."
)


def uneven(ranks: Mapping[str, int]) -> list[str]:
    """What to say of an adapter whose modules have several ranks (0 is none); empty otherwise."""
    return [_UNEVEN] if len({rank for rank in ranks.values() if rank}) > 1 else []


_NEW_HEAD = """\
- New head, saved with the adapter: {heads}. Loading the base reports it as newly initialised; the adapter
  then brings its own."""


def auto_class(model: nn.Module) -> str | None:
    """The class of ``transformers`` whose ``from_pretrained`` loads this network; None for other networks."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        return None
    own = name if type(model).__module__.startswith("transformers.") else None
    return next((auto for ending, auto in _AUTO_CLASSES.items() if name.endswith(ending)), own)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a network's first floating-point parameter (float32 if it has none)."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def labels_of(model: nn.Module, num_labels: int | None, id2label: Mapping[int, str] | None) -> dict[str, Any]:
    """What a classifier needs at load: ``num_labels``, and ``id2label`` where labels have names."""
    config = getattr(model, "config", None)
    named = {int(key): value for key, value in (id2label or getattr(config, "id2label", None) or {}).items()}
    count = num_labels or len(id2label or {}) or getattr(config, "num_labels", None)
    settings: dict[str, Any] = {} if count is None else {"num_labels": int(count)}
    if len(named) == count and any(name != f"LABEL_{key}" for key, name in named.items()):
        settings["id2label"] = named
        settings["label2id"] = {name: key for key, name in named.items()}
    # The base's own configuration may name another loss, which transformers refuses for one output.
    if (stated := getattr(config, "problem_type", None)) not in (None, "single_label_classification"):
        settings["problem_type"] = stated
    return settings


def base_settings(model: nn.Module, revision: str | None, labels: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments with which ``from_pretrained`` rebuilds the base network."""
    settings: dict[str, Any] = {"revision": revision} if revision else {}
    settings |= labels
    config = getattr(model, "config", None)
    pad = getattr(config, "pad_token_id", None)
    # GPT-2 and others come without a padding token: the one that the user set may not be in the base's config.
    if pad is not None and "num_labels" in labels and getattr(type(config), "pad_token_id", None) != pad:
        settings["pad_token_id"] = pad
    settings["dtype"] = dtype_of(model)
    return settings


def loading_snippet(
    model: nn.Module, name: str | None, base: str | None, settings: Mapping[str, Any], adapter: str | None
) -> str:
    """Python source that loads the base network by its class ``name`` and, if given, the adapter onto it."""
    if name is None:
        return (
            "from peft import PeftModel\n\n"
            f"base = ...  # your {type(model).__name__}, with the weights that this adapter was made for\n"
            f"model = PeftModel.from_pretrained(base, {adapter!r}).eval()\n"
        )
    target = "base" if adapter else "model"
    source = repr(base) if base else '"..."'
    arguments = "".join(f"    {key}={value!r},\n" for key, value in settings.items())
    return (
        "import torch\n"
        + ("from peft import PeftModel\n" if adapter else "")
        + f"from transformers import {name}\n\n"
        + f"{target} = {name}.from_pretrained(\n    {source},\n{arguments})\n"
        + (f"model = PeftModel.from_pretrained(base, {adapter!r}).eval()\n" if adapter else "model = model.eval()\n")
    )


MEAN_POOLING = '''\
from safetensors.torch import load_file

head = load_file({head!r})

def classify(**batch):
    """Logits of a tokenised batch: mean over the tokens that the mask keeps, then the head."""
    hidden = model(**batch).last_hidden_state.to(head["weight"].dtype)
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
    return torch.nn.functional.linear(pooled, head["weight"], head.get("bias"))
'''


_PLACES = (r"(PeftModel\.from_pretrained\(base, )'[^']*'()", r"(load_file\()'[^']*(/head\.safetensors)'")
_ABOUT_RANKS = ("Ranks", "Training", "Grown", "Compressed", "Ranks changed")


def moved_readme(words: str, folder: str) -> str | None:
    """A README of this package for the adapter in another ``folder``; what it says of the ranks goes.

    None where it says nowhere how to load the adapter.
    """
    first, *sections = words.rstrip().split("\n## ")
    kept = [part.rstrip() for part in sections if part.partition("\n")[0] not in _ABOUT_RANKS]
    text = "\n\n## ".join([first.rstrip(), *kept])
    if not re.search(_PLACES[0], text):
        return None
    for place in _PLACES:
        text = re.sub(place, lambda found: found[1] + repr(folder + found[2]), text)
    return text


def adapter_readme(
    config: LoraConfig,
    ranks: Mapping[str, int],
    snippet: str,
    *,
    heads: list[str],
    notes: list[str],
    extra: str,
) -> str:
    """The whole README (model-card front matter included) of an exported adapter."""
    base, revision = config.base_model_name_or_path, config.revision
    named = [f"base_model: {json.dumps(base)}"] if base else []
    front = ["---", "library_name: peft", *named, "tags: [lora, ranksure]", "---"]
    uniform = not config.rank_pattern
    listing = [f"| `{name}` | {rank} |" for name, rank in ranks.items()]
    facts = [
        f"- Base model: {f'`{base}`' if base else 'not recorded'}, revision "
        + (f"`{revision}`" if revision else "not recorded: pin the one that you used"),
        f"- Names of modules: those of transformers {transformers.__version__}. Other versions may have other names.",
        *([_NEW_HEAD.format(heads=", ".join(f"`{head}`" for head in heads))] if heads else []),
        *([f"- Zero-padded to one rank, {config.r}, for consumers without patterns."] if uniform else []),
        *(f"- {note}" for note in notes),
    ]
    if heads:
        advice = "This adapter has a head in `modules_to_save`: for vLLM, export a merged checkpoint."
    elif uniform:
        advice = "This adapter has one rank for all modules and no `modules_to_save`."
    else:
        advice = "For vLLM, export with one rank (`uniform=True`), or a merged checkpoint."
    parts = ["\n".join(front), "# LoRA adapter", "\n".join(facts), "## Load", f"```python\n{snippet}```"]
    parts += ["## Ranks", "\n".join(["| module | rank |", "|---|---|", *listing])]
    patterns = (_NO_PATTERNS if uniform else _PATTERNS).format(version=peft.__version__)
    parts += [_CONSUMERS.format(patterns=patterns, advice=advice).rstrip()]
    parts += [] if uniform else uneven(ranks)
    return "\n\n".join([*parts, *([extra.strip()] if extra.strip() else [])]) + "\n"
