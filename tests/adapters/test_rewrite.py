"""Adapters written again with other ranks: what PEFT loads afterwards is exactly what was meant."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from ranksure.adapters.loaded import read_adapter
from ranksure.adapters.rewrite import base_of, rewrite_adapter, stored_dtype
from ranksure.errors import AdapterError
from tests.adapters.networks import Suffixes, assert_unchanged, edited, save_bert, save_gpt2, snapshot, with_new_head
from tests.processes import ended_at, script

IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [7, 7, 8, 9, 10, 3]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        "bert": save_bert(root / "bert"),
        "gpt2": save_gpt2(root / "gpt2"),
        "bert16": save_bert(root / "bert16", dtype=torch.bfloat16),
    }


def fill(model: nn.Module, std: float = 0.3) -> nn.Module:
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=std)
    return model.eval()


def changed(model: nn.Module, ranks: dict[str, int], adapter: str = "default") -> dict:
    """New random factors: the given rank where named, the present factors elsewhere."""
    generator = torch.Generator().manual_seed(9)
    out = {}
    for name, (u, v) in read_adapter(model, adapter).factors.items():
        if name in ranks:
            u, v = (0.4 * torch.randn(len(x), ranks[name], generator=generator, dtype=torch.float64) for x in (u, v))
        out[name] = (u, v)
    return out


def logits(model: nn.Module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return getattr(out, "logits", out)


CASES = [
    ("bert", {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 5}),
    ("bert", {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 5, "use_rslora": True}),
    ("bert", {"target_modules": ["query", "value"], "r": 2, "lora_alpha": 2, "rank_pattern": {"query": 5}}),
    ("bert", {"target_modules": ["word_embeddings", "value"], "r": 3, "lora_alpha": 7}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 3, "lora_alpha": 4, "fan_in_fan_out": True}),
    ("bert16", {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 5}),
    ("bert", {"target_modules": ["query", "value"], "r": 4, "lora_alpha": 5, "init_lora_weights": "orthogonal"}),
    ("bert", {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 5, "init_lora_weights": "mica"}),
]


@pytest.mark.parametrize(("kind", "config"), CASES, ids=[f"{k}-{i}" for i, (k, _) in enumerate(CASES)])
def test_round_trip(bases, tmp_path, kind, config):
    head = "score" if kind == "gpt2" else "classifier"
    extra = {"pad_token_id": 0} if kind == "gpt2" else {}
    base = with_new_head(bases[kind], head, num_labels=2, **extra)
    model = fill(get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **config)))
    with torch.no_grad():  # a trained head
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "old" / "optimizer.pt").write_bytes(b"state")
    read = read_adapter(model)
    names = list(read.blocks)
    factors = changed(model, {names[0]: 7, names[1]: 1, names[-1]: 0})
    before = snapshot(model)
    done = rewrite_adapter(model, factors, tmp_path / "new", source=tmp_path / "old")
    assert_unchanged(model, before)
    assert done.ranks == {n: u.shape[1] for n, (u, _) in factors.items() if u.shape[1]}
    assert done.scales == {n: read.blocks[n].scale for n in done.ranks}

    fresh = with_new_head(bases[kind], head, num_labels=2, **extra)  # the base from disk, its head untrained
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "new")).eval()
    again = read_adapter(loaded)
    assert set(again.blocks) == set(done.ranks)  # the module of rank 0 is gone
    for name, block in again.blocks.items():
        u, v = factors[name]
        assert block.rank == u.shape[1] and block.scale == read.blocks[name].scale
        assert torch.allclose(block.factors[0] @ block.factors[1].T, u @ v.T, atol=1e-6)
        assert done.rounding[name] < 1e-6
    by_hand = with_new_head(bases[kind], head, num_labels=2, **extra)
    with torch.no_grad():
        for parameter in by_hand.get_submodule(head).parameters():
            parameter.add_(0.1)
    by_hand = edited(by_hand, {n: pair for n, pair in factors.items() if n in done.ranks})
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    apart = (logits(loaded, **inputs) - logits(by_hand, **inputs)).abs().max()
    assert float(apart) <= (0.1 if kind == "bert16" else 2e-5)
    for ranks, said in (({}, False), ({names[0]: 2, names[1]: 3}, True)):  # the same in each, and not
        rewrite_adapter(model, changed(model, ranks), tmp_path / "ranks")
        text, new = (tmp_path / "ranks" / "README.md").read_text(), read_adapter(model)
        said = said or len({block.rank for block in new.blocks.values()}) > 1
        assert ("llama.cpp's converter divides the one `lora_alpha`" in text) == said
    assert (tmp_path / "new" / "tokenizer_config.json").exists()
    assert not (tmp_path / "new" / "optimizer.pt").exists()
    config_now = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config_now["task_type"] == "SEQ_CLS" and config_now["use_rslora"] == config.get("use_rslora", False)
    assert (
        config_now["modules_to_save"]
        == json.loads((tmp_path / "old/adapter_config.json").read_text())["modules_to_save"]
    )


def test_names_that_are_endings_of_one_another_and_other_kinds_of_modules(tmp_path):
    torch.manual_seed(0)
    net = Suffixes().eval()
    names = ["emb", "q", "xq", "query", "layer.query", "layer.q", "b.layer.query", "b.q", "conv"]
    model = fill(get_peft_model(net, LoraConfig(r=2, lora_alpha=3, target_modules=r"(?:emb|conv|.*q|.*query)")))
    assert set(read_adapter(model).blocks) == set(names)
    ranks = {"emb": 3, "q": 1, "xq": 0, "query": 4, "layer.query": 0, "b.q": 5, "conv": 3}
    factors = changed(model, ranks)
    done = rewrite_adapter(model, factors, tmp_path / "new")
    assert done.ranks == {n: r for n, r in {**dict.fromkeys(names, 2), **ranks}.items() if r}
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Suffixes(), str(tmp_path / "new")).eval()
    found = {name: block.rank for name, block in read_adapter(loaded).blocks.items()}
    assert found == {n: r for n, r in {**dict.fromkeys(names, 2), **ranks}.items() if r}
    torch.manual_seed(0)
    ids = IDS + 0
    truth = logits(edited(Suffixes().eval(), {n: factors[n] for n in found}), ids=ids)
    assert torch.allclose(logits(loaded, ids=ids), truth, atol=1e-5)


def test_the_same_factors_come_back_bitwise(tmp_path):
    torch.manual_seed(0)
    model = fill(get_peft_model(Suffixes(), LoraConfig(r=3, lora_alpha=7, target_modules=["q", "query"])))
    model.save_pretrained(tmp_path / "old")
    rewrite_adapter(model, read_adapter(model).factors, tmp_path / "new", source=tmp_path / "old")
    old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("old", "new"))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, 7, {}, {})


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.1, 1 / 3, 16 / 7])
def test_the_scale_is_kept_at_every_rank(tmp_path, rslora, scale):
    """Alpha is chosen so that PEFT's own division gives the scale back."""
    torch.manual_seed(0)
    alpha = scale * (math.sqrt(4) if rslora else 4)
    model = fill(
        get_peft_model(Suffixes(), LoraConfig(r=4, lora_alpha=alpha, use_rslora=rslora, target_modules=["q", "xq"]))
    )
    for rank in (1, 3, 5, 6):
        done = rewrite_adapter(model, changed(model, {"q": rank}), tmp_path / "new")
        exact = read_adapter(model).blocks["q"].scale
        assert done.scales["xq"] == exact
        assert done.scales["q"] == pytest.approx(exact, rel=3e-16)


