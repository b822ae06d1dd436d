#!/usr/bin/env bash
# peft 0.21.0, transformers 5.23.0, torch 2.13.0 (PyPI), Python 3.11: with LoRA on `embed_tokens`, the output rows of
# added tokens are not saved.
#
# A language model whose input and output embeddings are not tied is given new tokens by `resize_token_embeddings`, and
# their rows are set. PEFT's `save_pretrained` sees that the vocabulary grew and keeps both embeddings with the adapter;
# loaded on a base resized in the same way, the logits are those when saved. Once `embed_tokens` is itself among the
# target modules, it keeps the input embedding only: the new rows of `lm_head` are gone, and a load puts the new model's
# random rows in their place. The shapes fit, nothing is said at the load, and the warning at saving tells of
# "embedding layers" that are saved, so one would expect more to be kept, not less. An explicit
# `save_embedding_layers=True` changes nothing.
#
# What to do: put "lm_head" in `modules_to_save` (or in the target modules as well), or save the resized base model
# and let the adapter be of that one.
#
# Output seen:
#     q_proj: embeddings saved ['embed_tokens', 'lm_head'], same logits True
#     q_proj and embed_tokens: embeddings saved ['embed_tokens'], same logits False
#       of the old tokens True
#     the same, save_embedding_layers=True: embeddings saved ['embed_tokens'], same logits False
#       of the old tokens True
#     the same, lm_head in modules_to_save: embeddings saved ['embed_tokens', 'lm_head'], same logits True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.0
found=$(cd "$folder" && HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
OLD, NEW = 60, 64
TOKENS = torch.arange(NEW)[None]

torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=OLD, tie_word_embeddings=False, **SHAPE)).save_pretrained("base")


def resized():
    model = LlamaForCausalLM.from_pretrained("base")
    model.resize_token_embeddings(NEW, mean_resizing=False)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def same(a, b):
    return torch.allclose(a, b, atol=1e-5)


def trial(name, targets, modules_to_save=None, save="auto"):
    model = resized()
    with torch.no_grad():  # each new token begins as a copy of an old one
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[OLD:] = layer.weight[: NEW - OLD]
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=modules_to_save, init_lora_weights=False)
    model = get_peft_model(model, config)
    folder = name.replace(" ", "-")
    model.save_pretrained(folder, save_embedding_layers=save)
    keys = [key for key in load_file(f"{folder}/adapter_model.safetensors") if ".lora_" not in key]
    kept = [layer for layer in ("embed_tokens", "lm_head") if any(layer in key for key in keys)]
    loaded, saved = logits(PeftModel.from_pretrained(resized(), folder)), logits(model)
    print(f"{name}: embeddings saved {kept}, same logits {same(loaded, saved)}")
    if not same(loaded, saved):
        print("  of the old tokens", same(loaded[..., :OLD], saved[..., :OLD]))


both = ["q_proj", "embed_tokens"]
trial("q_proj", ["q_proj"])
trial("q_proj and embed_tokens", both)
trial("the same, save_embedding_layers=True", both, save=True)
trial("the same, lm_head in modules_to_save", both, modules_to_save=["lm_head"])
PY
)
echo "$found"
[ "$found" = "q_proj: embeddings saved ['embed_tokens', 'lm_head'], same logits True
q_proj and embed_tokens: embeddings saved ['embed_tokens'], same logits False
  of the old tokens True
the same, save_embedding_layers=True: embeddings saved ['embed_tokens'], same logits False
  of the old tokens True
the same, lm_head in modules_to_save: embeddings saved ['embed_tokens', 'lm_head'], same logits True" ]
