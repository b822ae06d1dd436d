"""``ranksure certify``: what it prints and writes, and every mistake as one line with exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ranksure.adapters import loaded
from ranksure.runs.certificate import start
from ranksure.runs.saved.data import DataSettings, read_data
from ranksure.runs.saved.open import load_run
from tests import commands
from tests.runs.tiny_runs import PAIRS, classifier, copy_runs, save_runs
from tests.tiny_text import strict_json

VERDICTS = {"first-order-optimal", "rank-bound", "not-converged", "failed-loudly", "not-checked"}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_runs(tmp_path_factory.mktemp("certify"))


@pytest.fixture
def here(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copy_runs(assets, tmp_path))
    return tmp_path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch):
    return lambda *arguments: commands.call("certify", *arguments, monkeypatch=monkeypatch)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_classifier(here, call, capsys, monkeypatch):
    before = listing(here)
    read, real = [], loaded.to_factors
    monkeypatch.setattr(loaded, "to_factors", lambda *matrices: read.append(1) or real(*matrices))
    assert call("texts", "--data", "data.csv", "--weight-decay", "0.01") == 0
    assert listing(here) == sorted([*before, "texts/certificate.json", "texts/report.html"])
    found = strict_json((here / "texts" / "certificate.json").read_text())
    assert found["verdict"] in VERDICTS and found["verdict"] == "not-converged"
    assert len(found["modules"]) == 4 == len(read)  # each module's factors are read once
    for entry in found["modules"].values():
        assert entry["verdict"] in VERDICTS and entry["rank"] == 2 and entry["parameters"] == 2 * (16 + 16)
        assert entry["lam"] == pytest.approx(0.01 / 3)
    assert found["run"]["task_type"] == "SEQ_CLS" and found["data"]["rows"] == 40
    assert len(found["data"]["sha256"]) == len(found["run"]["adapter_sha256"]) == 64
    shown = capsys.readouterr().out
    for part in ("not-converged", "layer.1.attention.self.value".removeprefix("layer."), "possible gain", "AdamW"):
        assert part in shown, part
    assert "certificate.json" in shown and "Traceback" not in shown


def test_the_file_agrees_with_the_library(here, call):
    from ranksure.runs.certificate.certify import certify

    assert call("causal", "--data", "pairs.jsonl", "--weighting", "sample", "--out", "results/one") == 0
    found = strict_json((here / "results" / "one" / "certificate.json").read_text())
    run = load_run("causal")
    own = certify(run.model, read_data(run, "pairs.jsonl", DataSettings(batch_size=1)).batches, weighting="sample")
    assert found["loss"] == pytest.approx(own.loss, rel=1e-5) and found["verdict"] == own.verdict
    assert found["rank_gain_bound"] == pytest.approx(own.rank_gain_bound, rel=1e-4)
    assert found["data"]["form"] == "prompt and completion" and found["n_samples"] == len(PAIRS)
    assert not (here / "causal" / "certificate.json").exists()


def test_the_slope_at_the_base_weights_is_read_back(here, call, monkeypatch):
    """A run without decay needs one more pass, at W0: once for the same weights, rows and loss."""
    passes, real = [], start.gradient_pass
    monkeypatch.setattr(start, "gradient_pass", lambda *given, **how: passes.append(1) or real(*given, **how))
    path, known = here / "texts" / "certificate.json", []
    for rows, expected in (([], 1), ([], 1), (["--samples", "20"], 2), ([], 3), (["--batch-size", "7"], 4)):
        assert call("texts", "--data", "data.csv", *rows) == 0
        assert len(passes) == expected
        known.append(strict_json(path.read_text()))
    assert known[0]["first"] == known[1]["first"] and known[0]["first"]["key"]
    assert known[0]["rank_gain_bound"] == known[1]["rank_gain_bound"]
    path.write_text(path.read_text().replace('"slope"', '"slopes"'))  # one that cannot be read is no help
    assert call("texts", "--data", "data.csv", "--batch-size", "7") == 0 and len(passes) == 5


def test_packed_is_the_same(here, call):
    assert call("causal", "--data", "pairs.jsonl", "--lambda", "0.01") == 0
    apart = strict_json((here / "causal" / "certificate.json").read_text())
    assert call("causal", "--data", "pairs.jsonl", "--lambda", "0.01", "--packing") == 0
    packed = strict_json((here / "causal" / "certificate.json").read_text())
    assert packed["loss"] == pytest.approx(apart["loss"], rel=1e-5) and packed["n_terms"] == apart["n_terms"]
    assert packed["rank_gain_bound"] == pytest.approx(apart["rank_gain_bound"], rel=1e-4)
    assert packed["n_samples"] == apart["n_samples"] == len(PAIRS)
    assert "sequences that are kept apart" in packed["data"]["notes"][0]


def test_json_goes_to_standard_output_alone(here, call, capsys):
    assert call("texts", "--data", "data.csv", "--json") == 0
    captured = capsys.readouterr()
    printed = strict_json(captured.out)
    assert printed == strict_json((here / "texts" / "certificate.json").read_text())
    assert "possible gain" in captured.err


def test_a_sample_gives_no_verdict(here, call, capsys):
    assert call("texts", "--data", "data.csv", "--samples", "10") == 0
    found = strict_json((here / "texts" / "certificate.json").read_text())
    assert found["verdict"] == "not-checked" and {e["verdict"] for e in found["modules"].values()} == {"not-checked"}
    assert found["n_samples"] == 10 and found["rank_gain_bound"] > 0
    assert "only 10 of 40 rows" in found["reasons"][
        0
    ] and "a sample gives no verdict" in capsys.readouterr().out.replace("\n", " ")
    assert call("texts", "--data", "data.csv", "--samples", "40") == 0  # all of them
    assert strict_json((here / "texts" / "certificate.json").read_text())["verdict"] == "not-converged"


def test_an_untested_configuration_is_not_checked(assets, here, call):
    classifier(str(assets / "bert"), use_dora=True).save_pretrained(here / "dora")
    assert call("dora", "--data", "data.csv") == 0
    found = strict_json((here / "dora" / "certificate.json").read_text())
    assert found["verdict"] == "not-checked" and any("use_dora" in reason for reason in found["reasons"])


def spoil(here: Path, kind: str) -> None:
    weights = here / "texts" / "adapter_model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:500])
    elif kind in ("NaN", "missing tensor"):
        tensors = load_file(weights)
        name = next(name for name in tensors if "lora_A" in name)
        tensors[name].fill_(float("nan"))
        if kind == "missing tensor":
            del tensors[name]
        save_file(tensors, weights)
    elif kind == "other ranks":
        path = here / "texts" / "adapter_config.json"
        path.write_text(path.read_text().replace('"r": 2', '"r": 4'))
    elif kind == "someone's file":
        (here / "texts" / "certificate.json").write_text('{"mine": 1}')
    elif kind == "out is a file":
        (here / "taken").write_text("")


MISTAKES = [
    ("truncated", [], ["damaged or incomplete", "adapter_model.safetensors"]),
    ("NaN", [], ["not finite", "lora_A"]),
    ("missing tensor", [], ["the weights lack", "lora_A"]),
    ("other ranks", [], ["has rank 2", "says 4"]),
    ("base", ["--base", "nowhere/at/all"], ["nowhere/at/all", "does not exist"]),
    ("no adapter", ["bert"], ["a whole model", "adapter_config.json"]),
    ("no folder", ["gone"], ["gone", "does not exist"]),
    ("no data", ["--data", "dota.csv"], ["dota.csv", "data.csv"]),
    ("causal data for a classifier", ["--data", "pairs.jsonl"], ["no column 'text'", "'prompt'"]),
    ("texts for a causal model", ["causal", "--data", "data.csv"], ["'prompt' and 'completion'", "'messages'"]),
    ("both penalties", ["--weight-decay", "0.1", "--lambda", "0.1"], ["not both"]),
    ("negative decay", ["--weight-decay", "-1"], ["--weight-decay -1.0 must be at least 0"]),
    ("tolerance", ["--tolerance", "1"], ["tolerance"]),
    ("memory", ["--memory", "lots"], ["--memory", "8GB"]),
    ("samples", ["--samples", "0"], ["--samples 0"]),
    ("weighting", ["--weighting", "word"], ["token or sample"]),
    ("packing weights", ["--packing", "--weighting", "sample"], ["leave one out"]),
    ("packing texts", ["--packing"], ["causal language models"]),
    ("task", ["--task", "TOKEN_CLS"], ["SEQ_CLS or CAUSAL_LM"]),
    ("adapter", ["--adapter", "other"], ["no adapter 'other'"]),
    ("max length", ["--max-length", "1000"], ["limit of 32 tokens"]),
    ("batch", ["--batch-size", "0"], ["--batch-size 0"]),
    ("device", ["--device", "warp"], ["device 'warp'"]),
    ("someone's file", [], ["certificate.json exists and is no certificate"]),
    ("out is a file", ["--out", "taken"], ["--out taken is a file"]),
]


@pytest.mark.parametrize(("kind", "arguments", "parts"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing(assets, here, call, capsys, kind, arguments, parts):
    if kind == "no adapter":
        (here / "bert").symlink_to(assets / "bert")
    spoil(here, kind)
    before = listing(here)
    folder = arguments[0] if arguments and not arguments[0].startswith("-") else "texts"
    rest = arguments[1:] if arguments and folder == arguments[0] else arguments
    data = [] if "--data" in rest else ["--data", "data.csv"]
    assert call(folder, *data, *rest) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and captured.out == "" and "Traceback" not in captured.err
    for part in parts:
        assert part in errors[0], errors[0]
    assert listing(here) == before


def test_an_earlier_certificate_survives_a_failure(here, call, monkeypatch):
    assert call("texts", "--data", "data.csv") == 0
    before = (here / "texts" / "certificate.json").read_bytes()

    def fails(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fails)
    assert call("texts", "--data", "data.csv", "--lambda", "0.1") == 2
    assert (here / "texts" / "certificate.json").read_bytes() == before
    assert not [name for name in listing(here / "texts") if name.endswith(".tmp")]


def test_help(call, capsys):
    assert call("--help") == 0
    shown = capsys.readouterr().out
    assert "ranksure certify out/my-lora --data train.csv" in shown and "Examples" in shown
