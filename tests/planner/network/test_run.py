"""The network's plan against plain PyTorch, PEFT, the solver called directly, and certify."""

from __future__ import annotations

import copy
import math
import signal
import subprocess

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import ranksure
from ranksure.errors import CaptureError, SettingError
from ranksure.factors import singular_values
from ranksure.planner.network import run as network_run
from ranksure.planner.network.pieces import Pieces
from ranksure.planner.network.rows import labelled
from ranksure.records.plan import Plan
from ranksure.records.record import read
from ranksure.runs.fitting.plan_folder import read_plan
from tests.planner.network.conftest import ASKED
from tests.processes import command, environment
from tests.tiny_text import frame, strict_json


def by_peft(model: str, adapter, rows, n_outputs: int = 3) -> torch.Tensor:
    """Logits of an exported adapter, by transformers and PEFT alone."""
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=n_outputs)
    network = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        return network(**AutoTokenizer.from_pretrained(model)(rows.texts, padding=True, return_tensors="pt")).logits


def is_lora(module: torch.nn.Module) -> bool:
    return isinstance(module, LoraLayer)


def nuclear(factors) -> float:
    return sum(float(torch.linalg.svdvals(u.double() @ v.double().T).sum()) for u, v in factors.values())


def cross_entropy(logits: torch.Tensor, labels: list[int]) -> float:
    return float(torch.nn.functional.cross_entropy(logits.double(), torch.tensor(labels)))


def test_the_exported_adapter_has_the_objective_that_the_plan_states(answer, inputs, tmp_path):
    out, split = answer.save(tmp_path / "out"), answer._prepared.split
    found = read(out / "plan.json", Plan).network
    assert found is not None and found == answer.record.network and found.optimum.status == "converged"
    logits = by_peft(inputs[0], out / "adapter", split.train)
    loss = cross_entropy(logits, split.train.labels)
    assert loss == pytest.approx(found.optimum.loss, rel=1e-5)
    assert loss + found.weight_decay * nuclear(answer.factors) == pytest.approx(found.optimum.objective, rel=1e-5)
    held = by_peft(inputs[0], out / "adapter", split.report)
    assert found.heldout is not None and found.heldout.rows == len(split.report)
    assert cross_entropy(held, split.report.labels) == pytest.approx(found.heldout.loss, rel=1e-4)
    right = held.argmax(1) == torch.tensor(split.report.labels)
    assert float(right.double().mean()) == pytest.approx(found.heldout.accuracy)
    assert found.optimum.ranks == {name: u.shape[1] for name, (u, _) in answer.factors.items()}
    assert strict_json(answer.to_json())["schema"] == 3


def test_it_is_what_the_solver_finds_when_it_is_called_directly(answer):
    prepared, found = answer._prepared, answer.record.network
    task = prepared.task
    direct = ranksure.solve_network(
        task.model, labelled(task, prepared.split.train)[0], prepared.targets, weight_decay=found.weight_decay
    )
    assert direct.objective_at_zero == pytest.approx(found.optimum.objective_at_zero, rel=1e-6)
    gained = direct.objective_at_zero - direct.objective
    assert found.optimum.objective <= direct.objective + 0.01 * gained
    assert found.optimum.gap <= 0.01 * (found.optimum.objective_at_zero - found.optimum.objective)


def test_ranks_capture_what_they_say(answer):
    data = answer.data
    found, advice = data["network"], data["recommended"]
    zero = found["optimum"]["objective_at_zero"]
    best = min([found["optimum"]["objective"], *(row["objective"] for row in found["ranks"])])
    for row in found["ranks"]:
        assert row["captured"] == pytest.approx((zero - row["objective"]) / (zero - best), abs=1e-12)
        assert row["verdict"] in ("first-order-optimal", "rank-bound", "not-converged")
        assert row["gradients"] <= 40
    rows = {row["rank"]: row for row in found["ranks"]}
    assert {rank for rank, row in rows.items() if row["requested"]} == {1, 3}
    assert rows[found["r"]]["captured"] >= 0.95 and found["captured_uniform"] == rows[found["r"]]["captured"]
    assert all(row["captured"] < 0.95 for rank, row in rows.items() if rank < found["r"])
    assert found["captured_pattern"] >= 0.95
    shapes = data["shapes"]
    count = sum(rank * sum(shapes[name]) for name, rank in found["pattern"].items())
    assert count <= sum(found["r"] * sum(shape) for shape in shapes.values())
    assert advice["r"] == found["r"] and advice["rank_pattern"] == dict.fromkeys(shapes, found["r"])
    assert advice["weight_decay"] == found["weight_decay"] and advice["parameters_pattern"] == count
    assert answer.lora_config.r == found["r"]
    network = get_peft_model(copy.deepcopy(answer._prepared.task.model), answer.pattern_lora_config)
    wrapped = {
        name: module.r["default"] for name, module in network.get_base_model().named_modules() if is_lora(module)
    }
    assert wrapped == found["pattern"]
    assert rows[1]["captured"] < 0.999  # rank 1 is not enough here, or this would show little


