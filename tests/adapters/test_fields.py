"""Fields of a configuration: what is refused in a file, what is not certified and why, what patterns give."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from peft import LoraConfig

from ranksure.adapters import fields
from ranksure.adapters.fields import pattern_notes, ranks_of_module, read_config, untested_fields
from ranksure.errors import AdapterError
from tests.refusals import refusal

PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def written(folder: Path, **changes: object) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**PLAIN, **changes}))
    return path


def test_every_field_of_a_lora_config_is_either_tested_or_refused():
    """A field that PEFT adds later is refused at any value but its default."""
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    assert names >= fields._TESTED | fields._INERT_WITHOUT.keys() | set(fields._INERT_WITHOUT.values())
    for name in names - fields._TESTED - {"init_lora_weights"}:
        config = LoraConfig()
        if name in fields._INERT_WITHOUT:
            setattr(config, name, "something else")
            assert untested_fields(config) == []
            setattr(config, fields._INERT_WITHOUT[name], True)
        setattr(config, name, "something else")
        assert any(reason.startswith(name) for reason in untested_fields(config)), name


@pytest.mark.parametrize("value", [True, {"rank": 3}, "x", 0.1, [0]])
def test_a_field_of_a_newer_peft_is_named(tmp_path, value):
    path = written(tmp_path, newer_thing=value, quiet=None, off=False, empty=[], none={}, peft_version="99.0")
    (reason,) = untested_fields(read_config(path))
    assert reason.startswith("newer_thing=") and "does not know" in reason


def test_what_peft_ignores_by_its_own_word(tmp_path):
    ignored = {
        "eva_config": {"rho": 1.5},
        "corda_config": {"verbose": True},
        "loftq_config": {"loftq_bits": 4},
        "qalora_group_size": 8,
        "megatron_core": "mine",
        "runtime_config": {"ephemeral_gpu_offload": True},
        "target_parameters": [],
    }
    for name, value in ignored.items():
        assert untested_fields(read_config(written(tmp_path, **{name: value}))) == [], name


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica", "Gaussian"])
def test_starts_that_leave_the_base_alone(start):
    assert untested_fields(LoraConfig(init_lora_weights=start)) == []


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "unheard_of"])
def test_other_starts_are_named(start):
    (reason,) = untested_fields(LoraConfig(init_lora_weights=start))
    assert reason.startswith(f"init_lora_weights='{start}' ")
    assert ("draws" in reason) == ("niter" in start) and ("no initialisation" in reason) == (start == "unheard_of")


BAD = {
    "base_model_name_or_path": [7, [], "a" * 100_000, "a\0b"],
    "revision": [3],
    "r": [0, -1, 10**12, 10**400, float("nan"), float("inf"), "8", None, True, [2], 2.0],
    "rank_pattern": ["q_proj", [1], {"q_proj": "x"}, {"q_proj": -2}, {"q_proj": 10**9}, {"(": 2}, {"(" * 100_000: 2}],
    "lora_alpha": [float("nan"), float("inf"), 10**400, "16", None, [1]],
    "alpha_pattern": [3, {"q_proj": float("nan")}, {"q_proj": "4"}, {"*": 2}],
    "target_modules": [5, "(", "(" * 100_000, [5], {"q": 1}],
    "exclude_modules": [3, "["],
    "modules_to_save": ["head", 3, [3]],
    "lora_dropout": [float("nan"), 7, -0.1, "a"],
    "bias": ["some", 1],
    "task_type": ["FOO", 3],
    "use_rslora": ["yes", 1],
    "fan_in_fan_out": [[1]],
    "init_lora_weights": [3, None],
    "layers_to_transform": ["a", [None]],
    "target_parameters": ["x", [3]],
    "peft_type": ["LOHA", ["LORA"], None],
}


@pytest.mark.parametrize("name", BAD)
def test_rubbish_in_a_field_is_one_line(tmp_path, name):
    for value in BAD[name]:
        message = refusal(AdapterError, ["adapter_config.json"], read_config, written(tmp_path, **{name: value}))
        stated = {"r": "rank of r", "lora_alpha": "alpha", "peft_type": "type", "bias": "bias"}.get(name, "")
        assert stated in message and len(message) < len(str(tmp_path)) + 400


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "{", "[]", "3", "null", "", "NaN", '{"r":' + "9" * 5000 + "}", b"\xff\xfe"],
)
def test_a_file_that_is_no_configuration_is_one_line(tmp_path, text):
    path = tmp_path / "adapter_config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert len(refusal(AdapterError, [str(path)], read_config, path)) < len(str(path)) + 400


SCALES = {"a.0.q": 1.0, "a.1.q": 4.0, "b.v": 2.0}


def test_the_first_of_several_keys_and_keys_that_match_nothing():
    config = LoraConfig(r=4, rank_pattern={"1.q": 2, "q": 8, "lost": 3}, alpha_pattern={"q": 8, "1.q": 8, "v": 8})
    found = [list(ranks_of_module(config, name).items()) for name in SCALES]
    assert found == [[("q", 8)], [("1.q", 2), ("q", 8)], [("r", 4)]]
    torn, unused = sorted(pattern_notes(config, SCALES), key=lambda note: "matches no" in note)
    assert torn.startswith("rank_pattern: a.1.q loads with 2, of '1.q' (scale 4); 'q' (8) matches it too")
    assert "may have been trained with another one" in torn
    assert unused.startswith("rank_pattern: 'lost' matches no adapted module, so the default, 4, holds")
    config.rank_pattern = {"q": 8, "1.q": 2}  # as in training, before saving sorts them
    assert pattern_notes(config, SCALES)[0].startswith("rank_pattern: a.1.q loads with 8, of 'q'")
    assert pattern_notes(LoraConfig(rank_pattern={"^a\\.0\\.q": 2, "v": 1}), SCALES) == []
