#!/usr/bin/env bash
# peft 0.21.0, transformers 5.23.0, torch 2.13.0 (PyPI), Python 3.11: LoRA on WavLM's attention, or on `dt_proj` of
# Mamba and Jamba, does nothing.
#
# PEFT puts its wrapper in the place of a layer and adds the adapter's term where the wrapper is called. WavLM's
# attention hands the weights of q_proj, k_proj, v_proj and out_proj to a function of torch, and the state-space layers
# multiply by `dt_proj.weight`: the wrapper lets its layer's weight be read and is never called, so the adapter has no
# part in the output and gets no gradient. All of these are `nn.Linear`s under the usual names, `get_peft_model` says
# nothing (for Mamba it refuses out_proj and conv1d, as if it knew which layers are out of reach),
# `print_trainable_parameters` counts them, and training goes on, as the head lowers the loss alone. Wav2Vec2, with the
# same names, is adapted. Merging writes the term into the weight, so there an adapter that is not zero does act.
# For WavLM a change to transformers has been proposed: huggingface/transformers#48773.
#
# What to do: after one backward pass, look for adapter weights whose gradient is None; choose other layers of such a
# network (WavLM: the feed-forward ones; Mamba and Jamba: in_proj, x_proj).
#
# Output seen (adapters with random weights; "acts": the logits differ from the base network's):
#     Wav2Vec2 attention: 0 warnings, acts True, gradients for 16 of 16 adapter weights, acts merged True
#     WavLM attention: 0 warnings, acts False, gradients for 0 of 16 adapter weights, acts merged True
#     WavLM feed-forward: 0 warnings, acts True, gradients for 8 of 8 adapter weights, acts merged True
#     Mamba dt_proj: 0 warnings, acts False, gradients for 0 of 4 adapter weights, acts merged True
#     Mamba x_proj: 0 warnings, acts True, gradients for 4 of 4 adapter weights, acts merged True
#     Jamba dt_proj: 0 warnings, acts False, gradients for 0 of 6 adapter weights, acts merged True
#     Jamba x_proj: 0 warnings, acts True, gradients for 6 of 6 adapter weights, acts merged True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.0
found=$(cd "$folder" && TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WavLMConfig,
    WavLMForSequenceClassification,
)

torch.manual_seed(0)
SPEECH = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16, 16),
    conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2, classifier_proj_size=16,
)
MAMBA = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, tie_word_embeddings=False)
JAMBA = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, attn_layer_period=4, attn_layer_offset=2, num_experts=2, mamba_dt_rank=4,
)
SOUND, TOKENS = torch.randn(2, 800), torch.arange(8)[None]


def trial(name, network, inputs, targets, head):
    network.eval()
    with torch.no_grad():
        before = network(inputs).logits
    config = LoraConfig(r=4, lora_alpha=64, target_modules=targets, modules_to_save=[head], init_lora_weights=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(network, config).eval()
    after = model(inputs).logits
    after.square().sum().backward()
    weights = [weight for key, weight in model.named_parameters() if ".lora_" in key]
    reached = sum(weight.grad is not None for weight in weights)
    with torch.no_grad():
        merged = model.merge_and_unload()(inputs).logits
    acts, acts_merged = (not torch.allclose(each, before, rtol=0, atol=1e-6) for each in (after, merged))
    said = sum(warning.category is UserWarning for warning in caught)  # deprecations in the libraries themselves aside
    print(
        f"{name}: {said} warnings, acts {acts}, gradients for {reached} of {len(weights)} adapter weights, "
        f"acts merged {acts_merged}"
    )


attention = ["q_proj", "k_proj", "v_proj", "out_proj"]
wav2vec2 = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SPEECH))
trial("Wav2Vec2 attention", wav2vec2, SOUND, attention, "classifier")
for name, targets in (("attention", attention), ("feed-forward", ["intermediate_dense", "output_dense"])):
    trial(f"WavLM {name}", WavLMForSequenceClassification(WavLMConfig(**SPEECH)), SOUND, targets, "classifier")
for layer in ("dt_proj", "x_proj"):
    trial(f"Mamba {layer}", MambaForCausalLM(MambaConfig(**MAMBA)), TOKENS, [layer], "lm_head")
for layer in ("dt_proj", "x_proj"):
    trial(f"Jamba {layer}", JambaForCausalLM(JambaConfig(**JAMBA)), TOKENS, [layer], "lm_head")
PY
)
echo "$found"
[ "$found" = "Wav2Vec2 attention: 0 warnings, acts True, gradients for 16 of 16 adapter weights, acts merged True
WavLM attention: 0 warnings, acts False, gradients for 0 of 16 adapter weights, acts merged True
WavLM feed-forward: 0 warnings, acts True, gradients for 8 of 8 adapter weights, acts merged True
Mamba dt_proj: 0 warnings, acts False, gradients for 0 of 4 adapter weights, acts merged True
Mamba x_proj: 0 warnings, acts True, gradients for 4 of 4 adapter weights, acts merged True
Jamba dt_proj: 0 warnings, acts False, gradients for 0 of 6 adapter weights, acts merged True
Jamba x_proj: 0 warnings, acts True, gradients for 6 of 6 adapter weights, acts merged True" ]