def test_a_half_precision_adapter_keeps_its_dtype_and_says_the_rounding(tmp_path):
    torch.manual_seed(0)
    model = fill(get_peft_model(Suffixes(), LoraConfig(r=2, lora_alpha=2, target_modules=["q", "query"])))
    model.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Suffixes(), str(tmp_path / "old"))
    assert stored_dtype(loaded, source=tmp_path / "old") == torch.bfloat16
    done = rewrite_adapter(loaded, changed(loaded, {"q": 3}), tmp_path / "new", source=tmp_path / "old")
    new, old = load_file(tmp_path / "new" / "adapter_model.safetensors"), load_file(path)
    assert {value.dtype for value in new.values()} == {torch.bfloat16}
    kept = "base_model.model.query.lora_A.weight"
    assert torch.equal(new[kept], old[kept]) and done.rounding["query"] < 1e-15
    assert 1e-4 < done.rounding["q"] < 1e-2


def test_biases_are_kept_and_their_modules_stay(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(Suffixes(), LoraConfig(r=2, lora_alpha=2, target_modules=["xq", "query"], bias="lora_only"))
    with torch.no_grad():
        model.base_model.model.xq.base_layer.bias.add_(1)
    fill(model)
    model.save_pretrained(tmp_path / "old")
    done = rewrite_adapter(model, changed(model, {"xq": 0}), tmp_path / "new", source=tmp_path / "old")
    assert done.ranks["xq"] == 1  # one column of zeros: the bias is stored under its wrapper's name
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Suffixes(), str(tmp_path / "new"))
    assert torch.equal(loaded.base_model.model.xq.base_layer.bias, model.base_model.model.xq.base_layer.bias)
    u, v = read_adapter(loaded).blocks["xq"].factors
    assert float((u @ v.T).abs().max()) == 0


