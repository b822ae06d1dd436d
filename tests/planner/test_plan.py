"""A whole plan on a tiny model: its file, its figures found again from the definitions, and what it saves."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import datasets
import msgspec
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModel, AutoTokenizer

import ranksure
from ranksure.data.texts import Rows
from ranksure.errors import AdapterError, CaptureError, DataError, MemoryBudgetError, RanksureError, SettingError
from ranksure.planner.render import show
from ranksure.planner.result import PlanResult
from ranksure.records import Plan
from ranksure.theory.bounds import existence_rank, landscape_rank
from tests.adapters.networks import edited, first_snippet
from tests.adapters.test_fresh_process import run_fresh, worst
from tests.tiny_text import QUERY, VALUE, frame, loaded, save_bert_classifier, strict_json

SMALL: dict[str, Any] = {"target_modules": ["query", "value"], "layers_to_transform": "last", "samples": 16}
SMALL["linearised"] = True  # the network's own answer: tests/planner/network
QUICK: dict[str, Any] = {**SMALL, "weight_decay": "10%", "ranks": [1], "random_starts": 0, "heldout": 12}


def number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def check_schema(data: dict[str, Any]) -> None:
    """What the issue promises of plan.json, no more."""
    names = data["target_modules"]
    assert data["schema"] == 3
    assert isinstance(data["model"], str)
    assert all(isinstance(name, str) for name in names)
    for key in ("n_samples", "n_outputs"):
        assert isinstance(data[key], int)
    assert data["loss"] in ("cross-entropy", "logistic", "squared-error")
    assert number(data["weight_decay"], 0)
    assert number(data["lambda_max"], 0)
    for kind in ("existence", "landscape"):
        assert set(data["bounds"][kind]) == {"paper", "effective", "numerical"}
        assert all(isinstance(value, int) for value in data["bounds"][kind].values())
    optimum = data["optimum"]
    assert all(number(optimum[key]) for key in ("objective", "dual", "gap", "relative_gap"))
    assert list(optimum["ranks"]) == names
    for row in data["ranks"]:
        assert isinstance(row["rank"], int)
        assert number(row["objective"])
        assert number(row["gap"], 0)
        assert number(row["spectral_ratio"], 0)
        low, high = row["captured"]
        assert 0 <= low <= high <= 1
        assert row["heldout_loss"] is None or number(row["heldout_loss"], 0)
        assert row["heldout_accuracy"] is None or number(row["heldout_accuracy"], 0, 1)
        assert isinstance(row["parameters"], int)
        assert row["verdict"] in ("optimal", "rank-bound", "not-converged")
    advice = data["recommended"]
    assert isinstance(advice["r"], int)
    assert advice["lora_alpha"] == advice["r"]
    assert advice["alpha_pattern"] == advice["rank_pattern"]
    assert set(advice["target_modules"]) == set(advice["rank_pattern"])
    assert set(advice["rank_pattern"]) == (set(names) if advice["r"] else set())
    assert set(advice["linear_pattern"]) <= set(names)
    assert advice["weight_decay"] == data["weight_decay"]
    assert advice["heldout_r"] is None or isinstance(advice["heldout_r"], int)
    assert set(data["linearity"]) >= {"train", "heldout"}
    assert all(number(value, 0) for value in data["seconds"].values())


@pytest.mark.parametrize("name", ["answer", "auto"])
def test_schema(name, request):
    result = request.getfixturevalue(name)
    check_schema(result.data)
    assert strict_json(result.to_json())["ranks"] == result.data["ranks"]
    assert [row["rank"] for row in result.data["ranks"]] == sorted({row["rank"] for row in result.data["ranks"]})


def test_infinite_numbers_become_null(auto):
    settings = {"a": [math.inf, {"b": math.nan}], "c": 1.5}
    record = msgspec.structs.replace(auto.record, settings=settings, lambda_max=math.inf)
    written = strict_json(PlanResult(record, auto.factors, auto._prepared).to_json())
    assert written["settings"] == {"a": [None, {"b": None}], "c": 1.5}
    assert written["lambda_max"] is None
    assert written["sentences"] == auto.sentences()
    assert written["warnings"] == auto.warnings


def test_figures_agree_with_one_another(answer):
    data = answer.data
    optimum, zero = data["optimum"], data["optimum"]["objective_at_zero"]
    assert optimum["gap"] >= optimum["objective"] - optimum["dual"] >= -1e-12
    assert optimum["relative_gap"] == pytest.approx(optimum["gap"] / (zero - optimum["dual"]), rel=1e-6)
    assert optimum["relative_gap"] <= 1e-6
    assert optimum["status"] == "converged"
    assert optimum["ranks"] == {name: u.shape[1] for name, (u, _) in answer.factors.items()}
    for row in data["ranks"]:
        left = (row["objective"] - optimum["dual"]) / (zero - optimum["dual"])
        assert row["captured"][0] <= 1 - left + 1e-9
        assert (row["verdict"] == "optimal") == (left <= 1e-4)
        if row["verdict"] == "rank-bound":
            assert row["stationary"]
            assert row["negative_curvature"] == 0
            assert row["spectral_ratio"] > 1
        shapes = data["shapes"].values()
        assert row["parameters"] == sum(min(row["rank"], m, n) * (m + n) for m, n in shapes)
    assert data["ranks"][0]["captured"][0] < 0.999  # rank 1 is not enough here, or this would show nothing
    requested = {row["rank"]: row["requested"] for row in data["ranks"]}
    assert requested == {1: True, 2: False, 3: True}
    assert data["weight_decay"] == pytest.approx(0.03 * data["lambda_max"])


def test_bounds_count_equations(answer):
    bounds, operator_rank = answer.data["bounds"], answer.data["bounds"]["operator_rank"]
    assert bounds["existence"]["paper"] == existence_rank(40 * 3)
    assert bounds["existence"]["effective"] == existence_rank(40 * 2)
    assert bounds["landscape"]["paper"] == min(16, landscape_rank(40 * 3))
    assert operator_rank <= 80
    assert bounds["existence"]["numerical"] == existence_rank(operator_rank)
    optimum = answer.data["optimum"]["ranks"].values()
    assert max(optimum) <= 16


def test_recommendation(answer):
    data = answer.data
    advice = data["recommended"]
    row = next(row for row in data["ranks"] if row["rank"] == advice["r"])
    assert row["captured"][0] >= 0.999
    assert all(other["captured"][0] < 0.999 for other in data["ranks"] if other["rank"] < advice["r"])
    shapes = data["shapes"]
    assert advice["rank_pattern"] == {name: min(advice["r"], *shape) for name, shape in shapes.items()}
    assert advice["parameters_uniform"] == sum(
        rank * sum(shapes[name]) for name, rank in advice["rank_pattern"].items()
    )
    assert advice["captured_uniform"] == row["captured"][0]
    count = sum(rank * sum(shapes[name]) for name, rank in advice["linear_pattern"].items())
    assert advice["parameters_pattern"] == count
    assert count <= sum(rank * sum(shapes[name]) for name, rank in data["optimum"]["ranks"].items())
    assert all(rank > 0 for rank in advice["linear_pattern"].values())


# ---------------------------------------------------------------------------------------------------------------------
# from the definition: a network of one's own, autograd, float64


def head_of(result: PlanResult) -> torch.nn.Module:
    return result._prepared.task.model.get_submodule(result._prepared.task.head)


def double_network(result: PlanResult, path: str, n_outputs: int) -> torch.nn.Module:
    model = loaded(path, n_outputs).double()
    with torch.no_grad():
        model.classifier.weight.copy_(head_of(result).weight)
        model.classifier.bias.copy_(head_of(result).bias)
    return model


def tokens(path: str, rows: Rows) -> dict[str, torch.Tensor]:
    return dict(AutoTokenizer.from_pretrained(path)(rows.texts, padding=True, return_tensors="pt"))


def linearised(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], factors: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at W0 and of the linearisation at delta, by a forward-mode derivative along delta."""
    weights = {f"{name}.weight": model.get_submodule(name).weight.detach() for name in factors}
    deltas = {f"{name}.weight": (u.double() @ v.double().T) for name, (u, v) in factors.items()}
    model.config._attn_implementation = "eager"

    def logits(some: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, some, kwargs=batch).logits

    base, change = torch.func.jvp(logits, (weights,), (deltas,))
    return base.detach(), (base + change).detach()


