"""Tiny trained-looking LoRA runs on disk, as PEFT and transformers write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.data.test_conversations import CHATML, byte_tokenizer
from tests.tiny_text import loaded, save_bert, save_csv

PAIRS = [
    {"prompt": "the review", "completion": " is good"},
    {"prompt": "it is a very good film", "completion": " a"},
    {"prompt": "a", "completion": " good film, a very bad review"},
    {"prompt": "is it bad", "completion": " very"},
    {"prompt": "the film", "completion": " is bad"},
]


def save_pairs(path: Path, rows: list[dict[str, Any]] = PAIRS) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(path)


def llama_config(vocabulary: int, **settings: Any) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(vocab_size=vocabulary, **sizes, max_position_embeddings=64, initializer_range=0.3, **settings)


def save_llama(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    special = {"eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": True, "num_key_value_heads": 1}
    config = llama_config(len(tokenizer), **special)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return str(folder)


def save_mixtral(folder: Path) -> str:
    """A mixture of two experts."""
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    special = {"eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.3, "max_position_embeddings": 64}
    MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **sizes, **experts, **special)).save_pretrained(folder)
    return str(folder)


def save_gpt2_lm(folder: Path) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def shaken(model: PeftModel, seed: int = 3) -> PeftModel:
    """The adapter as if trained: no matrix is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def classifier(base: str, outputs: int = 2, **settings: Any) -> PeftModel:
    """A run on a headless BERT, its new head in ``modules_to_save``."""
    torch.manual_seed(5)
    arguments = {"r": 2, "lora_alpha": 6, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", **settings}
    return shaken(get_peft_model(loaded(base, outputs), LoraConfig(**arguments))).eval()


def language_model(base: str, **settings: Any) -> PeftModel:
    from transformers import AutoModelForCausalLM

    arguments = {"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings}
    return shaken(get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**arguments))).eval()


def save_runs(root: Path) -> Path:
    """A run on texts and a causal one, with their bases and data."""
    classifier(save_bert(root / "bert")).save_pretrained(root / "texts")
    language_model(save_llama(root / "llama"), target_modules=["q_proj", "down_proj"]).save_pretrained(root / "causal")
    save_csv(root / "data.csv", 40)
    save_pairs(root / "pairs.jsonl")
    return root


def copy_runs(root: Path, folder: Path) -> Path:
    """The runs and data of :func:`save_runs` (not the bases) in another folder."""
    for name in ("texts", "causal"):
        shutil.copytree(root / name, folder / name)
    for name in ("data.csv", "pairs.jsonl"):
        shutil.copy(root / name, folder / name)
    return folder
