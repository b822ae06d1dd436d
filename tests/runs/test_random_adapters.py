"""Random adapters over PEFT's options: ``certify``'s loss is that of PEFT's own forward pass, or the reason is true.

A share runs in the suite. All of it, with other seeds than those::

    RANKSURE_ADAPTERS=600 pytest tests/runs/test_random_adapters.py
"""

from __future__ import annotations

import os
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    ViTForImageClassification,
)

import ranksure
from ranksure.adapters.saved import read_files
from ranksure.errors import AdapterError
from ranksure.runs.saved.open import load_run, open_run
from tests.helpers import rounding
from tests.runs.saved.test_open import pictures, save_vit, vit_config
from tests.runs.tiny_runs import llama_config, save_gpt2_lm, save_llama, save_mixtral
from tests.tiny_text import save_bert

COUNT = int(os.environ.get("RANKSURE_ADAPTERS", "48"))
AT_ONCE = 12  # adapters in one test
KINDS = {
    # targets, modules to save, embeddings to target
    "llama": (["q_proj", "v_proj", "down_proj", "o_proj"], ["lm_head", "embed_tokens", "norm"], ["embed_tokens"]),
    "tied": (["q_proj", "v_proj", "gate_proj"], ["embed_tokens", "norm"], ["embed_tokens"]),
    "gpt2": (["c_attn", "c_proj", "c_fc"], ["ln_f", "wpe"], ["wte"]),
    "bert": (["query", "value", "output.dense"], ["pooler"], ["word_embeddings", "position_embeddings"]),
    "mixtral": (["q_proj", "o_proj", "k_proj"], ["norm"], ["embed_tokens"]),
    "vit": (["q_proj", "v_proj", "projection", "fc1"], ["layernorm"], []),
}
CAUSAL = ("llama", "tied", "gpt2", "mixtral")


@dataclass
class Case:
    """An adapter drawn at random, and by which reasons (patterns) it may not be certified."""

    kind: str
    dtype: torch.dtype
    config: dict[str, Any]
    added: int = 0
    reasons: list[str] = field(default_factory=list)
    lost: bool = False


def drawn(seed: int) -> Case:
    """The case of a seed. What PEFT refuses itself is no case: see :func:`trained`."""
    draw = random.Random(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    targets, saveable, embeddings = KINDS[kind]
    case = Case(kind, draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16]), {})
    chosen = draw.sample(targets, draw.randint(1, len(targets)))
    if embeddings and draw.random() < 0.3:
        chosen.append(draw.choice(embeddings))
    if kind == "mixtral" and case.dtype == torch.float64:
        case.dtype = torch.float32  # torch has no grouped product of experts in float64
    config: dict[str, Any] = {"r": draw.choice([1, 2, 4, 6]), "lora_alpha": draw.choice([1, 2, 8, 16]), "bias": "none"}
    config["target_modules"] = chosen if draw.random() < 0.7 else rf".*\.({'|'.join(map(re.escape, chosen))})"
    config["task_type"] = "CAUSAL_LM" if kind in CAUSAL else "SEQ_CLS" if kind == "bert" else None
    for name in ("rank_pattern", "alpha_pattern"):
        if draw.random() < 0.5:
            keys = draw.sample([*chosen, rf"layers?\.1\..*\.{chosen[0]}", "nothing", chosen[-1][1:]], 2)
            config[name] = {key: draw.choice([1, 2, 3, 8]) for key in keys}
    config["use_rslora"] = draw.random() < 0.3
    config["lora_dropout"] = draw.choice([0.0, 0.1])
    config["bias"] = draw.choice(["none", "none", "lora_only", "all"])
    if draw.random() < 0.4 or kind == "vit":
        config["modules_to_save"] = draw.sample(saveable, draw.randint(1, len(saveable)))
        config["modules_to_save"] = [name for name in config["modules_to_save"] if name not in chosen]
    if kind == "vit":
        config["modules_to_save"] = ["classifier", *config["modules_to_save"]]
    if isinstance(config["target_modules"], list) and draw.random() < 0.2:
        config["layers_to_transform"] = [1]
    if draw.random() < 0.15:
        config["exclude_modules"] = [chosen[-1]] if len(chosen) > 1 else None
    if draw.random() < 0.2:
        config["ensure_weight_tying"] = True
    _vary(case, config, draw)
    case.config = {key: value for key, value in config.items() if value is not None}
    return case


