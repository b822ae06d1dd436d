"""``ranksure lab``: the list, a claim that is measured, and mistakes in one line."""

from __future__ import annotations

from ranksure.lab.claim import Check, Claim, Finding, Run
from ranksure.lab.figures import panels
from ranksure.lab.run import Shelf
from tests.commands import call
from tests.tiny_text import strict_json


def test_the_list(monkeypatch, capsys):
    assert call("lab", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("generalization", "low-rank-solution", "no-spurious-minima"))


def test_a_mistake_is_one_line_and_writes_nothing(monkeypatch, capsys, tmp_path):
    assert call("lab", "generalisation", "--out", str(tmp_path / "out"), monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert "did you mean generalization" in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_claim_is_measured_and_written(monkeypatch, capsys, tmp_path):
    def measured(run: Run) -> Finding:
        figure, axes = panels(1)
        axes[0, 0].plot([1, 2], [1, 2])
        return Finding([Check("it is so", f"seed {run.seed}", True)], figure, {"full": run.full})

    monkeypatch.setattr(Shelf, "load", lambda shelf, name: Claim("Some claim", "It is so.", "Nobody 2026", measured))
    out = tmp_path / "out"
    assert call("lab", "some-claim", "--full", "--seed", "3", "--out", str(out), "--json", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr()
    record = strict_json(printed.out)
    assert record == strict_json((out / "some-claim.json").read_text())
    assert record["verdict"] == "reproduced" and record["size"] == "full" and record["seed"] == 3
    assert record["measured"] == {"summary": ["seed 3"], "full": True}
    assert record["command"] == f"ranksure lab some-claim --full --seed 3 --out {out}"
    assert "agrees" in printed.err and "reproduced" in printed.err
    assert {path.name for path in out.iterdir()} == {"some-claim.json", "some-claim.png", "report.html"}
