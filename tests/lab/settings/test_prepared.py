"""Settings made ready: splits without overlap, heads and gradients that come back from disk as they were."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from ranksure.certificate import certify_point
from ranksure.data.texts import load_rows
from ranksure.errors import DataError, ModelError
from ranksure.lab.settings.parts import Parts
from ranksure.lab.settings.prepared import Prepared, split
from ranksure.lab.settings.run import SettingRun
from ranksure.network.logits import predict
from ranksure.progress import Silent
from tests.lab.tiny import tiny_setting
from tests.refusals import refusal
from tests.tiny_text import frame


def test_no_training_row_is_held_out_even_if_it_comes_twice():
    table = frame(40)
    rows = load_rows(pd.concat([table, table, table]).reset_index(drop=True))
    for seed in range(3):
        parts = split(rows, 30, 10, seed)
        train, select, report = (set(part.identities()) for part in (parts.train, parts.select, parts.report))
        assert not train & select and not train & report and not select & report
        assert len(parts.train) == 30 and len(parts.select) == len(select) and len(parts.report) == len(report)


def test_splits_depend_on_the_seed_alone():
    rows = load_rows(frame(120))
    first, again, other = split(rows, 8, 20, 1), split(rows, 8, 20, 1), split(rows, 8, 20, 2)
    assert first.train.identities() == again.train.identities() and first.report.labels == again.report.labels
    assert first.train.identities() != other.train.identities()
    assert sorted(first.train.labels) == [0] * 4 + [1] * 4


@pytest.mark.parametrize(("n", "message"), [(119, "too few"), (40, "no rows to hold out")])
def test_too_few_rows(n, message):
    table = frame(120) if n == 119 else pd.concat([frame(40), *[frame(40)] * 2])
    refusal(DataError, message, split, load_rows(table.reset_index(drop=True)), n if n == 119 else 110, 20, 0)


def test_training_rows_of_one_class():
    rows = load_rows(frame(120))
    ones = rows.subset([i for i, label in enumerate(rows.labels) if label == 1])
    refusal(DataError, "one class only", split, ones, 8, 10, 0)


def test_what_comes_back_from_disk_is_what_was_made(tmp_path):
    setting = tiny_setting(tmp_path)
    first = Prepared(setting, 0, Parts(tmp_path / "parts"), Silent())
    lam = 0.2 * first.lambda_max
    optimum = first.optimum(lam)
    head = first.task.model.get_submodule(first.task.head).state_dict()
    held = first.held_out
    parts = Parts(tmp_path / "parts")
    second = Prepared(setting, 0, parts, Silent())
    assert (
        second.optimum(lam).certificate == certify_point(second.problem.with_penalty(lam), optimum.factors).certificate
    )
    assert not parts.made and {kind for kind, _ in parts.found} == {"captured", "optimum"}
    assert torch.equal(first.problem.base_logits, second.problem.base_logits)
    for name, value in second.task.model.get_submodule(second.task.head).state_dict().items():
        assert torch.equal(value, head[name])
    batches, back = second.task.batches_by_length(second.splits.train)
    logits = predict(second.task.model, batches)[back]
    assert torch.allclose(logits.double(), second.problem.base_logits, atol=1e-5)
    assert torch.equal(second.held_out.base_logits, held.base_logits)
    assert float(first.problem.data_loss(first.problem.base_logits)) < 0.69  # the head was fitted


def test_the_optimum_is_certified(tmp_path):
    prepared = Prepared(tiny_setting(tmp_path), 0, Parts(tmp_path / "parts"), Silent())
    optimum = prepared.optimum(0.1 * prepared.lambda_max)
    assert optimum.status == "converged" and optimum.certificate.relative_gap <= 1e-7
    rank = prepared.paper_rank  # the smallest above the threshold
    assert rank * (rank + 1) / 2 > 2 * 8 >= rank * (rank - 1) / 2
    assert prepared.ranks([1, 2, 4, 50]) == [1, 2, 4, 6]


def test_only_some_classes(tmp_path):
    names = ("bad", "good", "odd")
    setting = tiny_setting(tmp_path, data=lambda: load_rows(frame(120, names)), classes=("odd", "good"))
    prepared = Prepared(setting, 0, Parts(tmp_path / "parts"), Silent())
    assert prepared.n_outputs == 2 and prepared.splits.train.label_names == ["odd", "good"]
    lost = tiny_setting(tmp_path, classes=("odd", "good"))
    refusal(DataError, "no class 'odd'", Prepared, lost, 0, Parts(tmp_path / "other"), Silent())


def test_what_is_not_installed_is_one_line_and_the_rest_runs(tmp_path):
    def lost():
        raise ModelError("the model is not installed; run: pip install something")

    run = SettingRun(parts=Parts(tmp_path / "parts"))
    seeds, missing = run.each(
        [(tiny_setting(tmp_path, "lost", model=lost), 0), (tiny_setting(tmp_path), 0), (tiny_setting(tmp_path), 1)],
        lambda prepared: [prepared.seed],
    )
    assert seeds == [0, 1]
    assert missing == ["Sentences (lost): not run: the model is not installed; run: pip install something"]
