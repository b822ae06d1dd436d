"""Finished parts: found by their key alone, whole or not at all."""

from __future__ import annotations

import json

import pytest
import torch

from ranksure.errors import SettingError
from ranksure.lab.settings.parts import Parts, flat, unflat


def test_a_part_is_made_once_and_found_by_another_process(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"value": 1.5, "curve": [[0, 2.0]]}, {"x": torch.arange(6.0).view(2, 3).T}

    first = Parts(tmp_path / "parts").get("some-kind", {"rank": 4, "seed": 0}, make)
    other = Parts(tmp_path / "parts")
    second = other.get("some-kind", {"seed": 0, "rank": 4}, make)
    assert len(calls) == 1 and not other.made and other.found == [("some-kind", {"seed": 0, "rank": 4})]
    assert first[0] == second[0] == {"value": 1.5, "curve": [[0, 2.0]]}
    assert torch.equal(second[1]["x"], torch.arange(6.0).view(2, 3).T)


@pytest.mark.parametrize("other", [("some-kind", {"rank": 5}), ("other-kind", {"rank": 4})])
def test_another_key_is_another_part(tmp_path, other):
    parts = Parts(tmp_path)
    parts.get("some-kind", {"rank": 4}, lambda: ({"value": 1}, {}))
    assert parts.get(*other, lambda: ({"value": 2}, {}))[0] == {"value": 2}
    assert len(parts.made) == 2


def test_another_version_is_another_part(tmp_path, monkeypatch):
    parts = Parts(tmp_path)
    parts.get("kind", {}, lambda: ({"value": 1}, {}))
    monkeypatch.setattr("ranksure.lab.settings.parts.version", lambda name: "0.0.0")
    assert parts.get("kind", {}, lambda: ({"value": 2}, {}))[0] == {"value": 2}


@pytest.mark.parametrize("damage", ["cut json", "no tensors", "cut tensors", "another key"])
def test_a_damaged_part_is_made_again(tmp_path, damage):
    parts = Parts(tmp_path)
    parts.get("kind", {"a": 1}, lambda: ({"value": 1}, {"x": torch.ones(3)}))
    (record,) = tmp_path.glob("*.json")
    (tensors,) = tmp_path.glob("*.safetensors")
    if damage == "cut json":
        record.write_bytes(record.read_bytes()[:40])
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "cut tensors":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    else:
        content = json.loads(record.read_text())
        content["key"]["a"] = 2
        record.write_text(json.dumps(content))
    assert parts.get("kind", {"a": 1}, lambda: ({"value": 7}, {"x": torch.zeros(3)}))[0] == {"value": 7}
    found, tensor = parts.get("kind", {"a": 1}, lambda: pytest.fail("it is whole now"))
    assert found == {"value": 7} and torch.equal(tensor["x"], torch.zeros(3))


def test_what_stops_while_a_part_is_made_leaves_nothing(tmp_path):
    parts = Parts(tmp_path)

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.get("kind", {}, stopped)
    assert list(tmp_path.iterdir()) == [] and not parts.made


def test_infinities_become_null(tmp_path):
    found, _ = Parts(tmp_path).get("kind", {}, lambda: ({"dual": float("-inf"), "curve": [[1, float("nan")]]}, {}))
    assert found == {"dual": None, "curve": [[1, None]]}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"`out` .*file.* cannot be written"):
        Parts(tmp_path / "file").get("kind", {}, lambda: ({}, {}))


def test_factors_survive_the_way_to_tensors_and_back():
    factors = {"a.query": (torch.rand(3, 2), torch.rand(4, 2)), "a.value": (torch.rand(3, 0), torch.rand(4, 0))}
    back = unflat(flat(factors) | {"other": torch.ones(1)})
    assert back.keys() == factors.keys()
    assert all(torch.equal(x, y) for name in factors for x, y in zip(back[name], factors[name], strict=True))
