"""The benchmark of the advice: the cached tail is the network, the objective is the plan's, the tables are right."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from benchmarks import advice
from benchmarks.advice_cases import CASES, SCORED, UNSCORED, WIDER
from benchmarks.advice_rivals import adalora, eva
from benchmarks.advice_rows import plain_body
from benchmarks.advice_table import captured, choices, data_size_rank, duel, tables, threshold, within_error
from benchmarks.advice_tail import Tail, remembering
from benchmarks.advice_training import Bench, Rule, adapter_layers, last_layer, nuclear_norm
from ranksure.data.texts import Rows, load_rows
from ranksure.network.logits import predict
from ranksure.tasks.text import TextTask, load_text_task
from tests.tiny_text import VOCABULARY, frame, save_bert, save_gpt2

RULE = Rule(learning_rates=(0.03,), steps=40, window=20, polish=4)
TARGETS = {"bert": ["query", "value", "output.dense"], "llama": ["q_proj", "k_proj", "v_proj", "down_proj"]}


def rows(n: int, seed: int = 0) -> Rows:
    return load_rows(frame(n, seed=seed))


def task_of(kind: str, folder: Path) -> TextTask:
    if kind != "llama":
        pooling = "mean" if kind == "bert mean" else "model"
        return load_text_task(save_bert(folder), rows(8), pooling=pooling, batch_size=5)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=3,
    )  # two labels by default
    save_gpt2(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = "[SEP]"
    return load_text_task(LlamaForSequenceClassification(config).eval(), rows(8), tokenizer=tokenizer, batch_size=5)


@pytest.mark.parametrize("kind", ["bert", "bert mean", "llama"])
def test_the_cached_tail_is_the_whole_network(kind: str, tmp_path: Path) -> None:
    task = task_of(kind, tmp_path)
    task.model.eval()
    data = rows(13, seed=1)
    names = [name for name, _ in task.adapted.named_modules()]
    layer = next(name for name in reversed(names) if name.endswith(("layers.1", "layer.1")))
    tail = Tail(task, layer, data, size=4)
    torch.manual_seed(1)
    targets = [n for n in names if n.startswith(layer + ".") and n.endswith(tuple(TARGETS[kind.split()[0]]))]
    before = tail.all_logits()
    model = get_peft_model(task.adapted, LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    model.eval()
    batches, back = task.batches_by_length(data)
    whole = predict(task.model, batches)[back]
    with remembering(tail.layer, {}):
        cached, again = tail.all_logits(), tail.all_logits()
    assert (whole - before).abs().max() > 1e-2  # the adapters move the logits
    torch.testing.assert_close(cached, whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(cached, again)
    assert all(not hasattr(m, "kept") for m in task.adapted.modules())  # nothing of ours stays in the model
    assert torch.equal(tail.labels(), task.labels(data))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    task = task_of("bert", tmp_path_factory.mktemp("bert"))
    names = {f"bert.encoder.layer.1.attention.self.{name}": (16, 16) for name in ("query", "value")}
    torch.manual_seed(0)
    with torch.no_grad():
        task.model.get_parameter("classifier.weight").normal_(std=0.5)
    return Bench(task, rows(24), rows(30, seed=7), names, 0.005, RULE, seed=0)


def test_lora_minimises_the_plans_objective(bench: Bench) -> None:
    outcome = bench.lora("r=2", dict.fromkeys(bench.shapes, 2), check=True)
    assert outcome.objective < 0.95 * bench.base_loss
    assert outcome.tail_error is not None and outcome.tail_error < 1e-5
    assert outcome.parameters == 2 * 2 * 32 and set(outcome.ranks.values()) == {2}
    assert len(outcome.heldout) == 30 and 0 <= outcome.accuracy <= 1
    assert not adapter_layers(bench.task.adapted)  # the model is plain again

    # The same objective from PEFT's own update and the whole network.
    seen: dict[str, float] = {}

    def polish(model: Any) -> tuple[int, bool]:
        result = type(bench)._polish(bench, model)
        layers = adapter_layers(bench.task.adapted)
        seen["nuclear"] = sum(
            float(torch.linalg.svdvals(layer.get_delta_weight("default").detach().double()).sum())
            for layer in layers.values()
        )
        return result

    bench._polish = polish  # pyright: ignore[reportAttributeAccessIssue]
    try:
        again = bench.lora("r=2", dict.fromkeys(bench.shapes, 2))
    finally:
        del bench._polish
    assert again.objective == pytest.approx(outcome.objective, rel=1e-5)  # one seed, one result
    assert again.objective == pytest.approx(again.loss + bench.lam * seen["nuclear"], rel=1e-5)


def test_peft_rivals_run_on_the_same_objective(bench: Bench) -> None:
    for outcome in (eva(bench), adalora(bench)):
        assert outcome.loss < outcome.objective < bench.base_loss
        assert outcome.parameters == sum(rank * 32 for rank in outcome.ranks.values())
        assert not adapter_layers(bench.task.adapted)
    base = cross_entropy(bench.train.all_logits(), bench.train.labels())
    assert float(base) == pytest.approx(bench.base_loss)  # neither left anything behind


def test_nuclear_norm_of_a_product() -> None:
    torch.manual_seed(0)
    left, middle, right = torch.randn(7, 3).double(), torch.randn(3).double(), torch.randn(3, 5).double()
    expected = torch.linalg.svdvals(left @ torch.diag(middle) @ right).sum()
    assert float(nuclear_norm(left, right, middle)) == pytest.approx(float(expected))
    assert float(nuclear_norm(left, right)) == pytest.approx(float(torch.linalg.svdvals(left @ right).sum()))


def test_one_layer_is_asked_for() -> None:
    assert last_layer(["a.layer.5.q", "a.layer.5.o.dense"]) == "a.layer.5"
    with pytest.raises(ValueError, match="one layer"):
        last_layer(["a.layer.5.q", "a.layer.4.q"])


def part(name: str = "x", scored: bool = True, difference: float = 0.2, plan: float = 0.30) -> dict[str, Any]:
    """A finished case: F(0) = 0.7, r = 8 and 16 reach 0.2, r = 2 is planned and reaches ``plan``."""

    def method(rank: int, objective: float, heldout: list[float]) -> dict[str, Any]:
        return {
            "objective": objective,
            "heldout": heldout,
            "parameters": 100 * rank,
            "seconds": 10.0,
            "evaluations": 100,
            "learning_rate": 0.01,
            "converged": True,
        }

    reached = {1: 0.5, 2: plan, 4: 0.21, 8: 0.2, 16: 0.2}
    return {
        "case": {"name": name, "scored": scored, "samples": 64},
        "base_loss": 0.7,
        "base_heldout": [1.0, 1.2, 1.1, 0.9],
        "prefix_seconds": 1.0,
        "full_step_seconds": 0.5,
        "plan": {
            "weight_decay": 0.01,
            "linearity": {"train": difference, "heldout": difference / 2},
            "recommended": {"r": 2, "rank_pattern": {}},
            "bounds": {"landscape": {"paper": 16}},
            "processor_seconds": 5.1,
        },
        "methods": {
            **{f"r={r}": method(r, f, [0.5 + f, 0.6, 0.4, 0.5]) for r, f in reached.items()},
            "EVA": {"name": "EVA", "failed": "ValueError: no"},
        },
    }


def test_figures_of_the_table() -> None:
    one = part()
    assert captured(one, one["methods"]["r=2"]) == pytest.approx(0.4 / 0.5)
    assert captured(one, None) == 0 and captured(one, one["methods"]["r=16"]) == 1
    chosen = choices(one)
    assert chosen["plan"] is one["methods"]["r=2"] and chosen["data size"] is one["methods"]["r=8"]
    assert chosen["paper"] is one["methods"]["r=16"] and "AdaLoRA" not in chosen
    assert [data_size_rank(n) for n in (999, 1000, 10_000, 100_000)] == [8, 16, 32, 64]
    # Excess of r = 1 over r = 8 is 0.3, 0, 0, 0: mean 0.075, standard error 0.075.
    assert within_error(one, one["methods"]["r=1"]["heldout"]) == (pytest.approx(0.075), True)
    assert not within_error(one, one["base_heldout"])[1]
    assert duel(one, chosen["plan"], chosen["data size"] or {}) == -1
    good = part(plan=0.205)
    assert duel(good, choices(good)["plan"], good["methods"]["r=8"]) == 1  # fewer parameters, and enough
    assert duel(good, choices(good)["plan"], good["methods"]["r=1"]) == 1
    assert duel(one, choices(one)["plan"], one["methods"]["r=1"]) == 1  # neither is enough: the larger share


def test_threshold_is_the_first_failure() -> None:
    good = [part(difference=d, plan=0.2, scored=False) for d in (0.1, 0.9)]
    bad = [part(difference=d, plan=0.3, scored=False) for d in (0.6, 0.8)]
    assert threshold([*good, *bad]) == 0.6 and threshold(good) == float("inf")
    text = tables([*good, *bad, part("scored one"), part("warned", difference=0.99)])
    assert "first failure is at 0.60; every plan up to 0.10 transferred" in text
    assert "captures 98% on 0 of them" in text and "| failed |" in text and "80.0% (r 2)" in text
    unfinished = copy.deepcopy(part("unfinished"))
    del unfinished["methods"]["r=4"]
    assert "0 scored cases" in tables([unfinished]) and "| unfinished" not in tables([unfinished])


def test_parts_are_taken_up_only_for_the_same_case_and_rule(tmp_path: Path) -> None:
    case = SCORED[0]
    content = {"schema": advice.SCHEMA, "case": case.to_json(), "rule": advice.rule_json(), "methods": {}}
    assert advice.read(tmp_path, case) is None
    advice.write(tmp_path, content)
    assert advice.read(tmp_path, case) == json.loads(json.dumps(content))
    assert not advice.done(advice.read(tmp_path, case))
    advice.write(tmp_path, {**content, "rule": {**advice.rule_json(), "steps": 7}})
    assert advice.read(tmp_path, case) is None
    (tmp_path / f"{case.name}.json").write_text("{")  # cut off
    assert advice.read(tmp_path, case) is None


def test_cases_are_what_the_comparison_asks_for() -> None:
    assert len(SCORED) >= 8 and len({case.name for case in CASES}) == len(CASES)
    assert len({case.model for case in SCORED}) >= 2 and len({case.data for case in SCORED}) >= 3
    assert {min(c.samples for c in SCORED), max(c.samples for c in SCORED)} == {32, 256}
    assert len({case.targets for case in SCORED}) >= 3 and len({case.weight_decay for case in SCORED}) >= 3
    assert not any(case.scored for case in UNSCORED)
    assert not {(c.data, c.seed) for c in UNSCORED} & {(c.data, c.seed) for c in SCORED}
    assert len(CASES) == 26 and len(WIDER) >= 8 and all(case.scored for case in WIDER)
    assert {case.task for case in WIDER} == {"text", "prompt", "image", "speech"}
    assert max(case.samples for case in WIDER) == 512 and any("5" in case.data for case in WIDER)
    assert {case.layers for case in WIDER} == {"last", "all"}
    assert all(case.samples <= 64 for case in WIDER if case.layers == "all")


def test_mail_bodies_lose_what_gives_the_label_away() -> None:
    mail = (
        "From: a@b.c\nSubject: cheap\nX-Spam: yes\nContent-Type: text/html\n\n"
        "<html><style>p {}</style><p>Buy &amp; save</p> http://x.y/z now</html>"
    )
    assert plain_body(mail) == "Buy & save now"


def test_unknown_case_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert advice.main(["--only", "nothing"]) == 2
    captured_text = capsys.readouterr()
    assert captured_text.err.count("\n") == 1 and "nothing" in captured_text.err
