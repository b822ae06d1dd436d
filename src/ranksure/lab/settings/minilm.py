"""The bundled model and data as a linearised problem, for the lab's entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ranksure.bundled.minilm import minilm_path
from ranksure.bundled.rotten_tomatoes import rotten_tomatoes
from ranksure.capture import Progress
from ranksure.certificate import lambda_max
from ranksure.errors import SettingError
from ranksure.losses import CrossEntropy
from ranksure.network.targets import select_targets
from ranksure.problem import Problem
from ranksure.tasks.linearise import capture_rows, fit_new_head
from ranksure.tasks.text import load_text_task


def captured(
    n: int,
    *,
    share: float = 0.1,
    modules: Sequence[str] = ("query", "value"),
    layers: str = "last",
    pooling: Literal["model", "mean"] = "model",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Problem:
    """all-MiniLM-L6-v2 on Rotten Tomatoes, linearised around a fitted head: two classes, cross-entropy.

    Args:
        n: number of samples, the first of the rows shuffled by ``seed``; the head is fitted on them.
        share: ``lambda`` as a share of the smallest one whose optimum is zero, the same for all blocks.
        modules: target modules (see :func:`ranksure.network.targets.select_targets`).
        layers: which layers of them.
        pooling: what the head reads: the model's own choice (the first token) or the mean over tokens.
        seed: seed of the rows and of what the checkpoint leaves to chance.
        dtype: storage of the captured factors.
        progress: called after each captured batch.

    Returns:
        The problem, samples in the order of the rows; ``N`` equations, since two classes have one contrast.

    Raises:
        RanksureError: ``n`` or ``share`` out of range, or the bundled model or data is not installed.
    """
    data = rotten_tomatoes()
    if not 2 <= n <= len(data) or not 0 < share < 1:
        raise SettingError(f"between 2 and {len(data)} samples and 0 < share < 1, not {n} and {share}")
    rows = data.shuffled(seed).subset(list(range(n)))
    task = load_text_task(minilm_path(), rows, pooling=pooling, device="cpu", seed=seed)
    task.model.eval()
    loss = CrossEntropy()
    fit_new_head(task, rows, loss)
    targets = select_targets(task.adapted, modules, layers)
    problem = capture_rows(task, targets, rows, loss, dtype, progress).problem()
    return problem.with_penalty(share * lambda_max(problem))
