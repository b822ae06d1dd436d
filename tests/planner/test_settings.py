import math
from typing import Any

import pytest

from ranksure.errors import RanksureError
from ranksure.planner.settings import PlanSettings, parse_ranks
from ranksure.tasks.options import parse_target_modules
from tests.refusals import refusal


def test_ranks():
    assert parse_ranks("4, 1,2,,2") == [1, 2, 4]
    for text in ("1,two", "1.5", "1;2"):
        with pytest.raises(RanksureError, match="whole numbers"):
            parse_ranks(text)


def test_target_modules():
    assert parse_target_modules(None) is None
    assert parse_target_modules("all-linear") == "all-linear"
    assert parse_target_modules("query, value,") == ["query", "value"]
    assert parse_target_modules("layer.1.query") == ["layer.1.query"]
    assert parse_target_modules(r".*\.(query|value)") == r".*\.(query|value)"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"weight_decay": 0}, "no minimiser"),
    ({"weight_decay": 0.0}, "dual is trivial"),
    ({"weight_decay": -0.0}, "refused"),
    ({"weight_decay": -1e-3}, "positive"),
    ({"weight_decay": math.nan}, "positive"),
    ({"weight_decay": math.inf}, "positive"),
    ({"weight_decay": "large"}, "neither auto"),
    ({"weight_decay": "0%"}, "neither auto"),
    ({"weight_decay": "-5%"}, "neither auto"),
    ({"samples": 3}, "at least 4"),
    ({"heldout": -1}, "at least 0"),
    ({"seed": -1}, "out of range"),
    ({"seed": 2**32}, "out of range"),
    ({"batch_size": 0}, "at least 1"),
    ({"captured": 0}, "between 0 and 1"),
    ({"captured": 1}, "between 0 and 1"),
    ({"captured": math.nan}, "between 0 and 1"),
    ({"linear_tolerance": 0.1}, "linear_tolerance"),
    ({"tolerance": 0.9}, "tolerance"),
    ({"tolerance": math.nan}, "tolerance"),
    ({"uniform": True, "merged": True}, "exclude"),
    ({"merged": True, "pooling": "mean"}, "`pooling` model"),
    ({"ranks": []}, "ranks"),
    ({"ranks": [0, 1]}, "at least 1"),
    ({"random_starts": -1}, "at least 0"),
    ({"loss": "hinge"}, "cross-entropy"),
    ({"layers_to_transform": "5-2"}, "backwards"),
    ({"layers_to_transform": "first"}, "not understood"),
    ({"memory": "much"}, "memory"),
    ({"memory": "9" * 400}, "memory"),
]


@pytest.mark.parametrize(
    ("options", "part"), BAD, ids=[f"{k}={str(v)[:9]}" for d, _ in BAD for k, v in [*d.items()][:1]]
)
def test_refused_in_one_line(options, part):
    refusal(RanksureError, [part], PlanSettings, **options)


def test_defaults_and_edges_are_accepted():
    assert PlanSettings().memory_bytes == 8 * 10**9
    PlanSettings(weight_decay=1e-300, samples=4, heldout=0, seed=2**32 - 1, captured=0.999999, random_starts=0)
    PlanSettings(weight_decay="10%", ranks=[1], memory="1MiB", layers_to_transform="0-1")