def test_one_of_two_adapters(tmp_path):
    """The other one, its head, and a name that occurs in module names, do not get in the way."""
    torch.manual_seed(0)
    model = get_peft_model(Suffixes(), LoraConfig(r=2, lora_alpha=2, target_modules=["xq"], modules_to_save=["head"]))
    model.add_adapter("query", LoraConfig(r=3, lora_alpha=6, target_modules=["xq", "b.q"]))
    fill(model)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1)
    model.base_model.set_adapter(["default", "query"])
    before = snapshot(model)
    rewrite_adapter(model, changed(model, {"xq": 4}, "default"), tmp_path / "first", adapter="default")
    rewrite_adapter(model, changed(model, {"b.q": 1}, "query"), tmp_path / "second", adapter="query")
    assert_unchanged(model, before)
    torch.manual_seed(0)
    first = PeftModel.from_pretrained(Suffixes(), str(tmp_path / "first"))
    assert {name: block.rank for name, block in read_adapter(first).blocks.items()} == {"xq": 4}
    head = model.base_model.model.head.modules_to_save["default"].weight
    assert torch.equal(first.base_model.model.head.modules_to_save["default"].weight, head)
    torch.manual_seed(0)
    second = PeftModel.from_pretrained(Suffixes(), str(tmp_path / "second"))
    found = read_adapter(second)
    assert {name: (block.rank, block.scale) for name, block in found.blocks.items()} == {"xq": (3, 2), "b.q": (1, 2)}


def test_the_base_beneath_is_the_base(bases):
    base = with_new_head(bases["bert"], "classifier", num_labels=2)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    truth = logits(base, **inputs)
    model = fill(get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])))
    assert not torch.allclose(logits(model, **inputs), truth)
    assert torch.equal(logits(base_of(model, "default"), **inputs), truth)
    assert len(read_adapter(model).blocks) == 2


