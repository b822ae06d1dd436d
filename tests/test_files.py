"""Results on disk under kills at every step, two writers, and a disk that takes no more."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ranksure.errors import AdapterError, SettingError
from ranksure.files import put_back, staged_folder, write_together, writing
from tests.commands import call
from tests.processes import run, script

# A process that kills itself just before the n-th thing that it does to files below the folder given.
KILLED = """
import os, signal, sys
from pathlib import Path
from ranksure.files import staged_folder, write_together, writing
import filelock

left, place = int(sys.argv[1]), sys.argv[2]

def before(event, arguments):
    global left
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        if str(arguments[0]).startswith(place):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(before)
out = Path(place, "out")
if sys.argv[3] == "folder":
    with staged_folder(out, "b") as stage:
        (stage / "a").write_text("new")
        (stage / "b").write_text("new")
else:
    with writing(out):
        write_together(out, {"a": b"new", "b": b"new"})
"""


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("kind", ["folder", "files"])
def test_killed_at_every_step_one_of_the_two_results_is_there_whole(tmp_path: Path, kind: str, older: bool) -> None:
    found = []
    for step in range(1, 60):
        place = tmp_path / str(step)
        out = place / "out"
        (out if older else place).mkdir(parents=True)
        if older:
            (out / "a").write_text("old")
            (out / "b").write_text("old")
        status = run(script(KILLED, str(step), str(place), kind)).returncode
        if out.is_dir() and (out / "b").exists():  # what marks a result is never beside another's files
            assert {name: text for name, text in contents(out).items() if name in "ab"} in (
                {"a": "old", "b": "old"},
                {"a": "new", "b": "new"},
            ), step
        put_back(out)  # as whoever reads next
        if out.exists() and (out / "b").exists():
            found.append((out / "b").read_text())
            assert contents(out)["a"] == found[-1], step
        else:
            assert not older, step
        with writing(out):
            pass
        assert [path.name for path in place.iterdir()] == (["out"] if out.exists() else []), step
        assert {path.name for path in out.glob("*")} <= {"a", "b"}, step
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert step > 5 and status == 0 and found[-1] == "new" and (not older or found[0] == "old")


def test_a_kill_leaves_no_lock(tmp_path: Path) -> None:
    holds = "import os, signal, sys\nfrom ranksure.files import writing\n"
    holds += "with writing(sys.argv[1]):\n    os.kill(os.getpid(), signal.SIGKILL)"
    assert run(script(holds, str(tmp_path / "out"))).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    with writing(tmp_path / "out"), writing(tmp_path / "out"):
        asks = "import sys\nfrom ranksure.files import writing\nwith writing(sys.argv[1]): print('mine')"
        other = run(script(asks, str(tmp_path / "out")))
        assert other.stdout == "" and "SettingError: another run is writing" in other.stderr
    assert run(script(asks, str(tmp_path / "out"))).stdout == "mine\n"
    assert list(tmp_path.iterdir()) == []


@contextmanager
def held_by_another(folder: Path) -> Iterator[None]:
    """A lock is a thread's."""
    has, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with writing(folder):
            has.set()
            may_end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    has.wait()
    try:
        yield
    finally:
        may_end.set()
        thread.join()


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--model", "m", "--data", "d.csv"],
        ["demo"],
        ["fit", "--model", "m", "--data", "d.csv", "--rank", "1"],
        ["certify", "a", "--data", "d.csv"],
        ["grow", "a", "--data", "d.csv"],
        ["compress", "a"],
        ["lab", "generalization"],
        ["reproduce", "linearised-curves", "--small"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_second_of_two_runs_into_one_folder_says_so_and_ends(tmp_path, monkeypatch, capfd, arguments) -> None:
    monkeypatch.chdir(tmp_path)
    with held_by_another(tmp_path / "out"):
        assert call(*arguments, "--out", "out", monkeypatch=monkeypatch) == 2
    error = capfd.readouterr().err
    assert "another run is writing" in error and str(tmp_path / "out") in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files can have so many bytes only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("writes", ["safetensors", "torch", "plain"])
def test_a_full_disk_is_one_line_and_the_older_result_stays(tmp_path: Path, writes: str) -> None:
    with staged_folder(tmp_path / "out", "a") as stage:
        (stage / "a").write_text("old")
    tensors = {"x": torch.zeros(100_000)}

    def write(stage: Path) -> None:
        if writes == "safetensors":
            save_file(tensors, stage / "a")
        elif writes == "torch":
            torch.save(tensors, stage / "a")
        else:
            (stage / "a").write_bytes(bytes(100_000))

    error = pytest.raises(AdapterError, match="cannot write")
    with full_disk(50_000), error as caught, staged_folder(tmp_path / "out", "a") as stage:
        write(stage)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "out") == {"a": "old"} and [path.name for path in tmp_path.iterdir()] == ["out"]
    write_together(tmp_path / "out", {"b": b"old"})
    with full_disk(50_000), pytest.raises(OSError):
        write_together(tmp_path / "out", {"b": bytes(100_000)})
    assert contents(tmp_path / "out") == {"a": "old", "b": "old"}


def test_a_folder_beside_which_nothing_can_be_made_is_locked_inside(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # this may be root's process
    with writing(tmp_path / "mount"):
        assert [path.name for path in (tmp_path / "mount").iterdir()] == [".lock"]
    assert list((tmp_path / "mount").iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="cannot be written"), writing(tmp_path / "file" / "out"):
        pass
