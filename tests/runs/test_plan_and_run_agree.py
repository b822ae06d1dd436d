"""One meaning of a loss: what a plan solves, a fit trains, and certify, grow, compress and the report say, are one.

Networks that are linear in the weights to adapt, so that a plan's optimum is the network's own.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import ranksure
from ranksure import Problem, certify, lambda_max, mean_loss_function, solve
from ranksure.adapters.export import export_adapter
from ranksure.adapters.loaded import read_adapter
from ranksure.adapters.matrices import file_factors
from ranksure.errors import AdapterError
from ranksure.losses import get_loss
from ranksure.network.gradient import gradient_pass
from ranksure.operators.dense import DenseOperator
from ranksure.records import Plan, encoded
from ranksure.records.plan import Bound, Optimum, PlanBounds, Recommended, Source
from ranksure.records.task import TaskRecord, read_task
from ranksure.report import write_report
from ranksure.runs.fitting import fit as fitting
from ranksure.runs.fitting.inputs import Setup
from ranksure.runs.fitting.result import FitResult
from tests.helpers import generator_of, objective, randn, random_labels, updates
from tests.tiny_text import frame, save_tokenizer

pytestmark = pytest.mark.usefixtures("quick_collections")
ROWS, INPUTS, WIDTH = 24, 6, 5
CASES = [("squared-error", 1), ("squared-error", 4), ("logistic", 1), ("logistic", 4)]
CASES += [("cross-entropy", 4)]
ALL = [*CASES, ("cross-entropy", 2)]


class TwoLayersConfig(PreTrainedConfig):
    model_type = "two-layers"


class TwoLayersForSequenceClassification(PreTrainedModel):
    """A fixed head on one layer: linear in the layer. Reads vectors, or tokens through a fixed embedding."""

    config_class = TwoLayersConfig
    base_model_prefix = "base"

    def __init__(self, config: TwoLayersConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(64, INPUTS)
        self.layer = nn.Linear(INPUTS, WIDTH, bias=False)
        self.score = nn.Linear(WIDTH, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        x: Tensor | None = None,
        **_: Any,
    ) -> SimpleNamespace:
        if x is None:
            assert input_ids is not None and attention_mask is not None
            mask = attention_mask[..., None].to(self.embed.weight)
            x = (self.embed(input_ids) * mask).sum(1) / mask.sum(1)
        return SimpleNamespace(logits=self.score(self.layer(x)))


def network(k: int) -> TwoLayersForSequenceClassification:
    torch.manual_seed(k)
    return TwoLayersForSequenceClassification(TwoLayersConfig(num_labels=k)).eval()


def plan_by_hand(net: Any, x: Tensor, y: Tensor, kind: str, folder: Path) -> tuple[Problem, Any]:
    """The linearised problem from its definition, its optimum, and both in a plan's folder."""
    loss = get_loss(kind)
    k = net.config.num_labels
    score = net.score.weight.detach().double()
    jacobian = torch.einsum("kc,kw,id->icwd", loss.contrasts(k), score, x.double())
    with torch.no_grad():
        base = net(x=x).logits.double()
    problem = Problem(DenseOperator({"layer": jacobian}), base, y, loss, {"layer": 1.0})
    problem = problem.with_penalty(0.2 * lambda_max(problem))
    solution = solve(problem, tolerance=1e-9)
    found = solution.certificate
    export_adapter(net, solution.factors, folder / "adapter", task_type=None)
    bound = Bound(paper=1, effective=1)
    record = Plan(
        model="net",
        data=Source(source="by hand", rows=len(x), sha256=""),
        n_samples=len(x),
        n_outputs=k,
        loss=kind,
        mean_per=loss.term,
        weight_decay=problem.penalty["layer"],
        weight_decay_chosen_by="the user",
        lambda_max=lambda_max(problem),
        target_modules=["layer"],
        shapes={"layer": (WIDTH, INPUTS)},
        bounds=PlanBounds(existence=bound, landscape=bound),
        optimum=Optimum(
            objective=found.objective,
            objective_at_zero=found.objective_at_zero,
            dual=found.dual,
            gap=found.gap,
            relative_gap=found.relative_gap,
            ranks=solution.ranks,
            status=solution.status,
        ),
        ranks=[],
        recommended=Recommended(r=max(solution.ranks.values()), rank_pattern=solution.ranks),
        captured_target=0.99,
        seed=0,
    )
    (folder / "plan.json").write_bytes(encoded(record))
    return problem, solution


