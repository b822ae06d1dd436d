from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksure.data.texts import Rows, load_rows
from ranksure.errors import DataError, SettingError
from tests.refusals import refusal

TEXTS = ["good, really", "bad\nawful", 'so "so"', "fine"]
LABELS = ["pos", "neg", "neg", "pos"]
FRAME = pd.DataFrame({"text": TEXTS, "label": LABELS, "other": [1.5, None, 2.0, 3.0]})


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fails(source: Any, *parts: str, error: type[Exception] = DataError, **options: Any) -> str:
    return refusal(error, parts, load_rows, source, **options)


def frame(labels: list[Any], **columns: list[Any]) -> pd.DataFrame:
    texts = [f"text {i}" for i in range(len(labels))]
    return pd.DataFrame({"text": texts, "label": pd.Series(labels, dtype=object), **columns})


def labelled(labels: list[Any], **options: Any) -> Rows:
    return load_rows(frame(labels), **options)


# ---------------------------------------------------------------------------------------------------------------------
# sources


@pytest.fixture(params=["csv", "tsv", "jsonl", "json", "array", "parquet", "frame", "dataset", "saved", "dict"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    kind, data = request.param, datasets.Dataset.from_pandas(FRAME)
    if kind == "csv":
        FRAME.to_csv(path := tmp_path / "data.csv", index=False)
        return path
    if kind == "tsv":
        FRAME.to_csv(path := tmp_path / "data.TSV", index=False, sep="\t")
        return str(path)
    if kind in ("jsonl", "json"):
        FRAME.to_json(path := tmp_path / f"data.{kind}", orient="records", lines=True)
        return path
    if kind == "array":
        return write(tmp_path / "data.json", json.dumps(FRAME[["text", "label"]].to_dict("records"), indent=1))
    if kind == "parquet":
        FRAME.to_parquet(path := tmp_path / "data.parquet")
        return path
    if kind == "saved":
        data.save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved")
    if kind == "dict":
        datasets.DatasetDict(test=data.select([0]), train=data).save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"
    return {"frame": FRAME, "dataset": data}[kind]


def test_every_source_reads_alike(source: Any) -> None:
    rows = load_rows(source)
    assert rows.texts == TEXTS
    assert rows.label_names == ["neg", "pos"]
    assert rows.labels == [1, 0, 0, 1]
    assert all(type(label) is int for label in rows.labels)
    assert rows.pairs is None and rows.notes == [] and len(rows) == 4


def test_every_source_names_its_columns_when_one_is_missing(source: Any) -> None:
    fails(source, "no column 'labels'", "'text', 'label'", "did you mean 'label'?", label_column="labels")


def test_pairs_and_column_names(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", "id,premise,hypothesis,gold\n1,a,b,x\n2,c,d,y\n")
    rows = load_rows(path, text_column="premise", text_pair_column="hypothesis", label_column="gold")
    assert rows.texts == ["a", "c"] and rows.pairs == ["b", "d"]
    assert rows.subset([1]).pairs == ["d"]
    fails(path, "'premise' is two", error=SettingError, text_column="premise", text_pair_column="premise")


def test_checksum_of_file_and_of_content(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", "text,label\na,x\nb,y\n")
    assert load_rows(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    table = pd.DataFrame({"text": ["a", "b"], "label": ["x", "y"]})
    data = datasets.Dataset.from_pandas(table)
    assert load_rows(table).sha256 == load_rows(data).sha256
    assert load_rows(table.assign(label=["y", "x"])).sha256 != load_rows(table).sha256
    assert load_rows(table.assign(text=["ab", "b"])).sha256 != load_rows(table).sha256


def test_byte_order_mark(tmp_path: Path) -> None:
    for name, content in {
        "d.csv": "text,label\né,x\nb,y\n",
        "d.jsonl": '{"text": "é", "label": "x"}\n{"text": "b", "label": "y"}\n',
    }.items():
        rows = load_rows(write(tmp_path / name, b"\xef\xbb\xbf" + content.encode()))
        assert rows.texts == ["é", "b"] and rows.label_names == ["x", "y"]


def test_line_ends_and_blank_lines(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        path = write(tmp_path / "d.csv", end.join(["", "text,label", "a,x", "", '"b', 'c",y', "", ""]))
        assert [text.splitlines() for text in load_rows(path).texts] == [["a"], ["b", "c"]]
    path = write(tmp_path / "d.jsonl", '\r\n{"text": "a\u2028b", "label": 1}\r\n\r\n{"text": "c", "label": 0}')
    assert load_rows(path).texts == ["a\u2028b", "c"]


def test_words_for_missing_stay_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", "text,label\nNA,0\nnull,1\nnan,1\n")
    assert load_rows(path).texts == ["NA", "null", "nan"]


def test_tsv_with_plain_quotation_marks(tmp_path: Path) -> None:
    path = write(tmp_path / "d.tsv", 'text\tlabel\n"good" film\t1\n" open\t0\n')
    rows = load_rows(path)
    assert rows.texts == ['"good" film', '" open'] and rows.labels == [1, 0]
    assert "quotation marks" in rows.notes[0]


def test_long_texts_are_cut_and_told(tmp_path: Path) -> None:
    csv.field_size_limit(131_072)  # Python's default, which must neither stop the file nor be left changed
    path = write(tmp_path / "d.csv", f"text,label\n{'a' * 1_000_000},x\n{'b' * 100_000},y\n{'c' * 100_001},y\n")
    rows = load_rows(path)
    assert [len(text) for text in rows.texts] == [100_000] * 3
    assert rows.notes == [
        "2 texts longer than 100,000 characters in column 'text' were truncated (the longest had 1,000,000)."
    ]
    assert csv.field_size_limit() == 131_072


def test_dataset_format_is_ignored() -> None:
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [3, 5]}).with_format("torch")
    assert load_rows(data).label_names == ["3", "5"]


@pytest.fixture
def class_label_data() -> datasets.Dataset:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["world", "sports", "arts"])}
    )
    return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}, features=features)


