from __future__ import annotations

from collections.abc import Iterator

import pytest

from ranksure.bundled import converted, minilm, packages


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """What is verified once per process is verified anew in each test."""

    def clear() -> None:
        for verified in (converted._verify, minilm.minilm_path, packages.installed_path):
            verified.cache_clear()

    clear()
    yield
    clear()