def cross_entropy(z: torch.Tensor, y: list[int]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(z.double(), torch.tensor(y), reduction="none")


def test_objective_is_that_of_the_network(answer, bert):
    """Objective with and without the update from a network of one's own: nothing of ranksure but its answer."""
    split = answer._prepared.split
    model = double_network(answer, bert, 3)
    base, linear = linearised(model, tokens(bert, split.train), answer.factors)
    optimum = answer.data["optimum"]
    assert float(cross_entropy(base, split.train.labels).mean()) == pytest.approx(
        optimum["objective_at_zero"], rel=1e-5
    )
    nuclear = sum(float(torch.linalg.svdvals(u.double() @ v.double().T).sum()) for u, v in answer.factors.values())
    objective = float(cross_entropy(linear, split.train.labels).mean()) + answer.data["weight_decay"] * nuclear
    assert objective == pytest.approx(optimum["objective"], rel=1e-4)
    assert optimum["objective"] < 0.5 * optimum["objective_at_zero"]


def test_held_out_figures_are_those_of_the_network(answer, bert):
    """The row of rank 3 is the certified optimum itself."""
    held = answer._prepared.split.report
    base, linear = linearised(double_network(answer, bert, 3), tokens(bert, held), answer.factors)
    row = answer.data["ranks"][-1]
    assert row["rank"] == 3
    assert float(cross_entropy(linear, held.labels).mean()) == pytest.approx(row["heldout_loss"], rel=1e-3)
    assert float((linear.argmax(1) == torch.tensor(held.labels)).double().mean()) == pytest.approx(
        row["heldout_accuracy"]
    )
    summary = answer.data["heldout"]
    assert summary["rows"] == len(held)
    assert float(cross_entropy(base, held.labels).mean()) == pytest.approx(summary["loss_without_adapter"], rel=1e-4)


def test_linearity_is_that_of_edited_weights(answer, bert):
    for key, rows in (("train", answer._prepared.split.train), ("heldout", answer._prepared.split.report)):
        model = double_network(answer, bert, 3)
        base, linear = linearised(model, tokens(bert, rows), answer.factors)
        with torch.no_grad():
            real = edited(model, answer.factors)(**tokens(bert, rows)).logits

        def seen(z: torch.Tensor) -> torch.Tensor:  # the loss sees logits up to a constant
            return z - z.mean(1, keepdim=True)

        expected = float(seen(real - linear).norm() / seen(linear - base).norm())
        assert answer.data["linearity"][key] == pytest.approx(expected, rel=1e-3)
        assert answer.data["linearity"][f"{key}_real_loss"] == pytest.approx(
            float(cross_entropy(real, rows.labels).mean()), rel=1e-3
        )
    assert answer.data["linearity"]["train"] > 0.5
    assert any("linearisation" in warning for warning in answer.warnings)


def test_a_small_update_is_nearly_linear(bert, csv):
    result = ranksure.plan(bert, csv, **{**QUICK, "weight_decay": "95%"})
    assert not result.is_zero
    assert 0 < result.data["linearity"]["train"] < 0.1
    assert not any("linearisation" in warning for warning in result.warnings)


# ---------------------------------------------------------------------------------------------------------------------
# choosing lambda, and rows that chose nothing


def test_auto_takes_the_best_of_the_path(auto):
    path = auto.data["path"]
    lams = [point["weight_decay"] for point in path]
    assert lams == sorted(lams, reverse=True)
    assert lams[0] == pytest.approx(auto.data["lambda_max"])
    best = min(path, key=lambda point: point["selection_loss"])
    assert auto.data["weight_decay"] == best["weight_decay"]
    assert len({point["selection_loss"] for point in path}) == len(path)


def test_rows_are_used_once(auto, csv):
    split = auto._prepared.split
    parts = [list(zip(rows.texts, rows.labels, strict=True)) for rows in (split.train, split.select, split.report)]
    everything = [(text, int(label == "good")) for text, label in pd.read_csv(csv).itertuples(index=False)]
    assert sorted(row for part in parts for row in part) == sorted(
        everything
    )  # each row of the file in exactly one part
    assert len(split.train) == 24
    assert abs(len(split.select) - len(split.report)) <= 1


def test_evaluation_data_is_what_is_reported(bert, csv, tmp_path):
    """In another order of labels, and with rows enough in the data to choose lambda on."""
    other = frame(20, seed=9)
    other["text"] = "with " + other["text"]
    order = other.sort_values("label", ascending=False)  # 'good' comes first, unlike in the data
    order.to_csv(tmp_path / "eval.csv", index=False)
    result = ranksure.plan(bert, csv, eval_data=str(tmp_path / "eval.csv"), ranks=[1], random_starts=0, **SMALL)
    split = result._prepared.split
    assert sorted(split.report.texts) == sorted(other["text"])
    truth = dict(zip(other["text"], other["label"], strict=True))
    assert all(
        split.report.label_names[label] == truth[t]
        for t, label in zip(split.report.texts, split.report.labels, strict=True)
    )
    assert not set(split.report.texts) & {*split.train.texts, *split.select.texts}
    assert result.data["heldout"]["rows"] == 20


def test_evaluation_data_with_classes_of_its_own(bert, csv, tmp_path):
    frame(10, ("bad", "odd")).to_csv(tmp_path / "eval.csv", index=False)
    with pytest.raises(DataError, match="'odd'"):
        ranksure.plan(bert, csv, eval_data=str(tmp_path / "eval.csv"), **QUICK)


def test_auto_needs_rows_to_choose_on(bert):
    with pytest.raises(SettingError, match="held-out rows"):
        ranksure.plan(bert, frame(30), **SMALL)
    result = ranksure.plan(bert, frame(16), **QUICK)  # a number needs none
    assert result.data["heldout"] is None
    assert result.data["ranks"][0]["heldout_loss"] is None
    assert result.data["recommended"]["heldout_r"] is None
    assert "no held-out rows" in result.sentences()[2]
    assert result.data["subsets"] == []  # the file holds no more rows
    check_schema(result.data)


def test_heldout_rank_is_within_one_standard_error(answer):
    """The rule itself, on losses made anew by the solver's own factors for every rank of the table."""
    advised = answer.data["recommended"]["heldout_r"]
    losses = {row["rank"]: row["heldout_loss"] for row in answer.data["ranks"]}
    losses[0] = answer.data["heldout"]["loss_without_adapter"]
    best = min(losses, key=losses.__getitem__)
    assert answer.data["heldout"]["best_rank"] == best
    assert advised <= best
    assert advised in losses


@pytest.mark.parametrize("weight_decay", ["100%", "200%", 1e6])
def test_at_lambda_max_there_is_no_adapter(bert, csv, tmp_path, weight_decay):
    result = ranksure.plan(bert, csv, **{**QUICK, "weight_decay": weight_decay})
    assert result.is_zero
    assert set(result.data["optimum"]["ranks"].values()) == {0}
    assert result.data["recommended"]["r"] == 0
    assert result.data["recommended"]["rank_pattern"] == {}
    assert "rank is 0" in result.sentences()[0]
    with pytest.raises(AdapterError):
        _ = result.lora_config
    result.save(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]
    check_schema(strict_json((tmp_path / "out" / "plan.json").read_text()))


def test_zero_weight_decay_is_refused_before_anything_is_read():
    with pytest.raises(SettingError, match="no minimiser"):
        ranksure.plan("no-model", "no-data", weight_decay=0)


# ---------------------------------------------------------------------------------------------------------------------
# data and models of other kinds


def test_same_question_same_answer(bert, csv, auto):
    again = ranksure.plan(
        bert,
        csv,
        target_modules=["query", "value"],
        layers_to_transform="last",
        samples=24,
        ranks=[1, 2],
        linearised=True,
    )
    timeless = [{k: v for k, v in r.data.items() if k not in ("seconds", "estimate")} for r in (auto, again)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("loss", ["logistic", "squared-error"])
def test_one_output(bert, loss):
    data = frame(60)
    if loss == "squared-error":
        data["label"] = [0.1 * len(text) + (0.01 * i) for i, text in enumerate(data["text"])]
    result = ranksure.plan(bert, data, **{**QUICK, "loss": loss})
    check_schema(result.data)
    assert (result.data["n_outputs"], result.data["loss"]) == (1, loss)
    assert result.data["optimum"]["relative_gap"] <= 1e-6
    assert (result.data["ranks"][0]["heldout_accuracy"] is None) == (loss == "squared-error")
    assert result.data["bounds"]["existence"]["paper"] == result.data["bounds"]["existence"]["effective"]
    get_peft_model(loaded(bert, 1), result.lora_config)


def test_text_pairs(bert):
    data = frame(40)
    data["second"] = [text[::-1].split()[0] + " film" for text in data["text"]]
    one, two = (ranksure.plan(bert, data, text_pair_column=pair, **QUICK) for pair in (None, "second"))
    assert two._prepared.split.train.pairs is not None
    assert one.data["lambda_max"] != two.data["lambda_max"]


def test_saved_data_set(bert, tmp_path):
    data = frame(40)
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_pandas(data)})
    saved.save_to_disk(tmp_path / "saved")
    first = ranksure.plan(bert, data, **QUICK)
    second = ranksure.plan(bert, str(tmp_path / "saved"), **QUICK)
    assert first.data["optimum"] == second.data["optimum"]


