"""Signals from outside: Ctrl-C says what is left, and a grown fit that kill -9 ended goes on to the same bits."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

import ranksure
from ranksure.runs.fitting.fit import fit
from tests.commands import call
from tests.processes import ended_at, run, script
from tests.runs.tiny_fits import QUICK, same

pytestmark = pytest.mark.usefixtures("quick_collections")

SETTINGS = {**QUICK, "rank": 1, "max_steps": 100, "grow": True, "grow_stages": 1, "save_steps": 10}


def arguments(tiny: Path, out: Path) -> list[str]:
    """SETTINGS as the command line has them."""
    options = [
        part
        for key, value in SETTINGS.items()
        for part in [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    ]
    return ["fit", "--plan", str(tiny / "plan3"), "--data", str(tiny / "three.csv"), *options, "--out", str(out)]


# The command line, with a fit that waits at its first checkpoint of a stage: it cannot end before its signal comes.
HELD = """
import sys
import ranksure.runs.fitting.fit as module
from ranksure.cli import main
from transformers import TrainerCallback

fit, stage = module.fit, sys.argv.pop(1)

class Hold(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if args.output_dir.endswith(stage):
            print("saved", flush=True)
            sys.stdin.read()

module.fit = lambda *args, **settings: fit(*args, **settings, callbacks=[Hold()])
main()
"""


def ended_by(number: signal.Signals, tiny: Path, out: Path, stage: str) -> tuple[int, str]:
    """Run the command to the first checkpoint of a stage, send it a signal, and give its exit status and errors."""
    status, _, errors = ended_at("saved", number, script(HELD, stage, *arguments(tiny, out)))
    return status, errors


@pytest.fixture(scope="module")
def interrupted(tiny, tmp_path_factory):
    """The folder of a fit that Ctrl-C ended in its first stage, and what it said."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    status, errors = ended_by(signal.SIGINT, tiny, out, "stage-0")
    return out, status, errors


def test_ctrl_c_says_that_the_checkpoints_stay(interrupted):
    out, status, errors = interrupted
    assert status == 130 and "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last == (f"interrupted; the checkpoints in {out} stay, and the same command goes on from the last whole one")
    assert (out / "run.json").is_file() and not (out / "adapter").exists()
    assert list(out.glob("checkpoints/stage-0/checkpoint-*"))


@pytest.mark.slow
def test_after_ctrl_c_and_kill_9_a_grown_fit_ends_with_the_same_bits(tiny, interrupted, tmp_path):
    """Ctrl-C in the first stage, SIGKILL in the second (after growing), then to the end."""
    out = tmp_path / "out"
    shutil.copytree(interrupted[0], out)
    status, errors = ended_by(signal.SIGKILL, tiny, out, "stage-1")
    assert status == -signal.SIGKILL, errors
    assert (out / "stage-1.safetensors").is_file() and not (out / "adapter").exists()
    resumed = fit(plan=tiny / "plan3", data=str(tiny / "three.csv"), out=out, **SETTINGS)
    whole = fit(plan=tiny / "plan3", data=str(tiny / "three.csv"), out=tmp_path / "whole", **SETTINGS)
    assert resumed.data["resumed"] and not whole.data["resumed"]
    assert len(whole.data["stages"]) == 1 and sum(whole.data["ranks"].values()) > 1
    same(whole.folder, resumed.folder)


@pytest.mark.parametrize(
    ("holds", "more", "said"),
    [
        ([], [], "there was no checkpoint yet: the same command starts from the beginning"),
        (
            ["checkpoints/stage-0/checkpoint-5"],
            ["--restart"],
            "the checkpoints in {out} stay, and the same command without --restart goes on from the last whole one",
        ),
        (
            ["stage-1.safetensors"],
            [],
            "the checkpoints in {out} stay, and the same command goes on from the last whole one",
        ),
        (["adapter"], [], "the finished adapter in {out}/adapter is whole"),
    ],
)
def test_what_ctrl_c_says_of_what_is_there(tmp_path, monkeypatch, capfd, holds, more, said):
    out = tmp_path / "out"

    def halfway(*args, **kwargs):
        for name in holds:
            (out / name).mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("ranksure.fit", halfway)
    assert call("fit", "--plan", "plan", "--out", str(out), *more, monkeypatch=monkeypatch) == 130
    assert capfd.readouterr().err.splitlines()[-1] == f"interrupted; {said.format(out=out)}"


def test_other_commands_do_not_say_what_a_fit_before_them_left(tmp_path, monkeypatch, capfd):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ranksure.fit", interrupt)
    assert call("fit", "--plan", "plan", "--out", str(tmp_path / "out"), monkeypatch=monkeypatch) == 130
    monkeypatch.setattr("ranksure.planner.prepare.prepare", interrupt)
    monkeypatch.setattr("ranksure.planner.run.plan", interrupt)
    assert (
        call("plan", "--model", "m", "--data", "d.csv", "--out", str(tmp_path / "plan"), monkeypatch=monkeypatch) == 130
    )
    assert capfd.readouterr().err.splitlines()[-1] == "interrupted; no half-written output is left"


def test_the_commands_after_training_are_public():
    """Loaded on first use, and the same objects as where they are defined."""
    code = "import sys, ranksure; print('torch' in sys.modules, *(name in dir(ranksure) for name in sys.argv[1:]))"
    names = ["grow", "compress", "reduce_rank"]
    ran = run(script(code, *names))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["False", "True", "True", "True"]
    from ranksure.runs.resizing.compress import compress
    from ranksure.runs.resizing.grow import grow
    from ranksure.theory.rank_reduction import reduce_rank

    assert (ranksure.grow, ranksure.compress, ranksure.reduce_rank) == (grow, compress, reduce_rank)
