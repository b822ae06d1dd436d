"""The capacity count: counted by hand, satisfied where training is stuck, and out of reach of any advice."""

import ast
from pathlib import Path

import pytest
import torch

from ranksure.errors import SettingError
from ranksure.factors import Factors
from ranksure.solvers.burer_monteiro import solve
from ranksure.solvers.first_order import train_lora
from ranksure.theory import capacity
from ranksure.theory.capacity import CAPACITY_CONSTANT, capacity_rank, degrees_of_freedom
from tests.helpers import factored_objective, flatten, random_factors, spurious_instance

SOURCES = Path(capacity.__file__).resolve().parents[1]


@pytest.mark.parametrize("ranks", [{"a": 2, "b": 1}, {"a": 3, "b": 9}, {"b": 2}])
def test_degrees_of_freedom_are_the_dimension_of_the_updates(ranks: dict[str, int]) -> None:
    """Rank of the derivative of ``(u, v) -> u v^T`` at random factors of those ranks."""
    shapes = {"a": (3, 5), "b": (4, 2)}
    total = 0
    for name, (m, n) in shapes.items():
        r = min(ranks.get(name, 0), m, n)
        if r:
            factors = random_factors({name: (m, n)}, r)

            def update(x: torch.Tensor, m: int = m, n: int = n, r: int = r) -> torch.Tensor:
                return x[: m * r].view(m, r) @ x[m * r :].view(n, r).T

            jacobian = torch.func.jacrev(update)(flatten(factors))
            total += int(torch.linalg.matrix_rank(jacobian.reshape(m * n, -1)))
    assert degrees_of_freedom(ranks, shapes) == total


def test_capacity_rank_is_the_smallest_with_more_parameters() -> None:
    square = {"w": (100, 100)}
    for n_samples in (1, 100, 147, 148, 500, 3000):
        rank = capacity_rank(n_samples, 1, square)
        assert rank is not None
        assert rank * (200 - rank) > 1.35 * n_samples >= (rank - 1) * (201 - rank)
    assert capacity_rank(147, 1, square) == 1 and capacity_rank(148, 1, square) == 2  # 199 / 1.35 = 147.4
    assert capacity_rank(100, 2, square) == capacity_rank(200, 1, square)
    assert capacity_rank(100, 1, square, constant=2.0) == 2  # 199 < 200
    assert capacity_rank(10_000, 1, square) is None
    two = {"a": (10, 10), "b": (10, 10)}
    assert capacity_rank(20, 1, two) == 1 and capacity_rank(20, 1, {"a": (10, 10)}) == 2  # 38, 19 and 36 to 27
    for wrong in ({"n_samples": 0}, {"n_outputs": 0}, {"constant": 0.0}, {"constant": float("nan")}):
        with pytest.raises(SettingError):
            capacity_rank(**{"n_samples": 4, "n_outputs": 1, "shapes": square, **wrong})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("r", [1, 2, 3])
def test_a_capacity_promises_no_landscape(r: int) -> None:
    """The instance has capacity at rank r, and gradient descent from near its trap stays there."""
    problem, trap, best, excess = spurious_instance(r)
    n = problem.operator.n_samples
    assert degrees_of_freedom(r, problem.operator.shapes) > CAPACITY_CONSTANT * n
    rank = capacity_rank(n, 1, problem.operator.shapes)
    assert rank is not None and rank <= r
    # Strict but for the r (r - 1) / 2 rotations, along which nothing changes.
    hessian = torch.func.hessian(lambda x: factored_objective(problem, trap, x))(flatten(trap))
    values = torch.linalg.eigvalsh(hessian)
    rotations = r * (r - 1) // 2
    assert float(values[:rotations].abs().sum()) < 1e-12 and float(values[rotations]) > 0.1
    noise = random_factors(dict(problem.operator.shapes), r, scale=0.02)
    start: Factors = {"w": (trap["w"][0] + noise["w"][0], trap["w"][1] + noise["w"][1])}
    optimum = solve(problem, tolerance=1e-9)
    run = train_lora(problem, r, method="gd", learning_rate=0.05, start=start, steps=3000, looks=2, optimum=optimum)
    assert run.trajectory[-1].excess == pytest.approx(excess, abs=1e-6) and excess > 0.05
    assert optimum.certificate.objective == pytest.approx(
        float(problem.data_loss(problem.logits(problem.operator.apply(best))))
        + problem.penalty["w"] * float(torch.linalg.svdvals(best["w"]).sum()),
        abs=1e-8,
    )


def imports_of(path: Path) -> set[str]:
    """Modules and names that a source file imports, dotted."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_advice_cannot_use_it() -> None:
    """No source of the planner, the adapters or the bounds imports the module or names its functions."""
    # The check sees this file's own import, so it can fail.
    assert any("theory.capacity" in name for name in imports_of(Path(__file__)))
    files = [*SOURCES.glob("planner/*.py"), *SOURCES.glob("adapters/*.py"), SOURCES / "theory" / "bounds.py"]
    assert len(files) > 10
    for path in files:
        assert not any("capacity" in name for name in imports_of(path)), path
        text = path.read_text(encoding="utf-8")
        assert "capacity_rank" not in text and "degrees_of_freedom" not in text, path
