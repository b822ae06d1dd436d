"""The frame: claims are found, measured, judged by their numbers, and written whole."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from importlib import import_module

import pytest

from ranksure.errors import SettingError
from ranksure.files import put_back
from ranksure.lab.claim import Check, Claim, Curve, Finding, Run, Table
from ranksure.lab.figures import panels
from ranksure.lab.run import PAPER, THEORY, Shelf, measure, write
from ranksure.lab.settings.named import AUTHORS, SETTINGS, setting_named
from ranksure.lab.settings.parts import Parts
from ranksure.lab.settings.run import SettingRun
from ranksure.records import LabRecord, plain
from tests.lab.tiny import tiny_setting
from tests.refusals import refusal
from tests.tiny_text import strict_json


def finding(*holds: bool, missing: tuple[str, ...] = (), table: Table | None = None) -> Finding:
    figure, axes = panels(1)
    axes[0, 0].plot([1, 2], [1, 2])
    return Finding(
        [Check("c", "m", hold) for hold in holds],
        figure,
        {"value": 1.5, "bound": float("inf")},
        table or Table(),
        [Curve("rank 4", [0, 1], [1.0, 0.5], "g")],
        {"g": 0.5},
        missing=missing,
    )


@pytest.mark.parametrize(
    ("holds", "missing", "verdict"),
    [
        ((True, True), (), 0),
        ((True, True), ("one setting is not installed",), 1),
        ((True, False), (), 1),
        ((False, False), (), 2),
    ],
)
def test_the_verdict_follows_the_checks(holds, missing, verdict):
    found = finding(*holds, missing=missing)
    assert found.verdict(THEORY.verdicts) == ("reproduced", "partly", "not-reproduced")[verdict]
    assert found.verdict(PAPER.verdicts) == ("agreed", "partly", "not agreed")[verdict]


def test_a_finding_without_checks_has_no_verdict():
    refusal(ValueError, "at least one check", finding().verdict, THEORY.verdicts)


def test_the_shelves():
    assert THEORY.names() == ["generalization", "low-rank-solution", "no-spurious-minima"]
    assert set(PAPER.names()) == {"linearised-curves", "network-curves", "accuracy", "solution-rank", "weight-decay"}
    minutes = [PAPER.load(name).minutes or (0, 0) for name in PAPER.names()]
    assert minutes == sorted(minutes) and all(0 < usual < full for usual, full in minutes)
    assert sum(usual for usual, _ in minutes) <= 30
    assert PAPER.minutes(["accuracy", "weight-decay"], Run()) == 12
    assert PAPER.minutes(["accuracy", "weight-decay"], Run(full=True)) == 150


@pytest.mark.parametrize(("shelf", "name"), [(s, name) for s in (THEORY, PAPER) for name in s.names()])
def test_the_words_of_a_claim_are_read_without_running_its_file(shelf, name):
    read = shelf.load(name)
    made = import_module(f"ranksure.lab.{shelf.folder}.{name.replace('-', '_')}").CLAIM
    assert isinstance(made, Claim) and read.title and read.claim and read.source
    assert {**vars(read), "measure": None} == {**vars(made), "measure": None}


def test_a_list_needs_neither_torch_nor_matplotlib():
    code = (
        "import sys\nfrom ranksure.lab.options import ReproduceOptions\nfrom ranksure.lab.run import PAPER, THEORY\n"
        "assert ReproduceOptions().settings() and all(s.load(n).title for s in (PAPER, THEORY) for n in s.names())\n"
        "print(*{'torch', 'matplotlib', 'transformers', 'pandas'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_unknown_names_come_with_near_ones():
    refusal(SettingError, "no lab entry 'generalisation': did you mean generalization", THEORY.load, "generalisation")
    refusal(SettingError, "there are ", THEORY.load, "zzz")
    refusal(SettingError, "no lab entry 'all'", THEORY.chosen, ["all"])
    assert PAPER.chosen(["all"]) == PAPER.names()
    assert PAPER.chosen(["accuracy", "accuracy"]) == ["accuracy"]
    refusal(SettingError, "did you mean linearised-curves", PAPER.chosen, ["linearized-curves"])
    refusal(SettingError, "there are accuracy, .*or all", PAPER.chosen, ["all", "zzz"])
    refusal(SettingError, "did you mean rotten-tomatoes", setting_named, "rotten-tomatos")
    assert setting_named("prompts").kind == "prompt"


def test_settings_are_told_apart_and_cover_the_paper():
    names = [setting.name for setting in (*SETTINGS, *AUTHORS)]
    assert len(set(names)) == len(names)
    assert {setting.kind for setting in SETTINGS} == {"text", "prompt", "image", "speech"}
    assert all(json.dumps(setting.to_json()) for setting in (*SETTINGS, *AUTHORS))


def test_record_and_files_of_a_result_of_the_theory(tmp_path, monkeypatch):
    claim = Claim("t", "it holds", "nobody 2026", lambda run: finding(True, run.size(False, True, True)))
    monkeypatch.setattr(Shelf, "load", lambda shelf, name: claim)
    found, written = measure(THEORY, "some-name", Run(small=True, seed=3))
    record = plain(written)
    assert record["verdict"] == "partly" and record["claim"] == "it holds" and record["seed"] == 3
    assert record["kind"] == "lab" and record["source"] == "nobody 2026" and record["size"] == "small"
    assert record["measured"] == {"summary": ["m", "m"], "value": 1.5, "bound": None}
    paths = write(tmp_path / "new", found, written)
    assert strict_json(paths[0].read_text()) == record
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["some-name.json", "some-name.png"]


def test_record_and_files_of_an_experiment(tmp_path, monkeypatch):
    table = Table.of([1, 4], {"a": lambda x: 1 / x if x > 1 else x, "b": lambda x: "x" if x > 1 else None})
    claim = Claim("t", "it holds", "Theorem 0", lambda run: finding(True, run.size(False, True, True), table=table))
    monkeypatch.setattr(Shelf, "load", lambda shelf, name: claim)
    run = SettingRun(parts=Parts(tmp_path / "parts"), small=True, seed=3, settings=[tiny_setting(tmp_path)])
    found, typed = measure(PAPER, "some-name", run, "ranksure reproduce some-name --small")
    record = plain(typed)
    assert record["verdict"] == "partly" and record["seed"] == 3 and record["kind"] == "reproduce"
    assert record["where"] == record["source"] == "Theorem 0" and record["numbers"] == {"value": 1.5, "bound": None}
    assert record["reference"] == {"label": "certified optimum", "value": None, "per_group": {"g": 0.5}}
    assert record["curves"] == [{"label": "rank 4", "x": [0, 1], "y": [1.0, 0.5], "group": "g"}]
    assert record["table"] == {"columns": ["a", "b"], "rows": [[1, None], [0.25, "x"]]}
    assert record["command"] == "ranksure reproduce some-name --small" and record["settings"]["size"] == "small"
    written = write(tmp_path / "new", found, typed)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in written)
    assert len(written) == 4
    assert strict_json((tmp_path / "new" / "some-name.json").read_text()) == record
    assert (tmp_path / "new" / "some-name.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "new" / "some-name.svg").read_bytes()
    with (tmp_path / "new" / "some-name.csv").open() as file:
        assert list(csv.reader(file)) == [["a", "b"], ["1", ""], ["0.25", "x"]]


def valued(seed: int) -> LabRecord:
    return LabRecord(name="x", title="t", claim="c", verdict="v", source="s", checks=[], seed=seed)


@pytest.mark.parametrize("kill", range(1, 9))
def test_the_files_of_a_claim_are_of_one_measurement_wherever_it_stops(tmp_path, monkeypatch, kill):
    """Renames are what makes files be there: after each of them nothing more happens."""
    table = Table(["a"], [[1]])
    older = write(tmp_path / "out", finding(True, table=table), valued(1))
    before = {path: path.read_bytes() for path in older}
    done = []

    def stops(rename):
        def renames(*places):
            if len(done) == kill - 1:
                raise KeyboardInterrupt
            done.append(rename(*places))

        return renames

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stops(os.replace))
        patch.setattr("os.rename", stops(os.rename))
        try:
            write(tmp_path / "out", finding(False, table=Table(["b"], [[2]])), valued(2))
        except KeyboardInterrupt:
            assert not older[0].exists() or {path: path.read_bytes() for path in older} == before
    put_back(tmp_path / "out")
    after = {path: path.read_bytes() for path in older}
    whole = json.loads(after[older[0]])["seed"]
    assert (after == before) if whole == 1 else b"b" in after[tmp_path / "out" / "x.csv"]
    assert whole == (1 if kill <= 5 else 2)
    assert sorted((tmp_path / "out").iterdir()) == sorted(older)


def test_a_record_that_cannot_be_written_leaves_nothing_half_written(tmp_path):
    record = LabRecord(name="x", title="t", claim="c", verdict="v", source="s", checks=[])
    (tmp_path / "file").write_text("")
    refusal(SettingError, "cannot be written", write, tmp_path / "file", finding(True), record)
    (tmp_path / "out" / "x.json").mkdir(parents=True)
    refusal(SettingError, "cannot be written", write, tmp_path / "out", finding(True), record)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.json"]
