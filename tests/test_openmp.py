"""How threads wait is set before torch is loaded, and what the user set stays."""

import os

import pytest

from ranksure.openmp import SPINS, wait_briefly
from tests.processes import run, script


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


def test_threads_spin_briefly_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == str(SPINS) and "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")])
def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    before = dict(os.environ)
    wait_briefly()
    assert dict(os.environ) == before


def test_the_command_line_sets_it_before_torch_is_loaded() -> None:
    code = (
        "import os, sys, ranksure.cli; cli = sys.modules['ranksure.cli.app']; cli.app.main = lambda **_: print("
        "os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules); cli.main()"
    )
    ran = run(script(code))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(SPINS), "False"]
