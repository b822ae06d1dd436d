import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from ranksure.adapters import export
from ranksure.adapters.export import export_adapter, export_mean_pooled, export_merged
from ranksure.errors import AdapterError
from tests.adapters.networks import (
    Suffixes,
    assert_unchanged,
    edited,
    random_factors,
    save_bert,
    snapshot,
    with_new_head,
)

IDS = torch.tensor([[0, 3, 5, 1, 0], [2, 2, 9, 10, 4]])
QUERY, VALUE = "bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.0.attention.self.value"


def bert(tmp_path: Path, **settings: object) -> nn.Module:
    return with_new_head(save_bert(tmp_path / "base"), "classifier", num_labels=2, **settings)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_suffix_names_convolution_and_embedding(tmp_path, uniform, dtype, tolerance):
    torch.manual_seed(0)
    model = Suffixes().to(dtype)
    ranks = {"emb": 2, "q": 1, "layer.query": 3, "b.layer.query": 0, "b.q": 4, "conv": 2}
    factors = random_factors(model, ranks)
    before = snapshot(model)
    config = export_adapter(model, factors, tmp_path / "a", head="head", task_type=None, uniform=uniform)
    assert_unchanged(model, before)
    assert names_in(tmp_path) == ["a"]
    assert names_in(tmp_path / "a") == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert (config.r, config.lora_alpha, bool(config.rank_pattern)) == (4, 4, not uniform)

    torch.manual_seed(0)
    base = Suffixes().to(dtype)
    with torch.no_grad():
        base.head.weight.zero_()  # another head: the adapter brings its own
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "a"))
    layers = {n: m for n, m in loaded.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    kept = {name: rank for name, rank in ranks.items() if rank}
    assert {n: m.r["default"] for n, m in layers.items()} == (dict.fromkeys(kept, 4) if uniform else kept)
    assert all(m.scaling["default"] == 1 for m in layers.values())
    reference = edited(model, factors)(IDS)
    assert (loaded(IDS) - reference).abs().max() <= tolerance * reference.abs().max()
    assert (loaded.merge_and_unload()(IDS) - reference).abs().max() <= tolerance * reference.abs().max()


def test_a_dilated_convolution_is_refused_because_peft_drops_the_dilation(tmp_path):
    model = Suffixes(dilation=(1, 2))
    with pytest.raises(AdapterError, match="conv is a dilated convolution"):
        export_adapter(model, random_factors(model, {"conv": 2}), tmp_path / "a", task_type=None)
    assert names_in(tmp_path) == []


def test_one_module_in_two_places_is_refused_because_peft_wraps_one(tmp_path):
    model = Suffixes()
    model.b["q"] = model.q
    with pytest.raises(AdapterError, match=r"q and b\.q are one module"):
        export_adapter(model, random_factors(model, {"q": 2}), tmp_path / "a", task_type=None)
    shared = nn.Module()
    shared.first = shared.second = nn.ModuleDict({"q": nn.Linear(3, 3)})  # one q, in one parent: PEFT wraps it for both
    shared.forward = lambda x: shared.second["q"](shared.first["q"](x))
    export_adapter(shared, random_factors(shared, {"first.q": 1}), tmp_path / "b", task_type=None)
    assert names_in(tmp_path) == ["b"]


def test_only_the_fitted_head_is_saved(tmp_path):
    model = bert(tmp_path)
    export_adapter(model, random_factors(model, {QUERY: 2}), tmp_path / "a", head="classifier")
    stored = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert stored["task_type"] == "SEQ_CLS"
    assert stored["modules_to_save"] == ["classifier"]
    assert stored["inference_mode"] is True
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    heads = {key: value for key, value in tensors.items() if "lora" not in key}
    assert set(heads) == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert torch.equal(heads["base_model.model.classifier.weight"], model.classifier.weight)


def test_the_models_own_head_is_not_saved(tmp_path, recwarn):
    model = bert(tmp_path)  # seen as a model with a trained head
    factors = random_factors(model, {QUERY: 2})
    config = export_adapter(model, factors, tmp_path / "a", head=None)
    assert (config.task_type, config.modules_to_save) == (None, None)
    assert not any("classifier" in key for key in load_file(tmp_path / "a/adapter_model.safetensors"))
    assert "`task_type` is not set" in (tmp_path / "a/README.md").read_text()
    base = with_new_head(str(tmp_path / "base"), "classifier", num_labels=2)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "a")).eval()
    ids = torch.randint(1, 50, (2, 6))
    assert torch.allclose(loaded(ids).logits, edited(model, factors)(ids).logits, atol=1e-5)
    assert not [w for w in recwarn if "peft" in str(w.filename) and "missing" in str(w.message)]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.classifier, self.rescore = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.aux = nn.ModuleDict({"classifier": nn.Linear(4, 2), "score": nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.aux["score"](self.q(x))
        return self.classifier(x) + self.aux["classifier"](x) + self.rescore(x)


def test_heads_that_peft_cannot_tell_apart(tmp_path):
    model = TwoHeads()
    factors = random_factors(model, {"q": 1})
    with pytest.raises(AdapterError, match=r"module aux\.classifier is saved too"):
        export_adapter(model, factors, tmp_path / "a", head="classifier", task_type=None)
    assert names_in(tmp_path) == []
    # "rescore" ends with "score", which SEQ_CLS wraps: written without the task type instead
    config = export_adapter(model, factors, tmp_path / "a", head="aux.classifier")
    assert (config.task_type, config.modules_to_save) == (None, ["aux.classifier"])
    # a target inside a module that SEQ_CLS would save
    inside = random_factors(model, {"aux.score": 2, "q": 1})
    assert export_adapter(model, inside, tmp_path / "b", head="aux.classifier").task_type is None
    x = torch.randn(3, 4)
    loaded = PeftModel.from_pretrained(edited(model, {}), str(tmp_path / "b"))
    assert torch.allclose(loaded(x), edited(model, inside)(x), atol=1e-5)


def test_two_heads_and_a_target_in_the_head(tmp_path):
    model = TwoHeads()
    factors = random_factors(model, {"q": 1})
    config = export_adapter(model, factors, tmp_path / "a", head=["aux.classifier", "rescore"], task_type=None)
    assert config.modules_to_save == ["aux.classifier", "rescore"]
    with pytest.raises(AdapterError, match=r"module aux\.classifier is not wrapped"):
        both = random_factors(model, {"q": 1, "aux.classifier": 1})
        export_adapter(model, both, tmp_path / "b", head="aux.classifier", task_type=None)


def test_frozen_half_precision_and_training_mode_stay(tmp_path):
    model = bert(tmp_path, dtype=torch.bfloat16)
    model.train()
    model.bert.embeddings.requires_grad_(False)
    model.gradient_checkpointing_enable()
    factors = random_factors(model, {QUERY: 2, VALUE: 1})
    before = snapshot(model)
    export_adapter(model, factors, tmp_path / "a", head="classifier")
    export_merged(model, factors, tmp_path / "m")
    assert_unchanged(model, before)
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    assert {v.dtype for k, v in tensors.items() if "lora" in k} == {torch.float32}
    assert tensors["base_model.model.classifier.weight"].dtype == torch.bfloat16
    export_adapter(model, factors, tmp_path / "a", head="classifier", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    assert {v.dtype for v in tensors.values()} == {torch.bfloat16}


def test_merged_conv1d_keeps_tied_head_and_refuses_tied_targets(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)).eval()
    factors = random_factors(model, {"transformer.h.0.attn.c_attn": 2})
    before = snapshot(model)
    export_merged(model, factors, tmp_path / "m", tokenizer=None)
    assert_unchanged(model, before)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "m").eval()
    ids = torch.randint(0, 20, (2, 5))
    assert torch.equal(loaded(ids).logits, edited(model, factors)(ids).logits)
    with pytest.raises(AdapterError, match=r"transformer\.wte is tied to lm_head"):
        export_merged(model, random_factors(model, {"transformer.wte": 1}), tmp_path / "t")
    assert names_in(tmp_path) == ["m"]


def test_merged_without_transformers(tmp_path):
    with pytest.raises(AdapterError, match="no transformers model"):
        export_merged(Suffixes(), random_factors(Suffixes(), {"q": 1}), tmp_path / "m")


def test_an_adapter_on_a_tied_embedding_adapts_its_own_use(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)).double().eval()
    factors = random_factors(model, {"transformer.wte": 2})
    export_adapter(model, factors, tmp_path / "a", task_type="CAUSAL_LM")
    assert len(load_file(tmp_path / "a/adapter_model.safetensors")) == 2  # the embedding itself is not saved
    reference = edited(model, factors)
    loaded = PeftModel.from_pretrained(model, str(tmp_path / "a")).eval()
    ids = torch.randint(0, 20, (2, 5))
    assert torch.allclose(loaded(ids).logits, reference(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), RuntimeError("boom")])
