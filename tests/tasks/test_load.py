"""Tasks by name: what goes where, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import ranksure
from ranksure.bundled.names import DATA, MODELS, named_data, named_model
from ranksure.data.images import ImageRows, image_rows
from ranksure.data.texts import Rows
from ranksure.errors import DataError, SettingError
from ranksure.planner.settings import PlanSettings
from ranksure.runs.fitting.settings import FitSettings
from ranksure.runs.saved.data import DataSettings
from ranksure.tasks.load import KINDS, load_samples, load_task
from ranksure.tasks.options import Loading, ModelOptions, RowOptions, TaskOptions, values_of
from ranksure.tasks.text import TextTask
from tests.refusals import refusal
from tests.tiny_text import save_bert, save_csv


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return load_samples("text", save_csv(tmp_path_factory.mktemp("load") / "two.csv", 20))


def pictures() -> ImageRows:
    return image_rows([np.zeros((4, 4), np.uint8)] * 4, [0, 1, 0, 1], label_names=("a", "b"))


def test_texts(texts, tmp_path):
    assert isinstance(texts, Rows) and load_samples("prompt", texts) is texts
    task = load_task("text", save_bert(tmp_path / "bert"), texts)
    assert isinstance(task, TextTask) and task.kind == "text"
    assert task.record() == {"kind": "text", "pooling": "model", "max_length": 32}


def test_an_unknown_task(texts):
    for call in (lambda: load_samples("video", "x"), lambda: load_task("video", "m", texts)):
        with pytest.raises(SettingError, match="unknown task 'video': use text, prompt, image or speech"):
            call()
    with pytest.raises(SettingError, match="unknown task 'video'"):
        ranksure.plan("m", texts, task="video")


def test_inputs_of_another_kind(texts):
    with pytest.raises(DataError, match="holds texts, but the task image needs images"):
        load_samples("image", texts)
    with pytest.raises(DataError, match="holds images, but the task prompt needs texts"):
        load_samples("prompt", pictures())
    with pytest.raises(SettingError, match="squared error is for texts"):
        load_samples("image", "photos", regression=True)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("text", {"template": "{text}"}, "`template` has no meaning for the task text: it is for prompt"),
        ("text", {"image_size": 8}, "`image_size` has no meaning"),
        ("prompt", {"pooling": "mean"}, "`pooling` mean has no meaning"),
        ("prompt", {"loss": "logistic"}, "`loss` logistic has no meaning"),
        ("image", {"max_length": 8}, "`max_length` has no meaning .* text and prompt"),
        ("speech", {"verbalizers": "a=b"}, "`verbalizers` has no meaning"),
        ("text", {"max_seconds": 1.0}, "`max_seconds` has no meaning"),
    ],
)
def test_options_of_another_task(texts, kind, options, named):
    with pytest.raises(SettingError, match=named):
        load_task(kind, "m", texts, **options)


def test_names_give_way_to_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(MODELS, "minilm", lambda: tmp_path / "found")
    monkeypatch.setitem(DATA, "asterisk", ("speech", lambda: "rows"))
    assert named_model("minilm") == str(tmp_path / "found") and named_data("asterisk") == "rows"
    assert named_model("other/minilm") == "other/minilm" and named_data(tmp_path) == tmp_path
    (tmp_path / "minilm").mkdir()
    (tmp_path / "asterisk").mkdir()
    assert named_model("minilm") == "minilm" and named_data("asterisk") == "asterisk"


def load_toy(model: Any, rows: Rows, **options: Any) -> Any:
    return {"model": model, "rows": rows, **options}


def test_a_new_kind_is_a_row_of_the_table(texts, monkeypatch):
    """It gets its own options and those of loading, and the options of others are refused for it by name."""
    row = replace(KINDS["text"], load="tests.tasks.test_load:load_toy", options=("template",))
    monkeypatch.setitem(KINDS, "toy", row)
    assert load_samples("toy", texts) is texts
    found: Any = load_task("toy", "m", texts, processor="p", template="{text}", seed=3)
    own = {"model": "m", "rows": texts, "tokenizer": "p", "template": "{text}"}
    assert found == {**own, **values_of(Loading(seed=3, batch_size=32), Loading)}
    for options, message in (
        ({"pooling": "mean"}, "`pooling` mean has no meaning for the task toy: it is for text"),
        ({"max_length": 4}, "`max_length` has no meaning for the task toy: it is for text and prompt"),
    ):
        refusal(SettingError, [message], load_task, "toy", "m", texts, **options)
    refusal(SettingError, ["it is for prompt and toy"], load_task, "image", "m", texts, template="{text}")
    refusal(SettingError, ["text, prompt, image, speech or toy"], load_task, "video", "m", texts)
    refusal(TypeError, ["unheard_of"], load_task, "toy", "m", texts, unheard_of=1)


def test_settings_share_their_options():
    """A plan, a fit and the data of a run have the same defaults for the same names."""
    shared = values_of(TaskOptions(), TaskOptions)
    assert values_of(FitSettings(), TaskOptions) == shared
    assert values_of(PlanSettings(), TaskOptions) == {**shared, "batch_size": 32}
    assert values_of(DataSettings(), RowOptions) == values_of(RowOptions(), RowOptions)
    assert set(ModelOptions.__dataclass_fields__) >= {name for row in KINDS.values() for name in row.options}
    assert set(RowOptions.__dataclass_fields__) >= {name for row in KINDS.values() for name in row.columns}