def test_trained_head_in_its_own_order(tmp_path):
    """The head's class 0 is 'good': losses and accuracies are right only in the model's order."""
    path = save_bert_classifier(tmp_path / "trained", ["good", "bad"])
    result = ranksure.plan(path, frame(40), **QUICK)
    held = result._prepared.split.report
    assert held.label_names == ["good", "bad"]
    with torch.no_grad():
        z = loaded(path)(**tokens(path, held)).logits
    texts = dict(zip(*(frame(40)[c] for c in ("text", "label")), strict=False))
    truth = torch.tensor([0 if texts[text] == "good" else 1 for text in held.texts])
    summary = result.data["heldout"]
    assert summary["accuracy_without_adapter"] == pytest.approx(float((z.argmax(1) == truth).double().mean()))
    assert summary["loss_without_adapter"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(z, truth)), rel=1e-5
    )
    assert result.data["head"]["new"] is False
    assert result.lora_config.modules_to_save is None


def test_model_in_memory_is_left_as_it_was(bert, csv):
    model, tokenizer = loaded(bert), AutoTokenizer.from_pretrained(bert)
    model.train()
    before = copy.deepcopy(model.state_dict())
    result = ranksure.plan(model, csv, tokenizer=tokenizer, **QUICK)
    assert result.data["head"]["new"] is False
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    get_peft_model(model, result.lora_config)


