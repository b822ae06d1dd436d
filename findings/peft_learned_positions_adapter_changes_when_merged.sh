#!/usr/bin/env bash
# peft 0.21.0, transformers 5.23.0, torch 2.13.0 (PyPI), Python 3.11: an adapter on OPT's position embeddings is one
# network beside its layer and another one merged into it, without a word.
#
# OPT's `embed_positions` is a subclass of nn.Embedding whose forward pass takes the attention mask and works the
# positions out itself. `target_modules=["embed_positions"]` is accepted, and PEFT's embedding layer looks its low-rank
# factors up by the layer's first argument: by the zeros and ones of the mask, so that every real token gets the update
# of row 1. Trained so, the adapter is one vector for all positions; `merge_and_unload` adds each row's own update
# instead. The same target on `embed_tokens` agrees.
#
# What to do: before an adapter is merged, compare the logits on one batch; target only layers whose forward pass is
# that of the torch class they derive from.
#
# Output seen:
#     embed_tokens: beside its layer and merged into it, the adapter gives the same logits
#     embed_positions: beside its layer and merged into it, the adapter gives logits more than 10% apart
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.0
found=$(cd "$folder" && HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM

config = OPTConfig(
    vocab_size=40, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2,
    max_position_embeddings=32, dropout=0.0, tie_word_embeddings=False,
)
ids = torch.arange(5, 15).view(1, -1)
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

for target in ("embed_tokens", "embed_positions"):
    torch.manual_seed(0)
    model = get_peft_model(OPTForCausalLM(config), LoraConfig(r=2, target_modules=[target])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
        beside = model(**batch).logits
        merged = model.merge_and_unload()(**batch).logits
    apart = float((beside - merged).norm() / merged.norm())
    said = "the same logits" if apart < 1e-4 else "logits more than 10% apart" if apart > 0.1 else f"{apart}"
    print(f"{target}: beside its layer and merged into it, the adapter gives {said}")
PY
)
echo "$found"
[ "$found" = "embed_tokens: beside its layer and merged into it, the adapter gives the same logits
embed_positions: beside its layer and merged into it, the adapter gives logits more than 10% apart" ]