def test_readme(tmp_path):
    torch.manual_seed(0)
    model = fill(get_peft_model(Suffixes(), LoraConfig(r=2, lora_alpha=2, target_modules=["xq"])))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "README.md").write_text("# My adapter\n\nMine.\n")
    rewrite_adapter(
        model, changed(model, {"xq": 3}), tmp_path / "a", source=tmp_path / "old", title="Grown", text="So."
    )
    text = (tmp_path / "a" / "README.md").read_text()
    assert text.startswith("# My adapter\n\nMine.\n\n<!--") and "## Grown\n\nSo." in text and "| `xq` | 3 | 1 |" in text
    rewrite_adapter(model, changed(model, {"xq": 1}), tmp_path / "b", source=tmp_path / "a")
    text = (tmp_path / "b" / "README.md").read_text()  # a second change
    assert "Mine." in text and "| `xq` | 1 | 1 |" in text and "Grown" not in text


def test_what_is_refused(tmp_path):
    torch.manual_seed(0)
    net = Suffixes()
    model = fill(get_peft_model(net, LoraConfig(r=2, lora_alpha=2, target_modules=["q", "query"])))
    factors = read_adapter(model).factors
    cases = [
        ({**factors, "q": (factors["q"][0][:, :0], factors["q"][1][:, :0])}, None),
        ({name: (u[:, :0], v[:, :0]) for name, (u, v) in factors.items()}, "nothing is left"),
        ({"q": factors["q"]}, "differ in"),
        ({**factors, "q": (factors["q"][1][:3], factors["q"][1])}, "shapes"),
        ({**factors, "q": (factors["q"][0] * math.nan, factors["q"][1])}, "not finite"),
    ]
    for given, match in cases:
        if match is None:
            rewrite_adapter(model, given, tmp_path / "fine")
            continue
        with pytest.raises(AdapterError, match=match):
            rewrite_adapter(model, given, tmp_path / "out")
    with pytest.raises(AdapterError, match="no LoRA adapter 'other'"):
        rewrite_adapter(model, factors, tmp_path / "out", adapter="other")
    with pytest.raises(AdapterError, match="overflow"):
        rewrite_adapter(model, {n: (1e6 * u, v) for n, (u, v) in factors.items()}, tmp_path / "out", dtype=torch.half)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(AdapterError, match="holds no adapter_config"):
        rewrite_adapter(model, factors, tmp_path / "full")
    dora = get_peft_model(Suffixes(), LoraConfig(r=2, target_modules=["xq"], use_dora=True))
    with pytest.raises(AdapterError, match="plain LoRA"):
        rewrite_adapter(dora, {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


KILLED = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from tests.adapters.networks import Suffixes
import ranksure.adapters.rewrite as rewrite
from ranksure.adapters.loaded import read_adapter

torch.manual_seed(0)
model = PeftModel.from_pretrained(Suffixes(), "adapter")
real = rewrite.save_file

def half(tensors, path, metadata):
    Path(path).write_bytes(b"half of it")
    print("writing", flush=True)
    sys.stdin.read()

if sys.argv[1] == "half":
    rewrite.save_file = half
else:
    rewrite._verify = lambda *args: (print("writing", flush=True), sys.stdin.read())
factors = {name: (u[:, :1], v[:, :1]) for name, (u, v) in read_adapter(model).factors.items()}
rewrite.rewrite_adapter(model, factors, "adapter", source="adapter")
"""


@pytest.mark.parametrize("when", ["half", "verifying"])
def test_killed_while_replacing_its_own_folder(tmp_path, when):
    """Kill -9: the old adapter is there, whole, and running again replaces it."""
    torch.manual_seed(0)
    model = fill(get_peft_model(Suffixes(), LoraConfig(r=2, lora_alpha=2, target_modules=["q", "query"])))
    model.save_pretrained(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    status, _, errors = ended_at("writing", signal.SIGKILL, script(KILLED, when), cwd=tmp_path)
    assert status == -signal.SIGKILL, errors
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    factors = changed(model, {"q": 1, "query": 1})
    rewrite_adapter(model, factors, tmp_path / "adapter", source=tmp_path / "adapter")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Suffixes(), str(tmp_path / "adapter"))
    assert {block.rank for block in read_adapter(loaded).blocks.values()} == {1, 2}
