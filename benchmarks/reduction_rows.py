"""Rank reduction: seconds from LoRA factors of rank 64 to within the bound of Theorem 3.1."""

from __future__ import annotations

import torch

from benchmarks.measure import Row, Size
from ranksure.operators.factored import FactoredOperator, Group
from ranksure.theory.rank_reduction import RankReduction, reduce_factors

WIDTH = 128
TOKENS = 4  # per sample
OUTPUTS = 2  # K: with squared error, so that all N K equations count


def reduction_rows(size: Size) -> list[Row]:
    rows: list[Row] = []
    for blocks, rank, equations, target, runs in size.reduction:
        found = [reduced(blocks, rank, equations, seed) for seed in range(runs)]
        last = found[-1]
        note = (
            f"{last.removed} of {sum(last.ranks_before.values())} ranks removed, "
            f"sum r(r+1)/2 from {last.count_before} to {last.count_after} of {last.independent}, "
            f"predictions changed by {max(r.relative_change for r in found):.0e} at most, relative"
        )
        name = f"rank reduction, {blocks} blocks of rank {rank}, NK = {equations}"
        rows.append(Row(name, "s", [r.seconds for r in found], "<=", target, note=note))
    return rows


def reduced(blocks: int, rank: int, equations: int, seed: int) -> RankReduction:
    """Reduce random factors on a random operator with as many independent equations as outputs."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n = equations // OUTPUTS
    sample = torch.arange(n).repeat_interleave(TOKENS)
    groups = [
        Group(randn(n * TOKENS, WIDTH), WIDTH, sample, {f"block.{j}": randn(n * TOKENS, OUTPUTS, WIDTH)})
        for j in range(blocks)
    ]
    factors = {f"block.{j}": (randn(WIDTH, rank), randn(WIDTH, rank)) for j in range(blocks)}
    found = reduce_factors(FactoredOperator(groups, n), factors)
    assert found.count_after <= found.independent and found.relative_change <= 1e-9
    return found
