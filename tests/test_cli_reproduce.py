"""``ranksure reproduce``: the list, one experiment on a tiny setting, and mistakes in one line."""

from __future__ import annotations

import pytest

from ranksure.lab.settings import named as settings
from tests.commands import call
from tests.lab.tiny import tiny_setting
from tests.tiny_text import strict_json


def test_the_list(monkeypatch, capsys):
    assert call("reproduce", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    for name in ("linearised-curves", "network-curves", "accuracy", "solution-rank", "weight-decay", "rotten-tomatoes"):
        assert name in printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("linearized-curves",), "did you mean linearised-curves"),
        (("zzz",), "there is no experiment 'zzz'"),
        (("all", "accurracy"), "did you mean accuracy"),
        (("accuracy", "--on", "rotten"), "did you mean rotten-tomatoes"),
        (("accuracy", "--on", ","), "--on names no setting"),
        (("accuracy", "--full", "--small"), "exclude each other"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(monkeypatch, capsys, tmp_path, arguments, line):
    assert call("reproduce", *arguments, "--out", str(tmp_path / "out"), monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert line in error and "Traceback" not in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_one_experiment_and_again(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(settings, "SETTINGS", (tiny_setting(tmp_path),))
    out = tmp_path / "out"
    arguments = ("solution-rank", "--small", "--out", str(out), "--json")
    assert call("reproduce", *arguments, monkeypatch=monkeypatch) == 0
    captured = capsys.readouterr()
    record = strict_json(captured.out)
    assert record["name"] == "solution-rank" and record["parts"]["found"] == 0
    assert record["command"] == f"ranksure reproduce solution-rank --small --out {out}"
    assert "minutes" in captured.err and "verdict" in captured.err
    assert {path.name for path in out.iterdir()} == {
        *(f"solution-rank.{s}" for s in ("json", "csv", "png", "svg")),
        "parts",
        "report.html",
    }
    assert call("reproduce", *arguments, monkeypatch=monkeypatch) == 0
    assert strict_json(capsys.readouterr().out)["parts"]["made"] == 0


def test_a_setting_that_is_not_installed(monkeypatch, capsys, tmp_path):
    from ranksure.errors import ModelError

    def lost():
        raise ModelError("the model is not installed; run: pip install it")

    monkeypatch.setattr(settings, "SETTINGS", (tiny_setting(tmp_path, model=lost),))
    assert call("reproduce", "solution-rank", "--small", "--out", str(tmp_path / "out"), monkeypatch=monkeypatch) == 2
    printed = capsys.readouterr()
    assert "not installed; run: pip install it" in " ".join((printed.out + printed.err).split())
    assert "Traceback" not in printed.err


def test_ctrl_c_keeps_the_finished_parts(monkeypatch, capsys, tmp_path):
    from ranksure.lab.paper import solution_rank

    monkeypatch.setattr(settings, "SETTINGS", (tiny_setting(tmp_path),))
    monkeypatch.setattr(solution_rank, "finding", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert call("reproduce", "solution-rank", "--small", "--out", str(tmp_path / "out"), monkeypatch=monkeypatch) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list((tmp_path / "out" / "parts").glob("optimum-*.json"))
    assert not list((tmp_path / "out").glob("solution-rank.*"))
