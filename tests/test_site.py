"""The site: its menu, the pages that are made rather than written, links, examples, and the check of what was built."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import markdown
import pytest
from click.testing import CliRunner
from markdown_it import MarkdownIt
from mkdocs.config import load_config
from mkdocs.config.defaults import MkDocsConfig

from ranksure.cli.app import app
from scripts.docs import check, cli_reference, docstrings, examples
from scripts.docs.hooks import BROUGHT_IN, CLI, relinked, without

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
WRITTEN = [page for page in PAGES if "api" not in page.parts] + [
    ROOT / name for name in BROUGHT_IN if name != "LICENSE"
]


@pytest.fixture(scope="module")
def config() -> MkDocsConfig:
    return load_config(str(ROOT / "mkdocs.yml"))


def leaves(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for item in nav.values():
            yield from leaves(item)
    elif isinstance(nav, list):
        for item in nav:
            yield from leaves(item)


def test_every_page_is_in_the_menu_once(config: MkDocsConfig) -> None:
    menu = list(leaves(config.nav))
    written = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}
    made = {page for page in BROUGHT_IN.values() if page.endswith(".md")} | {CLI}
    assert len(menu) == len(set(menu))
    assert set(menu) - set(config.extra["optional_pages"]) <= written | made <= set(menu)


def test_the_build_is_strict_about_links_anchors_and_forgotten_pages(config: MkDocsConfig) -> None:
    levels = [*config.validation.links.values(), *config.validation.nav.values()]
    assert set(levels) == {logging.WARNING}
    assert config.theme["font"] is False
    assert any("offline" in name for name in config.plugins)


def test_pages_that_are_not_written_yet_leave_the_menu() -> None:
    nav = [{"Home": "index.md"}, {"Evidence": [{"Paper": "paper.md"}, {"Real": "real.md"}]}, {"Empty": ["paper.md"]}]
    assert without(nav, {"paper.md"}) == [{"Home": "index.md"}, {"Evidence": [{"Real": "real.md"}]}]
    assert without(nav, set()) == nav


@pytest.mark.parametrize(
    ("source", "site", "link", "expected"),
    [
        ("README.md", "overview.md", "docs/theory/landscape.md#limits", "theory/landscape.md#limits"),
        ("README.md", "overview.md", "CONTRIBUTING.md", "contributing.md"),
        ("README.md", "overview.md", "LICENSE", "license.txt"),
        ("docs/index.md", "index.md", "../README.md", "overview.md"),
        ("docs/theory/landscape.md", "theory/landscape.md", "../../CHANGELOG.md#a", "../changelog.md#a"),
        ("docs/theory/landscape.md", "theory/landscape.md", "../mathematics.md#b", "../mathematics.md#b"),
        ("docs/index.md", "index.md", "#here", "#here"),
        ("docs/index.md", "index.md", "https://example.org/README.md", "https://example.org/README.md"),
        ("docs/index.md", "index.md", "../src/x.py", "../src/x.py"),
    ],
)
def test_links_of_the_repository_hold_in_the_site(source: str, site: str, link: str, expected: str) -> None:
    text = f"See [it]({{}}).\n\n```python\nx = [a]({link})\n```\n"
    assert relinked(text.format(link), source, site) == text.format(expected)


@pytest.mark.parametrize("name", [name for name, _ in cli_reference.commands()])
def test_the_reference_has_every_option_that_help_prints(name: str) -> None:
    section = cli_reference.page().split(f"## `{name}`\n")[1].split("\n## ")[0]
    arguments = [*name.split()[1:], "--help"]
    printed = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    assert printed.exit_code == 0
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", printed.output.partition("Examples")[0]))
    listed = set(re.findall(r"`(--[a-z-]+)`", "".join(re.findall(r"^\| `--.*? \|", section, re.MULTILINE))))
    lines = printed.output.splitlines()
    named_in_passing = {o for o in options - listed if not any(re.match(rf"  (--\S+ / )?{o}( |$)", x) for x in lines)}
    assert listed == options - {"--help"} - named_in_passing
    assert "[bold]" not in section
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in section.splitlines() if row.startswith("| "))


def test_the_reference_gives_values_defaults_and_examples() -> None:
    page = cli_reference.page()
    assert "| `--samples` integer | Training rows to solve on. Default: `64`. |" in page
    assert "ranksure plan --model MODEL --data DATA [options]" in page
    assert "ranksure lab [NAME] [options]" in page
    assert "\nranksure lab generalization --full --seed 1 --out out/lab\n```" in page
    assert re.search(r"^\| `--dry-run`  \| .*\. \|$", page, re.MULTILINE)  # a flag: no value, no default


def test_docstrings_become_markdown() -> None:
    given = "See :func:`~ranksure.solve` (docs/theory/landscape.md)::\n\n    x\n\nIn `docs/x.md` a::b."
    assert docstrings.as_markdown(given) == (
        'See `ranksure.solve` (<a href="../theory/landscape.html">docs/theory/landscape.md</a>):\n\n    x\n\n'
        "In `docs/x.md` a::b."
    )
    assert docstrings.as_markdown("Use it so::\n\n    x") == "Use it so:\n\n    x"


def marked(code: str) -> str:
    return f"Before.\n\n<!-- run -->\n```python\n{code}\n```\n"


def test_output_of_examples_is_shown_where_the_page_does_not() -> None:
    page = examples.with_output(marked("print(6 * 7)"), "page.md")
    assert page.endswith("```\n\nIt printed, when this page was built:\n\n```text\n42\n```\n")
    for then in ["\n```text\n42\n```\n", "\nIt prints\n\n```text\n42\n```\n"]:
        assert examples.with_output(marked("print(6 * 7)") + then, "page.md") == marked("print(6 * 7)") + then
    unmarked = "```python\nraise SystemExit(1)\n```\n"
    assert examples.with_output(unmarked, "page.md") == unmarked


@pytest.mark.parametrize(
    ("code", "message"),
    [("1 / 0", r"^page.md: an example failed:(?s:.*)ZeroDivisionError"), ("x = 1", "printed nothing")],
)
def test_an_example_that_fails_or_says_nothing_stops_the_build(code: str, message: str) -> None:
    with pytest.raises(examples.ExampleError, match=message):
        examples.with_output(marked(code), "page.md")


def test_an_example_that_hangs_stops_the_build() -> None:
    with pytest.raises(examples.ExampleError, match="more than 1 s"):
        examples.run("import time; time.sleep(60)", "page.md", timeout=1)


class Shape(HTMLParser):
    """How many of each element."""

    KINDS = frozenset(re.findall(r"\w+", "li td th tr table h1 h2 h3 h4 pre strong em ul ol blockquote p"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.count[tag] += tag in self.KINDS


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_mean_the_same_on_github_and_in_the_site(page: Path, config: MkDocsConfig) -> None:
    """Lists, tables and paragraphs by CommonMark, and by the site's own renderer, which has other rules."""
    text = page.read_text(encoding="utf-8")
    site = markdown.Markdown(extensions=config.markdown_extensions, extension_configs=config.mdx_configs)
    here = Shape(site.convert(text)).count
    there = Shape(MarkdownIt("commonmark").enable("table").render(text)).count
    assert +here == +there


