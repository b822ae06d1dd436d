"""The lab's frame: entries are found, run, judged and written whole."""

from __future__ import annotations

import json

import pytest

from ranksure.errors import SettingError
from ranksure.lab import run as lab
from ranksure.lab.entry import Check, Entry, Finding, Run
from ranksure.lab.figures import panels


def finding(*holds: bool) -> Finding:
    figure, axes = panels(1)
    axes[0, 0].plot([1, 2], [1, 2])
    return Finding([Check("c", "m", hold) for hold in holds], figure, {"value": 1.5})


@pytest.mark.parametrize(
    ("holds", "verdict"),
    [((True, True), "reproduced"), ((True, False), "partly"), ((False, False), "not-reproduced")],
)
def test_the_verdict_follows_the_checks(holds, verdict):
    assert finding(*holds).verdict == verdict


def test_a_finding_without_checks_has_no_verdict():
    with pytest.raises(ValueError, match="at least one check"):
        finding().verdict  # noqa: B018


def test_every_entry_has_what_the_list_shows():
    assert lab.names()
    for name in lab.names():
        entry = lab.load(name)
        assert isinstance(entry, Entry)
        assert entry.title and entry.claim and entry.source


def test_unknown_entry_names_near_ones():
    with pytest.raises(SettingError, match="did you mean generalization"):
        lab.load("generalisation")
    with pytest.raises(SettingError, match="there are "):
        lab.load("zzz")


def test_record_and_files(tmp_path, monkeypatch):
    entry = Entry("t", "it holds", "nobody 2026", lambda run: finding(True, run.size(False, True, True)))
    monkeypatch.setattr(lab, "load", lambda name: entry)
    found, record = lab.measure("some-name", Run(small=True, seed=3))
    assert record["verdict"] == "partly" and record["claim"] == "it holds" and record["seed"] == 3
    assert record["measured"]["value"] == 1.5
    paths = lab.write(tmp_path / "new", found, record)
    assert json.loads(paths[0].read_text()) == record
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["some-name.json", "some-name.png"]


def test_a_figure_that_cannot_be_written_leaves_nothing_half_written(tmp_path):
    _, record = finding(True), {"name": "x", "value": 1}
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="cannot be written"):
        lab.write(tmp_path / "file", finding(True), record)
    (tmp_path / "out" / "x.json").mkdir(parents=True)
    with pytest.raises(SettingError, match="cannot be written"):
        lab.write(tmp_path / "out", finding(True), record)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.json"]
