"""One objective-and-gradient evaluation against its bare matrix products on the same packed arrays."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Row, Size, duration, paired, ratios
from benchmarks.setting import captured_problem
from ranksure.factors import Factors
from ranksure.operators.factored import FactoredOperator


def evaluation_rows(size: Size) -> list[Row]:
    rows = []
    for n in (size.growth[0], size.growth[-1]):
        problem, _ = captured_problem(n, fitted=False).reduced  # what the solver evaluates: float64
        operator = problem.operator
        assert isinstance(operator, FactoredOperator)
        for rank in (4, 16):
            factors = random_factors(operator, rank)
            bare = bare_products(operator, factors)
            repeat = max(1, 20 * 64 // n)
            ours, products = paired(partial(problem.value_and_gradient, factors), bare, size.runs, repeat)
            note = f"N={n}, r={rank}, last-layer q,v, float64; ours {duration(statistics.median(ours))}"
            name = f"evaluation vs bare products, N={n}, r={rank}"
            rows.append(Row(name, "x", ratios(ours, products), "<=", 2, note=note, details={"ours_seconds": ours}))
    return rows


def random_factors(operator: FactoredOperator, rank: int) -> Factors:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(operator.dtype)

    return {name: (normal(m, rank), normal(n, rank)) for name, (m, n) in operator.shapes.items()}


def bare_products(operator: FactoredOperator, factors: Factors) -> Callable[[], None]:
    """The four products of every block (two share an input's copy), their operands prepared; results dropped."""
    work: list[tuple[Tensor, Tensor]] = []
    for group in operator.groups:
        v = torch.cat([factors[name][1].T for name in group.outputs]).contiguous()
        work += [(v, group.inputs.T), (torch.randn(v.shape[0], group.n_tokens).to(v), group.inputs)]
        for name, b in group.outputs.items():
            u = factors[name][0].T.contiguous()
            flat = b.flatten(0, 1)
            work += [(u, flat.T), (torch.randn(u.shape[0], flat.shape[0]).to(u), flat)]

    def run() -> None:
        for left, right in work:
            torch.mm(left, right)

    return run
