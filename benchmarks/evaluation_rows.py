"""One objective-and-gradient evaluation, of the linearised problem and of the network, against its bare operations."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.measure import Row, Size, duration, paired, ratios, seconds_of
from benchmarks.setting import captured_problem, setting
from ranksure.factors import Factors
from ranksure.network.logits import frozen, unlabelled
from ranksure.network.prefix import cached_prefix
from ranksure.network.side_path import applied
from ranksure.operators.factored import FactoredOperator
from ranksure.solvers.network_objective import NetworkObjective


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


def network_rows(size: Size) -> list[Row]:
    """The network's objective and its factor gradient through the cached tail, against the bare passes of that tail.

    Bare: the model's own call, torch's own loss and backward pass; hooks and frozen weights are in place before.
    """
    n = min(32, size.samples)
    chosen = setting(n, fitted=False)
    parts = chosen.labels.split([len(batch["input_ids"]) for batch in chosen.batches])
    batches = [{**batch, "labels": labels} for batch, labels in zip(chosen.batches, parts, strict=True)]
    targets, rows = chosen.targets("last"), []
    with cached_prefix(chosen.model, batches, targets) as prefix:
        penalty = dict.fromkeys(targets, 1e-3)
        objective = NetworkObjective(chosen.model, batches, targets, penalty, "cross-entropy", prefix.paused)
        for rank in (4, 16):
            torch.manual_seed(rank)
            sides = {name: (m, k) for name, (m, k) in objective.shapes.items()}
            factors = {
                name: (0.01 * torch.randn(m, rank), 0.01 * torch.randn(k, rank)) for name, (m, k) in sides.items()
            }
            leaves = {
                name: (u.clone().requires_grad_(), v.clone().requires_grad_()) for name, (u, v) in factors.items()
            }
            ours: list[float] = []
            bare: list[float] = []
            for run in range(-1, size.runs):  # the first warms up
                first = [seconds_of(partial(objective.value_and_gradient, factors)) for _ in range(10)]
                with frozen(chosen.model), applied(targets, leaves):
                    second = [seconds_of(partial(bare_passes, chosen.model, batches)) for _ in range(10)]
                if run >= 0:
                    ours.append(statistics.median(first))
                    bare.append(statistics.median(second))
            note = f"N={n}, last-layer q,v, float32; ours {duration(statistics.median(ours))}"
            name = f"network's evaluation vs bare passes of its tail, r={rank}"
            rows.append(Row(name, "x", ratios(ours, bare), "<=", 1.3, note=note, details={"ours_seconds": ours}))
    return rows


def bare_passes(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    for batch in batches:
        logits = model(**unlabelled(batch)).logits
        cross_entropy(logits, batch["labels"], reduction="sum").backward()