@pytest.mark.parametrize("step", ["save_file", "load_back", "second rename"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_nothing_and_keeps_the_old_adapter(tmp_path, monkeypatch, error, step, existing):
    model = bert(tmp_path)
    shutil.rmtree(tmp_path / "base")
    factors = random_factors(model, {QUERY: 2})
    out = tmp_path / "deep" / "er" / "a"
    if existing:
        export_adapter(model, random_factors(model, {QUERY: 3}), out, head="classifier")
        old = {path.name: path.read_bytes() for path in out.iterdir()}
    before = snapshot(model)

    def fail(*args, **kwargs):
        if step == "save_file":
            Path(args[1]).write_bytes(b"half")
        raise error

    if step == "second rename":
        rename, calls = os.rename, []

        def fail_second(a, b):
            calls.append(a)
            if len(calls) == (2 if existing else 1):
                raise error
            rename(a, b)

        monkeypatch.setattr("os.rename", fail_second)
    else:
        monkeypatch.setattr(export, step, fail)
    expected = AdapterError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        export_adapter(model, factors, out, head="classifier")
    monkeypatch.undo()
    assert_unchanged(model, before)
    if existing:
        assert {path.name: path.read_bytes() for path in out.iterdir()} == old
        assert names_in(out.parent) == ["a"]
    else:
        assert names_in(tmp_path) == []
    export_adapter(model, factors, out, head="classifier")
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
    assert names_in(out.parent) == ["a"]


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    model = bert(tmp_path)
    factors = random_factors(model, {QUERY: 2})
    with pytest.raises(AdapterError, match=r"not empty and holds no adapter_config\.json"):
        export_adapter(model, factors, tmp_path / "base", head="classifier")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match="is a file"):
        export_merged(model, factors, tmp_path / "file")
    assert names_in(tmp_path) == ["base", "file"]


def test_corruption_is_found_when_loading_back(tmp_path, monkeypatch):
    model = bert(tmp_path)
    save = export.save_file

    def corrupt(tensors, path, **settings):
        save({key: value * 1.001 for key, value in tensors.items()}, path, **settings)

    monkeypatch.setattr(export, "save_file", corrupt)
    with pytest.raises(AdapterError, match=r"does not load back as written: tensor .* has other values"):
        export_adapter(model, random_factors(model, {QUERY: 2}), tmp_path / "a", head="classifier")
    assert names_in(tmp_path) == ["base"]


def test_requests_that_cannot_be_met(tmp_path):
    model = bert(tmp_path)
    factors = random_factors(model, {QUERY: 2})
    out = tmp_path / "a"
    with pytest.raises(AdapterError, match="nothing to export: the optimum is zero"):
        export_adapter(model, random_factors(model, {QUERY: 0}), out, head="classifier")
    with pytest.raises(AdapterError, match="head 'score' is not a module"):
        export_adapter(model, factors, out, head="score")
    with pytest.raises(AdapterError, match="head 'dropout' has no parameters"):
        export_adapter(model, factors, out, head="dropout")
    with pytest.raises(AdapterError, match="head classifier has 2 outputs, but there are 3 labels"):
        export_adapter(model, factors, out, head="classifier", id2label={0: "a", 1: "b", 2: "c"})
    with pytest.raises(AdapterError, match="nope, which is not a module"):
        export_adapter(model, {"nope": factors[QUERY]}, out)
    with pytest.raises(AdapterError, match=r"overflow torch\.float16"):
        u, v = factors[QUERY]
        export_adapter(model, {QUERY: (u * 1e6, v)}, out, head="classifier", dtype=torch.float16)
    with pytest.raises(AdapterError, match=r"expected \(K, d\) and \(K,\)"):
        export_mean_pooled(model.bert, {}, torch.zeros(3), None, out)
    adapted = PeftModel.from_pretrained
    export_adapter(model, factors, out, head="classifier")
    adapted = adapted(with_new_head(str(tmp_path / "base"), "classifier"), str(out))
    with pytest.raises(AdapterError, match="already carries an adapter"):
        export_adapter(adapted.get_base_model(), factors, tmp_path / "b")
    with pytest.raises(AdapterError, match="cannot be copied"):
        model.odd = torch.ones(2, requires_grad=True) * 2
        export_adapter(model, factors, tmp_path / "b", head="classifier")
    assert names_in(tmp_path) == ["a", "base"]


def test_readme_names_what_a_loader_must_know(tmp_path):
    model = with_new_head(save_bert(tmp_path / "base"), "classifier", num_labels=3)
    factors = random_factors(model, {QUERY: 2, VALUE: 1})
    id2label = {0: "en", 1: "fr", 2: "ru"}
    export_adapter(
        model,
        factors,
        tmp_path / "a",
        head="classifier",
        base_model_name_or_path="org/base",
        revision="deadbeef",
        id2label=id2label,
        extra_readme="## Certificate\n\ngap 1e-9",
        shown_path="somewhere/else",
    )
    text = (tmp_path / "a/README.md").read_text()
    parts = ("`deadbeef`", "org/base", "num_labels=3", f"id2label={id2label}", "vLLM", "somewhere/else", "gap 1e-9")
    for part in parts:
        assert part in text, part
    stored = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (stored["base_model_name_or_path"], stored["revision"]) == ("org/base", "deadbeef")
    export_adapter(model, factors, tmp_path / "u", head=None, task_type=None, uniform=True)
    assert "one rank for all modules and no `modules_to_save`" in (tmp_path / "u/README.md").read_text()


def test_a_head_that_replaced_a_smaller_one_is_loaded_with_its_own_size(tmp_path):
    model = bert(tmp_path)
    model.classifier = nn.Linear(16, 4)
    export_adapter(model, random_factors(model, {QUERY: 1}), tmp_path / "a", head="classifier")
    assert "num_labels=4" in (tmp_path / "a/README.md").read_text()


def test_twelve_layers_layer_1_and_layer_11(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=12, num_attention_heads=2, intermediate_size=8)
    model = BertForSequenceClassification(config).double().eval()
    names = {f"bert.encoder.layer.{i}.attention.self.query": r for i, r in ((1, 3), (11, 1), (0, 0))}
    factors = random_factors(model, names)
    export_adapter(model, factors, tmp_path / "a", head="classifier")
    reference = edited(model, factors)
    loaded = PeftModel.from_pretrained(model, str(tmp_path / "a")).eval()
    ids = torch.randint(1, 30, (2, 6))
    assert torch.allclose(loaded(ids).logits, reference(ids).logits, rtol=0, atol=1e-12)
