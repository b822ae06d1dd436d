"""Where first-order LoRA training starts: PEFT's initialisations, small and large random ones."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch

from ranksure.errors import SettingError
from ranksure.factors import Factors
from ranksure.operators.base import cast_factors
from ranksure.problem import Problem

Init: TypeAlias = Literal["peft", "peft-gaussian", "small", "large"]

_RANDOM_SCALE = {"small": 1e-4, "large": 10.0}  # penalty of the start as a share of F(0)


def initial_factors(problem: Problem, ranks: int | dict[str, int], *, init: Init = "peft", seed: int = 0) -> Factors:
    """Factors to start training from.

    Ranks are of every block or by block name, clipped to its size. ``peft`` is PEFT's default, ``u = 0`` (``lora_B``)
    and ``v`` (``lora_A``) Kaiming-uniform, that is uniform in ``+- 1/sqrt(n)``; ``peft-gaussian`` PEFT's
    ``init_lora_weights="gaussian"``, ``u = 0`` and ``v`` normal with deviation ``1/r``; ``small`` and ``large`` are
    both normal, scaled so that the penalty of all blocks is 1e-4 or 10 times ``F(0)``.

    Returns:
        Factors of every block, drawn on the CPU in float64, in the operator's dtype.

    Raises:
        SettingError: an unknown initialisation or block, or a negative rank.
    """
    shapes = problem.operator.shapes
    wanted = dict.fromkeys(shapes, ranks) if isinstance(ranks, int) else ranks
    if init not in ("peft", "peft-gaussian", *_RANDOM_SCALE):
        raise SettingError(f"unknown initialisation {init!r}: use peft, peft-gaussian, small or large")
    unknown = [name for name in wanted if name not in shapes]
    if unknown or any(rank < 0 for rank in wanted.values()):
        raise SettingError(f"ranks name the unknown block {unknown[0]}" if unknown else "a rank cannot be negative")
    generator = torch.Generator().manual_seed(seed)
    out: Factors = {}
    for name, (m, n) in shapes.items():
        rank = min(wanted.get(name, 0), m, n)
        u = torch.zeros(m, rank, dtype=torch.float64)
        v = torch.zeros(n, rank, dtype=torch.float64)
        if init == "peft":
            v = (2 * torch.rand(n, rank, generator=generator, dtype=torch.float64) - 1) / math.sqrt(n)
        else:
            v.normal_(generator=generator)
            if init == "peft-gaussian":
                v /= max(rank, 1)
            else:
                u.normal_(generator=generator)
        out[name] = (u, v)
    if init in _RANDOM_SCALE:
        penalty = float(problem.penalty_of(out))
        if penalty > 0:
            scale = math.sqrt(_RANDOM_SCALE[init] * problem.objective_at_zero / penalty)
            out = {name: (scale * u, scale * v) for name, (u, v) in out.items()}
    return cast_factors(out, problem.operator)