def _vary(case: Case, config: dict[str, Any], draw: random.Random) -> None:
    """What changes more than numbers, and the reason that it gives."""
    what = draw.choice(["start", "start", "dora", "lora_bias", "parameters", "tokens", "rows", "", "", "", ""])
    if what == "start":
        starts = ["gaussian", "eva", "orthogonal", "mica", False, "pissa", "olora", "lora_ga"]
        config["init_lora_weights"] = start = draw.choice(starts)
        if start in ("pissa", "olora", "lora_ga"):
            case.reasons.append(f"init_lora_weights='{start}'")
    elif what == "dora":
        config["use_dora"] = True
        case.reasons.append("use_dora=True")
    elif what == "lora_bias":
        config["lora_bias"] = True
        case.reasons.append("lora_bias=True")
    elif what == "parameters":
        config["target_parameters"] = ["mlp.experts.down_proj"] if case.kind == "mixtral" else ["q_proj.weight"]
        config["target_modules"] = [draw.choice(["k_proj", "v_proj"])]
        config.pop("exclude_modules", None)
        case.reasons.append("target_parameters=")
    elif what == "tokens" and case.kind in ("llama", "tied", "mixtral"):
        case.added = draw.randint(1, 3)
    elif what == "rows":
        config["trainable_token_indices"] = [1, 2]
        case.reasons.append("trainable_token_indices=")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Callable[[Case], Path]:
    """Where the base of a case is, with its dtype; made at the first call."""
    root = tmp_path_factory.mktemp("bases")

    def base(case: Case) -> Path:
        folder = root / f"{case.kind}-{str(case.dtype)[6:]}"
        if folder.exists():
            return folder
        torch.manual_seed(0)
        if case.kind == "vit":
            save_vit(folder, ViTForImageClassification(vit_config(num_labels=2)).to(case.dtype))
        elif case.kind == "bert":
            save_bert(folder, case.dtype)
        elif case.kind == "gpt2":
            save_gpt2_lm(folder)
        elif case.kind == "mixtral":
            save_mixtral(folder)
        else:
            save_llama(folder, case.dtype)
            if case.kind == "llama":
                config = llama_config(len(AutoTokenizer.from_pretrained(folder)), num_key_value_heads=1)
                LlamaForCausalLM(config).to(case.dtype).save_pretrained(folder)
        if case.kind in ("gpt2", "mixtral"):
            AutoModelForCausalLM.from_pretrained(folder).to(case.dtype).save_pretrained(folder)
        return folder

    return base


def plain(case: Case, base: Path) -> nn.Module:
    """The base network by transformers alone, resized as the run's."""
    if case.kind == "vit":
        return ViTForImageClassification.from_pretrained(base)
    if case.kind == "bert":
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    network = AutoModelForCausalLM.from_pretrained(base)
    if case.added:
        network.resize_token_embeddings(network.config.vocab_size + case.added, mean_resizing=False)
    return network


def trained(case: Case, base: Path, folder: Path, seed: int) -> bool:
    """Save an adapter as if trained; whether PEFT makes such a one at all."""
    torch.manual_seed(seed)
    try:
        model = get_peft_model(plain(case, base), LoraConfig(**case.config, base_model_name_or_path=str(base)))
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError):
        return False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or ("lora_" in name and "magnitude" not in name):
                parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter))
    assert isinstance(model, PeftModel)
    model.save_pretrained(str(folder))
    if case.added:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens([f"<new{i}>" for i in range(case.added)])
        tokenizer.save_pretrained(folder)
    return True


