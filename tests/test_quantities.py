"""Quantities as people write them."""

import math

import pytest

from ranksure.errors import RanksureError
from ranksure.quantities import parse_effort, parse_memory, parse_share


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GB", 8 * 10**9),
        ("8gb", 8 * 10**9),
        ("512MiB", 512 * 2**20),
        (" 6.5 GB ", 6_500_000_000),
        ("1000", 1000),
        (2.0**31, 2**31),
        ("2G", 2 * 10**9),
        ("1TiB", 2**40),
        ("1GiB", 2**30),
        ("6.5 GB", 6_500_000_000),
        ("1KB", 1000),
        (" 3 kib", 3 * 1024),
    ],
)
def test_memory(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lots",
        "-8GB",
        "0",
        "8XB",
        "1.2.3GB",
        "nan",
        "inf",
        math.inf,
        "9" * 400,
        -1,
        "GB",
        "8 GB GB",
        "8,5GB",
        "1e9",
        "0.5",
        None,
    ],
)
def test_memory_that_is_not(text):
    with pytest.raises(RanksureError, match="memory"):
        parse_memory(text)


def test_shares():
    assert [parse_share(text) for text in ("10%", " 2.5 % ", ".5%", "100%")] == [0.1, 0.025, 0.005, 1.0]
    assert all(parse_share(text) is None for text in ("0%", "10", "-5%", "ten%", "%", ""))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (300, (300, math.inf)),
        ("300", (300, math.inf)),
        ("10min", (math.inf, 600)),
        (" 1.5 h", (math.inf, 5400)),
        ("90s", (math.inf, 90)),
    ],
)
def test_budget(text, expected):
    assert parse_effort(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "0", "0min", "-3", "1.5", "5 parsecs", "3 min 2", "inf", "1e3"])
def test_a_budget_that_is_not(text):
    with pytest.raises(RanksureError, match="budget"):
        parse_effort(text)
