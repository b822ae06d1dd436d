"""The command line made from settings: one statement of an option for Python, help, files of options and records."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
import pytest
import yaml
from click.testing import CliRunner

from ranksure.cli.app import app
from ranksure.cli.commands import SettingsCommand, command
from ranksure.cli.fit import FitCommand
from ranksure.errors import SettingError
from ranksure.options import COMMON, GROUPS, Option, Settings, options_of, spoken
from ranksure.planner.settings import PlanSettings
from ranksure.runs.fitting.settings import FitSettings
from ranksure.tasks.load import KINDS
from ranksure.tasks.options import TASKS
from tests import commands

CONTEXT = click.Context(app)
COMMANDS: dict[str, SettingsCommand] = {name: app.get_command(CONTEXT, name) for name in app.lazy}  # type: ignore[misc]
SOURCE = str(Path(__file__).parents[1] / "src")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs a command; a command's work only prints what it was asked."""
    monkeypatch.chdir(tmp_path)
    for each in COMMANDS.values():
        monkeypatch.setattr(each, "work", lambda asked: click.echo(str(asked)))

    def called(*arguments: Any) -> tuple[int, str, str]:
        return commands.call(*arguments, monkeypatch=monkeypatch), *capsys.readouterr()

    return called


@pytest.mark.parametrize("code", [*(f"{name} --help" for name in COMMANDS), "--help", "--version", ""])
def test_help_and_import_load_nothing_heavy(code: str) -> None:
    run = "import ranksure" + (
        f"; import ranksure.cli; sys.argv = ['ranksure', *{code.split()}]; atexit.register(told); ranksure.cli.main()"
        if code
        else "; told()"
    )
    watched = {"torch", "transformers", "peft", "rich", "yaml", "numpy", "pandas", "msgspec"}
    told = f"told = lambda: print(sorted({watched} & {{m.split('.')[0] for m in sys.modules}}))"
    program = f"import atexit, sys; {told}; {run}"
    env = {**os.environ, "PYTHONPATH": SOURCE}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_option_once_in_its_group(call, name):
    code, out, _ = call(name, "--help")
    assert code == 0
    assert f"ranksure {name}" in out.partition("Examples:")[2]
    lines = out.splitlines()
    for stated in options_of(COMMANDS[name].settings):
        at = [i for i, line in enumerate(lines) if line.startswith(f"  {stated.flag} ")]
        assert len(at) == 1, stated.flag
        assert next(line[:-1] for line in reversed(lines[: at[0]]) if line[:-1] in GROUPS) == stated.option.group
    assert sum(stated.option.group == COMMON for stated in options_of(COMMANDS[name].settings)) <= 10


@pytest.mark.parametrize("name", COMMANDS)
def test_no_two_options_share_a_name(name):
    flags = [stated.flag for stated in options_of(COMMANDS[name].settings)]
    assert len(flags) == len(set(flags))
    assert all(stated.option.help.endswith(".") for stated in options_of(COMMANDS[name].settings))


def test_an_option_left_out_has_the_default_of_python(monkeypatch):
    seen: list[Any] = []
    for name in ("fit", "plan"):
        monkeypatch.setattr(COMMANDS[name], "work", seen.append)
    assert CliRunner().invoke(app, ["fit", "--out", "x"], catch_exceptions=False).exit_code == 0
    assert CliRunner().invoke(app, ["plan", "--model", "x", "--data", "y"], catch_exceptions=False).exit_code == 0
    assert seen[0].to_json() == FitSettings().to_json()
    assert seen[1].to_json() == PlanSettings(layers_to_transform="all").to_json()  # which None means too


def test_tasks_are_those_that_can_be_loaded():
    assert tuple(KINDS) == TASKS