def test_class_label_names_are_kept(class_label_data: datasets.Dataset, tmp_path: Path) -> None:
    class_label_data.to_parquet(tmp_path / "d.parquet")
    for source in (class_label_data, tmp_path / "d.parquet"):
        rows = load_rows(source)
        assert rows.label_names == ["world", "sports", "arts"] and rows.labels == [2, 0]
        assert "no row of 'sports'" in rows.notes[0]
    fails(class_label_data, "holds classes", regression=True)


def test_hidden_class_labels(class_label_data: datasets.Dataset) -> None:
    features = class_label_data.features
    hidden = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, -1]}, features=features)
    fails(hidden, "row 2", "missing (-1)", "split with labels")


def test_splits(tmp_path: Path) -> None:
    data = datasets.Dataset.from_pandas(FRAME)
    both = datasets.DatasetDict(train=data, test=data.select([0, 1, 2]))
    assert len(load_rows(both)) == 4
    assert len(load_rows(both, split="test")) == 3
    assert load_rows(both, split="test").source == "data set [test]"
    assert len(load_rows(datasets.DatasetDict(dev=data))) == 4
    fails(both, "no split 'dev'", "train, test", split="dev")
    fails(datasets.DatasetDict(a=data, b=data), "no split 'train'", "a, b")
    fails(data, "one split already", error=SettingError, split="test")
    fails(FRAME, "a data frame", error=SettingError, split="test")
    path = write(tmp_path / "d.csv", "text,label\na,x\nb,y\n")
    fails(path, "d.csv", "a single file", error=SettingError, split="test")


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None = None, split: str | None = None) -> Any:
        asked.append((path, name, split))
        data = datasets.Dataset.from_pandas(FRAME)
        return data if split else datasets.DatasetDict(train=data, test=data.select([0, 1]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_rows("owner/name")) == 4
    assert load_rows("nyu-mll/glue:sst2").source == "nyu-mll/glue:sst2 [train]"
    assert len(load_rows("owner/name-v1.0", split="train[:4]")) == 4
    assert asked == [("owner/name", None, None), ("nyu-mll/glue", "sst2", None), ("owner/name-v1.0", None, "train[:4]")]


def test_hub_offline() -> None:
    message = fails("no-such-owner/no-such-name", "no such file or folder", "Hub", "connection")
    assert "owner/name:configuration" in message


# ---------------------------------------------------------------------------------------------------------------------
# sources that cannot be read


def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "reviews.csv", "")
    fails(tmp_path / "review.csv", "review.csv", "near matches: reviews.csv")
    fails(tmp_path / "xyz.jsonl", "no such file")
    fails(tmp_path / "folder" / "d.csv", "no folder")
    monkeypatch.chdir(tmp_path)
    for name in ("review.csv", "./reviews", "reviews.xlsx"):  # plainly files, so no word of the Hub
        assert "Hub" not in fails(name, "no such file", "reviews.csv")
    assert "reviews.csv" in fails("review_csv", "Hub")  # may be either
    fails("what is this?", "neither a file")
    fails("x" * 5000 + ".csv", "cannot be read")


