"""One headless Chromium for the tests of a module."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.processes import PATIENCE

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; without one the tests fail, unless RANKSURE_NO_BROWSER says that none is wanted."""
    path = os.environ.get("RANKSURE_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        if os.environ.get("RANKSURE_NO_BROWSER"):
            pytest.skip("RANKSURE_NO_BROWSER is set")
        pytest.fail(
            "no Chromium: install it (Debian: apt-get install chromium), name it with RANKSURE_CHROMIUM, or set "
            "RANKSURE_NO_BROWSER=1 to leave the report untested"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS, timeout=1000 * PATIENCE)
        try:
            yield browser
        finally:
            browser.close()
