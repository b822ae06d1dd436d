"""The entry at its small size, and that each of its checks fails on numbers that contradict its claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from ranksure.lab import run as lab
from ranksure.lab.claim import Run
from ranksure.lab.landscape.census import VERDICTS, Cell, Verdict, census
from ranksure.lab.landscape.instances import gaussian_problem, spurious_instance, two_block_instance
from ranksure.lab.theory import no_spurious_minima as entry
from ranksure.records import encoded
from ranksure.theory.bounds import landscape_rank
from tests.helpers import convex_optimum, random_problem
from tests.tiny_text import strict_json


@pytest.fixture(scope="module")
def result():
    return lab.measure(lab.THEORY, "no-spurious-minima", Run(small=True))


def changed(cell: Cell, take: Verdict, give: Verdict) -> Cell:
    """The cell with one start of a verdict given another."""
    part = cell.parts[0]
    counts = {**part.counts, take: part.counts[take] - 1, give: part.counts[give] + 1}
    return replace(cell, parts=[replace(part, counts=counts), *cell.parts[1:]])


def first_changed(cells: Sequence[Cell], give: Verdict) -> list[Cell]:
    return [changed(cells[0], "global", give), *cells[1:]]


def small_cells(rank: int) -> list[Cell]:
    trap = spurious_instance(1, extra=1)
    shapes = dict(trap.problem.operator.shapes)
    return [Cell(f"{rank}\nr=1", {"w": rank}, 2, shapes, 0.0, census([trap.problem], {"w": rank}, 40, seed=2))]


def test_the_claims_hold_at_the_small_size(result):
    finding, record = result
    assert [check.claim for check in finding.checks if not check.holds] == []
    assert record.verdict == "reproduced" and len(finding.checks) == 8
    assert strict_json(encoded(record).decode())["verdict"] == "reproduced"
    numbers = record.measured
    above = [cell for cell in numbers["gaussian"] if cell["above"]]
    assert above and all(cell["counts"]["global"] == cell["starts"] for cell in above)
    for cell in numbers["gaussian"]:
        r = cell["ranks"]["w"]
        assert cell["above"] == (r * (r + 1) // 2 > cell["n"] or r >= min(cell["shapes"]["w"]))
    for kind in ("gaussian", "explicit", "blocks", "bundled"):
        for cell in numbers[kind]:
            assert sum(cell["counts"].values()) == cell["starts"] == sum(p["starts"] for p in cell["parts"])
            for part in cell["parts"]:
                assert sum(g["count"] for g in part["groups"]) == part["starts"] - part["counts"]["global"]
                assert part["optimum"]["relative_gap"] <= 1e-9
    traps = [g for cell in numbers["explicit"] for p in cell["parts"] for g in p["groups"]]
    assert traps and all(g["strict"] is True and g["radius"] > 0 for g in traps)


def test_the_figure_names_its_axes_units_and_colours(result):
    finding, _ = result
    axes = finding.figure.axes
    assert len(axes) == 4 and finding.figure.get_size_inches()[0] == 8
    assert all(a.get_xlabel() and a.get_ylabel() and a.get_title(loc="left") for a in axes)
    assert "(%)" in axes[0].get_title(loc="left")
    assert all("(%)" in a.get_ylabel() for a in axes[1:])
    assert len(finding.figure.legends[0].get_texts()) == len(VERDICTS)
    assert "threshold" in axes[0].get_legend().get_texts()[0].get_text()
    steps = {line.get_label(): line for line in axes[0].get_lines()}["threshold r(r + 1)/2 > N"]
    samples = [int(tick.get_text()) for tick in axes[0].get_xticklabels()]
    assert list(steps.get_ydata()[::2] + 0.5) == [landscape_rank(n) for n in samples]


@pytest.mark.parametrize("verdict", ["spurious", "rank-bound", "saddle", "undetermined"])
def test_one_start_that_is_not_global_is_enough_to_fail_above_the_threshold(verdict):
    cells = small_cells(2)
    assert entry.clear_check("c", cells).holds
    assert not entry.clear_check("c", first_changed(cells, verdict)).holds
    assert not entry.bundled_check(first_changed(cells, verdict)).holds
    assert entry.bundled_check(cells).holds and not entry.bundled_check(small_cells(1)).holds
    assert not entry.clear_check("c", []).holds


def test_real_traps_fail_the_claim_of_a_clear_landscape():
    """Not doctored numbers: the landscape below the threshold."""
    check = entry.clear_check("c", small_cells(1))
    assert not check.holds and " at spurious minima" in check.measured


def test_the_trap_check_fails_without_traps_and_with_another_excess():
    trap = spurious_instance(1, extra=1)
    cells = entry.trap_cells(Run(small=True), [trap])
    below = [cell for cell in cells if not cell.above]
    survived = {1: entry.survives(trap)}
    assert max(survived[1]) > 0.05
    assert entry.trapped_check([trap], below, survived).holds
    assert not entry.trapped_check([replace(trap, excess=trap.excess * 1.001)], below, survived).holds
    assert not entry.trapped_check(
        [trap], [replace(cell, parts=small_cells(2)[0].parts) for cell in below], survived
    ).holds
    assert not entry.trapped_check([trap], below, {1: []}).holds
    weak = [
        replace(c, parts=[replace(p, groups=tuple(replace(g, examined=None) for g in p.groups)) for p in c.parts])
        for c in below
    ]
    assert not entry.trapped_check([trap], weak, survived).holds


def test_the_block_check_needs_the_sum_form_and_traps():
    cells = entry.block_cells(Run(small=True))
    below, above = [c for c in cells if not c.above], [c for c in cells if c.above]
    assert len(below) == len(above) == 2 and {c.size for c in below} == {0.0, entry.SIZE}
    assert entry.blocks_check(below).holds
    assert not entry.blocks_check(above).holds  # no traps
    low = [replace(cell, ranks={"first": 1, "second": 1}) for cell in below]
    assert not entry.blocks_check(low).holds  # 2 <= 2: the sum form is not satisfied
    shapes = dict(two_block_instance().problem.operator.shapes)
    assert all(rank < min(shapes[name]) for cell in above for name, rank in cell.ranks.items())


def test_the_capacity_check_needs_a_spurious_minimum_where_there_is_capacity():
    assert entry.capacity_check(small_cells(1)).holds
    assert not entry.capacity_check(small_cells(2)).holds
    assert not entry.capacity_check([replace(cell, n=100) for cell in small_cells(1)]).holds


def test_onset_and_the_check_of_slack():
    cells = [
        Cell("", {"w": r}, 5, {"w": (5, 5)}, 0.0, census([gaussian_problem(5, (5, 5), seed=4)], {"w": r}, 8))
        for r in (1, 2, 3)
    ]
    (fact,) = entry.onset(cells)
    assert fact["n"] == 5 and fact["threshold"] == 3 and fact["capacity"] == 1
    assert fact["optimum"] == cells[0].parts[0].optimum.ranks["w"]
    best, _ = convex_optimum(gaussian_problem(5, (5, 5), seed=4))
    assert cells[0].parts[0].optimum.certificate.objective == pytest.approx(best, rel=1e-6)
    rank = fact["optimum"]
    assert entry.in_reach(cells) == (0, 8 * (4 - rank))
    assert entry.in_reach([changed(cells[-1], "global", "spurious")]) == (1, 8)
    slack = [changed(cell, "global", "saddle") if cell.ranks["w"] == 2 else cell for cell in cells]
    assert entry.onset(slack)[0]["not_global"] == 2
    assert not entry.gaussian_checks(slack)[1].holds  # trouble right below the threshold
    assert entry.gaussian_checks(slack)[0].holds


def test_the_trap_does_not_survive_where_there_is_none():
    """Descent that starts at the trap's point of another problem ends elsewhere."""
    trap = spurious_instance(1)
    other = random_problem(1, "squared-error", n=2, k=1, shapes={"w": (2, 2)}, share=0.9)
    assert entry.survives(replace(trap, problem=other)) == []
