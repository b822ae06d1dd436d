"""Set-up of every test: one thread, no network, fixed seeds."""

from __future__ import annotations

import os

# Before torch and transformers are imported: they read these once. One thread on every machine, here and in the
# processes that tests start: the number of threads decides the order of sums, and so their last bits.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import random

import hypothesis
import numpy as np
import pytest
import torch

# No deadline: a machine shared by two workers has no steady clock.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def _settle() -> None:
    """One thread and fixed seeds, whatever a test before this one did."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Also before the fixtures of a module or of the session, which come before those of a test."""
    _settle()


@pytest.fixture(autouse=True)
def _settled() -> None:
    _settle()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
