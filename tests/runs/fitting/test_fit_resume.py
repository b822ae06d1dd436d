"""Kill -9 and resume: the same bits as without; other settings, damaged checkpoints, finished runs."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import (
    TrainerCallback,
)

from ranksure.errors import SettingError
from ranksure.runs.fitting.trainer import last_checkpoint
from tests.processes import run, script
from tests.runs.tiny_fits import ADAPTER, fitted, same

pytestmark = pytest.mark.usefixtures("quick_collections")


KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from ranksure.runs.fitting.fit import fit

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 17:
            os.kill(os.getpid(), signal.SIGKILL)

fit(data=sys.argv[1], plan=sys.argv[2], out=sys.argv[3], callbacks=[Kill()], max_steps=25, batch_size=7, save_steps=5,
    gradient_accumulation_steps=2, learning_rate=0.03, logging_steps=5, lora_dropout=0.1)
"""
SMALL = {
    "max_steps": 25,
    "batch_size": 7,
    "save_steps": 5,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.1,
}


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory):
    """The folder of a run that kill -9 ended at step 17 of 25 (dropout, shuffled batches, accumulation)."""
    out = tmp_path_factory.mktemp("killed") / "out"
    arguments = [str(tiny / "two.csv"), str(tiny / "plan2"), str(out)]
    ended = run(script(KILLED, *arguments))
    assert ended.returncode == -9, ended.stderr
    return out


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    return fitted(tiny, tmp_path_factory.mktemp("whole") / "out", **SMALL)


def test_killed_and_resumed_it_ends_with_the_same_bits(tiny, killed, uninterrupted, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(killed, out)
    assert not (out / "adapter").exists()
    assert last_checkpoint(out / "checkpoints" / "stage-0")[1]["global_step"] == 15
    resumed = fitted(tiny, out, **SMALL)
    assert resumed.data["resumed"] and not uninterrupted.data["resumed"]
    same(uninterrupted.folder, resumed.folder)
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "run.json"]


@pytest.mark.parametrize("damage", ["optimizer.pt", ADAPTER, "trainer_state.json", "rng_state.pth"])
def test_a_half_written_checkpoint_is_passed_over(killed, tmp_path, damage):
    folder = tmp_path / "stage-0"
    shutil.copytree(killed / "checkpoints" / "stage-0", folder)
    shutil.copytree(folder / "checkpoint-15", folder / "checkpoint-20")
    state = json.loads((folder / "checkpoint-20" / "trainer_state.json").read_text())
    (folder / "checkpoint-20" / "trainer_state.json").write_text(json.dumps({**state, "global_step": 20}))
    assert last_checkpoint(folder)[0].name == "checkpoint-20"
    content = (folder / "checkpoint-20" / damage).read_bytes()
    (folder / "checkpoint-20" / damage).write_bytes(content[: len(content) // 2])
    assert last_checkpoint(folder)[0].name == "checkpoint-15"
    assert not (folder / "checkpoint-20").exists()


def test_killed_after_training_only_the_end_is_done_again(tiny, killed, uninterrupted, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(killed, out)

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("ranksure.runs.fitting.fit.write_adapter", fails)
        fitted(tiny, out, **SMALL)
    assert not (out / "adapter").exists()
    begun = []

    class Seen(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)

    same(uninterrupted.folder, fitted(tiny, out, callbacks=[Seen()], **SMALL).folder)
    assert begun == []


def test_a_run_that_a_verdict_stopped_stays_stopped(tiny, tmp_path, monkeypatch):
    settings = {"max_steps": 20, "certify_every": 5, "stop": ["not-converged"], "save_steps": 15}
    whole = fitted(tiny, tmp_path / "whole", **settings)
    assert whole.data["steps"] == 5 and whole.certificate.verdict == "not-converged"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(
            "ranksure.runs.fitting.fit.write_adapter", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        fitted(tiny, tmp_path / "out", **settings)
    same(whole.folder, fitted(tiny, tmp_path / "out", **settings).folder)


def test_a_run_without_a_checkpoint_or_one_to_restart_is_no_obstacle(tiny, killed, tmp_path):
    with pytest.raises(SettingError, match="Trainer refuses"):
        fitted(tiny, tmp_path / "new", max_steps=5, lr_scheduler_type="up")
    assert not fitted(tiny, tmp_path / "new", max_steps=5).data["resumed"]
    out = tmp_path / "out"
    shutil.copytree(killed, out)
    with pytest.raises(SettingError, match="`restart`"):
        fitted(tiny, out, max_steps=5)
    again = fitted(tiny, out, max_steps=5, restart=True)
    assert again.data["steps"] == 5 and not again.data["resumed"]
    same(again.folder, tmp_path / "new" / "adapter")


def test_other_settings_do_not_go_on_with_a_run(tiny, killed, uninterrupted, done):
    with pytest.raises(SettingError, match="an unfinished run with another learning_rate"):
        fitted(tiny, killed, **{**SMALL, "learning_rate": 0.01})
    with pytest.raises(SettingError, match="a finished run with another seed"):
        fitted(tiny, uninterrupted.folder.parent, **SMALL, seed=1)
    before = (uninterrupted.folder / "fit.json").read_bytes()
    again = fitted(tiny, uninterrupted.folder.parent, **{**SMALL, "save_steps": 7})  # no part of the result
    assert again.model is None and again.certificate == uninterrupted.certificate
    assert (uninterrupted.folder / "fit.json").read_bytes() == before
