"""The lambda path: grid, solutions, and no dual value carried from one lambda to another."""

from __future__ import annotations

import pytest
import torch

from ranksure.certificate import certify_point, lambda_max
from ranksure.errors import SettingError
from ranksure.losses import CrossEntropy, Loss
from ranksure.operators.dense import DenseOperator
from ranksure.problem import Problem
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.path import PathPoint, lambda_path
from tests.solvers.small import LOSSES, small_problem


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_every_point_is_the_solution_at_its_lambda(loss: Loss) -> None:
    problem = small_problem(loss)
    points = lambda_path(problem, count=5, smallest=0.05, tolerance=1e-6)
    for point in points:
        cold = solve(problem.with_penalty(point.lam), tolerance=1e-9)
        assert point.solution.status == "converged"
        assert point.solution.certificate.relative_gap <= 1e-6
        # A dual value of another lambda would be above the optimum.
        assert point.solution.certificate.dual <= cold.certificate.objective + 1e-12
        assert point.solution.certificate.objective >= cold.certificate.dual - 1e-12
        gain = problem.objective_at_zero - cold.certificate.objective
        assert point.solution.certificate.objective - cold.certificate.objective <= 1.01e-6 * gain + 1e-9
        own = certify_point(problem.with_penalty(point.lam), point.solution.factors).certificate
        assert own.objective == pytest.approx(point.solution.certificate.objective, abs=1e-12)


def test_grid_starts_at_lambda_max_with_zero_and_goes_down_geometrically() -> None:
    problem = small_problem(CrossEntropy())
    points = lambda_path(problem, count=4, smallest=0.125)
    largest = lambda_max(problem)
    assert [point.lam for point in points] == pytest.approx([largest, largest / 2, largest / 4, largest / 8])
    assert set(points[0].solution.ranks.values()) == {0}
    assert sum(points[-1].solution.ranks.values()) > 0
    objectives = [point.solution.certificate.objective for point in points]
    assert objectives == sorted(objectives, reverse=True)


def test_warm_starts_save_evaluations() -> None:
    problem = small_problem(CrossEntropy(), n=12)
    points = lambda_path(problem, count=8, smallest=0.05, tolerance=1e-5)
    warm = sum(point.solution.evaluations for point in points)
    cold = sum(solve(problem.with_penalty(point.lam), tolerance=1e-5).evaluations for point in points)
    assert warm < cold


def test_progress_and_the_problem_are_as_given() -> None:
    problem = small_problem(CrossEntropy())
    before = dict(problem.penalty)
    seen: list[tuple[int, PathPoint]] = []
    points = lambda_path(problem, count=3, progress=lambda index, point: seen.append((index, point)))
    assert seen == list(enumerate(points))
    assert dict(problem.penalty) == before


def test_refusals() -> None:
    problem = small_problem(CrossEntropy())
    for wrong in ({"count": 1}, {"smallest": 0.0}, {"smallest": 1.0}):
        with pytest.raises(SettingError):
            lambda_path(problem, **wrong)
    still = DenseOperator({"a": torch.zeros(4, 1, 3, 3, dtype=torch.float64)})
    zero = Problem(still, torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), CrossEntropy(), {"a": 1.0})
    with pytest.raises(SettingError, match="lambda_max is 0"):
        lambda_path(zero)
