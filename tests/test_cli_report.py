"""``ranksure report``, and the page that other commands write beside their results."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Any

import pytest

from ranksure.errors import DataError, SettingError
from ranksure.report.page import write_report
from tests.commands import call
from tests.refusals import refusal
from tests.report import records
from tests.tiny_text import save_bert, save_csv

SMALL = ["--target-modules", "query,value", "--layers-to-transform", "last", "--samples", "16", "--weight-decay", "10%"]
SMALL += ["--linearised", "--ranks", "1", "--random-starts", "0", "--heldout", "12"]


def test_report_writes_the_page_into_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records.write(tmp_path, "plan.json", records.plan())
    shown: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: shown.append(address) or True)
    assert call("report", tmp_path, "--open", monkeypatch=monkeypatch) == 0
    page = tmp_path / "report.html"
    assert shown == [page.as_uri()]
    assert str(page) in capsys.readouterr().out.replace("\n", "")
    assert page.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "report.html"]
    assert call("report", tmp_path, monkeypatch=monkeypatch) == 0  # an earlier one is replaced
    assert len(shown) == 1


def test_open_without_a_browser_says_where_the_page_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records.write(tmp_path, "plan.json", records.plan())
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    assert call("report", tmp_path, "--open", monkeypatch=monkeypatch) == 0
    assert "no browser could be opened" in capsys.readouterr().out


def test_report_to_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records.write(tmp_path / "in", "plan.json", records.plan())
    assert call("report", tmp_path / "in", "--out", tmp_path / "new" / "page.html", monkeypatch=monkeypatch) == 0
    assert (tmp_path / "new" / "page.html").is_file()
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["plan.json"]


def _nothing(folder: Path) -> None:
    folder.mkdir()


def _damaged(folder: Path) -> None:
    folder.mkdir()
    (folder / "plan.json").write_text('{"schema": 1, ')


def _unknown(folder: Path) -> None:
    records.write(folder, "plan.json", records.plan() | {"schema": 99})


def _foreign(folder: Path) -> None:
    records.write(folder, "plan.json", records.plan())
    (folder / "report.html").write_text("<h1>mine</h1>")


def _folder_in_the_way(folder: Path) -> None:
    records.write(folder, "plan.json", records.plan())
    (folder / "report.html").mkdir()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "does not exist"),
        (_nothing, "holds no result"),
        (_damaged, "is damaged, no JSON"),
        (_unknown, "has schema 99; this version of ranksure reads schema 3"),
        (_foreign, "exists and is no report of ranksure"),
        (_folder_in_the_way, "is a folder"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make: Any, says: str
) -> None:
    folder = tmp_path / "here"
    make(folder)
    before = sorted((p.name, p.read_bytes() if p.is_file() else b"") for p in tmp_path.rglob("*"))
    assert call("report", folder, monkeypatch=monkeypatch) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    assert says in printed.err and str(folder) in printed.err
    assert sorted((p.name, p.read_bytes() if p.is_file() else b"") for p in tmp_path.rglob("*")) == before


def test_a_failure_while_writing_leaves_the_earlier_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records.write(tmp_path, "plan.json", records.plan())
    before = write_report(tmp_path).read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    refusal(SettingError, "cannot be written: No space left", write_report, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "report.html"]


def test_plan_fit_and_certify_write_a_page_and_take_their_folders_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_bert(tmp_path / "bert")
    data = save_csv(tmp_path / "data.csv", 60)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second replaces the first, page and all
        assert call("plan", "--model", "bert", "--data", data, *SMALL, "--out", "plan", monkeypatch=monkeypatch) == 0
    page = (tmp_path / "plan" / "report.html").read_text()
    assert (
        "is enough" in page
        and "lora_config = LoraConfig(" in page
        and "ranksure plan --model bert" in page
        and "bert.encoder" in page
    )
    assert "to look at: plan/report.html" in capsys.readouterr().out

    fit = ["fit", "--plan", "plan", "--data", data, "--max-steps", "4", "--logging-steps", "1", "--out", "fit"]
    for _ in range(2):  # the second only shows the first
        assert call(*fit, monkeypatch=monkeypatch) == 0
    page = (tmp_path / "fit" / "report.html").read_text()
    assert "How did training go, against the certified optimum?" in page and "ranksure fit --plan plan" in page

    assert call("certify", "fit/adapter", "--data", data, "--out", "again", monkeypatch=monkeypatch) == 0
    page = (tmp_path / "again" / "report.html").read_text()
    assert "What could still be gained?" in page and "ranksure certify fit/adapter" in page

    assert call("report", ".", "--out", "all.html", monkeypatch=monkeypatch) == 0
    assert (tmp_path / "all.html").read_text().count('<section class="result"') == 3


def test_a_page_that_cannot_be_written_does_not_fail_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from ranksure.cli.report import report_beside

    records.write(tmp_path, "plan.json", records.plan())
    (tmp_path / "report.html").write_text("mine")
    report_beside(tmp_path, Console(width=400))
    assert "no report was written" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text() == "mine"


def test_a_record_whose_values_do_not_belong_together(tmp_path):
    content = records.plan() | {"target_modules": [], "shapes": {}}
    records.write(tmp_path, "plan.json", content)
    with pytest.raises(DataError, match=r"plan\.json cannot be shown, as its values do not belong together"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
