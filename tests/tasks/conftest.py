"""Language models that several files of tests read."""

from __future__ import annotations

import pytest

from ranksure.bundled.smollm import smollm2_path
from ranksure.tasks.prompt import PromptTask, load_prompt_task
from tests.tasks.prompt_parts import SENTENCES, rows_of, save_albert


@pytest.fixture(scope="module")
def albert_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_albert(tmp_path_factory.mktemp("rxn") / "albert")


@pytest.fixture(scope="module")
def smollm() -> PromptTask:
    return load_prompt_task(str(smollm2_path()), rows_of(SENTENCES), batch_size=4)