def setup_of(net: Any, x: Tensor, y: Tensor, kind: str) -> Setup:
    return Setup(
        base=net,
        prefix="",
        heads=[],
        task_type=None,
        kind=kind,
        features=[{"x": x[i].tolist(), "labels": y[i].tolist()} for i in range(len(x))],
        held=None,
        collator=collate,
        shapes={"layer": (WIDTH, INPUTS)},
        name="net",
        revision=None,
        pooling="model",
        n_outputs=net.config.num_labels,
        label_names=None,
        batch_size=7,
        source="",
        sha256="",
        same_data=True,
    )


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def assert_done(result: FitResult) -> None:
    """First-order optimal, and all that was predicted was gained."""
    found, predicted = result.certificate, result.data["prediction"]
    assert found.verdict == "first-order-optimal"
    gain = result.data["objective_at_zero"] - result.objective
    assert gain > 0.02 * result.data["objective_at_zero"]
    assert gain == pytest.approx(predicted["objective_at_zero"] - predicted["objective"], rel=1e-4)
    assert "100.0% of the predicted gain" in " ".join(result.sentences())
    assert found.rank_gain_bound is not None and found.rank_gain_bound < 1e-3 * gain


@pytest.mark.parametrize(("kind", "k"), CASES)
def test_a_plans_optimum_is_done_for_fit_and_certify(kind, k, tmp_path, monkeypatch):
    g = generator_of(10 * k)
    net, x, y = network(k), randn(ROWS, INPUTS, generator=g).float(), random_labels(kind, ROWS, k, g)
    problem, solution = plan_by_hand(net, x, y, kind, tmp_path / "plan")
    monkeypatch.setattr(fitting, "task_setup", lambda *args: setup_of(net, x, y, kind))
    result = ranksure.fit(plan=tmp_path / "plan", out=tmp_path / "out", mode="linear")
    assert_done(result)
    certificate = solution.certificate
    assert result.objective == pytest.approx(certificate.objective, rel=1e-5)
    assert result.data["mean_per"] == ("sample" if kind == "cross-entropy" else "output")

    # certify by itself; and at any other penalty the point is not optimal
    batches = [{"x": x[part], "labels": y[part]} for part in (slice(0, 9), slice(9, None))]
    lam = problem.penalty["layer"]
    again = certify(result.model, batches, loss=kind, lam=lam)
    assert again.verdict == "first-order-optimal" and again.objective == pytest.approx(certificate.objective, rel=1e-5)
    for factor in (0.25, 0.5, 2.0):
        assert certify(result.model, batches, loss=kind, lam=factor * lam, probe=False).verdict != "first-order-optimal"


@pytest.mark.parametrize(("kind", "k"), ALL)
def test_loss_gradient_and_gain_are_one_number_each(kind, k, tmp_path):
    """At a point that is no optimum: the problem's, the gradient pass's, the certificate's, and training's."""
    g = generator_of(20 * k)
    net, x, y = network(k), randn(ROWS, INPUTS, generator=g).float(), random_labels(kind, ROWS, k, g)
    problem, solution = plan_by_hand(net, x, y, kind, tmp_path / "plan")
    setup = setup_of(net, x, y, kind)
    ranks = {"layer": solution.ranks["layer"]}
    half = {name: (math.sqrt(0.5) * u, math.sqrt(0.5) * v) for name, (u, v) in solution.factors.items()}
    model = setup.wrap(ranks, 1.0, 0.0, 0)
    fitting.place_factors(model, half, "")
    batches = setup.batches(setup.features)
    state = ranksure.certify_point(problem, half)
    layer = model.get_base_model().get_submodule("layer")
    found = gradient_pass(model, batches, {"layer": layer}, kind=kind)
    data_loss = float(problem.data_loss(state.logits))
    assert found.terms.mean == pytest.approx(data_loss, rel=1e-5)
    torch.testing.assert_close(found.gradients["layer"].double(), state.gradients["layer"], rtol=1e-4, atol=1e-6)
    run = certify(model, batches, loss=kind, lam=problem.penalty["layer"])
    assert run.objective == pytest.approx(state.certificate.objective, rel=1e-5)
    assert run.objective == pytest.approx(objective(problem, updates(half)), rel=1e-5)
    # The network is its own linearisation, and both bounds search the same dual line.
    assert run.rank_gain_bound == pytest.approx(state.certificate.gap, rel=1e-3)
    trained = mean_loss_function(kind)(model(x=x), y.to(torch.long if kind == "cross-entropy" else torch.float32))
    assert float(trained.detach()) == pytest.approx(data_loss, rel=1e-5)


