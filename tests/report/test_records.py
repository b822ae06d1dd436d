"""Which results a folder holds, and what is said of one that cannot be read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from ranksure.errors import DataError, RanksureError, SettingError
from ranksure.report.page import _builder, write_report
from ranksure.report.records import find
from tests.refusals import refusal
from tests.report import records


def test_every_kind_is_found_once(tmp_path: Path) -> None:
    found = find(records.write_all(tmp_path))
    assert sorted((record.kind, record.where) for record in found.records) == [
        ("certificate", "certify"),
        ("compress", "smaller"),
        ("fit", "fit/adapter"),
        ("grow", "grown"),
        ("lab", "lab"),
        ("plan", "linearised"),
        ("plan", "plan"),
        ("reproduce", "reproduce"),
    ]


@pytest.mark.parametrize(("command", "said"), [("ranksure plan", "give --weight-decay"), (None, "give `weight_decay`")])
def test_the_page_of_a_command_names_options(tmp_path: Path, command: str | None, said: str) -> None:
    text = "a weaker decay may be better; give `weight_decay` a smaller number to see."
    plan = {**records.plan(), "command": command, "warnings": [text]}
    records.write(tmp_path, "plan.json", plan)
    page = write_report(tmp_path).read_text()
    assert said in page and (text in page) == (command is None)


def test_files_of_others_are_not_looked_into(tmp_path: Path) -> None:
    records.write(tmp_path, "certificate.json", records.certificate())
    (tmp_path / "tokenizer.json").write_text("{ not json")
    records.write(tmp_path / "base", "config.json", {"model_type": "bert"})
    (tmp_path / "base" / "other.json").write_text("{ not json")
    records.write(tmp_path / "checkpoints" / "stage-0", "plan.json", {"schema": 99})
    records.write(tmp_path / "parts", "trained-1.json", {"schema": 99, "kind": "reproduce"})
    records.write(tmp_path / "more", "bench.json", {"schema": 1, "rows": []})
    found = find(tmp_path)
    assert [record.kind for record in found.records] == ["certificate"]
    assert found.skipped == ["more/bench.json"]


def without(record: dict[str, Any], *path: str) -> dict[str, Any]:
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return record


def replaced(record: dict[str, Any], value: Any, *path: Any) -> dict[str, Any]:
    inner: Any = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return record


@pytest.mark.parametrize(
    ("name", "record", "says"),
    [
        ("plan.json", replaced(records.plan(), "two", "ranks", 1, "rank"), "ranks[1].rank: expected `int`, got `str`"),
        (
            "plan.json",
            replaced(records.plan(), [0.1], "ranks", 0, "captured"),
            "ranks[0].captured: expected `array` of length 2",
        ),
        ("plan.json", replaced(records.plan(), math.nan, "lambda_max"), "is damaged, no JSON"),
        ("plan.json", replaced(records.plan(), [], "optimum"), "optimum: expected `object`, got `array`"),
        ("certificate.json", replaced(records.certificate(), "x", "modules"), "modules: expected `object`, got `str`"),
        ("fit.json", without(records.fit(), "final"), "final is missing"),
        ("grow.json", without(records.grow(), "certificate", "verdict"), "certificate.verdict is missing"),
        ("compress.json", replaced(records.compress(), -1, "ranks_after", records.NAMES[0]), "expected `int` >= 0"),
        ("x.json", replaced(records.lab(), "yes", "checks", 0, "holds"), "checks[0].holds: expected `bool`, got `str`"),
        (
            "x.json",
            replaced(records.reproduce(), ["one"], "curves", 2, "x"),
            "curves[2].x[0]: expected `float`",
        ),
        ("x.json", replaced(records.reproduce(), 3, "schema"), "has schema 3"),
    ],
)
def test_a_damaged_record_is_one_line_that_names_the_place(
    tmp_path: Path, name: str, record: dict[str, Any], says: str
) -> None:
    records.write(tmp_path, name, record)
    with pytest.raises(DataError) as caught:
        write_report(tmp_path)
    line = str(caught.value)
    assert says in line and str(tmp_path / name) in line and "\n" not in line
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["plan.json", "no-spurious-minima.json"])
@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00", b'{"a": 1} trailing', b"[" * 100_000])
def test_what_is_no_json_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    refusal(DataError, "is damaged, no JSON", find, tmp_path)


def test_a_fit_needs_its_certificate(tmp_path: Path) -> None:
    records.write(tmp_path, "fit.json", records.fit())
    refusal(DataError, "certificate.json cannot be read", write_report, tmp_path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.write_text("x"), "is a file"),
        (lambda folder: folder.mkdir(), "holds no result"),
        (lambda folder: records.write(folder, "bench.json", {"rows": 1}), "holds no result (bench.json is no result"),
    ],
)
def test_a_folder_without_a_result(tmp_path: Path, make: Any, says: str) -> None:
    make(tmp_path / "here")
    refusal(SettingError, says, write_report, tmp_path / "here")


def test_too_many_results_for_one_page(tmp_path: Path) -> None:
    for number in range(61):
        records.write(tmp_path, f"claim-{number}.json", records.lab(f"claim-{number}"))
    refusal(SettingError, "61 results, more than the 60", find, tmp_path)


def test_every_optional_part_may_be_missing_or_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that passes the check never fails later: every key is removed, or null, in turn."""
    monkeypatch.setattr("ranksure.report.svg._cleaned", lambda source, name: "")
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **settings: None)  # drawn, but not written: for speed
    whole = {
        "plan.json": records.plan(["a.0.q", "a.1.q"]),
        "network/plan.json": records.network_plan(["a.0.q", "a.1.q"]),
        "certificate.json": records.certificate(["a.0.q", "a.1.q"]),
        "compress.json": records.compress(),
        "claim.json": records.lab(),
        "curves.json": records.reproduce(),
    }
    tried = {"missing": 0, "null": 0}
    for name, record in whole.items():
        for key in record:
            for change in ("missing", "null"):
                changed = {k: v for k, v in record.items() if k != key} | ({key: None} if change == "null" else {})
                folder = tmp_path / name.removesuffix(".json")
                records.write(folder, Path(name).name, changed)
                try:
                    find(folder)
                except RanksureError:
                    continue
                for one in find(folder).records:
                    _builder(one.kind)(one, "s1", None, True)
                tried[change] += 1
    assert tried["missing"] > 40 and tried["null"] > 15, tried


@pytest.mark.parametrize("where", ["network", "network.optimum", "network.heldout"])
def test_every_optional_part_of_the_networks_answer_may_be_missing_or_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr("ranksure.report.svg._cleaned", lambda source, name: "")
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **settings: None)
    tried = 0
    for change in ("missing", "null", "empty"):
        whole = records.network_plan(["a.0.q", "a.1.q"])
        for key, value in dict(_inner(whole, where)).items():
            record = records.network_plan(["a.0.q", "a.1.q"])
            inner = _inner(record, where)
            del inner[key]
            if change != "missing":
                inner[key] = [] if change == "empty" and isinstance(value, list) else None
            records.write(tmp_path, "plan.json", record)
            try:
                (found,) = find(tmp_path).records
            except RanksureError:
                continue
            section = _builder("plan")(found, "s1", None, True)
            assert section.answer.startswith("Rank 2 is enough in both targets")
            tried += 1
    assert tried >= 4


def _inner(record: dict[str, Any], where: str) -> dict[str, Any]:
    for key in where.split("."):
        record = record[key]
    return record


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    text = json.dumps(records.plan())
    records.write(tmp_path, "plan.json", records.plan())
    write_report(tmp_path)
    assert (tmp_path / "plan.json").read_text() == text
