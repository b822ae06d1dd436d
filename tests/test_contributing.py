"""A part of each kind, added by exactly the steps of CONTRIBUTING.md to a copy of the sources, and used."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.processes import run, script
from tests.tiny_text import save_bert

ROOT = Path(__file__).parents[1]
STEP = re.compile(r"(At the end of|new\sfile)\s`src/([\w/]+\.py)`:\n\n```python\n(.*?)```", re.S)

USED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import ranksure
assert ranksure.__file__.startswith(sys.argv[1])
from ranksure import Problem, get_loss, lambda_max, solve
from ranksure.bundled.names import named_data
from ranksure.operators.dense import DenseOperator
from ranksure.operators.outer import Outer
from ranksure.solvers.no_update import no_update
from ranksure.tasks.load import load_samples, load_task

g = torch.Generator().manual_seed(0)
a = {"w": torch.randn(6, 3, generator=g, dtype=torch.float64)}
b = {"w": torch.randn(6, 2, 4, generator=g, dtype=torch.float64)}
operator = Outer(a, b)
dense = DenseOperator({"w": torch.einsum("icm,in->icmn", b["w"], a["w"])})
torch.testing.assert_close(operator.gram(), dense.gram())  # inherited

y = torch.randn(6, 2, generator=g, dtype=torch.float64)
problem = Problem(operator, torch.zeros(6, 2, dtype=torch.float64), y, get_loss("huber"), {"w": 1.0})
largest = lambda_max(problem)
found = solve(problem.with_penalty(0.1 * largest), tolerance=1e-8)
assert found.status == "converged" and found.ranks["w"] > 0
assert no_update(problem.with_penalty(0.1 * largest)).status == "not-converged"
assert no_update(problem.with_penalty(1.01 * largest)).status == "converged"

rows = named_data("three-words")
assert load_samples("headline", rows) is rows
task = load_task("headline", sys.argv[2], rows)
assert type(task).__name__ == "HeadlineTask" and task.max_length == 16
print("used")
"""


def steps() -> list[tuple[str, str, str]]:
    """Where each goes, the file, and the code."""
    return STEP.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the sources with the parts added."""
    folder = tmp_path_factory.mktemp("copy") / "src"
    shutil.copytree(ROOT / "src" / "ranksure", folder / "ranksure", ignore=shutil.ignore_patterns("__pycache__"))
    assert len(steps()) == 8
    for how, name, code in steps():
        path = folder / name
        assert path.exists() == (how == "At the end of"), name
        path.write_text((path.read_text() + "\n\n" if path.exists() else "") + code)
    return folder


def test_a_part_of_each_kind_is_used(sources, tmp_path):
    ran = run(script(USED, str(sources), save_bert(tmp_path / "bert")))
    assert ran.returncode == 0 and ran.stdout.endswith("used\n"), ran.stderr


def test_a_claim_is_found_by_its_name(sources, tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from ranksure.cli import main; main()"
    ran = run(script(code, str(sources), "lab", "trace-norm", "--out", str(tmp_path)))
    assert ran.returncode == 0, ran.stderr
    assert "reproduced" in ran.stdout and (tmp_path / "trace-norm.json").is_file()