def test_random_networks_are_refused(bert, csv):
    model = loaded(bert)
    model.bert.pooler.register_forward_hook(lambda m, i, out: out + 0.01 * torch.randn_like(out))
    with pytest.raises(CaptureError, match="deterministic"):
        ranksure.plan(model, csv, tokenizer=AutoTokenizer.from_pretrained(bert), **QUICK)


def test_weights_that_are_not_finite_are_refused(bert, csv):
    model = loaded(bert)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = math.nan
    with pytest.raises(RanksureError, match="not finite"):
        ranksure.plan(model, csv, tokenizer=AutoTokenizer.from_pretrained(bert), **QUICK)


def test_half_precision(bert, csv):
    full = ranksure.plan(bert, csv, **QUICK)
    half = ranksure.plan(bert, csv, **{**QUICK, "dtype": "bfloat16"})
    assert half.data["optimum"]["relative_gap"] <= 1e-6  # solved and certified in higher precision
    assert half.data["lambda_max"] == pytest.approx(full.data["lambda_max"], rel=0.5)


def test_memory_budget(bert, csv):
    with pytest.raises(MemoryBudgetError) as caught:
        ranksure.plan(bert, csv, **{**QUICK, "memory": "150KB"})
    for advice in ("`target_modules`", "`samples`", "`memory`", "matrix-free"):
        assert advice in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# what is given to PEFT