def test_folders(tmp_path: Path) -> None:
    fails(tmp_path, "not one that datasets.save_to_disk wrote", "name a file")
    write(tmp_path / "a.csv", "")
    fails(str(tmp_path), "(a.csv)")
    write(tmp_path / "state.json", "{}")
    fails(tmp_path, "damaged")


@pytest.mark.parametrize("name", ["d.txt", "d.csv.gz", "data"])
def test_unknown_extension(tmp_path: Path, name: str) -> None:
    fails(write(tmp_path / name, "text,label\na,x\n"), name, "not read", ".csv, .tsv, .jsonl, .json, .parquet")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path: Path, suffix: str, content: bytes) -> None:
    fails(write(tmp_path / f"d.{suffix}", content), f"d.{suffix} is empty", "'text', 'label'")


def test_no_rows(tmp_path: Path) -> None:
    fails(write(tmp_path / "d.csv", "text,label\n"), "d.csv", "header but no rows")
    fails(write(tmp_path / "d.json", "[]"), "d.json is empty")
    fails(FRAME.iloc[:0], "data frame is empty")
    FRAME.iloc[:0].to_parquet(tmp_path / "d.parquet")
    fails(tmp_path / "d.parquet", "d.parquet is empty")


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl"])
def test_not_utf8(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "text,label\nok,x\ncafé,y\n".encode("latin-1"))
    fails(path, name, "byte 0xe9 at offset 19 (line 3)", f"iconv -f WINDOWS-1252 -t UTF-8 {name} >")
    fails(write(path, b"\xef\xbb\xbf" + path.read_bytes()), "offset 22 (line 3)")
    fails(write(path, "text,label\n".encode("utf-16")), "offset 0", "iconv -f UTF-16")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("text,label\na,x\nb,c,y\n", ["line 3 has 3 fields", "header has 2"]),
        ('text,label\n"a\nb",x\nc\n', ["line 4 has 1 field,", "header has 2"]),
        ('text,label\na,x\n"b,y\nc,x\n', ["starts on line 3", "quotation marks"]),
        ('text,label\na,x\n"b"c,y\n', ["starts on line 3", "quotation marks"]),
        ("text,text,label\na,b,x\n", ["2 columns named 'text'"]),
        ("a,x\nb,y\n", ["no column 'text'", "'a', 'x'"]),
    ],
)
def test_malformed_csv(tmp_path: Path, content: str, parts: list[str]) -> None:
    fails(write(tmp_path / "d.csv", content), "d.csv", *parts)