@pytest.mark.parametrize(("kind", "k"), ALL)
def test_grow_and_compress_say_the_same_numbers(kind, k, tmp_path):
    g = generator_of(30 * k)
    net, x, y = network(k), randn(ROWS, INPUTS, generator=g).float(), random_labels(kind, ROWS, k, g)
    problem, solution = plan_by_hand(net, x, y, kind, tmp_path / "plan")
    setup, lam = setup_of(net, x, y, kind), problem.penalty["layer"]
    u, v = solution.factors["layer"]
    half = {"layer": (math.sqrt(0.5) * u[:, :1], math.sqrt(0.5) * v[:, :1])}
    model = setup.wrap({"layer": 1}, 1.0, 0.0, 0)
    fitting.place_factors(model, half, "")
    batches = setup.batches(setup.features)
    truth, zero = objective(problem, updates(half)), float(problem.data_loss(problem.base_logits))

    gradient = ranksure.certify_point(problem, half).gradients["layer"]
    left, right = (part / part.norm() for part in half["layer"])
    outside = gradient - left @ (left.T @ gradient)
    slope = float(torch.linalg.matrix_norm(outside - (outside @ right) @ right.T, 2)) - lam
    changes: list[Any] = []
    if problem.loss.effective_outputs(k) == 1:  # whose gradient has the one direction that is there
        with pytest.raises(AdapterError, match="no new direction"):
            ranksure.grow(model, batches, loss=kind, lam=lam, force=True, most_new=1)
    else:
        grown = ranksure.grow(model, batches, loss=kind, lam=lam, force=True, most_new=1)
        assert grown.certificate.objective == pytest.approx(truth, rel=1e-5)
        assert slope > 0 and grown.slopes["layer"] == [pytest.approx(slope, rel=1e-3, abs=1e-5)]
        changes.append(grown)

    small = ranksure.compress(model, batches, loss=kind, lam=lam, level="budget", max_loss_increase=1e-9)
    assert small.before is not None and small.after is not None and small.at_zero is not None
    assert small.before.objective == pytest.approx(truth, rel=1e-5)
    assert small.at_zero.objective == pytest.approx(zero, rel=1e-5)
    assert small.after.loss == pytest.approx(small.before.loss, rel=1e-5)
    for found in [*changes, small]:
        found.save(model, tmp_path / found.record)
        assert read_task(tmp_path / found.record) == TaskRecord(loss=kind)


@pytest.mark.parametrize(("kind", "k"), ALL)
def test_training_and_its_report_speak_of_the_plans_objective(kind, k, tmp_path, monkeypatch):
    """Also with a scale, where the decay of PEFT's matrices is that times lambda, and in batches of unequal size."""
    g = generator_of(40 * k)
    net, x, y = network(k), randn(ROWS, INPUTS, generator=g).float(), random_labels(kind, ROWS, k, g)
    problem, solution = plan_by_hand(net, x, y, kind, tmp_path / "plan")
    monkeypatch.setattr(fitting, "task_setup", lambda *args: setup_of(net, x, y, kind))
    lam, rank = problem.penalty["layer"], max(solution.ranks.values())
    how = {"rank": rank, "lora_alpha": 3 * rank, "weight_decay": 3 * lam, "learning_rate": 0.02, "logging_steps": 1}
    full = {"gradient_accumulation_steps": "full", "max_steps": 40, "certify_every": 40}
    result = ranksure.fit(plan=tmp_path / "plan", out=tmp_path / "out", **how, **full)
    record = result.record
    assert record.lam == pytest.approx(lam)
    logged = [entry["loss"] for entry in record.history if "loss" in entry]
    zero = float(problem.data_loss(problem.base_logits))
    assert logged[0] == pytest.approx(zero, rel=1e-4)  # an adapter that does nothing yet
    assert record.objective_at_zero == pytest.approx(zero, rel=1e-5)
    trained = read_adapter(result.model).factors
    truth = objective(problem, updates(trained))
    assert result.objective == pytest.approx(truth, rel=1e-5) and truth < zero
    called = [entry["ranksure/objective"] for entry in record.history if "ranksure/objective" in entry]
    assert called == [pytest.approx(truth, rel=1e-5)]
    tensors = load_file(result.folder / "adapter_model.safetensors")
    stored = file_factors(tensors, "layer")
    assert stored is not None
    assert objective(problem, updates({"layer": stored})) == pytest.approx(truth, rel=1e-5)
    assert record.prediction is not None
    optimum = solution.certificate.objective
    assert record.prediction.optimum == pytest.approx(optimum)

    text = " ".join(re.sub(r"<[^>]*>", " ", write_report(tmp_path / "out").read_text()).split())
    for number in (f"{truth:.5g}", f"{optimum:.5g}", f"{zero:.5g}", f"loss {kind}"):
        assert number in text, number


@pytest.mark.parametrize(("kind", "classes"), [("squared-error", 2), ("logistic", 2), ("cross-entropy", 2)])
def test_plan_and_fit_of_texts_agree(kind, classes, tmp_path):
    """The whole way, from a table of texts to a fit's verdict."""
    data = frame(60)
    if kind == "squared-error":
        data["label"] = [len(text) / 10 + ("good" in text) for text in data["text"]]
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    options = {"target_modules": ["layer"], "loss": kind, "samples": 40, "heldout": 0, "linearised": True}
    outputs = classes if kind == "cross-entropy" else 1
    plan = ranksure.plan(network(outputs), data, tokenizer=tokenizer, weight_decay="5%", ranks=[1], **options)
    plan.save(tmp_path / "plan")
    result = ranksure.fit(
        network(outputs), data, tokenizer=tokenizer, plan=tmp_path / "plan", out=tmp_path / "out", mode="linear"
    )
    assert_done(result)