def test_configuration_wraps_exactly_the_pattern(answer, bert):
    config = answer.pattern_lora_config
    assert isinstance(config, LoraConfig)
    model = get_peft_model(loaded(bert, 3), config)
    pattern = answer.data["recommended"]["linear_pattern"]
    wrapped = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert {name: module.r["default"] for name, module in wrapped.items()} == pattern
    assert all(module.scaling["default"] == 1 for module in wrapped.values())
    assert len(set(pattern.values())) > 1  # a pattern in earnest
    saved = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert saved
    assert all("classifier" in name for name in saved)


def test_uniform_configuration(answer, bert):
    model = get_peft_model(loaded(bert, 3), answer.lora_config)
    wrapped = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len(wrapped) == len(answer.data["target_modules"])
    assert {module.r["default"] for module in wrapped} == {answer.data["recommended"]["r"]}


@pytest.fixture(scope="module")
def saved(answer, bert, csv, csv3, tmp_path_factory):
    """Every kind of output, loaded back in one fresh process that knows nothing of ranksure."""
    root = tmp_path_factory.mktemp("saved")
    texts = ["the good film", "a very nasty and dull story", "odd", "it is not bad"]
    batch = dict(AutoTokenizer.from_pretrained(bert)(texts, padding=True, return_tensors="pt"))
    options: dict[str, dict[str, Any]] = {
        "uniform": {"uniform": True},
        "merged": {"merged": True},
        "mean": {"pooling": "mean"},
    }
    results = {name: ranksure.plan(bert, csv, **{**QUICK, **more}) for name, more in options.items()}
    results["adapter"] = answer
    jobs = {}
    for name, result in results.items():
        out = result.save(root / name)
        kind = "merged" if name == "merged" else "adapter"
        model = result._prepared.task.model.eval()
        with torch.no_grad():
            if name == "mean":
                inner = edited(AutoModel.from_pretrained(bert).eval(), result.factors)
                hidden = inner(**batch).last_hidden_state
                means = [hidden[i, : int(batch["attention_mask"][i].sum())].mean(0) for i in range(len(texts))]
                logits, plain = model.head(torch.stack(means)), model(**batch)
            else:
                logits, plain = edited(model, result.factors)(**batch).logits, model(**batch).logits
        assert worst(plain, logits) > 1e-3  # the update shows
        jobs[name] = (first_snippet(out / kind / "README.md"), batch, logits, 1e-5)
    return results, jobs, run_fresh(root, jobs), root