def test_malformed_tsv(tmp_path: Path) -> None:
    fails(write(tmp_path / "d.tsv", "text\tlabel\na\tx\nb\n"), "line 3 has 1 field")


GOOD = '{"text": "a", "label": 1}\n'


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (GOOD + '{"text": "b", "label": }\n', ["line 2 is not valid JSON", "column 24"]),
        (GOOD + "\n[1, 2]\n", ["row 2 is [1, 2], not an object"]),
        (GOOD + '{"text": "b", "text": "c", "label": 0}', ["line 2 has 'text' more than once"]),
        (GOOD + '{"label": 0}', ["row 2 (line 2), column 'text'", "missing"]),
        (GOOD + '\n{"text": "b", "label": NaN}', ["row 2 (line 3), column 'label'", "nan is not finite"]),
        (GOOD + '{"text": "b", "label": null}', ["row 2 (line 2)", "the label is missing"]),
        (GOOD + '{"text": "b", "label": [1]}', ["row 2 (line 2)", "[1] is a list"]),
        (GOOD + '{"text": 5, "label": 0}', ["row 2 (line 2)", "5 is not text but of type int"]),
        (GOOD + '{"text": "\\ud800", "label": 0}', ["row 2 (line 2)", "surrogate"]),
        (GOOD + '{"text": "b", "label": ' + "1" * 5000 + "}", ["line 2 cannot be read"]),
        (GOOD + "[" * 100_000, ["line 2"]),
        ('[{"text": "a",\n "label": 1},\n {]', ["line 3 is not valid JSON"]),
    ],
)
def test_malformed_json(tmp_path: Path, content: str, parts: list[str]) -> None:
    fails(write(tmp_path / "d.jsonl", content), "d.jsonl", *parts)


def test_malformed_parquet(tmp_path: Path) -> None:
    fails(write(tmp_path / "d.parquet", b"PAR1 no"), "not a readable Parquet file")


def test_duplicate_frame_columns() -> None:
    fails(pd.DataFrame([["a", "b", 1]], columns=["text", "text", "label"]), "2 columns named 'text'")
    twice = pd.DataFrame([["a", 0, 0, 1], ["b", 0, 0, 2]], columns=["text", "x", "x", "label"])
    assert len(load_rows(twice)) == 2  # a column that is not asked for does no harm


@pytest.mark.parametrize("source", [5, None, ["a"], iter([])])
def test_unknown_source(source: Any) -> None:
    fails(source, type(source).__name__, error=SettingError)


