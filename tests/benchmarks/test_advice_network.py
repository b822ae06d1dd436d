"""The network's own answer in the benchmark of the advice: its figures, its rivals, and the targets met or not."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import advice_recipe
from benchmarks.advice_network import heldout, network_answer
from benchmarks.advice_network_table import (
    first_gap,
    first_near,
    found_share,
    network_tables,
    sweep_gradients,
    trained_shares,
)
from benchmarks.advice_recipe import common_recipe
from benchmarks.advice_rivals import train_then_compress
from benchmarks.advice_training import Bench, Rule
from benchmarks.advice_whole import Whole, in_model
from ranksure.data.texts import Rows, load_rows
from ranksure.network.logits import logits_of, predict
from ranksure.tasks.text import load_text_task
from tests.benchmarks.test_advice import part
from tests.tiny_text import frame, save_bert

RULE = Rule(learning_rates=(0.03,), steps=40, window=20, polish=4)


def rows(n: int, seed: int = 0) -> Rows:
    return load_rows(frame(n, seed=seed))


def bench_of(folder: Path, pooling: Any, layer: int) -> Bench:
    """Query and value of one layer of a tiny BERT, every token followed."""
    task = load_text_task(save_bert(folder), rows(8), pooling=pooling, batch_size=5)
    torch.manual_seed(0)
    with torch.no_grad():
        task.model.get_parameter(f"{task.head}.weight").normal_(std=0.5)
    inside = "" if pooling == "mean" else "bert."
    names = {f"{inside}encoder.layer.{layer}.attention.self.{name}": (16, 16) for name in ("query", "value")}
    return Bench(task, rows(24), rows(30, seed=7), names, 0.005, RULE, seed=0, tail=False)


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_the_networks_answer_beside_the_sweeps_rule(pooling: str, tmp_path: Path) -> None:
    bench = bench_of(tmp_path, pooling, 0)
    found = network_answer(bench, rows(20, seed=9), lambda_max=0.05)
    swept = bench.lora("r=2", dict.fromkeys(bench.shapes, 2))
    assert found["objective"] < swept.objective + 0.02 * (bench.base_loss - swept.objective)
    assert found["ranks"].keys() == bench.shapes.keys()
    values = [value for _, value, _ in found["trace"]]
    assert values == sorted(values, reverse=True) and values[-1] >= found["objective"] - 1e-3
    assert found["trace"][-1][0] <= found["gradients"]
    table = found["table"]
    assert 1 <= table["recommended"] <= max(found["ranks"].values())
    gain = bench.base_loss - found["objective"]
    assert bench.base_loss - table["objective"] >= 0.99 * gain * (1 - 1e-9)
    chosen = min(found["path"]["steps"], key=lambda step: step["loss"])
    assert found["chosen"]["weight_decay"] == pytest.approx(chosen["share"] * 0.05)
    # Singular values of the plain gradient, by autograd.
    model, data = bench.task.model, bench.rows
    weights = {name: bench.task.adapted.get_parameter(f"{name}.weight") for name in bench.shapes}
    for weight in weights.values():
        weight.requires_grad_()
    batches, back = bench.task.batches_by_length(data)
    logits = torch.cat([logits_of(model, batch) for batch in batches])[back]
    gradients = torch.autograd.grad(cross_entropy(logits, bench.task.labels(data)), list(weights.values()))
    model.requires_grad_(False)
    above = {n: int((torch.linalg.svdvals(g) > bench.lam).sum()) for n, g in zip(weights, gradients, strict=True)}
    assert found["one_gradient"] == above and max(above.values()) > 0
    # Without an update, held-out rows have the losses that they have without an adapter.
    plain = heldout(bench, {}, bench.report_rows, bench.report_labels)
    assert plain["losses"] == pytest.approx(bench.base_heldout, abs=1e-5)


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_cached_rows_are_the_whole_networks(pooling: str, tmp_path: Path) -> None:
    bench = bench_of(tmp_path, pooling, 1)
    task, other = bench.task, rows(9, seed=3)
    train = Whole(task, in_model(task, bench.shapes), bench.rows, size=4)
    beside = Whole(task, in_model(task, bench.shapes), other, beside=train)
    with train.cached():
        assert train.prefix is not None and train.prefix.skipped
        cached, apart = train.all_logits(), beside.all_logits()
    for logits, data, labels in ((cached, bench.rows, train.labels()), (apart, other, beside.labels())):
        batches, back = task.batches_by_length(data)
        torch.testing.assert_close(logits, predict(task.model, batches)[back], atol=1e-5, rtol=1e-5)
        assert torch.equal(labels, task.labels(data))
    outcome = bench.lora("r=2", dict.fromkeys(bench.shapes, 2), check=True)  # PEFT's adapters on the cached layers
    assert outcome.tail_error is not None and outcome.tail_error < 1e-5
    assert outcome.objective < bench.base_loss


def test_rivals_on_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(tmp_path, "model", 0)
    large = bench.lora("r=16", dict.fromkeys(bench.shapes, 16))
    small = train_then_compress(bench, 0.03)
    assert small.parameters < large.parameters
    gain = bench.base_loss - large.objective
    assert bench.base_loss - small.objective >= 0.98 * gain * (1 - 1e-3)
    assert not hasattr(bench.task.model, "peft_config")
    monkeypatch.setattr(advice_recipe, "EPOCHS", (1, 4))
    found = common_recipe(bench, rows(20, seed=9))
    assert len(found["ends"]) == 2 * len(advice_recipe.RATES)
    assert found["select"] == min(end["select"] for end in found["ends"]) and 0 <= found["accuracy"] <= 1
    assert found["parameters"] == 2 * 8 * 32 and len(found["losses"]) == 30
    after = heldout(bench, {}, bench.report_rows, bench.report_labels)["losses"]
    assert after == pytest.approx(bench.base_heldout, abs=1e-5)  # no rival left anything behind


def with_network(name: str = "x") -> dict[str, Any]:
    """The sweep of ``part`` (500 gradients, F from 0.7 to 0.2), and a solver that is done after 60."""
    found = part(name)
    held = {"loss": 0.5, "losses": [0.5] * 4, "accuracy": 0.75}
    found["network"] = {
        "objective": 0.199,
        "ranks": {"a": 4},
        "parameters": 400,
        "relative_gap": 0.004,
        "status": "converged",
        "e": 0.02,
        "w": 1.01,
        "gradients": 60,
        "forwards": 9,
        "captures": 0,
        "seconds": 6.0,
        "one_gradient": {"a": 31},
        "trace": [[1, 0.7, 0.1], [20, 0.21, 2.0], [30, 0.2024, 3.0], [50, 0.199, 5.0]],
        "rounds": [[1, 0.7, 0.6, 0.1], [40, 0.2, 0.004, 4.5]],
        "table": {"recommended": 4, "objective": 0.2, "rows": [], "gradients": 90, "seconds": 1.0},
        "path": {"steps": [], "gradients": 400, "seconds": 9.0},
        "heldout": held,
        "chosen": {**held, "parameters": 200, "weight_decay": 0.1, "ranks": {"a": 2}, "status": "converged"},
    }
    found["recipe"] = {"loss": 0.6, "accuracy": 0.75, "parameters": 800, "rate": 1e-3, "epochs": 10}
    return found


def test_figures_of_the_networks_table() -> None:
    one = with_network()
    assert sweep_gradients(one) == 500
    assert first_near(one) == (30, 3.0) and first_gap(one) == (40, 4.5)
    never = copy.deepcopy(one)
    never["network"] |= {"trace": [[1, 0.7, 0.1], [20, 0.21, 2.0]], "status": "not-converged", "rounds": []}
    assert first_near(never) == first_gap(never) == (math.inf, math.inf)
    sharper = copy.deepcopy(one)
    sharper["network"]["rounds"] = []  # only the certificate of the end is sharp enough
    assert first_gap(sharper) == (60, 6.0)
    assert found_share(one, 0.2) == pytest.approx(0.5 / 0.501)  # of the best that anyone found
    assert trained_shares(one) == (pytest.approx(0.5 / 0.501), pytest.approx(0.49 / 0.501))
    text = network_tables([one, never, part("no network")], 26)
    assert "2 of 26 cases" in text and "r 31: not trained" in text and "30 (6.0%)" in text
    assert "loss: 2 wins, 0 losses, 0 ties" in text and "accuracy: 0 wins, 0 losses, 2 ties" in text


def test_targets_are_met_or_not() -> None:
    def lines(*parts: dict[str, Any]) -> dict[str, str]:
        text = network_tables(parts, len(parts)).split("Targets:")[1]
        cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
        return {cell[0]: cell[-1] for cell in cells[1:]}

    good = lines(with_network())
    assert set(good.values()) == {"met"} and len(good) == 9
    bad = with_network("bad")
    bad["network"] |= {"trace": [[120, 0.2, 1.0]], "rounds": [[200, 0.2, 0.004, 1.0]]}
    bad["network"]["table"] |= {"objective": 0.3, "gradients": 101}
    found = lines(bad)
    assert [name for name, verdict in found.items() if verdict == "met"] == [
        "objective within 0.5% of the sweep's best",
        "not converged",
        "the same by Adam",
    ]
    open_one = with_network("open")
    open_one["network"] |= {"status": "not-converged", "trace": [], "rounds": []}
    text = network_tables([open_one] * 4, 26)
    assert "open (gap 0.4%, e 0.02, w 1.01)" in text and "| not converged | at most 3 |" in text
    assert lines(*[open_one] * 4)["not converged"] == "not met"
    assert network_tables([part("no network")], 26).endswith("no case is finished.")
