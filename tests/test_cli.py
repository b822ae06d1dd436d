"""The command line: every mistake is one clear line and exit code 2, with nothing written."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

from tests.commands import call
from tests.processes import command, ended_at, run
from tests.tiny_text import frame, loaded, save_bert, save_csv, save_tokenizer, strict_json

SMALL = ["--target-modules", "query,value", "--layers-to-transform", "last", "--samples", "16", "--linearised"]
QUICK = [*SMALL, "--weight-decay", "10%", "--ranks", "1", "--random-starts", "0", "--heldout", "12"]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("assets")
    save_bert(root / "bert")
    save_csv(root / "data.csv", 60)
    return root


@pytest.fixture
def here(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with the model and the data in it."""
    (tmp_path / "bert").symlink_to(assets / "bert")
    shutil.copy(assets / "data.csv", tmp_path / "data.csv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


def write_data(here: Path, kind: str) -> None:
    data = frame(60)
    if kind == "one class":
        data["label"] = "good"
    elif kind == "infinite":
        data["label"] = [0.5, float("inf")] * 30
    elif kind == "no label":
        data.loc[7, "label"] = None
    elif kind == "no text":
        data.loc[7, "text"] = None
    path = here / "bad.csv"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "header":
        path.write_text("text,label\n")
    elif kind == "latin":
        path.write_bytes(data.to_csv(index=False).encode() + "café,good\n".encode("latin-1"))
    elif kind == "binary":
        path.write_bytes(bytes(range(256)) * 20)
    else:
        data.to_csv(path, index=False)


def write_model(here: Path, kind: str) -> None:
    folder = here / "broken"
    if kind == "nan":
        model = loaded(str(here / "bert"))
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
        model.bert.save_pretrained(folder)
        save_tokenizer(folder)
    elif kind == "half":
        shutil.copytree(here / "bert", folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "no tokenizer":
        shutil.copytree(here / "bert", folder)
        for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink(missing_ok=True)
    elif kind == "empty":
        folder.mkdir()


MISTAKES: list[tuple[str, list[str], list[str]]] = [
    ("missing file", ["--data", "dota.csv"], ["dota.csv", "data.csv"]),
    ("missing column", ["--text-column", "txt"], ["txt", "text"]),
    ("missing label column", ["--label-column", "lable"], ["lable", "label"]),
    ("data: empty", [], ["bad.csv", "empty"]),
    ("data: header", [], ["bad.csv", "no rows"]),
    ("data: one class", [], ["bad.csv", "'good'", "two classes"]),
    ("data: infinite", [], ["not finite", "row 2"]),
    ("data: no label", [], ["label is missing", "row 8"]),
    ("data: no text", [], ["text is missing", "row 8"]),
    ("data: latin", [], ["not UTF-8", "iconv"]),
    ("data: binary", [], ["bad.csv"]),
    ("too many samples", ["--samples", "61"], ["61", "60 rows"]),
    ("too few samples", ["--samples", "1"], ["at least 4"]),
    ("no rows to choose on", ["--samples", "50", "--weight-decay", "auto"], ["--eval-data"]),
    ("unknown module", ["--target-modules", "qery"], ["qery", "query"]),
    ("unknown layer", ["--layers-to-transform", "7"], ["layer 7", "0 to 1"]),
    ("rank too large", ["--ranks", "1,17"], ["rank 17", "16 x 16"]),
    ("bad ranks", ["--ranks", "1,two"], ["--ranks", "whole numbers"]),
    ("rank zero", ["--ranks", "0"], ["--ranks", "at least 1"]),
    ("no ranks", ["--ranks", ","], ["--ranks"]),
    ("negative weight decay", ["--weight-decay", "-0.1"], ["-0.1", "positive"]),
    ("zero weight decay", ["--weight-decay", "0"], ["dual is trivial", "no minimiser"]),
    ("weight decay in words", ["--weight-decay", "big"], ["big", "auto"]),
    ("weight decay not a number", ["--weight-decay", "nan"], ["positive"]),
    ("bad memory", ["--memory", "lots"], ["--memory", "8GB"]),
    ("small memory", ["--memory", "150KB"], ["--target-modules", "--samples", "--memory", "matrix-free"]),
    ("absent model", ["--model", "./nowhere"], ["./nowhere", "does not exist"]),
    ("model is a file", ["--model", "./data.csv"], ["data.csv", "not a folder"]),
    ("absent Hub model", ["--model", "someone/no-such-model"], ["someone/no-such-model"]),
    ("model: empty", [], ["config.json"]),
    ("model: nan", [], ["not finite"]),
    ("model: half", [], ["cannot be loaded"]),
    ("model: no tokenizer", [], ["tokenizer"]),
    ("out is a file", ["--out", "data.csv"], ["data.csv", "file"]),
    ("out inside a file", ["--out", "data.csv/x"], ["data.csv"]),
    ("out holds other things", ["--out", "."], ["which no plan wrote"]),
    ("out cannot be written", ["--out", "/proc/ranksure/out"], ["/proc/ranksure/out", "cannot be written"]),
    ("bad loss", ["--loss", "hinge"], ["hinge", "cross-entropy"]),
    ("bad pooling", ["--pooling", "max"], ["max", "mean"]),
    ("bad device", ["--device", "abacus"], ["abacus"]),
    ("bad dtype", ["--dtype", "int3"], ["int3"]),
    ("bad length", ["--max-length", "4000"], ["4000", "32"]),
    ("negative starts", ["--random-starts", "-2"], ["--random-starts"]),
    ("merged and uniform", ["--merged", "--uniform"], ["exclude"]),
]


@pytest.mark.parametrize(("name", "options", "parts"), MISTAKES, ids=[m[0].replace(" ", "-") for m in MISTAKES])
def test_mistakes(here, monkeypatch, capfd, name, options, parts):
    arguments = ["plan", "--model", "bert", "--data", "data.csv", *QUICK, "--out", "new/out"]
    if name.startswith("data: "):
        write_data(here, name[6:])
        arguments += ["--data", "bad.csv"]
    if name.startswith("model: "):
        write_model(here, name[7:])
        arguments += ["--model", "./broken"]
    capfd.readouterr()
    before = listing(here)
    code = call(*arguments, *options, monkeypatch=monkeypatch)
    out, err = capfd.readouterr()
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert [line for line in lines if not line.startswith("done ")] == lines[-1:], err
    assert lines[-1].startswith("error ")
    for part in parts:
        assert part in lines[-1]
    assert listing(here) == before


@pytest.mark.parametrize("arguments", [["plan", "--sample", "3"], ["plan"], ["plan", "--model", "x"], ["nonsense"]])
def test_usage_errors(here, monkeypatch, capfd, arguments):
    assert call(*arguments, monkeypatch=monkeypatch) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "--help" in err


def test_a_number_that_is_not_one(here, monkeypatch, capfd):
    arguments = ["plan", "--model", "bert", "--data", "data.csv", "--samples", "many"]
    assert call(*arguments, monkeypatch=monkeypatch) == 2
    assert "--samples" in capfd.readouterr().err


def test_a_mistake_in_a_real_process(here):
    done = run(command("plan", "--model", "bert", "--data", "data.csv", *QUICK, "--weight-decay", "-1", "--out", "x"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error --weight-decay -1.0")
    assert not (here / "x").exists()


NOISY = """
import torch
from transformers import BertForSequenceClassification

class NoisyBert(BertForSequenceClassification):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + 1e-3 * torch.randn_like(out.logits)
        return out
"""


def test_a_model_that_is_not_deterministic(here, monkeypatch, capfd, tmp_path):
    """Code from the model's own folder, which adds noise to the logits."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(here / "bert", here / "noisy")
    (here / "noisy" / "noisy.py").write_text(NOISY)
    config = here / "noisy" / "config.json"
    reference = '"auto_map": {"AutoModelForSequenceClassification": "noisy.NoisyBert"},'
    config.write_text(config.read_text().replace("{", "{" + reference, 1))
    arguments = ["plan", "--model", "./noisy", "--data", "data.csv", *QUICK, "--out", "out"]
    code = call(*arguments, "--trust-remote-code", monkeypatch=monkeypatch)
    err = capfd.readouterr().err.splitlines()
    assert code == 2
    assert err[-1].startswith("error ")
    assert "deterministic" in err[-1]
    assert not (here / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# what works


def test_json_alone_on_standard_output(here):
    done = run(command("plan", "--model", "bert", "--data", "data.csv", *QUICK, "--json", "--out", "out"))
    assert done.returncode == 0, done.stderr
    data = strict_json(done.stdout)
    assert data["schema"] == 3
    assert "Answer" in done.stderr
    written = strict_json((here / "out" / "plan.json").read_text(encoding="utf-8"))
    assert written == data
    assert (here / "out" / "adapter" / "adapter_config.json").is_file()


def test_table_on_standard_output(here, monkeypatch, capfd):
    assert call("plan", "--model", "bert", "--data", "data.csv", *QUICK, monkeypatch=monkeypatch) == 0
    out, err = capfd.readouterr()
    for part in ("What theory says", "What each rank reaches", "Answer", "LoraConfig(", "captured"):
        assert part in out
    assert all(line.startswith("done ") for line in err.splitlines())
    assert "Traceback" not in err
    assert sorted(path.name for path in here.iterdir()) == ["bert", "data.csv"]  # no --out, no files


def test_running_twice_replaces(here, monkeypatch, capfd):
    arguments = ["plan", "--model", "bert", "--data", "data.csv", *QUICK, "--out", "deep/er/out"]
    assert call(*arguments, monkeypatch=monkeypatch) == 0
    first = strict_json((here / "deep/er/out/plan.json").read_text())
    assert call(*arguments, "--seed", "1", monkeypatch=monkeypatch) == 0
    second = strict_json((here / "deep/er/out/plan.json").read_text())
    assert (first["seed"], second["seed"]) == (0, 1)
    assert [path.name for path in (here / "deep/er").iterdir()] == ["out"]
    capfd.readouterr()


def test_dry_run_writes_nothing(here, monkeypatch, capfd):
    before = listing(here)
    arguments = ["plan", "--model", "bert", "--data", "data.csv", *QUICK, "--dry-run", "--out", "new/out"]
    assert call(*arguments, monkeypatch=monkeypatch) == 0
    out, err = capfd.readouterr()
    assert "Estimate" in out
    assert "memory" in out
    assert err.splitlines() == ["done Reading data and model"]
    assert listing(here) == before


def test_very_long_texts_are_cut_and_said(here, monkeypatch, capfd):
    data = frame(60)
    data.loc[3, "text"] = "good " * 200_000
    data.loc[4, "text"] = "bad " * 250_000
    data.to_csv("long.csv", index=False)
    assert call("plan", "--model", "bert", "--data", "long.csv", *QUICK, monkeypatch=monkeypatch) == 0
    out = capfd.readouterr().out
    assert "2 texts longer than 100,000 characters" in " ".join(out.split())
    assert "1,000,000" in out


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl", ".parquet"])
def test_other_files(here, monkeypatch, capfd, suffix):
    data = frame(60)
    if suffix == ".tsv":
        data.to_csv("rows.tsv", sep="\t", index=False)
    elif suffix == ".jsonl":
        data.to_json("rows.jsonl", orient="records", lines=True)
    else:
        data.to_parquet("rows.parquet")
    answers = []
    for name in ("data.csv", f"rows{suffix}"):
        arguments = ["plan", "--model", "bert", "--data", name, *QUICK, "--json"]
        assert call(*arguments, monkeypatch=monkeypatch) == 0
        answers.append(strict_json(capfd.readouterr().out)["optimum"])
    assert answers[0] == answers[1]


def test_options_reach_the_plan(here, monkeypatch, capfd):
    pd.DataFrame(frame(60)).rename(columns={"text": "t", "label": "y"}).assign(u="film").to_csv(
        "other.csv", index=False
    )
    options = ["--text-column", "t", "--label-column", "y", "--text-pair-column", "u", "--loss", "logistic"]
    options += ["--pooling", "mean", "--captured", "0.9", "--ranks", "2", "--seed", "3", "--weight-decay", "1e-3"]
    arguments = ["plan", "--model", "bert", "--data", "other.csv", *QUICK, *options, "--json"]
    assert call(*arguments, monkeypatch=monkeypatch) == 0
    data = strict_json(capfd.readouterr().out)
    assert (data["loss"], data["pooling"], data["captured_target"], data["seed"]) == ("logistic", "mean", 0.9, 3)
    assert data["weight_decay"] == 1e-3
    assert 2 in [row["rank"] for row in data["ranks"] if row["requested"]]
    assert all(name.startswith("encoder.layer.1") for name in data["target_modules"])


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["demo", "--help"]])
def test_help(monkeypatch, capfd, arguments):
    assert call(*arguments, monkeypatch=monkeypatch) == 0
    out = capfd.readouterr().out
    assert "Usage" in out
    if arguments[0] != "--help":
        assert "Example" in out
        assert f"ranksure {arguments[0]} --" in out


def test_version(monkeypatch, capfd):
    assert call("--version", monkeypatch=monkeypatch) == 0
    assert capfd.readouterr().out.startswith("ranksure ")


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C


@pytest.mark.parametrize("after", ["done Reading data and model", "done Solving to a certified optimum"])
def test_interrupted(here, after):
    """A signal in the middle of the work, with an older result in place: that one stays as it was."""
    (here / "out").mkdir()
    older = '{"schema": 1, "recommended": {}}'
    (here / "out" / "plan.json").write_text(older)
    before = listing(here)
    long = ["--samples", "40", "--random-starts", "300", "--ranks", "1,2,3,4", "--weight-decay", "1%"]
    arguments = command("plan", "--model", "bert", "--data", "data.csv", *QUICK, *long, "--out", "out")
    status, out, err = ended_at(after, signal.SIGINT, arguments, stream="stderr")
    assert status == 130, (out, err)
    assert "Traceback" not in err
    assert "interrupted" in err.splitlines()[-1]
    assert listing(here) == before
    assert (here / "out" / "plan.json").read_text() == older


def test_interrupted_while_writing(here, monkeypatch, capfd):
    """At the worst moment: half of the adapter is on disk."""
    import ranksure.planner.result as module

    def half(model: object, factors: object, out: Path, **settings: object) -> None:
        out.mkdir()
        (out / "adapter_config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "export_adapter", half)
    before = listing(here)
    arguments = ["plan", "--model", "bert", "--data", "data.csv", *QUICK, "--out", "new/out"]
    assert call(*arguments, monkeypatch=monkeypatch) == 130
    assert "interrupted" in capfd.readouterr().err
    assert listing(here) == before


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (MemoryError(), 2, ["not enough memory"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 2, ["memory"]),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            2,
            ["not enough memory", "2.00 GiB"],
        ),
        (ImportError("libtorch.so: failed to map segment from shared object"), 2, ["not enough memory"]),
        (OSError(28, "No space left on device", "x"), 2, ["the disk takes no more"]),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 2, ["the disk takes no more"]),
        (
            RuntimeError("[enforce fail at inline_container.cc:815] PytorchStreamWriter failed"),
            2,
            ["disk"],
        ),
        (PermissionError(13, "Permission denied", "/some/file"), 2, ["/some/file: Permission denied"]),
        (IndexError("index out of\nrange"), 70, ["unexpected IndexError: index out of", "RANKSURE_DEBUG=1", "line"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_no_code_foresaw_is_one_line(here, monkeypatch, capfd, error, code, parts):
    def fail(*args, **more):
        raise error

    monkeypatch.setattr("ranksure.planner.prepare.prepare", fail)
    assert call("plan", "--model", "bert", "--data", "data.csv", *QUICK, monkeypatch=monkeypatch) == code
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error ") and all(part in line for part in parts)
    monkeypatch.setenv("RANKSURE_DEBUG", "1")
    with pytest.raises(type(error)):
        call("plan", "--model", "bert", "--data", "data.csv", *QUICK, monkeypatch=monkeypatch)