# ---------------------------------------------------------------------------------------------------------------------
# texts and labels


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        (None, ["the text is missing"]),
        (math.nan, ["the text is missing"]),
        (pd.NA, ["the text is missing"]),
        ("", ["the text is missing"]),
        (" \t\n\u00a0", ["only white space"]),
        (7.5, ["7.5 is not text but of type float"]),
        (b"x", ["not text but of type bytes"]),
        (["x"], ["not text but of type list"]),
    ],
)
def test_bad_texts(bad: Any, parts: list[str]) -> None:
    texts = pd.Series(["a", "b", bad, "d"], dtype=object)
    table = pd.DataFrame({"text": texts, "label": [0, 1, 0, 1], "good": list("abcd")})
    fails(table, "row 3, column 'text'", *parts)
    fails(table, "row 3, column 'text'", *parts, text_column="good", text_pair_column="text")


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        ([1, 0, 1], ["0", "1"], [1, 0, 1]),
        ([10, 9, -1], ["-1", "9", "10"], [2, 1, 0]),
        ([1.0, 0.0, 1.0], ["0", "1"], [1, 0, 1]),
        (["10", "9", "9"], ["9", "10"], [1, 0, 0]),
        (["10", "9", " 9 "], [" 9 ", "10", "9"], [1, 2, 0]),
        (["1.0", "0", "1"], ["0", "1", "1.0"], [2, 0, 1]),
        (["02116", "2116", "10001"], ["02116", "10001", "2116"], [0, 2, 1]),
        (["010", "10", "1e1", "+10", "10.0"], ["+10", "010", "10", "10.0", "1e1"], [1, 2, 4, 0, 3]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
        (["true", "FALSE", "True"], ["FALSE", "True", "true"], [2, 0, 1]),
        (["true", "maybe", "1", "1"], ["1", "maybe", "true"], [2, 1, 0, 0]),
        (["b ", "B", "a"], ["B", "a", "b "], [2, 0, 1]),
        (["caf\u00e9", "cafe\u0301", "x"], ["cafe\u0301", "caf\u00e9", "x"], [1, 0, 2]),
        (
            ["nan", "inf", "-inf", "NA", "null", "word"],
            ["-inf", "NA", "inf", "nan", "null", "word"],
            [3, 2, 0, 1, 4, 5],
        ),
        (["inf", "nan", "nan"], ["inf", "nan"], [0, 1, 1]),
        (["10", "9", "x"], ["10", "9", "x"], [0, 1, 2]),
        (["1_0", "9", "9"], ["1_0", "9"], [0, 1, 1]),
        ([0.5, 2, 0.5, 2, 1.5, 1.5], ["0.5", "1.5", "2"], [0, 2, 0, 2, 1, 1]),
        (["None", "neutral", "None"], ["None", "neutral"], [0, 1, 0]),
        (["none", "NA", "NA"], ["NA", "none"], [1, 0, 0]),
        ([np.int64(3), np.float32(4), np.True_], ["3", "4", "True"], [0, 1, 2]),
    ],
)
def test_class_names_and_ids(labels: list[Any], names: list[str], ids: list[int]) -> None:
    rows = labelled(labels)
    assert rows.label_names == names
    assert rows.labels == ids


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (None, "is missing"),
        ("", "is missing"),
        (" ", "is missing"),
        (pd.NA, "is missing"),
        (pd.NaT, "is missing"),
        (math.nan, "nan is not finite"),
        (-math.inf, "-inf is not finite"),
        ("NaN", "'NaN' is not finite"),
        ("inf", "'inf' is not finite"),
        ("1e999", "inf is not finite"),
        ("NA", "'NA' is missing"),
        ("null", "'null' is missing"),
        ([1], "[1] is a list"),
        (b"x", "of type bytes"),
        (pd.Timestamp("2020-01-01"), "of type Timestamp"),
    ],
)
@pytest.mark.parametrize("regression", [False, True])
def test_bad_labels(bad: Any, what: str, regression: bool) -> None:
    table = frame([1, 0, bad, 1])
    fails(table, "row 3, column 'label'", what, regression=regression)


def test_one_class() -> None:
    fails(frame(["x", "x"]), "every row has the label 'x'", "two classes")
    fails(frame([2, 2]), "every row has the label '2'")
    fails(frame([2, 2]), "every row has the target 2.0", regression=True)


@pytest.mark.parametrize(
    "names", [["x", "x "], ["1", "1.0"], ["true", "True"], ["caf\u00e9", "cafe\u0301"], ["a", "A"]]
)
def test_names_that_differ_in_spelling_only_are_kept_apart_and_told(names: list[str]) -> None:
    rows = labelled(names)
    assert sorted(rows.label_names or []) == sorted(names)
    assert len(rows.notes) == 1 and "are 2 classes, as the data has them" in rows.notes[0]


def test_one_name_for_a_text_and_a_number() -> None:
    fails(frame(["1", 0, 1]), "row 3", "'1' is of type int here and of type text in row 1", "in one way")
    fails(frame([True, "x", "True"]), "row 3", "'True' is of type text here and of type bool in row 1")


