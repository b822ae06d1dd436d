"""Prompts as a task: calibration, what is written down and read back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from ranksure.data.texts import Rows
from ranksure.errors import ModelError, RanksureError, SettingError
from ranksure.network.logits import predict
from ranksure.tasks.load import load_task
from ranksure.tasks.prompt import PromptTask, class_offsets, load_prompt_task
from ranksure.tasks.prompt_model import Verbalized
from tests.refusals import refusal
from tests.tasks.prompt_parts import (
    CHEMISTRY,
    MOLECULES,
    SENTENCES,
    agree,
    byte_bpe,
    ending_with_eos,
    needs_albert,
    needs_smollm,
    rows_of,
    save_albert,
    strict,
    tiny,
    tiny_llama,
    tiny_roberta,
)
from tests.tiny_text import save_bert, save_bert_classifier

# ---------------------------------------------------------------------------------------------------------------------
# calibration


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("k", [2, 3, 10])
def test_offsets_give_the_shares(scale: float, k: int):
    g = torch.Generator().manual_seed(k)
    logits = scale * torch.randn(60, k, generator=g, dtype=torch.float64) + 5 * torch.randn(k, generator=g).double()
    labels = torch.cat([torch.arange(k), torch.randint(k, (60 - k,), generator=g)])
    offset = class_offsets(logits, labels)
    shares = torch.bincount(labels, minlength=k).double() / 60
    assert float((torch.softmax(logits + offset, 1).mean(0) - shares).abs().max()) <= 1e-6
    assert abs(float(offset.sum())) <= 1e-9 * (1 + float(offset.abs().max()))
    # It is the minimum of a convex function: no step lowers the loss.
    loss = torch.nn.functional.cross_entropy(logits + offset, labels)
    for step in torch.randn(20, k, generator=g, dtype=torch.float64):
        assert float(torch.nn.functional.cross_entropy(logits + offset + step, labels)) >= float(loss) - 1e-12


def test_offsets_in_closed_form():
    """The same logits in every row: the offsets are what is missing to the log shares."""
    logits = torch.tensor([[2.0, -1.0, 0.5]]).double().repeat(10, 1)
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    expected = torch.tensor([0.5, 0.3, 0.2]).double().log() - logits[0]
    assert torch.allclose(class_offsets(logits, labels), expected - expected.mean(), atol=1e-9)
    absent = class_offsets(logits, torch.tensor([0] * 5 + [1] * 5))  # a class without a row counts as half of one
    expected = torch.tensor([5, 5, 0.5]).double().log() - logits[0]
    assert torch.allclose(absent, expected - expected.mean(), atol=1e-9)


def test_offsets_that_do_not_exist():
    with pytest.raises(ModelError, match="cannot be calibrated"):
        class_offsets(torch.full((4, 2), torch.nan, dtype=torch.float64), torch.tensor([0, 1, 0, 1]))


@needs_smollm
def test_smollm2_is_calibrated_and_says_so(smollm: PromptTask):
    rows = rows_of(SENTENCES)
    z = predict(smollm.model, smollm.batches(rows)).double()
    assert torch.allclose(z.softmax(1).mean(0), torch.full((2,), 0.5).double(), atol=1e-5)
    plain = z - torch.tensor(smollm.offsets).double()
    labels = torch.tensor(rows.labels)
    before, after = (100 * float((y.argmax(1) == labels).double().mean()) for y in (plain, z))
    (note,) = [note for note in smollm.notes if "Zero-shot" in note]
    assert f"get {before:.1f}% of 6 training rows right" in note and note.endswith(f"which gives {after:.1f}%.")
    assert f"negative {100 * float(plain.softmax(1).mean(0)[0]):.0f}%" in note
    assert any("Review: {text}" in note for note in smollm.notes)


def test_given_offsets_and_none():
    rows = rows_of(SENTENCES)
    fitted = tiny(tiny_llama(), False)
    plain = tiny(tiny_llama(), False, calibrate=False)
    again = tiny(tiny_llama(), False, calibrate=fitted.record()["offsets"])
    assert plain.offsets == [0.0, 0.0] and not any("Zero-shot" in note for note in plain.notes)
    first, second, third = (predict(task.model, task.batches(rows)) for task in (fitted, again, plain))
    assert torch.equal(first, second) and any(fitted.offsets)
    assert torch.allclose(first - third, torch.tensor(fitted.offsets).float(), atol=1e-6)
    for bad in ([1.0], [1.0, float("nan")], [1.0, 2.0, 3.0]):
        with pytest.raises(SettingError, match="2 finite offsets"):
            tiny(tiny_llama(), False, calibrate=bad)


def test_large_data_is_calibrated_on_a_sample(monkeypatch):
    monkeypatch.setattr("ranksure.tasks.prompt.CALIBRATION_ROWS", 4)
    assert any("of 4 training rows" in note for note in tiny(tiny_llama(), False).notes)


# ---------------------------------------------------------------------------------------------------------------------
# rows, records, use


def test_features_collator_and_remarks():
    task = tiny(tiny_roberta(), True, max_length=12)
    rows = rows_of(SENTENCES)
    features = task.features(rows)
    assert [row["labels"] for row in features] == rows.labels
    batch = task.collator(features)
    assert batch["labels"].tolist() == rows.labels
    (plain,) = task.batches(rows)
    assert all(torch.equal(batch[key], plain[key]) for key in plain) and "labels" not in plain
    assert int((plain["input_ids"] == task.processor.mask_token_id).sum()) == 6
    cut = sum(len(row["input_ids"]) == 12 for row in features)
    (remark,) = task.remarks(rows)
    assert remark.startswith(f"{len(task.encoder.encode(rows).cut)} of the 6 training texts were cut") and cut
    assert "at most 12 tokens; raise `max_length`" in remark
    assert task.tokens(plain) == int(plain["attention_mask"].sum()) < task.padded_tokens(plain)
    spelled = rows_of([("a <mask>", "negative"), ("b", "positive")])
    roomy = tiny(tiny_roberta(), True)
    assert ["1 of the 2 training texts spell the mask token <mask>" in remark for remark in roomy.remarks(spelled)] == [
        True
    ]
    assert roomy.remarks(rows_of(SENTENCES[4:])) == []


def test_batches_keep_the_order():
    rows = rows_of(SENTENCES)
    task = tiny(tiny_llama(), False, batch_size=2)
    assert [batch["input_ids"].shape[0] for batch in task.batches(rows)] == [2, 2, 2]
    by_length, back = task.batches_by_length(rows)
    assert sum(map(task.padded_tokens, by_length)) < sum(map(task.padded_tokens, task.batches(rows)))
    assert sorted(back.tolist()) == list(range(6))


def test_record_makes_the_task_again():
    first = tiny(tiny_roberta(), True, max_length=20)
    record = strict(json.dumps(first.record()))
    assert record["kind"] == "prompt" and record["architecture"] == "masked" and record["truncation_side"] == "right"
    assert record["verbalizers"] == {"negative": "terrible", "positive": "great"}
    assert record["verbalizer_ids"] == first.token_ids and record["template"] == "{text} It was {mask}."
    again = load_task(
        "prompt",
        tiny_roberta(),
        rows_of(SENTENCES),
        processor=byte_bpe(True),
        template=record["template"],
        verbalizers=record["verbalizers"],
        calibrate=record["offsets"],
        max_length=record["max_length"],
    )
    assert again.record() == first.record()
    rows = rows_of(SENTENCES)
    assert torch.equal(predict(first.model, first.batches(rows)), predict(again.model, again.batches(rows)))
    assert again.head is None and not again.head_is_new and again.prefix == "lm." and again.saved_modules is None
    name, _ = next(iter(again.adapted.named_modules(prefix="")))
    assert name == "" and again.model.get_submodule(again.prefix.rstrip(".")) is again.adapted


def classify_of(task: PromptTask, folder: Path) -> Any:
    """The code of ``usage``, run as a reader of the README would."""
    task.processor.save_pretrained(folder)
    text = task.usage()
    code = text.split("```python\n")[1].split("```")[0].replace(repr(task.name), repr(str(folder)))
    scope: dict[str, Any] = {"model": task.adapted.eval()}
    exec(code, scope)
    return scope["classify"], scope


def test_usage_gives_the_logits(tmp_path: Path):
    rows = rows_of(SENTENCES)
    ended = ending_with_eos(byte_bpe(False))
    for index, task in enumerate(
        (tiny(tiny_llama(), False), tiny(tiny_llama(), False, tokenizer=ended), tiny(tiny_roberta(), True))
    ):
        classify, scope = classify_of(task, tmp_path / str(index))
        expected = predict(task.model, task.batches(rows))
        assert scope["LABELS"] == ["negative", "positive"]
        for text, z in zip(rows.texts, expected, strict=True):
            assert agree(classify(text), z)
        assert f"at most {task.max_length} tokens" in task.usage()


def test_usage_of_pairs(tmp_path: Path):
    rows = rows_of(SENTENCES, pairs=[text for text, _ in reversed(SENTENCES)])
    task = tiny(tiny_roberta(), True, rows, template="{text}? {mask} , {pair}")
    classify, _ = classify_of(task, tmp_path)
    expected = predict(task.model, task.batches(rows))
    assert agree(classify(rows.texts[2], rows.pairs[2]), expected[2])  # type: ignore[index]


@needs_smollm
def test_usage_of_smollm2(smollm: PromptTask, tmp_path: Path):
    classify, _ = classify_of(smollm, tmp_path)
    text = SENTENCES[0][0]
    assert agree(classify(text), predict(smollm.model, smollm.batches(rows_of(SENTENCES[:1])))[0])


@pytest.mark.parametrize(("build", "masked"), [(tiny_llama, False), (tiny_roberta, True)])
def test_an_adapter_loads_back(build: Any, masked: bool, tmp_path: Path):
    rows = rows_of(SENTENCES)
    task = tiny(build(), masked)
    before = predict(task.model, task.batches(rows))
    task.adapted.save_pretrained(tmp_path / "base")
    targets = list(task.default_targets())
    config = LoraConfig(r=2, target_modules=targets, task_type=task.peft_task_type, init_lora_weights=False)
    wrapped = get_peft_model(task.adapted, config)
    changed = predict(task.model, task.batches(rows))  # PEFT adapts in place: the task sees it
    assert not agree(changed, before, 1e-3)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    base = auto.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    mask_id = task.processor.mask_token_id if masked else None
    again = Verbalized(loaded.get_base_model(), task.token_ids, mask_id)  # type: ignore[arg-type]
    again.offset.copy_(torch.tensor(task.offsets))
    assert agree(predict(again, task.batches(rows)), changed, 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# loading


def refused(error: type[RanksureError], *parts: str, model: Any, rows: Rows | None = None, **options: Any) -> None:
    refusal(error, parts, load_prompt_task, model, rows or rows_of(SENTENCES), **options)


@needs_albert
def test_pickled_weights_are_read_and_told(tmp_path: Path, albert_path: str):
    pickled = load_prompt_task(save_albert(tmp_path / "albert", pickled=True), rows_of(MOLECULES), **CHEMISTRY)
    assert any("pickled, not safetensors; they were read with weights_only" in note for note in pickled.notes)
    safe = load_prompt_task(albert_path, rows_of(MOLECULES), **CHEMISTRY)
    assert not any("pickled" in note for note in safe.notes)
    rows = rows_of(MOLECULES)
    assert torch.equal(predict(pickled.model, pickled.batches(rows)), predict(safe.model, safe.batches(rows)))


def test_the_architecture_decides(tmp_path: Path):
    masked, causal = str(tmp_path / "masked"), str(tmp_path / "causal")
    tiny_roberta().save_pretrained(masked)
    byte_bpe(True).save_pretrained(masked)
    tiny_llama().save_pretrained(causal)
    byte_bpe(False).save_pretrained(causal)
    assert load_prompt_task(masked, rows_of(SENTENCES), verbalizers="terrible,great").architecture == "masked"
    assert load_prompt_task(causal, rows_of(SENTENCES)).architecture == "causal"
    config = json.loads(Path(masked, "config.json").read_text())
    config.pop("architectures")  # RoBERTa can be either: the tokenizer's mask token tells
    Path(masked, "config.json").write_text(json.dumps(config))
    assert load_prompt_task(masked, rows_of(SENTENCES), verbalizers="terrible,great").architecture == "masked"


def test_models_that_cannot_be_read(tmp_path: Path):
    torch.manual_seed(0)
    headless = save_bert(tmp_path / "bert")
    refused(ModelError, "cls.predictions", "language-model head", model=headless, verbalizers="bad,good")
    classifier = save_bert_classifier(tmp_path / "classifier", ["a", "b"])
    refused(ModelError, "language-model head", model=classifier, verbalizers="bad,good")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=600, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    refused(ModelError, "encoder-decoder", model=t5, tokenizer=byte_bpe(True))
    refused(ModelError, "RobertaModel", "no masked or causal", model=tiny_roberta().roberta, tokenizer=byte_bpe(True))
    refused(ModelError, "no mask token", model=tiny_roberta(), tokenizer=byte_bpe(False), verbalizers="bad,good")
    refused(SettingError, "pass tokenizer=", model=tiny_llama())
    refused(ModelError, "does not exist", model=str(tmp_path / "nothing"))
    damaged = str(tmp_path / "damaged")
    tiny_llama().save_pretrained(damaged)
    byte_bpe(False).save_pretrained(damaged)
    Path(damaged, "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    refused(ModelError, "cannot be loaded as a language model", model=damaged)


def test_data_and_options_that_do_not_fit():
    floats = Rows(texts=["a", "b"], labels=[0.5, 1.5], label_names=None, source="f", sha256="", notes=[])
    common = {"model": tiny_llama(), "tokenizer": byte_bpe(False)}
    refused(SettingError, "float targets", "`task` text", rows=floats, **common)
    others = rows_of([("good", "0"), ("bad", "1")])
    refused(SettingError, "'0', '1'", "`verbalizers` '0=WORD,1=WORD'", rows=others, **common)
    pairs = rows_of(SENTENCES, pairs=["x"] * len(SENTENCES))
    refused(SettingError, "pairs of texts", "{pair}", rows=pairs, **common)
    refused(SettingError, "{mask}", "ends where the answer begins", template="{text} {mask}", **common)
    refused(SettingError, "max_length 1000 is more than the model's limit of 64", max_length=1000, **common)
    refused(SettingError, "template alone takes", max_length=4, **common)
    refused(SettingError, "tokens here", verbalizers="unputdownable,great", template="{text} It was", **common)
