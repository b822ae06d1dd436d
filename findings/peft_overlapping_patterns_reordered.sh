#!/usr/bin/env bash
# peft 0.21.0, transformers 5.23.0, torch 2.13.0 (PyPI), Python 3.11: keys of `rank_pattern` or `alpha_pattern` that
# overlap mean something else after saving.
#
# The first key that matches a module decides its rank and its alpha, so one writes the special case before the rule:
# {"layers.1.mlp.down_proj": 2, "down_proj": 8}. `get_peft_model` follows that order, and the model trains. But
# `save_pretrained` writes adapter_config.json with its keys sorted, also inside the patterns; read back, the rule comes
# first and the special case is dead. With ranks, PEFT refuses its own file (a size mismatch); with alphas the shapes
# fit, and the adapter is applied at another scale without a word. A dict keeps its order in Python and through json, so
# one would not expect a round trip to change which key comes first.
#
# What to do: no two keys that match one module (list the modules, or exclude the special case in the rule's regular
# expression); or keys whose sorted order is the order meant.
#
# Output seen:
#     ranks made: [8, 2]
#     keys made: ['layers.1.mlp.down_proj', 'down_proj']; keys in the file: ['down_proj', 'layers.1.mlp.down_proj']
#     ranks loaded: RuntimeError, size mismatch True
#     scales made: [8.0, 0.5]
#     scales loaded: [8.0, 8.0], 0 warnings
#     without overlap, scales loaded: [8.0, 0.5]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.0
found=$(cd "$folder" && HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import json
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **SHAPE))


def adapt(**patterns):
    return get_peft_model(base(), LoraConfig(r=4, lora_alpha=4, target_modules=["down_proj"], **patterns))


def each(model, what):
    return [getattr(module, what)["default"] for name, module in model.named_modules() if name.endswith("down_proj")]


model = adapt(rank_pattern={"layers.1.mlp.down_proj": 2, "down_proj": 8})
print("ranks made:", each(model, "r"))
model.save_pretrained("ranks")
with open("ranks/adapter_config.json") as file:
    saved = json.load(file)["rank_pattern"]
print(f"keys made: {list(model.peft_config['default'].rank_pattern)}; keys in the file: {list(saved)}")
try:
    print("ranks loaded:", each(PeftModel.from_pretrained(base(), "ranks"), "r"))
except RuntimeError as error:
    print(f"ranks loaded: RuntimeError, size mismatch {'size mismatch' in str(error)}")

model = adapt(alpha_pattern={"layers.1.mlp.down_proj": 2, "down_proj": 32})
print("scales made:", each(model, "scaling"))
model.save_pretrained("alphas")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loaded = PeftModel.from_pretrained(base(), "alphas")
said = sum(warning.category is UserWarning for warning in caught)  # deprecations in the libraries themselves aside
print(f"scales loaded: {each(loaded, 'scaling')}, {said} warnings")

adapt(alpha_pattern={"layers.1.mlp.down_proj": 2, "layers.0.mlp.down_proj": 32}).save_pretrained("apart")
print("without overlap, scales loaded:", each(PeftModel.from_pretrained(base(), "apart"), "scaling"))
PY
)
echo "$found"
[ "$found" = "ranks made: [8, 2]
keys made: ['layers.1.mlp.down_proj', 'down_proj']; keys in the file: ['down_proj', 'layers.1.mlp.down_proj']
ranks loaded: RuntimeError, size mismatch True
scales made: [8.0, 0.5]
scales loaded: [8.0, 8.0], 0 warnings
without overlap, scales loaded: [8.0, 0.5]" ]
