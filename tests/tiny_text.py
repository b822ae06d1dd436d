"""A tiny random BERT with a small vocabulary, and made-up sentences whose words tell their class."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

GOOD = ["good", "warm", "bright", "lovely", "fresh", "kind"]
BAD = ["bad", "cold", "dull", "nasty", "stale", "cruel"]
ODD = ["odd", "queer", "weird", "random", "curious", "novel"]
PLAIN = ["the", "a", "film", "story", "cast", "plot", "and", "is", "very", "not", "with", "song", "day", "it"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, *GOOD, *BAD, *ODD, *PLAIN, "##s", "##ly", ",", "."]
LARGE = 0.3  # initial weights large enough for the inputs to show in the logits
QUERY, VALUE = (f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "value"))


def save_tokenizer(folder: Path) -> BertTokenizerFast:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32)
    tokenizer.save_pretrained(folder)
    return tokenizer


def bert_config(**settings: Any) -> BertConfig:
    return BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        initializer_range=LARGE,
        **settings,
    )


def save_bert(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """A headless checkpoint, so that a classifier on it has a new head."""
    torch.manual_seed(0)
    BertModel(bert_config()).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def save_bert_classifier(folder: Path, names: list[str], **settings: Any) -> str:
    """A checkpoint with a 'trained' head and its own label names."""
    torch.manual_seed(1)
    labels = dict(enumerate(names))
    config = bert_config(id2label=labels, label2id={name: i for i, name in labels.items()}, **settings)
    BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def save_roberta(folder: Path) -> str:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        initializer_range=LARGE,
        pad_token_id=0,
    )
    RobertaModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def save_gpt2(folder: Path) -> str:
    """No padding token and no [CLS]: texts are their words alone."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=40,
        initializer_range=LARGE,
        bos_token_id=3,
        eos_token_id=3,
    )
    GPT2Model(config).save_pretrained(folder)
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    return str(folder)


def sentences(n: int, classes: int = 2, seed: int = 0, noise: float = 0.15) -> list[tuple[str, int]]:
    """Texts of 3 to 9 words, one or two of which tell the class (another class with probability ``noise``)."""
    source = random.Random(seed)
    words = [BAD, GOOD, ODD][:classes]
    rows = []
    for i in range(n):
        label = i % classes
        told = source.randrange(classes) if source.random() < noise else label
        text = source.choices(PLAIN, k=source.randrange(2, 8)) + source.choices(words[told], k=source.randrange(1, 3))
        source.shuffle(text)
        rows.append((" ".join(text), label))
    source.shuffle(rows)
    return rows


def frame(n: int = 120, names: tuple[str, ...] = ("bad", "good"), seed: int = 0, noise: float = 0.15) -> pd.DataFrame:
    rows = sentences(n, len(names), seed, noise)
    return pd.DataFrame({"text": [text for text, _ in rows], "label": [names[label] for _, label in rows]})


def save_csv(path: Path, n: int = 120, names: tuple[str, ...] = ("bad", "good"), seed: int = 0) -> str:
    frame(n, names, seed).to_csv(path, index=False)
    return str(path)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


def strict_json(text: str) -> dict[str, Any]:
    """JSON without NaN, Infinity or repeated keys."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse, object_pairs_hook=no_duplicates)


def loaded(path: str, n_outputs: int = 2) -> PreTrainedModel:
    """The classifier on a checkpoint as transformers alone reads it."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=n_outputs).eval()
