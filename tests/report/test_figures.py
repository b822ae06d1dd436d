"""Drawings, numbers and colours, against what they are of."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from ranksure.errors import DataError, SettingError
from ranksure.planner.answer import sentences
from ranksure.records.plan import Plan
from ranksure.report.blocks import Section, Status
from ranksure.report.heat_map import Grid, heat_map, level
from ranksure.report.lora_source import pattern, source, written
from ranksure.report.module_places import clean, places
from ranksure.report.page import write_report
from ranksure.report.records import find
from ranksure.report.sections import claims, plan
from ranksure.report.spectrum import singular_values
from ranksure.report.svg import INKS, render
from ranksure.report.wording import after, listed, number, percent, power, share
from tests.refusals import refusal
from tests.report import records


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 9, bias=False)
        self.second = nn.Linear(9, 7, bias=False)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_are_those_of_the_update_that_peft_adds(
    tmp_path: Path, rslora: bool, dtype: torch.dtype
) -> None:
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["first", "second"],
        rank_pattern={"^second": 5},
        alpha_pattern={"^second": 2},
        use_rslora=rslora,
    )
    model = get_peft_model(Net(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(tmp_path)
    found = singular_values(tmp_path)
    assert found is not None and set(found) == {"first", "second"}
    for name, values in found.items():
        delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")  # pyright: ignore
        expected = torch.linalg.svdvals(delta.detach().double())[: len(values)].numpy()
        assert len(values) == {"first": 3, "second": 5}[name]
        np.testing.assert_allclose(values, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2)


def test_an_adapter_that_cannot_be_read(tmp_path: Path) -> None:
    assert singular_values(tmp_path) is None
    get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"])).save_pretrained(tmp_path)
    assert singular_values(tmp_path) is None  # B is zero: no update
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    refusal(DataError, "adapter_model.safetensors is damaged", singular_values, tmp_path)


def test_a_drawing_is_clean_and_the_same_each_time() -> None:
    def draw(canvas: Any) -> None:
        (axes,) = canvas.axes()
        axes.plot([1, 2, 3], [1, 4, 9], "o--", color=INKS["c0"])
        axes.text(2, 4, "<b>&$x$", color=INKS["muted"])

    wide, narrow = render("one", draw)
    assert (wide, narrow) == render("one", draw)
    for text, width in ((wide, "0 0 760"), (narrow, "0 0 340")):
        root = ElementTree.fromstring(text)
        assert root.attrib["viewBox"].startswith(width)
        assert {element.tag for element in root.iter()} <= {
            "svg",
            "g",
            "path",
            "use",
            "text",
            "defs",
            "clipPath",
            "rect",
        }
        assert [t.text for t in root.iter("text")].count("<b>&$x$") == 1
        assert not re.search(r"#0a00|font-family|data:|https?:|\bon\w+=", text)
        assert "var(--c0)" in text and "var(--muted)" in text
        assert "#000000" not in text and "#ffffff" not in text  # every colour follows the theme
    ids = re.findall(r'id="([^"]+)"', wide)
    assert ids and all(name.startswith("one-w-") for name in ids)


def test_no_drawing_of_any_kind_has_a_colour_of_its_own(tmp_path: Path) -> None:
    text = write_report(records.write_all(tmp_path)).read_text()
    drawings = re.findall(r'<svg viewBox="0 0 (?:760|340).*?</svg>', text, re.DOTALL)
    assert len(drawings) >= 40
    for drawing in drawings:
        assert re.findall(r"(?:fill|stroke):(?!none|var\()[^;\"]+", drawing) == []
        assert "<image" not in drawing


def test_a_page_is_the_same_for_the_same_results(tmp_path: Path) -> None:
    first = write_report(records.write_all(tmp_path)).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_the_heat_map_holds_every_rank() -> None:
    ranks = {name: index % 6 for index, name in enumerate(records.NAMES)}
    figure = heat_map("heat", "Where?", None, "There.", [Grid("Ranks", ranks)])
    for drawing in (figure.wide, figure.narrow):
        texts = [element.text for element in ElementTree.fromstring(drawing).iter("text")]
        for rank in range(6):
            cells = sum(1 for value in ranks.values() if value == rank)
            assert texts.count(str(rank)) in (cells, cells + 1, cells + 2)  # and the heads of layers 0 to 5
        assert len([t for t in texts if t == "q_proj"]) >= 1
    assert [row[:2] for row in figure.table.rows] == [[name, str(rank)] for name, rank in ranks.items()]


@given(st.integers(0, 300), st.integers(1, 300))
def test_levels_are_in_order_and_zero_is_apart(value: int, largest: int) -> None:
    value = min(value, largest)
    found = level(value, largest)
    assert 0 <= found <= 6 and (found == 0) == (value == 0)
    assert value == largest or level(value + 1, largest) >= found


def test_places_of_modules() -> None:
    bert = ["attention.self.query", "attention.output.dense", "output.dense", "intermediate.dense"]
    names = [f"bert.encoder.layer.{layer}.{part}" for layer in (0, 11) for part in bert] + ["bert.pooler.dense"]
    found = places(names)
    assert found["bert.encoder.layer.11.attention.self.query"] == ("11", "query")
    assert found["bert.encoder.layer.0.attention.output.dense"] == ("0", "attention.output.dense")
    assert found["bert.pooler.dense"] == ("–", "pooler.dense")
    assert len(set(found.values())) == len(names)
    two = places([f"{stack}.layers.{layer}.fc1" for stack in ("encoder", "decoder") for layer in range(2)])
    assert len(set(two.values())) == 4
    assert {text for _, text in two.values()} == {"encoder.layers.*.fc1", "decoder.layers.*.fc1"}


@given(st.lists(st.text(alphabet="ab.01\x00\u202e", min_size=1, max_size=8), unique=True, max_size=8))
def test_any_name_has_a_place(names: list[str]) -> None:
    found = places(names)
    assert set(found) == set(names)
    assert all(text == clean(text) for _, text in found.values())


def test_numbers_as_text() -> None:
    assert [percent(x) for x in (0.5, 0.99996, 1.0, 0.0, 4e-4, 1.376, -0.02)] == [
        "50%", "99.996%", "100%", "0%", "0.04%", "137.6%", "-2%",
    ]  # fmt: skip
    assert share(0.98466, 0.984661) == "98.47%" and share(0.9, 0.95) == "90% to 95%" and share(0.9999997, 1) == "100%"
    assert number(-0.25) == "\u22120.25" and number(None) == "–"
    assert [power(x) for x in (6.7e-7, 1e-7, 0.02, 0.0, 8530.0)] == ["7·10⁻⁷", "10⁻⁷", "0.02", "0", "8,530"]
    assert listed([1, 2, 4]) == "1, 2 and 4" and listed([]) == "none"
    assert after("Rank 1 is enough", "Rank 1 is enough: it is.") == "It is."
    assert after("Rank 1 is enough", "Rank 2 is enough: it is.") == "Rank 2 is enough: it is."


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_wcag_aa() -> None:
    css = files("ranksure.report").joinpath("templates", "page.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)[:2]
    )
    assert len(light) > 30 and light.keys() == dark.keys()
    for theme in (light, dark):
        text = [(ink, paper) for ink in ("ink", "muted", "link", "accent") for paper in ("paper", "card", "code")]
        text += [("good", "good-bg"), ("warn", "warn-bg"), ("muted", "plain-bg"), ("ink", "warn-bg"), ("good", "card")]
        text += [("bad", "card"), ("muted", "h0"), *(("on-light", f"h{n}") for n in (1, 2, 3))]
        text += [("on-dark", f"h{n}") for n in (4, 5, 6)]
        graphics = [(f"c{n}", "card") for n in range(8)] + [("focus", paper) for paper in ("paper", "card")]
        graphics += [(tone, "card") for tone in ("good", "warn", "bad", "ink", "muted")]
        low = {pair: contrast(theme[pair[0]], theme[pair[1]]) for pair in text + graphics}
        assert {pair: value for pair, value in low.items() if value < (4.5 if pair in text else 3)} == {}


def test_the_rank_table_is_the_records(tmp_path: Path) -> None:
    (record,) = find(records.write(tmp_path, "plan.json", records.plan())).records
    section = plan.build(record, "s1")
    figure = section.blocks[0]
    assert [row[0] for row in figure.table.rows] == ["0", "1", "2", "4"]
    assert [row[3] for row in figure.table.rows] == ["0%", "71% to 74%", "93%", "100%"]
    assert "Rank 4 is the smallest examined that surely captures 99%" in figure.summary
    assert "Rank 2 is stuck" in figure.summary
    tiles = {tile.label: tile.value for tile in section.tiles}
    assert (
        tiles["Rank"] == "4"
        and tiles["Optimality gap"] == "8·10⁻⁷"
        and tiles["Change of held-out loss"] == "\u22120.039"
    )


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({}, "Rank 4 is enough in every target."),
        (
            {"linearity": {"train": 0.9, "heldout": None}},
            "Rank 4 is enough in every target of the linearised network, which is far",
        ),
        (
            {"recommended": records.plan()["recommended"] | {"heldout_r": 0}},
            "Rank 4 is enough in every target for the training rows;",
        ),
        ({"optimum": records.plan()["optimum"] | {"ranks": {"a": 0}}}, "No adapter is needed"),
    ],
)
def test_the_answer_says_what_it_rests_on(tmp_path: Path, change: dict[str, Any], answer: str) -> None:
    (record,) = find(records.write(tmp_path, "plan.json", records.plan() | change)).records
    assert plan.build(record, "s1").answer.startswith(answer)


def network_section(tmp_path: Path, optimum: dict[str, Any] | None = None, **network: Any) -> Section:
    data = records.network_plan(["layer.0.query", "layer.0.value"])
    data["network"] |= network
    data["network"]["optimum"] |= optimum or {}
    data["sentences"] = sentences(msgspec.convert(data, Plan))
    (record,) = find(records.write(tmp_path, "plan.json", data)).records
    return plan.build(record, "s1")


def test_the_network_answers_first_and_its_linearisation_is_folded(tmp_path: Path) -> None:
    section = network_section(tmp_path)
    assert section.answer == "Rank 2 is enough in both targets."
    assert section.sentences[0].startswith("On the network itself it reaches 99.4%")
    worth = {tile.label: (tile.value, tile.status) for tile in section.tiles}
    assert worth["Rank"] == ("2", Status.MEASURED) and worth["Captured"] == ("99.4%", Status.MEASURED)
    assert worth["Gap"] == ("0.8%", Status.CERTIFIED) and worth["Parameters"][0] == "512"
    titles = [block.title for block in section.blocks]
    assert titles[:2] == ["How much does each rank capture on the network itself?", "Where does the rank go?"]
    (fold,) = [block for block in section.blocks if block.kind == "fold"]
    assert fold.blocks[0].status is Status.CERTIFIED and fold.summary.startswith(
        "A convex problem, whose answer is proved"
    )
    shares = section.blocks[0]
    assert [row[:3] for row in shares.table.rows][1:3] == [["1", "0.506700", "94.8%"], ["2", "0.500800", "99.4%"]]
    assert "rank 2 is the smallest examined" in shares.summary and "pretrained weights rank 4 does" in shares.summary
    descent = next(block for block in section.blocks if block.title.startswith("How did the solver"))
    assert descent.table.rows[1] == ["12", "0.560000", "1.60e-01", "228.57%"]  # .16 of .63 - .56
    assert descent.status is Status.CERTIFIED


def test_what_is_not_certified_is_not_labelled_so(tmp_path: Path) -> None:
    section = network_section(tmp_path, {"status": "not-converged", "relative_gap": 0.3, "remedy": "x"})
    assert {tile.label: tile.status for tile in section.tiles}["Gap"] is Status.NOT_CHECKED
    descent = next(block for block in section.blocks if block.title.startswith("How did the solver"))
    assert descent.status is Status.NOT_CHECKED


@pytest.mark.parametrize(
    ("network", "answer", "tone"),
    [
        (
            {"heldout": {"rows": 9, "loss_without_adapter": 0.6, "loss": 0.7}},
            "in both targets for the training",
            "warn",
        ),
        ({"captured_uniform": 0.97}, "Rank 2 captures 97%, less than was asked for.", "good"),
        ({"optimum": "zero"}, "No adapter is needed: the network's own solution is no update at all.", "good"),
    ],
)
def test_the_networks_headline(tmp_path: Path, network: dict[str, Any], answer: str, tone: str) -> None:
    none = {"layer.0.query": {"rank": 0, "spectral_ratio": 0.9, "stationarity": 0.0, "outside_norm": 0.0}}
    zero = {"modules": none, "history": [[1, 0.63, 0.1]]} if network.pop("optimum", None) else None
    section = network_section(tmp_path, zero, **network)
    assert answer in section.answer and section.tone == tone
    assert any(block.kind == "code" and block.id == "s1-config" for block in section.blocks) == (zero is None)


def test_distances_to_the_optimum(tmp_path: Path) -> None:
    data = records.reproduce()
    (record,) = find(records.write(tmp_path, "curves.json", data)).records
    section = claims.build_reproduction(record, "s1")
    assert section.warnings == ["three: no such package"]
    rows = {(row[0], row[1]): row[2:] for row in section.blocks[2].table.rows}
    assert "more rows" not in {setting for setting, _ in rows}  # it has no reference
    assert float(rows["setting 1", "rank 1"][1]) == pytest.approx(0.02, rel=0.01)
    assert float(rows["setting 1", "rank 4"][1].replace("\u2212", "-")) == pytest.approx(1e-6, rel=0.01)
    assert rows["setting 0", "full fine-tuning"][1] == "0"  # its last point is the optimum
    assert section.blocks[2].summary.startswith(
        "6 of 9 curves end above the certified optimum, the nearest by 10⁻⁶ (rank 4"
    )


def test_configurations_run(tmp_path: Path) -> None:
    arguments = {
        "task_type": "SEQ_CLS",
        "r": 2,
        "lora_alpha": 7,
        "target_modules": "(?:a\\.b)",
        "rank_pattern": {"^a": 1},
    }
    (tmp_path / "lora_config.py").write_text("# a comment\n" + source(arguments))
    found = written(tmp_path)
    assert found is not None and found[1] == arguments
    scope: dict[str, Any] = {}
    exec(pattern(found[1], {"first": 2, "second": 3}), scope)
    model = get_peft_model(Net(), scope["lora_config"])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "lora_A" in name}
    assert sorted(shapes.values()) == [(2, 12), (3, 9)]
    assert {layer.scaling["default"] for layer in model.modules() if hasattr(layer, "scaling")} == {1.0}
    (tmp_path / "lora_config.py").write_text("import os\nLoraConfig(r=os.getpid())")
    assert written(tmp_path) is None  # read, never run


def test_pictures_of_the_lab_are_put_in_only_where_small_and_real(tmp_path: Path) -> None:
    records.write(tmp_path, "some-claim.json", records.lab())
    path = tmp_path / "some-claim.png"
    records.picture(path)
    content = path.read_bytes()
    assert write_report(tmp_path).read_text().count("data:image/png;base64,") == 1
    for other in (b"<script>alert(1)</script>", content[:20], content + b"0" * 400 * 1024):
        path.write_bytes(other)
        assert "data:image/png" not in write_report(tmp_path).read_text()


def test_a_page_that_would_be_too_large_has_less_detail_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.write(tmp_path, "some-claim.json", records.lab())
    records.picture(tmp_path / "some-claim.png")
    whole = write_report(tmp_path)
    size = whole.stat().st_size
    monkeypatch.setattr("ranksure.report.page.LARGEST", size)
    less = write_report(tmp_path)
    assert less.stat().st_size < size and "data:image/png" not in less.read_text()
    monkeypatch.setattr("ranksure.report.page.LARGEST", 10_000)
    refusal(SettingError, "make one of a folder below it", write_report, tmp_path)
    assert less.stat().st_size < size  # the earlier one stays
