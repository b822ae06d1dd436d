from __future__ import annotations

import math

import pytest
import torch

from ranksure.operators.factored import FactoredOperator
from ranksure.planner.subsets import extrapolate, subset_rows
from ranksure.records.plan import Subset
from tests.helpers import convex_optimum, random_problem, token_group


def factored_problem(n: int = 12):
    group = token_group([2, 1, 3] * (n // 3), 5, {"q": 4, "v": 3}, 1, seed=0)
    return random_problem(0, n=n, operator=FactoredOperator([group], n), share=0.2, uneven=False)


def test_a_subset_is_the_problem_on_these_samples():
    problem = factored_problem()
    smaller = problem.subset(torch.arange(3))
    assert smaller.operator.n_samples == 3
    assert torch.equal(smaller.base_logits, problem.base_logits[:3])
    assert torch.equal(smaller.labels, problem.labels[:3])
    torch.testing.assert_close(smaller.weights, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=1e-6, atol=0)
    assert smaller.penalty == problem.penalty
    u, v = torch.randn(4, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    whole, part = problem.operator.apply_factors({"q": (u, v)}), smaller.operator.apply_factors({"q": (u, v)})
    torch.testing.assert_close(part, whole[:3])


def test_subset_rows_are_solved_problems():
    problem = factored_problem()
    calls: list[tuple[int, int]] = []
    rows = subset_rows(problem, [6, 9], [1, 4], 0.9, lambda *args: calls.append(args))
    assert calls == [(1, 2), (2, 2)]
    for row, n in zip(rows, (6, 9), strict=True):
        assert row.n_samples == n
        assert row.relative_gap <= 1e-3
        assert set(row.captured) == {"1", "4"}
        assert 0 <= row.captured["1"] <= 1
        assert row.captured["4"] >= 1 - 2e-3
        scaled = {name: lam * math.sqrt(12 / n) for name, lam in problem.penalty.items()}
        smaller = problem.subset(torch.arange(n)).with_penalty(scaled)
        best, _ = convex_optimum(smaller)
        assert best < smaller.objective_at_zero  # something to gain
        assert row.weight_decay == pytest.approx(smaller.penalty["q"])
        assert 1 <= row.rank_needed <= max(row.ranks.values())


def row(n: int, needed: int) -> Subset:
    return Subset(n_samples=n, rank_needed=needed, largest_rank=needed)


def test_a_power_law_is_extrapolated_exactly():
    fit = extrapolate([row(16, 4), row(64, 8), row(256, 16)], 1024)
    assert fit is not None
    assert fit.rank_needed == pytest.approx(32, abs=0.01)
    assert fit.exponent == pytest.approx(0.5)
    assert fit.rms_log_residual == pytest.approx(0, abs=1e-9)
    assert fit.points == [(16, 4), (64, 8), (256, 16)]
    assert "extrapolation" in fit.note
    assert "not certified" in fit.note


def test_a_bad_fit_shows_its_residual():
    fit = extrapolate([row(16, 1), row(32, 9), row(64, 1)], 128)
    assert fit is not None
    assert fit.rms_log_residual > 0.5


def test_no_fit_through_too_little():
    assert extrapolate([row(16, 4), row(64, 8)], 1024) is None
    assert extrapolate([row(16, 0), row(32, 1), row(64, 2)], 1024) is None


def test_subsets_of_a_plan(answer):
    """Sizes, scaled lambdas, and each subset's certificate; the last is the plan's own optimum."""
    subsets, data = answer.data["subsets"], answer.data
    assert [subset["n_samples"] for subset in subsets] == [10, 20, 40]
    for subset in subsets:
        assert subset["weight_decay"] == pytest.approx(data["weight_decay"] * math.sqrt(40 / subset["n_samples"]))
        assert subset["relative_gap"] <= 1e-3
        assert subset["largest_rank"] == max(subset["ranks"].values())
        shares = list(subset["captured"].values())
        assert all(0 <= share <= 1 for share in shares)
    assert subsets[-1]["ranks"] == data["optimum"]["ranks"]
    assert subsets[-1]["weight_decay"] == data["weight_decay"]
    fit = data["extrapolation"]
    assert fit["n_samples"] == 200
    assert "extrapolation" in fit["note"]
