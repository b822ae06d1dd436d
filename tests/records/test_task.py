"""``task.json``: written, read again, refused where it is damaged."""

from __future__ import annotations

import json

import pytest

from ranksure.errors import AdapterError
from ranksure.records.task import TASK_FILE, TaskRecord, carry_loss, read_task, write_task

RECORDS = [
    TaskRecord(kind="text", loss="logistic", labels=["no", "yes"], pooling="mean", max_length=12),
    TaskRecord(kind="text", loss="squared-error", pooling="model", max_length=12),
    TaskRecord(kind="prompt", loss="cross-entropy", labels=["a", "b"], verbalizers={"a": "x"}, offsets=[0.5, -0.5]),
    TaskRecord(kind="CAUSAL_LM", loss="cross-entropy", weighting="sample", loss_on="all", max_length=9),
    TaskRecord(kind="speech", loss="cross-entropy", labels=["a"], max_seconds=1.5),
]


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_comes_back(record, tmp_path):
    write_task(tmp_path, record)
    assert read_task(tmp_path) == record
    content = json.loads((tmp_path / TASK_FILE).read_text())
    assert content["schema"] == 2 and content["labels"] == record.labels
    assert all(value is not None for name, value in content.items() if name != "labels")


def test_schema_1_says_no_loss(tmp_path):
    (tmp_path / TASK_FILE).write_text(json.dumps({"schema": 1, "labels": ["a", "b"], "kind": "text", "max_length": 8}))
    found = read_task(tmp_path)
    assert found is not None and found.loss is None and found.labels == ["a", "b"]
    assert read_task(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"schema": 3, "kind": "text"}',
        '{"schema": 2, "loss": "hinge"}',
        '{"schema": 2, "loss": 3}',
        '{"schema": 2, "labels": "ab"}',
        '{"schema": 2, "offsets": [null]}',
        '{"schema": 2, "weighting": "row"}',
        "[" * 100_000,
    ],
)
def test_a_damaged_record_is_named(content, tmp_path):
    (tmp_path / TASK_FILE).write_text(content)
    with pytest.raises(AdapterError, match=rf"{TASK_FILE} cannot be read .* restore it, or remove it and name `task`"):
        read_task(tmp_path)


def test_a_loss_that_was_given_is_kept(tmp_path):
    carry_loss(tmp_path, None)
    assert not (tmp_path / TASK_FILE).exists()
    carry_loss(tmp_path, "logistic")
    assert read_task(tmp_path) == TaskRecord(loss="logistic")
    write_task(tmp_path, RECORDS[1])
    before = (tmp_path / TASK_FILE).read_bytes()
    carry_loss(tmp_path, "logistic")  # the adapter's own word stands
    assert (tmp_path / TASK_FILE).read_bytes() == before