CODES = ["02116", "2116", "10001", "010", "nan", "NA", "1e3", "1.0", "1", "x "]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "dataset", "saved", "hub", "hub parquet"])
def test_codes_are_the_same_classes_in_every_source(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's own CSV reader makes numbers of them, and nothing of ``NA``."""
    table = pd.DataFrame({"text": [f"t {i}" for i in range(len(CODES))], "label": CODES, "size": range(len(CODES))})
    data = datasets.Dataset.from_pandas(table)
    source: Any = {"dataset": data, "saved": tmp_path / "saved"}.get(kind, tmp_path / f"data.{kind}")
    if kind == "saved":
        data.save_to_disk(source)
    elif kind == "jsonl":
        table.to_json(source, orient="records", lines=True)
    elif kind in ("parquet", "hub parquet"):
        table.to_parquet(source)
    elif kind != "dataset":
        table.to_csv(source, index=False, sep="\t" if kind == "tsv" else ",")
    if kind.startswith("hub"):
        builder, file, load = "parquet" if kind == "hub parquet" else "csv", str(source), datasets.load_dataset

        def of_the_hub(path: str, name: str | None = None, split: str | None = None, **more: Any) -> Any:
            return load(builder, data_files=file, split=split, cache_dir=str(tmp_path / "cache"), **more)

        monkeypatch.setattr(datasets, "load_dataset", of_the_hub)
        source = "owner/name"
    rows = load_rows(source)
    assert [(rows.label_names or [])[label] for label in rows.labels] == CODES


def test_zip_codes_of_a_hub_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them look like integers, so nothing in what is read tells that they were not."""
    file, load = str(write(tmp_path / "d.csv", "text,label\na,02116\nb,2116\nc,10001\n")), datasets.load_dataset

    def of_the_hub(path: str, name: str | None = None, split: str | None = None, **more: Any) -> Any:
        return load("csv", data_files=file, split=split, cache_dir=str(tmp_path / "cache"), **more)

    monkeypatch.setattr(datasets, "load_dataset", of_the_hub)
    assert load_rows("owner/name").label_names == ["02116", "10001", "2116"]
    assert load_rows("owner/name", regression=True).labels == [2116.0, 2116.0, 10001.0]


def test_labels_that_are_not_classes() -> None:
    fails(frame([0.1 * i for i in range(1, 9)]), "8 different labels in 8 rows", "`loss` squared-error")
    fails(frame([0.1, 0.2, 0.3, 0.4, 0.1]), "4 different labels in 5 rows", "`loss` squared-error")
    fails(frame(list(range(21))), "21 different labels in 21 rows", "`loss` squared-error")
    assert "squared-error" not in fails(frame([f"id{i}" for i in range(21)]), "choose another label column")
    fails(frame([i % 1001 for i in range(3000)]), "1,001 different labels", "at most 1,000")
    assert len(labelled([i % 1000 for i in range(3000)]).label_names or []) == 1000
    assert labelled(["a", "b", "c"]).labels == [0, 1, 2]


def test_regression() -> None:
    rows = labelled([1, "2.5", 3.0, -1e3], regression=True)
    assert rows.labels == [1.0, 2.5, 3.0, -1000.0] and rows.label_names is None
    assert all(type(label) is float for label in rows.labels)
    fails(frame([1, "high"]), "row 2", "'high' is not a number", regression=True)
    fails(frame([True, 2]), "row 1", "is not a number", regression=True)
    for huge in (1e300, -1e16, "1e16"):
        fails(frame([1, huge]), "row 2", "is beyond 1e+15", "overflows", regression=True)


def test_errors_do_not_quote_whole_texts() -> None:
    assert len(fails(frame([1, "x" * 100_000]), "is not a number", regression=True)) < 300


# ---------------------------------------------------------------------------------------------------------------------
# methods


def test_subset_keeps_the_classes() -> None:
    rows = labelled(["a", "b", "c", "a"]).subset(np.array([3, 0]))
    assert rows.texts == ["text 3", "text 0"] and rows.labels == [0, 0] and rows.label_names == ["a", "b", "c"]
    for index in (-1, 2):
        with pytest.raises(SettingError, match=f"row index {index} .* 0 to 1"):
            rows.subset([index])


def test_with_label_names() -> None:
    rows = labelled(["b", "c", "b"])
    mapped = rows.with_label_names(["a", "b", "c"])
    assert mapped.labels == [1, 2, 1] and mapped.label_names == ["a", "b", "c"]
    assert mapped.with_label_names(["c", "b"]).labels == [1, 0, 1]  # an unused class may be unknown
    with pytest.raises(DataError, match=r"'b' \(2 rows\).*'a', 'c'"):
        rows.with_label_names(["a", "c"])
    with pytest.raises(DataError, match="regression"):
        labelled([1.0, 2.0], regression=True).with_label_names(["a"])


def test_label_names_are_equal_exactly_before_they_are_as_values() -> None:
    assert labelled(["1.0", "0.0", "1.0"]).with_label_names(["1", "0"]).labels == [0, 1, 0]
    assert labelled([True, False]).with_label_names(["false", "true"]).labels == [1, 0]
    assert labelled(["a ", "b"]).with_label_names(["a", "b"]).labels == [0, 1]
    assert labelled(["1", "1.0"]).with_label_names(["1.0", "1"]).labels == [1, 0]
    for names, known in ((["010", "20"], ["10", "20"]), (["1", "1.0"], ["1", "2"]), (["1", "2"], ["1.0", "1.00", "2"])):
        with pytest.raises(DataError, match="which the training data does not have"):
            labelled(names).with_label_names(known)


class_lists = st.lists(st.integers(0, 5), min_size=2, max_size=120).filter(lambda labels: len(set(labels)) > 1)


@given(class_lists, st.integers(0, 2**32 - 1))
def test_every_prefix_of_a_shuffle_has_the_class_shares(labels: list[int], seed: int) -> None:
    table = pd.DataFrame({"text": [f"{i}" for i in range(len(labels))], "label": [f"c{label}" for label in labels]})
    if len(set(labels)) == len(labels) > 20:  # identifiers, refused
        return
    rows = load_rows(table)
    shuffled = rows.shuffled(seed)
    # A permutation that keeps each text with its label.
    assert sorted(shuffled.texts, key=int) == rows.texts
    assert [rows.labels[int(text)] for text in shuffled.texts] == shuffled.labels
    # The documented invariant.
    total = Counter(rows.labels)
    bound = 1 - 1 / (2 * len(total) - 2)
    seen: Counter[int] = Counter()
    for n, label in enumerate(shuffled.labels, start=1):
        seen[label] += 1
        for c, count in total.items():
            assert abs(seen[c] - n * count / len(rows)) <= bound + 1e-9


def test_shuffle_is_seeded_and_random() -> None:
    rows = labelled([i // 50 for i in range(100)])
    assert rows.shuffled(1) == rows.shuffled(1) != rows.shuffled(2)
    # A frozen stream: this order must never change, or results with a seed would.
    assert [int(text.split()[1]) for text in rows.shuffled(0).texts[:6]] == [86, 26, 55, 2, 75, 16]
    # Within a class each row is equally likely to come first; so is each class.
    first = Counter(rows.shuffled(seed).texts[0] for seed in range(2000))
    assert len(first) == 100 and max(first.values()) < 45
    assert 850 < sum(count for text, count in first.items() if int(text.split()[1]) < 50) < 1150


def test_shuffle_of_regression_of_part_and_of_nothing() -> None:
    rows = labelled([float(i) for i in range(20)], regression=True)
    assert sorted(rows.shuffled(3).labels) == rows.labels != rows.shuffled(3).labels
    part = labelled(["a", "b"] * 10).subset(range(0, 20, 2))  # one class left
    assert sorted(part.shuffled(0).texts) == sorted(part.texts)
    assert len(part.subset([]).shuffled(0)) == 0
    for seed in (-1, 2**32):
        with pytest.raises(SettingError, match="seed"):
            rows.shuffled(seed)