MISTAKES = [
    (["fit", "--out", "x", "--lamda", "1"], ["--lamda", "did you mean --lambda?", "ranksure fit --help"]),
    (["fti"], ["did you mean fit?"]),
    (["fit"], ["--out must be given"]),
    (["certify"], ["--data", "ADAPTER_DIR", "must be given"]),
    (["certify", "a", "b", "--data", "x"], ["extra argument", "b"]),
    (["fit", "--out", "x", "--rank", "four"], ["--rank 'four'", "whole number"]),
    (["fit", "--out", "x", "--rank", "0"], ["--rank 0", "at least 1"]),
    (["fit", "--out", "x", "--mode", "tran"], ["--mode 'tran'", "train or linear"]),
    (["fit", "--out", "x", "--gradient-accumulation-steps", "some"], ["a whole number or full"]),
    (["fit", "--out", "x", "--stop", "rank-bnd", "--certify-every", "1"], ["rank-bnd", "rank-bound"]),
    (["fit", "--out", "x", "--lambda", "1", "--weight-decay", "1"], ["give --lambda or --weight-decay, not both"]),
    (["fit", "--out", "x", "--lambda", "nan"], ["--lambda nan"]),
    (["fit", "--out", "x", "--task", "video"], ["unknown task 'video'", "CAUSAL_LM"]),
    (["fit", "--out"], ["--out", "requires an argument"]),
    (["fit", "--config", "none.yaml"], ["none.yaml", "No such file"]),
    (["reproduce", "--seed", str(2**32)], ["--seed", "out of range"]),
]


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES)
def test_a_mistake_is_one_line_and_code_2(call, arguments, parts):
    code, out, err = call(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error ")
    for part in parts:
        assert part in err


FILES = [
    ("rnak: 3", "did you mean rank?"),
    ("rank: true", "not integer"),
    ("rank: [1]", "not integer"),
    ("rank: {a: 1}", "not integer"),
    ("grow: 'no'", "true or false"),
    ("model: yes", "not text"),  # YAML's yes is true
    ("- 1", "names and values"),
    ("a: [", "no YAML"),
    ("lambda: -1", "--lambda -1"),
]


@pytest.mark.parametrize(("text", "part"), FILES)
def test_a_mistake_in_a_file_of_options(call, tmp_path, text, part):
    (tmp_path / "c.yaml").write_text(text)
    code, out, err = call("fit", "--out", "x", "--config", "c.yaml")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert part in err


def test_a_printed_file_gives_the_same_settings(call, tmp_path):
    options = ["--out", "x", "--lambda", "1e-3", "--target-modules", "query,value", "--grow", "--no-calibrate"]
    options += ["--template", 'a # b: "{text}"\nc', "--stop", "rank-bound", "--certify-every", "5"]
    options += ["--learning-rate", "1e-5"]
    asked = call("fit", *options)
    assert asked[0] == 0 and "lam=0.001" in asked[1]
    code, printed, _ = call("fit", *options, "--print-config")
    assert code == 0
    assert yaml.safe_load(printed)["target_modules"] == ["query", "value"]
    (tmp_path / "given.yaml").write_text(printed)
    assert call("fit", "--config", "given.yaml") == asked
    everything = "\n".join(
        line.removeprefix("# ") if ": " in line.partition("  # ")[0] else line for line in printed.splitlines()
    )
    assert len(yaml.safe_load(everything)) == len(options_of(FitCommand))
    (tmp_path / "all.yaml").write_text(everything)
    assert call("fit", "--config", "all.yaml")[0] == 0


def test_a_list_of_numbers_in_a_file(call, tmp_path):
    (tmp_path / "c.yaml").write_text("model: x\ndata: y\nranks: [1, 3]\nweight_decay: 10%\nmemory: 1000000\n")
    asked = call("plan", "--model", "x", "--data", "y", "--ranks", "1,3", "--weight-decay", "10%", "--memory", 1000000)
    assert asked[0] == 0
    assert call("plan", "--config", "c.yaml") == asked


def test_the_command_line_wins_over_the_file(call, tmp_path):
    (tmp_path / "c.yaml").write_text("out: x\nlearning-rate: 1e-3\ngrow: true\nrank: 4\n")
    both = call("fit", "--config", "c.yaml", "--no-grow", "--rank", 8)
    assert both[0] == 0
    assert both == call("fit", "--out", "x", "--learning-rate", "1e-3", "--rank", 8)


@pytest.mark.parametrize("name", COMMANDS)
def test_print_config_needs_nothing(call, name):
    code, out, err = call(name, "--print-config")
    assert (code, err, yaml.safe_load(out)) == (0, "", None)


def test_completion(call):
    assert "_RANKSURE_COMPLETE" in call("--completion", "zsh")[1]
    env = {"COMP_WORDS": "ranksure fit --mode ", "COMP_CWORD": "3", "_RANKSURE_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-m", "ranksure.cli"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCE, **env},
        check=False,
    )
    assert done.stdout.split() == ["plain,train", "plain,linear"]


@dataclass(frozen=True, kw_only=True)
class _Toy(Settings):
    """Options of a toy command."""

    rank: Annotated[int, Option("How many.", COMMON, was=("width",))] = 1


def test_a_renamed_option_says_its_new_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def toy(asked: _Toy) -> None:
        """A toy."""
        click.echo(str(asked.rank))

    made = command(_Toy, "toy --rank 3")(toy)
    assert CliRunner().invoke(made, ["--rank", "3"]).output == "3\n"
    old = CliRunner().invoke(made, ["--width", "3"])
    assert old.exit_code == 2 and "--width is now --rank" in old.output
    (tmp_path / "c.yaml").write_text("width: 3\n")
    in_file = CliRunner().invoke(made, ["--config", "c.yaml"])
    assert isinstance(in_file.exception, SettingError) and "width is now rank" in str(in_file.exception)


def test_a_message_of_the_library_is_spoken_in_options():
    assert spoken("give `lam` or `max_length`, not `LoraConfig`") == "give --lambda or --max-length, not `LoraConfig`"


@pytest.mark.parametrize(
    ("text", "value"), [("query,value", ["query", "value"]), ("a.*b", "a.*b"), ("all-linear", "all-linear")]
)
def test_an_option_with_its_own_reader(text, value):
    stated = next(o for o in options_of(FitSettings) if o.name == "target_modules")
    assert stated.read(text) == value


WRONGS: list[dict[str, Any]] = [
    {"rank": 0},
    {"rank": "4"},
    {"rank": True},
    {"heldout": None},
    {"mode": "tran"},
    {"mode": None},
    {"stop": ["rank-bnd"], "certify_every": 1},
    {"stop": None},
    {"tolerance": 2},
    {"tolerance": "small"},
    {"gradient_accumulation_steps": "some"},
    {"gradient_accumulation_steps": 0},
    {"seed": 2**32},
    {"lam": float("nan")},
    {"learning_rate": 0},
]


@pytest.mark.parametrize("wrong", WRONGS, ids=str)
def test_python_refuses_what_the_command_line_refuses(wrong):
    with pytest.raises(SettingError, match=f"`{next(iter(wrong))}`"):
        FitSettings(**wrong)


def test_python_takes_what_it_took():
    asked = FitSettings(gradient_accumulation_steps="full", stop=("rank-bound",), certify_every=1, rank=None)
    assert asked.rank is None and asked.deciding().keys() == asked.to_json().keys() - {
        *("save_steps", "report_to", "keep_checkpoints", "memory")
    }
    assert FitSettings(task="SEQ_CLS").task == "text"
