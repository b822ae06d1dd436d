"""The network's answer in sentences and on a terminal: each state says what it is, and no more."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from rich.console import Console

from ranksure.planner.answer import certified, sentences, warnings
from ranksure.planner.render import show
from ranksure.records.plan import FIRST_ORDER, Plan
from tests.report import records

NAMES = ["encoder.layer.5.query", "encoder.layer.5.value"]


def plan(optimum: dict[str, Any] | None = None, whole: dict[str, Any] | None = None, **network: Any) -> Plan:
    """A plan with the network's answer, some of it changed."""
    made = records.network_plan(NAMES) | (whole or {})
    made["network"] |= network
    made["network"]["optimum"] |= optimum or {}
    return msgspec.convert(made, Plan)


def zero(lam: float = 0.04, **network: Any) -> Plan:
    modules = {name: {"rank": 0, "spectral_ratio": 0.9, "stationarity": 0.0, "outside_norm": 0.009} for name in NAMES}
    path = records.network(NAMES)["path"]
    path[0]["selection_loss"] = 0.6  # lower than where there is an update
    network = {"weight_decay": lam, "r": 0, "pattern": {}, "subsets": [], "path": path, **network}
    return plan({"modules": modules, "gap": 0.002}, **network)


def printed(record: Plan, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    result = SimpleNamespace(
        record=record, warnings=warnings(record), sentences=lambda: sentences(record), is_zero=True, snippet=str
    )
    show(result, console)  # type: ignore[arg-type]
    return console.export_text()


def test_the_network_answers_first_and_measured_is_not_certified():
    first, second, third, fourth, last = sentences(plan())
    assert first.startswith("Rank 2 is enough in both targets: on the network itself it reaches 99.4% of what the best")
    assert "(measured; 99% was asked for)" in first and "certif" not in first
    assert "the smallest there is may be lower" in first and "rank 1 stops at 94.8%" in first
    assert "with 128 parameters in place of 512" in first  # rank 1 in one module of 64 x 64, rank 2 in both
    assert second.startswith("Certified to 0.8%: the model re-linearised at the point found could gain at most 0.001")
    assert "no optimum of the network itself" in second and "first-order optimal there within 5% (measured)" in second
    assert "rank 4 suffices (certified, on 64 rows, at weight decay 0.02 instead of 0.01)" in third
    assert "for the network itself rank 2 (measured), which is the advice" in third
    assert "from 1 to 2" in fourth and "has not settled" in fourth
    assert last.endswith("the adapter has loss 0.6400 against 0.6800, accuracy 64.0% against 60.0% without it.")
    assert warnings(plan()) == []


def test_the_two_answers_agree():
    same = plan(r=4, weight_decay=0.02, n_samples=64)
    assert "The same rank suffices for the network linearised at its pretrained weights (certified)." in sentences(same)


@pytest.mark.parametrize("e", [0.9 * FIRST_ORDER, 1.1 * FIRST_ORDER])
@pytest.mark.parametrize("w", [1 + 0.9 * FIRST_ORDER, 1 + 1.1 * FIRST_ORDER])
def test_first_order_is_said_of_every_module_or_not_at_all(e, w):
    made = records.network(NAMES)
    made["optimum"]["modules"][NAMES[0]]["stationarity"] = e
    made["optimum"]["modules"][NAMES[1]]["outside_norm"] = w * made["weight_decay"]
    record = plan({"modules": made["optimum"]["modules"]})
    assert record.network is not None and record.network.first_order == pytest.approx((e, w))
    assert ("first-order optimal" in certified(record.network)) == (e < FIRST_ORDER and w < 1 + FIRST_ORDER)


@pytest.mark.parametrize(
    ("gap", "share", "says"),
    [
        (0.0156, 0.12, "could still gain up to 0.016, 12.0% of what was gained"),
        (0.15, 1.15, "could still gain up to 0.15, more than all of what was gained"),
        (0.15, None, "could still gain up to 0.15, more than all of what was gained"),
    ],
)
def test_what_is_not_certified_says_so_with_its_remedy(gap, share, says):
    record = plan({"gap": gap, "relative_gap": share, "status": "not-converged", "remedy": "raise `budget`"})
    second = sentences(record)[1]
    assert second.startswith("Not certified to the tolerance") and says in second and "Certified" not in second
    (told,) = warnings(record)
    assert "not certified" in told and "raise `budget`" in told


def test_a_gap_below_the_noise_is_certified_to_the_noise():
    record = plan({"gap": 1e-9, "relative_gap": 3.0})
    assert sentences(record)[1].startswith("Certified to the noise of an evaluation: ")


def test_no_adapter():
    record = zero()
    first, second, third, held = sentences(record)
    assert "No adapter is needed" in first and "the rank is 0" in first and "Lower the weight decay" not in first
    assert first.endswith("their loss is 0.6000 here, and 0.6100 at 0.01.")  # the lowest of the weaker ones
    assert "Lower the weight decay" in sentences(zero(path=[]))[0]
    assert "Lower the weight decay" in sentences(zero(0.07))[0]  # not on the path: nothing is known of weaker ones
    assert "What each rank reaches" not in printed(record, 140)  # all are the same
    assert "could gain at most 0.002 of 0.63" in second and "nothing is proved about the network itself" in second
    assert "rank 4 suffices (certified" in third and "rank 0 (measured)" in third
    assert held == "On 256 held-out rows that chose nothing, the loss is 0.6800 without an adapter."


def test_held_out_rows_that_speak_against_it_come_first():
    worse = {"rows": 64, "loss_without_adapter": 0.6, "loss": 0.61}
    first = sentences(plan(heldout=worse))[0]
    assert first == (
        "On 64 held-out rows that chose nothing, the network does worse with the adapter than without it: loss 0.6100 "
        "against 0.6000."
    )
    none = {"recommended": records.network_plan(NAMES)["recommended"] | {"heldout_r": 0}}
    assert sentences(plan(whole=none))[0].endswith("within one standard error, so they show no gain.")
    assert "no held-out rows" in sentences(plan(heldout=None))[-1]


def test_the_linearised_optimum_is_told_where_held_out_rows_prefer_it():
    linearity = {"train": 0.06, "heldout": 0.03, "heldout_real_loss": 0.5, "heldout_linear_loss": 0.64}
    held = {"rows": 9, "loss_without_adapter": 0.7, "loss": 0.6}
    said = warnings(plan(whole={"linearity": linearity}, heldout=held))
    assert any("(loss 0.5000 against 0.6000)" in text for text in said)
    assert not any(
        "prefer" in text for text in warnings(plan(whole={"linearity": linearity}, heldout=held | {"loss": 0.4}))
    )


def test_work_that_ended_early_and_a_share_that_was_not_reached():
    record = plan(stopped="the budget of 100 gradients was spent", captured_uniform=0.97, r=4)
    (told,) = warnings(record)
    assert "ended early (the budget of 100 gradients was spent)" in told and "not known" in told
    first = sentences(record)[0]
    assert "less than the 99% that was asked for" in first and "is enough" not in first


def test_a_path_that_ends_too_early_and_pooling():
    path = records.network(NAMES)["path"][:3]
    (told,) = warnings(plan(path=path))
    assert "still fell at the end of the path" in told and "0.01, 0.12 of lambda_max" in told
    assert warnings(plan(path=path, weight_decay_chosen_by="the user")) == []
    (told,) = warnings(plan(whole={"head": {"new": True, "accuracy": {"model": 0.5, "mean": 0.6}}}))
    assert told.endswith("try `pooling` mean.")


def test_a_linearisation_far_from_the_network_is_no_reason_to_warn_where_the_network_answers():
    far = {"linearity": {"train": 0.9, "heldout": 0.8}}
    assert warnings(plan(whole=far)) == []
    assert any("treat the ranks as a guide" in text for text in warnings(msgspec.convert(records.plan() | far, Plan)))


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_shows_the_networks_numbers_first(width):
    record = plan()
    text = printed(record, width)
    assert max(map(len, text.splitlines())) <= width
    assert text.index("What each rank reaches on the network itself") < text.index("linearised at its pretrained")
    flat = " ".join(text.split())
    for shown in (
        "│ 94.80% │ 1.310 │",
        "│ 2 │",
        "0.6410",
        "first-order-optimal",
        "no adapter",
        "0.80% of what was gained",
    ):
        assert shown in flat, shown
    assert "certified optimum" not in flat and "What theory says" not in flat  # the linearised tables
    assert "rank 4 captures at least 99.9999% (certified" in flat  # its own share, not 100%
    assert "48 gradients, 31 forward passes, 1 capture at" in flat
    assert ("0.500800" in flat) == (width == 140)  # a narrow one has the columns that matter most
    assert "settled" in flat and "2 frozen layers ran once" in flat


def test_a_terminal_without_the_optional_parts():
    text = printed(plan(path=[], subsets=[], heldout=None, settled=None, skipped=[], ranks=[]), 100)
    assert "no layer could be left out" in text and "How the answer moves" not in text