def test_lambda_is_chosen_by_the_networks_own_held_out_loss(inputs, tmp_path):
    asked = {**ASKED, "weight_decay": "auto", "ranks": [1], "target_modules": ["value"], "samples": 40}
    result = ranksure.plan(inputs[0], frame(120, noise=0.0), **asked)
    found = result.record.network
    lams = [step.weight_decay for step in found.path]
    assert lams == sorted(lams, reverse=True) and lams[0] == found.lambda_max and lams[1] < lams[0]
    losses = [step.selection_loss for step in found.path]
    assert found.weight_decay == lams[losses.index(min(losses))] == result.record.recommended.weight_decay
    assert losses[0] > min(losses)  # else the path would show nothing
    select = result._prepared.split.select
    with torch.no_grad():
        plain = result._prepared.task.model(
            **AutoTokenizer.from_pretrained(inputs[0])(select.texts, padding=True, return_tensors="pt")
        ).logits
    assert cross_entropy(plain, select.labels) == pytest.approx(losses[0], rel=1e-5)
    assert "held-out" in found.weight_decay_chosen_by


def test_at_lambda_max_the_rank_is_zero(inputs):
    result = ranksure.plan(*inputs, **{**ASKED, "weight_decay": "120%"})
    found = result.record.network
    assert result.is_zero and found.r == 0 and found.pattern == {} and result.record.recommended.rank_pattern == {}
    assert found.optimum.status == "converged" and found.heldout.loss == found.heldout.loss_without_adapter
    assert found.optimum.objective == pytest.approx(found.optimum.objective_at_zero, rel=1e-12)


def test_a_budget_ends_the_work_at_its_best_point(inputs, answer):
    result = ranksure.plan(*inputs, **{**ASKED, "budget": 12})
    found = result.record.network
    assert found.stopped and found.gradients <= 12 + 4
    assert found.optimum.status == "not-converged" and found.optimum.remedy
    assert found.optimum.objective < found.optimum.objective_at_zero
    assert found.optimum.objective >= answer.record.network.optimum.objective
    assert found.r == max(found.optimum.ranks.values())
    for wrong in ("0", "soon", -3, "5 parsecs", 1.5):
        with pytest.raises(SettingError, match="budget"):
            ranksure.plan(*inputs, **{**ASKED, "budget": wrong})


def test_what_cannot_be_solved_is_said_and_the_linearised_answer_stands(inputs, monkeypatch):
    def refuse(*_args, **_more):
        raise CaptureError("this network cannot be differentiated")

    monkeypatch.setattr(network_run, "network_objective", refuse)
    result = ranksure.plan(*inputs, **ASKED)
    assert result.record.network is None and result.record.recommended.r == result.record.recommended.linear_r > 0
    assert any("network itself was not solved" in note and "differentiated" in note for note in result.record.notes)


def test_a_fit_takes_the_networks_ranks_and_solution(answer, inputs, tmp_path):
    out = answer.save(tmp_path / "plan")
    folder, found = read_plan(out), answer.record.network
    assert folder.pattern == answer.record.recommended.rank_pattern and folder.weight_decay == found.weight_decay
    kept = folder.factors()
    for name, values in singular_values(answer.factors).items():
        if len(values):
            torch.testing.assert_close(singular_values({name: kept[name]})[name].double(), values, rtol=1e-5, atol=1e-7)
    fit = ranksure.fit(plan=out, data=inputs[1], out=tmp_path / "fit", mode="linear")
    prediction = fit.record.prediction
    assert prediction.objective == found.optimum.objective
    assert fit.certificate.objective == pytest.approx(prediction.objective, rel=1e-5)
    one = folder.prediction(1, False)
    assert one.objective == next(row.objective for row in found.ranks if row.rank == 1)


class Interrupt(Exception):
    """Stands for Ctrl-C."""


def test_interrupted_it_goes_on_and_ends_with_the_same_bits(inputs, answer, tmp_path, monkeypatch):
    """Interrupted after each of its first pieces, each time in a run of its own."""
    from ranksure.planner.prepare import prepare
    from ranksure.planner.run import run_plan
    from ranksure.planner.settings import PlanSettings
    from ranksure.progress import Clock, Silent

    kept, own, runs = tmp_path / "out.partial", Pieces.put, 0

    def interrupted(self, key, point):
        own(self, key, point)
        if runs < 3:
            raise Interrupt

    monkeypatch.setattr(Pieces, "put", interrupted)
    while True:
        try:
            clock = Clock(Silent())
            result = run_plan(prepare(*inputs, PlanSettings(**ASKED), None, clock), clock, kept)
            break
        except Interrupt:
            runs += 1
    assert runs == 3
    assert result.record.network == answer.record.network
    for name, pair in answer.factors.items():
        assert all(map(torch.equal, pair, result.factors[name]))


def test_killed_and_asked_again_it_ends_with_the_same_plan(inputs, answer, tmp_path):
    out = tmp_path / "out"
    options = [
        *("--target-modules", "value,output.dense", "--layers-to-transform", "last", "--samples", "24"),
        *("--heldout", "40", "--weight-decay", "40%", "--ranks", "1,3", "--captured", "0.95", "--random-starts", "0"),
    ]
    arguments = command("plan", "--model", inputs[0], "--data", inputs[1], *options, "--out", str(out))
    killed = (
        "import os, signal, sys\n"
        "from ranksure.planner.network.pieces import Pieces\n"
        "own = Pieces.put\n"
        "def put(self, key, point):\n"
        "    own(self, key, point)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Pieces.put = put\n"
        "from ranksure.cli import main\n"
        "main()\n"
    )
    first = subprocess.run([arguments[0], "-c", killed, *arguments[3:]], env=environment(), capture_output=True)
    assert first.returncode == -signal.SIGKILL and (tmp_path / "out.partial").is_file() and not out.exists()
    again = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert not (tmp_path / "out.partial").exists()
    found = read(out / "plan.json", Plan)
    assert found.network == answer.record.network
    assert math.isfinite(found.network.optimum.objective)
