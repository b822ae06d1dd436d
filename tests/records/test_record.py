"""Every record is written, checked and read through one type, and its published JSON Schema is that type's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator

from ranksure.errors import DataError
from ranksure.records import KINDS, Plan, encoded, plain, read
from scripts.docs.records import schemas
from tests.refusals import refusal
from tests.report import records

WRITTEN = {kind: getattr(records, kind)() for kind in KINDS}
SCHEMAS = {name.partition(".")[0]: json.loads(content) for name, content in schemas()}


def saved(folder: Path, content: Any) -> Path:
    path = folder / "record.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_and_written_again_is_the_same(kind: str, tmp_path: Path) -> None:
    record = read(saved(tmp_path, WRITTEN[kind]), KINDS[kind])
    again = saved(tmp_path, json.loads(encoded(record)))
    assert read(again, KINDS[kind]) == record
    kept = plain(record)
    for key, value in WRITTEN[kind].items():
        if key in kept and not isinstance(value, (dict, list)):
            assert kept[key] == value, key


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_schema_takes_what_the_type_takes(kind: str, tmp_path: Path) -> None:
    validator = Draft202012Validator(SCHEMAS[kind])
    validator.validate(WRITTEN[kind])
    refused = 0
    for key in WRITTEN[kind]:
        content = {name: value for name, value in WRITTEN[kind].items() if name != key}
        try:
            read(saved(tmp_path, content), KINDS[kind])
        except DataError:
            refused += 1
            assert key == "schema" or not validator.is_valid(content), key
        else:
            assert validator.is_valid(content), key
    assert refused > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schema", [0, 4, "1", None, True, 1.5])
def test_another_schema_is_refused_with_both_numbers(kind: str, schema: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, {**WRITTEN[kind], "schema": schema})
    own = KINDS[kind].SCHEMA
    with pytest.raises(DataError, match=f"reads schema {own}") as caught:
        read(path, KINDS[kind])
    assert str(path) in str(caught.value) and ("no schema" if schema is None else repr(schema)) in str(caught.value)


@pytest.mark.parametrize(("name", "taken"), [("cross-entropy", True), ("logistic", False), ("squared-error", False)])
@pytest.mark.parametrize("kind", ["plan", "fit", "certificate", "grow"])
def test_schema_1_is_read_where_its_numbers_mean_the_same(kind: str, name: str, taken: bool, tmp_path: Path) -> None:
    """Squared error and logistic loss were on another scale then."""
    content = {**WRITTEN[kind], "schema": 1}
    if kind == "grow":
        content["certificate"] = {**content["certificate"], "loss_kind": name}
    else:
        content["loss_kind" if kind == "certificate" else "loss"] = name
    path, own = saved(tmp_path, content), KINDS[kind].SCHEMA
    if taken:
        assert read(path, KINDS[kind]).schema == own
    else:
        refusal(DataError, f"has schema 1; this version of ranksure reads schema {own}", read, path, KINDS[kind])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optimum": {"objective": 1}}, "optimum.dual is missing"),
        ({"weight_decay": 0}, "weight_decay: expected `float` > 0"),
        ({"weight_decay": "0.1"}, "weight_decay: expected `float`, got `str`"),
        ({"shapes": {"q": [4]}}, "shapes[...]: expected `array` of length 2"),
        ({"data": []}, "data: expected `object`, got `array`"),
    ],
)
def test_a_fault_names_its_place(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(saved(tmp_path, {**WRITTEN["plan"], **change}), Plan)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def with_null(content: Any) -> Any:
    """A record as it is written where none of its numbers is finite."""
    if isinstance(content, dict):
        return {key: value if key in BOUNDED else with_null(value) for key, value in content.items()}
    if isinstance(content, list):
        return [with_null(value) for value in content]
    return None if isinstance(content, float) else content


BOUNDED = ("weight_decay",)  # positive: what is not finite is refused before any work


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_without_a_finite_number_is_read_and_keeps_to_its_schema(kind: str, tmp_path: Path) -> None:
    content = with_null(WRITTEN[kind])
    assert content != WRITTEN[kind]
    assert type(read(saved(tmp_path, content), KINDS[kind])) is KINDS[kind]
    Draft202012Validator(SCHEMAS[kind]).validate(content)


def test_what_is_not_finite_is_null_and_can_be_read_again(tmp_path: Path) -> None:
    record = msgspec.convert(WRITTEN["plan"], Plan)
    record.heldout = msgspec.structs.replace(
        record.heldout, loss_without_adapter=1.0, accuracy_without_adapter=math.inf
    )
    record.settings = {"a": [math.nan, -math.inf, 1e300]}
    record.optimum = msgspec.structs.replace(record.optimum, dual=-math.inf)
    record.ranks = [msgspec.structs.replace(row, captured=(math.nan, 1.0)) for row in record.ranks]
    path = tmp_path / "plan.json"
    path.write_bytes(encoded(record))
    again = read(path, Plan)
    assert again.heldout is not None and again.heldout.accuracy_without_adapter is None
    assert again.settings == {"a": [None, None, 1e300]}
    assert math.isnan(again.optimum.dual) and math.isnan(again.ranks[0].captured[0])
    assert again.ranks[0].captured[1] == 1.0


def test_scalars_of_numpy_and_torch_are_numbers() -> None:
    record = msgspec.convert(WRITTEN["plan"], Plan)
    scalars = [np.float64(0.1), np.float32(0.5), np.int64(3), np.bool_(True), np.float64("nan"), torch.tensor(2.5)]
    record.settings = {"a": scalars, "b": {"c": np.float32(0.25)}}
    record.notes = [np.str_("one")]
    again = json.loads(encoded(record))
    assert again["settings"] == {"a": [0.1, 0.5, 3, True, None, 2.5], "b": {"c": 0.25}} == plain(record)["settings"]
    assert again["notes"] == ["one"]
    record.settings = {"a": object()}
    with pytest.raises(NotImplementedError, match="a record cannot hold a object"):
        encoded(record)