def batches(case: Case, network: nn.Module) -> list[dict[str, Any]]:
    if case.kind == "vit":
        return []
    generator = torch.Generator().manual_seed(7)
    rows: Any = network.get_input_embeddings()
    ids = torch.randint(5, rows.weight.shape[0], (3, 6), generator=generator)
    ids[:, -2] = rows.weight.shape[0] - 1  # an added token, if there is any
    return [{"input_ids": ids, "labels": ids.clone() if case.kind in CAUSAL else torch.tensor([0, 1, 1])}]


def loss_of(case: Case, network: nn.Module, given: list[dict[str, Any]]) -> float:
    """The mean loss, in float64 from the logits of plain calls."""
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in given:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            out = network(**inputs).logits.double()
        if case.kind in CAUSAL:
            logits.append(out[:, :-1].flatten(0, 1))
            labels.append(batch["labels"][:, 1:].flatten())
        else:
            logits.append(out)
            labels.append(batch["labels"])
    return float(F.cross_entropy(torch.cat(logits), torch.cat(labels)))


def check(case: Case, base: Path, folder: Path) -> str:
    """One adapter, certified and computed by PEFT alone; returns the verdict."""
    torch.manual_seed(11)
    try:
        reference = PeftModel.from_pretrained(plain(case, base), str(folder)).eval()
    except RuntimeError as error:  # keys that overlap, sorted: other ranks than were trained
        assert "size mismatch" in str(error) and "rank_pattern" in case.config
        with pytest.raises(
            AdapterError, match=r"was trained at rank \d, by the rank_pattern key .* saving sorted them"
        ):
            open_run(folder, pictures(6)) if case.kind == "vit" else load_run(folder)
        return "torn"
    try:
        if case.kind == "vit":
            rows = pictures(6)
            run, read = open_run(folder, rows)
            given = list(read.batches)
        else:
            run = load_run(folder)
            given = batches(case, reference.get_base_model())
    except AdapterError as error:
        told = re.search(r"PEFT did not save the rows of (\S+)|PEFT saved none of their rows", str(error))
        assert told and case.added, error
        saved = {key for key in read_files(folder).head if (told[1] or "embed_tokens") in key}
        assert not saved  # it is true
        return "lost"
    found = ranksure.certify(run.model, given, lam=0.01)
    shared = [reason for reason in found.reasons if "shares its matrices" in reason]
    if found.verdict == "not-checked":
        unexplained = [r for r in found.reasons if not any(r.startswith(known) for known in case.reasons)]
        assert [r for r in unexplained if "is not a tested kind of module" not in r] == shared, found.reasons
        assert case.reasons or case.config.get("ensure_weight_tying"), found.reasons
        return "not-checked"
    assert not case.reasons, (case.reasons, found.reasons)
    expected = loss_of(case, reference, given)
    assert found.loss == pytest.approx(expected, rel=64 * rounding(reference)), case
    return found.verdict


@pytest.mark.parametrize("part", range(-(-COUNT // AT_ONCE)))
def test_the_loss_is_that_of_pefts_own_forward_pass(bases, tmp_path, part):
    verdicts: list[str] = []
    for seed in range(part * AT_ONCE, min((part + 1) * AT_ONCE, COUNT)):
        case, folder = drawn(seed), tmp_path / str(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT, about overlapping or useless settings
            base = bases(case)
            if trained(case, base, folder, seed):
                try:
                    verdicts.append(check(case, base, folder))
                except Exception as error:
                    error.add_note(f"seed {seed}: {case}")
                    raise
    assert len(verdicts) >= AT_ONCE // 2 and len(set(verdicts) - {"not-checked", "lost", "torn"}) > 0, verdicts
