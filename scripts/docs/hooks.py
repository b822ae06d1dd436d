"""What `mkdocs build` does beside rendering `docs/`: pages from elsewhere, the command line's reference, examples.

Settings of the environment: `RANKSURE_DOCS_EXAMPLES=skip` leaves the marked examples alone (the tests run them too).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `mkdocs` alone, unlike `python -m mkdocs`, does not look here

from scripts.docs import cli_reference, examples, records  # noqa: E402

BROUGHT_IN = {
    "README.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "license.txt",
}
"""Files outside of `docs/` that are in the site, and where."""

CLI = "reference/cli.md"
LINK = re.compile(r"(?<!!)(\[[^\]]*\]\()([^)\s]+)(\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave pages out of the menu that `extra.optional_pages` names and that are not written yet."""
    absent = {page for page in config.extra["optional_pages"] if not Path(config.docs_dir, page).exists()}
    config.nav = without(config.nav, absent)
    return config


def without(nav: Any, absent: set[str]) -> Any:
    """A menu (lists of `{title: page or menu}`) less the pages that are absent, and less what is then empty."""
    if isinstance(nav, list):
        kept = [without(item, absent) for item in nav]
        return [item for item in kept if item]
    if isinstance(nav, dict):
        kept = {title: without(item, absent) for title, item in nav.items()}
        return {title: item for title, item in kept.items() if item}
    return None if nav in absent else nav


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of `docs/`."""
    for source, target in BROUGHT_IN.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, CLI, content=cli_reference.page()))
    for name, content in records.schemas():
        files.append(File.generated(config, f"reference/records/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links around that leave `docs/` or come from outside, then run the examples."""
    site = page.file.src_uri
    sources = {target: source for source, target in BROUGHT_IN.items()}
    markdown = markdown.replace("<!-- table of records -->", records.table())
    for settings in cli_reference.SETTINGS:
        markdown = markdown.replace(f"<!-- options of {settings.__name__} -->", cli_reference.arguments(settings))
    markdown = relinked(markdown, sources.get(site, f"docs/{site}"), site)
    if os.environ.get("RANKSURE_DOCS_EXAMPLES") == "skip":
        return markdown
    try:
        return examples.with_output(markdown, site)
    except examples.ExampleError as error:
        raise PluginError(str(error)) from None


def relinked(markdown: str, source: str, site: str) -> str:
    """Relative links of a page, which hold in the repository, as they hold in the site.

    Args:
        markdown: the page.
        source: where it lies in the repository.
        site: where it lies in the site.
    """

    def target(found: re.Match[str]) -> str:
        path, mark, anchor = found[2].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return found[0]
        file = normpath(join(dirname(source), path))
        if file in BROUGHT_IN:
            file = BROUGHT_IN[file]
        elif file.startswith("docs/"):
            file = file.removeprefix("docs/")
        else:
            return found[0]  # not in the site: `--strict` says so
        return found[1] + relpath(file, dirname(site) or ".") + mark + anchor + found[3]

    parts = examples.FENCE.split(markdown)  # text, fenced block, text, ...
    return "".join(part if place % 2 else LINK.sub(target, part) for place, part in enumerate(parts))
