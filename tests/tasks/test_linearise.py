"""One recipe from rows to a linearised problem, and every row prepared once on the way."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, ViTModel, WhisperForConditionalGeneration
from transformers.models.whisper import WhisperFeatureExtractor

import ranksure
from ranksure.data.texts import Rows, load_rows
from ranksure.losses import get_loss
from ranksure.network.logits import predict
from ranksure.tasks import classifiers
from ranksure.tasks.linearise import HeldOut, fit_new_head, linearise
from ranksure.tasks.text import load_text_task
from tests.tasks.prompt_parts import SENTENCES, byte_bpe, rows_of, tiny_llama
from tests.tasks.test_image import processor, random_rows, vit_config
from tests.tasks.test_image import save as save_vit
from tests.tasks.test_speech import recordings, whisper_config
from tests.tiny_text import save_bert, save_bert_classifier, save_csv

CROSS_ENTROPY = get_loss("cross-entropy")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return load_rows(save_csv(tmp_path_factory.mktemp("rows") / "rows.csv", 40))


# ---------------------------------------------------------------------------------------------------------------------
# the recipe


def test_samples_stand_in_the_order_of_the_rows(bert: str, rows: Rows) -> None:
    """Base logits and labels of the problem and of the held-out rows are those of each row run by itself."""
    train, other = rows.subset(range(12)), rows.subset(range(20, 27))
    task = load_text_task(bert, train, batch_size=5)
    found = linearise(task, task.targets(["query"], "last"), train, CROSS_ENTROPY, held_out=[None, other])
    missing, held = found.held_out
    assert missing is None and isinstance(held, HeldOut) and held.rows is other and found.head is not None
    assert torch.allclose(task.model.get_submodule("classifier").weight.double(), found.head.weight, atol=1e-6)
    problem = found.problem
    for part, base, labels in ((train, problem.base_logits, problem.labels), (other, held.base_logits, held.labels)):
        assert labels.tolist() == part.labels
        alone = torch.cat([predict(task.model, task.batches(part.subset([i]))) for i in range(len(part))])
        assert torch.allclose(base, alone.double(), atol=1e-5)
    assert set(problem.penalty.values()) == {1.0} and list(problem.operator.shapes) == list(
        task.targets(["query"], "last")
    )


def test_a_trained_head_stays(tmp_path: Path, rows: Rows) -> None:
    task = load_text_task(save_bert_classifier(tmp_path / "m", ["bad", "good"]), rows)
    before = task.model.get_submodule("classifier").weight.clone()
    assert fit_new_head(task, rows, CROSS_ENTROPY) is None
    assert torch.equal(task.model.get_submodule("classifier").weight, before)


def test_no_target_is_part_of_a_head(bert: str, rows: Rows) -> None:
    task = load_text_task(bert, rows)
    assert task.head == "classifier" and not any(name.startswith("classifier") for name in task.targets("all-linear"))


# ---------------------------------------------------------------------------------------------------------------------
# once


class Counting:
    """Anything that prepares inputs, with a count of the calls for each input."""

    def __init__(self, inner: Any, key: Any = lambda value: value) -> None:
        self._inner, self._key, self.seen = inner, key, Counter[Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)

    def __len__(self) -> int:
        return len(self._inner)

    def __bool__(self) -> bool:
        return True

    def __call__(self, first: Any = None, *args: Any, **options: Any) -> Any:
        inputs = options.get("images", first)
        self.seen.update(map(self._key, [inputs] if isinstance(inputs, str) else inputs))
        return self._inner(*([] if first is None else [first]), *args, **options)


def _distinct(n: int) -> Rows:
    """Texts of three words that all differ."""
    words = ["good", "warm", "bright", "bad", "cold", "dull", "the", "film", "story", "cast"]
    texts = [" ".join(words[(i // 10**d) % 10] for d in range(3)) for i in range(n)]
    labels = [i % 2 for i in range(n)]
    return Rows(texts=texts, labels=labels, label_names=["bad", "good"], source="made", sha256="0", notes=[])


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_a_plan_tokenises_each_text_once(bert: str, pooling: str) -> None:
    """Remarks, estimate, head, capture, the other pooling and the comparison with the network share the tokens."""
    rows, tokenizer = _distinct(60), Counting(AutoTokenizer.from_pretrained(bert))
    found = ranksure.plan(
        bert,
        rows,
        tokenizer=tokenizer,
        pooling=pooling,
        samples=16,
        target_modules=["query"],
        weight_decay="5%",
        linearised=True,
    )
    assert found.data["linearity"]["heldout"] is not None and len(found.data["head"]["accuracy"]) == 2
    assert sum(tokenizer.seen.values()) == len(rows) and set(tokenizer.seen) == set(rows.texts)


def test_texts_that_may_be_cut_are_tokenised_once_more(bert: str) -> None:
    """Only so is it known which have more tokens than the limit of 4."""
    rows, tokenizer = _distinct(60), Counting(AutoTokenizer.from_pretrained(bert))
    found = ranksure.plan(
        bert,
        rows,
        tokenizer=tokenizer,
        max_length=4,
        samples=16,
        target_modules=["query"],
        weight_decay="5%",
        linearised=True,
    )
    assert any("16 of the 16 training texts reach 4 tokens" in note for note in found.data["notes"])
    assert sorted(tokenizer.seen.values()) == [1] * 44 + [2] * 16


def test_a_fit_tokenises_each_text_once(bert: str, tmp_path: Path) -> None:
    rows, tokenizer = _distinct(40), Counting(AutoTokenizer.from_pretrained(bert))
    task = load_text_task(bert, rows, tokenizer=tokenizer)
    fit_new_head(task, rows, CROSS_ENTROPY)
    task.features(rows)
    assert set(tokenizer.seen.values()) == {1} and len(tokenizer.seen) == 40


def test_a_plan_tokenises_each_prompt_once() -> None:
    """Calibration too; verbalisers are looked up in three prompts, which are tokenised for that alone."""
    sentences = [(f"{text} {i}", label) for i in range(4) for text, label in SENTENCES]
    rows, tokenizer = rows_of(sentences), Counting(byte_bpe(False))
    ranksure.plan(
        tiny_llama(),
        rows,
        task="prompt",
        tokenizer=tokenizer,
        samples=16,
        weight_decay="5%",
        target_modules=["q_proj"],
        linearised=True,
    )
    counts = [tokenizer.seen[f"Review: {text}\nSentiment:"] for text in rows.texts]
    assert sorted(counts)[: len(rows) - 3] == [1] * (len(rows) - 3)


def test_a_plan_prepares_each_image_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder, rows = save_vit(tmp_path / "vit", ViTModel(vit_config())), random_rows(60, (9, 12, 3))
    prepare = Counting(processor(), lambda image: (image.size, image.tobytes()))
    ranksure.plan(
        folder,
        rows,
        task="image",
        tokenizer=prepare,
        samples=16,
        heldout=40,
        weight_decay="5%",
        ranks=[1],
        linearised=True,
    )
    tries = 3  # of the processor's size, on black images
    assert Counter(prepare.seen.values()) == {1: 56 + tries}


def test_a_plan_prepares_each_recording_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    WhisperForConditionalGeneration(whisper_config(max_source_positions=200)).save_pretrained(tmp_path)
    rows = recordings(40)
    prepare = Counting(WhisperFeatureExtractor(chunk_length=1), lambda waveform: waveform.tobytes())
    options: dict[str, Any] = {"samples": 16, "max_seconds": 1, "weight_decay": "5%", "ranks": [1]}
    ranksure.plan(str(tmp_path), rows, task="speech", tokenizer=prepare, **options, linearised=True)
    assert Counter(prepare.seen.values()) == {1: 40}


def test_a_plan_reads_the_weights_once(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, load = [], classifiers.load_weights
    monkeypatch.setattr(classifiers, "load_weights", lambda *args, **more: read.append(args) or load(*args, **more))
    ranksure.plan(
        bert, _distinct(60), samples=16, target_modules=["query"], weight_decay="5%", ranks=[1], linearised=True
    )
    assert len(read) == 1


def test_what_was_prepared_goes_with_the_rows(bert: str) -> None:
    rows = _distinct(8)
    task = load_text_task(bert, rows)
    few = rows.subset(range(4))
    assert task.rows(few) is task.rows(few) and len(task.kept) == 1
    del few
    assert len(task.kept) == 0
