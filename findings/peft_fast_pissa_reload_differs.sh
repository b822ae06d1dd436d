#!/usr/bin/env bash
# peft 0.21.0, transformers 5.23.0, torch 2.13.0 (PyPI), Python 3.11: a "pissa_niter_N" adapter is another network at
# every load.
#
# PiSSA starts an adapter B A at the leading singular part of a weight W and lowers the frozen weight to W - B A. The
# saved folder holds the trained A and B, not the lowered weight: loading works the start out again from W. With "pissa"
# that is an exact decomposition, the same every time. With "pissa_niter_N" it is a randomised one drawn from torch's
# global generator: the lowered weight is not the one that was trained against, and the logits differ from those at
# saving and from load to load. The load warns of nothing, the file's tensors all fit, and a start drawn anew looks
# harmless (right after `get_peft_model` the logits are the base model's whatever was drawn), so one would take the
# saved folder to fix the model.
#
# What to do: use "pissa"; or save the adapter as plain LoRA through `path_initial_model_for_weight_conversion`, which
# needs no lowered weight. The same seed before making and before loading also agrees, as long as nothing else draws.
#
# Output seen (a random network; each line compares with the logits when saved):
#     pissa, loaded at seed 1: same logits True
#     pissa, loaded at seed 2: same logits True
#     pissa_niter_4, loaded at seed 1: same logits False
#     pissa_niter_4, loaded at seed 2: same logits False
#     pissa_niter_4, two loads at different seeds agree: False
#     pissa_niter_4, loaded at the seed it was made at: same logits True
#     pissa_niter_4, saved as plain LoRA, loaded at seed 1: same logits True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.0
found=$(cd "$folder" && HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
TOKENS = torch.arange(8)[None]


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **SHAPE)).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def make(init):
    """The logits of an adapter made at seed 7 and trained for three steps; it is saved twice, also as plain LoRA."""
    network = base()
    torch.manual_seed(7)
    model = get_peft_model(network, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init))
    model.peft_config["default"].init_lora_weights = True  # as the documentation of the conversion asks
    model.save_pretrained(f"{init}-start")
    model.peft_config["default"].init_lora_weights = init
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(init)
    trained = logits(model)
    model.save_pretrained(f"{init}-lora", path_initial_model_for_weight_conversion=f"{init}-start")
    return trained


def load(folder, seed):
    network = base()
    torch.manual_seed(seed)
    return logits(PeftModel.from_pretrained(network, folder))


def same(a, b):
    return torch.allclose(a, b, atol=1e-4)


for init in ("pissa", "pissa_niter_4"):
    trained = make(init)
    for seed in (1, 2):
        print(f"{init}, loaded at seed {seed}: same logits {same(load(init, seed), trained)}")
print(f"{init}, two loads at different seeds agree: {same(load(init, 1), load(init, 2))}")
print(f"{init}, loaded at the seed it was made at: same logits {same(load(init, 7), trained)}")
print(f"{init}, saved as plain LoRA, loaded at seed 1: same logits {same(load(init + '-lora', 1), trained)}")
PY
)
echo "$found"
[ "$found" = "pissa, loaded at seed 1: same logits True
pissa, loaded at seed 2: same logits True
pissa_niter_4, loaded at seed 1: same logits False
pissa_niter_4, loaded at seed 2: same logits False
pissa_niter_4, two loads at different seeds agree: False
pissa_niter_4, loaded at the seed it was made at: same logits True
pissa_niter_4, saved as plain LoRA, loaded at seed 1: same logits True" ]