@pytest.mark.parametrize("name", ["adapter", "uniform", "merged", "mean"])
def test_saved_update_loads_without_ranksure(saved, name):
    _, jobs, outputs, root = saved
    _, _, logits, tolerance = jobs[name]
    assert worst(outputs[name]["plain"], logits) <= tolerance
    check_schema(strict_json((root / name / "plan.json").read_text(encoding="utf-8")))
    if name != "mean":
        assert outputs[name]["id2label"] == dict(enumerate(["bad", "good", "odd"][: logits.shape[1]]))


def test_uniform_adapter_has_one_rank(saved):
    results, _, _, root = saved
    config = json.loads((root / "uniform" / "adapter" / "adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["r"] == config["lora_alpha"] == max(results["uniform"].data["optimum"]["ranks"].values())


def test_saved_files(saved):
    _, _, _, root = saved
    assert {p.name for p in (root / "adapter").iterdir()} == {"plan.json", "lora_config.py", "axolotl.yaml", "adapter"}
    scope: dict[str, Any] = {}
    exec((root / "adapter" / "lora_config.py").read_text(), scope)
    assert any(isinstance(value, LoraConfig) for value in scope.values())
    assert (root / "mean" / "adapter" / "head.safetensors").is_file()
    assert (root / "merged" / "merged" / "model.safetensors").is_file()
    assert not any(path.name.startswith(".") for path in root.iterdir())  # nothing half-written


def test_saving_twice_replaces_and_strangers_are_kept(auto, tmp_path):
    out: Path = tmp_path / "out"
    auto.save(out)
    (out / "plan.json").write_text('{"schema": 1, "recommended": {}}')
    (out / "adapter" / "README.md").unlink()
    auto.save(out)
    assert strict_json((out / "plan.json").read_text())["schema"] == 3
    assert (out / "adapter" / "README.md").is_file()
    for name in ("notes.txt", "adapter/checkpoint.bin"):  # beside a plan, too
        (out / name).write_text("x")
        with pytest.raises(SettingError, match=name):
            auto.save(out)
        assert (out / name).read_text() == "x"
        (out / name).unlink()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "plan.json").write_text('{"terraform": 1}')
    with pytest.raises(SettingError, match="which no plan wrote"):
        auto.save(foreign)
    assert (foreign / "plan.json").read_text() == '{"terraform": 1}'
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("years of work")
    with pytest.raises(SettingError, match=r"thesis\.tex"):
        auto.save(stranger)
    assert [path.name for path in stranger.iterdir()] == ["thesis.tex"]


def test_sentences_tell_the_figures(answer):
    sentences = answer.sentences()
    if answer.data["recommended"]["heldout_r"] == 0:  # then that is the answer, and comes first
        assert "no gain" in sentences[0]
        sentences = [*sentences[1:], sentences[0]]
    first, second, third = sentences
    far = "For the linearised network, which is far from the real one here, rank"  # this tiny network is
    assert first.startswith(f"{far} {answer.data['recommended']['r']} is enough")
    assert "99.9%" in first
    assert "rank-bound" in second
    assert str(answer.data["heldout"]["rows"]) in third


def test_poolings_are_compared_on_rows_that_are_not_reported(auto, bert):
    accuracies, rows = auto.data["head"]["accuracy"], auto._prepared.split.select
    assert set(accuracies) == {"model", "mean"}
    with torch.no_grad():
        guess = double_network(auto, bert, 2)(**tokens(bert, rows)).logits.argmax(1)
    assert accuracies["model"] == pytest.approx(float((guess == torch.tensor(rows.labels)).double().mean()))
    assert 0 <= accuracies["mean"] <= 1


def test_names_of_targets(auto):
    assert auto.data["target_modules"] == [QUERY, VALUE]


def test_brackets_in_names_are_shown(answer):
    data = copy.deepcopy(answer.data)
    data["data"]["source"], data["notes"] = "rows [train]", ["see [bold] and [/]"]
    console = Console(width=140, record=True, file=io.StringIO())
    record = msgspec.convert(data, Plan)
    show(PlanResult(record, answer.factors, answer._prepared), console, "out[1]")
    text = console.export_text()
    for part in ("on rows [train]:", "see [bold] and [/]", "written to out[1] in"):
        assert part in text
