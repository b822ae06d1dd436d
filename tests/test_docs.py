"""README and docs: links lead somewhere, code runs, options and settings exist."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import ranksure
from ranksure.cli.app import app
from ranksure.planner.settings import PlanSettings
from ranksure.runs.certificate.settings import CertifySettings, RunSettings
from ranksure.runs.fitting.settings import FitSettings
from scripts.docs.examples import BLOCK, RUN, run
from tests.runs.certificate.test_callback import Net, rows

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
# Two dashes that are ours: not those of an HTML comment or of another program.
OPTION = re.compile(r"(?<![\w<!-])--[a-z][a-z-]*")
OTHER_PROGRAMS = re.compile(r"^\s*(pip|npm|git|pytest|python -m (pip|benchmarks\.))|`python -m (benchmarks|scripts)\.")


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def blocks(language: str) -> Iterator[tuple[str, bool, str]]:
    """Page, whether it is to be run, and text of every fenced block of a language."""
    for page in PAGES:
        for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if found["language"] == language:
                yield page.relative_to(ROOT).as_posix(), found["mark"] is not None, found["text"]


def anchors(page: Path) -> set[str]:
    """Anchors of headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PYTHON = list(blocks("python"))
RUNNABLE = [(page, text) for page, run, text in PYTHON if run]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_linked_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in LINK.findall(prose(index))}
    assert set((ROOT / "docs").rglob("*.md")) - {index} <= linked


def test_every_public_name_is_in_the_api_pages_and_what_they_show_exists() -> None:
    shown = [
        name
        for page in sorted((ROOT / "docs" / "api").glob("*.md"))
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert {f"ranksure.{name}" for name in ranksure.__all__} <= {*shown, *documented_by_modules(shown)}
    assert len(shown) == len(set(shown))
    for name in shown:
        pkgutil.resolve_name(name)


def documented_by_modules(shown: list[str]) -> set[str]:
    """Public names of the package that are shown with the whole module in which they are defined."""
    here = {f"ranksure.{name}": getattr(ranksure, name) for name in ranksure.__all__}
    return {name for name, value in here.items() if value.__module__ in shown}


@pytest.mark.parametrize(("page", "text"), [(page, text) for page, _, text in PYTHON], ids=[p for p, _, _ in PYTHON])
def test_python_blocks_compile_and_plan_settings_exist(page: str, text: str) -> None:
    settings = {field.name for field in dataclasses.fields(PlanSettings)} | {"tokenizer", "reporter"}
    for node in ast.walk(ast.parse(text, page)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ranksure.plan":
            assert {keyword.arg for keyword in node.keywords} <= settings


@pytest.mark.parametrize(("page", "text"), RUNNABLE, ids=[page for page, _ in RUNNABLE])
def test_marked_blocks_run(page: str, text: str) -> None:
    run(text, page)


def test_the_readme_certifies_and_attaches_as_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The block of README that speaks of a model, a loader and a Trainer of the reader's own, given some."""
    (code,) = [text for page, text in [(p, t) for p, _, t in PYTHON] if page == "README.md" and "Callback" in text]
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=1, target_modules=["first", "second"]))
    loader = torch.utils.data.DataLoader(rows(), batch_size=8)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=200, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    own = {"label_names": ["labels"], "remove_unused_columns": False}
    trainer = Trainer(model, dataclasses.replace(arguments, **own), train_dataset=rows())
    names = {"peft_model": model, "dataloader": loader, "trainer": trainer}
    exec(compile(code, "README.md", "exec"), names)
    certified = [entry["step"] for entry in trainer.state.log_history if "ranksure/objective" in entry]
    assert certified == [100, 200] == [step for step, _ in names["callback"].certificates]
    assert names["verdict"].verdict in capsys.readouterr().out


def test_the_other_ways_into_growing_and_compressing_are_written_as_they_are_called() -> None:
    """Calls of ranksure's functions in README and docs have arguments that exist."""
    settings: dict[str, type] = dict.fromkeys(("certify", "grow", "CertificateCallback"), CertifySettings)
    settings |= {"compress": RunSettings, "fit": FitSettings, "plan": PlanSettings}
    seen = set()
    for page, _, text in PYTHON:
        for node in ast.walk(ast.parse(text, page)):
            name = ast.unparse(node.func).removeprefix("ranksure.") if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and f"ranksure.{name}" == ast.unparse(node.func) and name in ranksure.__all__:
                signature = inspect.signature(getattr(ranksure, name))
                bound = signature.bind_partial(*node.args, **{str(k.arg): k.value for k in node.keywords})
                more = bound.arguments.get("settings", {})
                assert not more or more.keys() <= {field.name for field in dataclasses.fields(settings[name])}
                seen.add(name)
    assert {"certify", "compress", "grow", "plan", "CertificateCallback"} <= seen


def test_marks_are_followed_by_python() -> None:
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    assert len(RUNNABLE) == lines.count(RUN) > 0


def test_options_exist() -> None:
    """Options named in README and docs are some command's; in a line that runs a command, that command's."""
    context = click.Context(app)
    commands = {name: app.get_command(context, name) for name in app.list_commands(context)}
    known = {
        name: {o for p in command.params for o in [*p.opts, *p.secondary_opts]} | {"--help"}
        for name, command in commands.items()
        if command is not None
    }
    anything = {o for p in app.params for o in p.opts}.union(*known.values())
    named: set[str] = set()
    for page in [PAGES[0], *sorted((ROOT / "docs").rglob("*.md"))]:
        text = re.sub(
            r"<!-- demo output.*?<!-- /demo output -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL
        )
        lines = [line for line in text.replace("\\\n", " ").splitlines() if not OTHER_PROGRAMS.search(line)]
        for line in lines:
            found = set(OPTION.findall(line))
            assert found <= anything, (page.name, line)
            for name, options in known.items():
                for command in re.findall(rf"ranksure {name} ([^`]*)", line):
                    assert set(OPTION.findall(command)) <= options, (page.name, line)
            named |= found
    assert {"--model", "--data", "--weight-decay", "--samples"} <= named