@pytest.fixture
def built(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(
        '<link rel="stylesheet" href="a.css"><link rel="canonical" href="https://x.org/"><h1 id="top">A</h1>'
        '<a href="sub/b.html#b">b</a><a href="https://x.org/nothing">out</a><a href="#top">up</a><a href="sub/">c</a>'
    )
    (tmp_path / "a.css").write_text("body { background: url(data:image/png;base64,AA==) }")
    (tmp_path / "sub" / "b.html").write_text('<h1 id="b">B</h1><a href="../index.html#top">a</a>')
    (tmp_path / "sub" / "index.html").write_text("<p>c</p>")
    return tmp_path


def test_a_whole_site_passes(built: Path) -> None:
    assert check.problems(built) == []
    ran = subprocess.run([sys.executable, "-m", "scripts.docs.check", str(built)], cwd=ROOT, check=False)
    assert ran.returncode == 0


@pytest.mark.parametrize(
    ("addition", "problem"),
    [
        ('<a href="sub/none.html">x</a>', "index.html: sub/none.html leads nowhere"),
        ('<a href="sub/b.html#none">x</a>', "index.html: sub/b.html#none has no such anchor"),
        ('<a href="#none">x</a>', "index.html: #none has no such anchor"),
        ('<img src="figure.png">', "index.html: figure.png leads nowhere"),
        ('<script src="https://cdn.org/x.js"></script>', "index.html: loads https://cdn.org/x.js"),
        ('<script src="//cdn.org/x.js"></script>', "index.html: loads //cdn.org/x.js"),
        ('<link rel="preconnect" href="https://fonts.org">', "index.html: loads https://fonts.org"),
    ],
)
def test_what_is_broken_in_a_page_is_found(built: Path, addition: str, problem: str) -> None:
    page = built / "index.html"
    page.write_text(page.read_text() + addition)
    assert check.problems(built) == [problem]


def test_fonts_from_elsewhere_are_found_in_style_sheets(built: Path) -> None:
    (built / "a.css").write_text('@import "https://fonts.org/a.css"; b { src: url(//fonts.org/b.woff) }')
    assert check.problems(built) == ["a.css: loads https://fonts.org/a.css", "a.css: loads //fonts.org/b.woff"]
    ran = subprocess.run(
        [sys.executable, "-m", "scripts.docs.check", str(built)], cwd=ROOT, capture_output=True, check=False
    )
    assert ran.returncode == 1 and b"fonts.org/b.woff" in ran.stdout


def test_an_empty_folder_is_no_site(tmp_path: Path) -> None:
    assert check.problems(tmp_path) == [f"{tmp_path}: no page"]


def test_the_pages_about_python_list_the_arguments_of_settings() -> None:
    for settings in cli_reference.SETTINGS:
        pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")]
        assert sum(f"<!-- options of {settings.__name__} -->" in page for page in pages) == 1
        table = cli_reference.arguments(settings)
        assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == {each.name for each in fields(settings)}
    assert "| `rank` integer | One rank for every target (default: the plan's). |" in table
