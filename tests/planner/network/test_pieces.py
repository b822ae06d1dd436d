"""Finished pieces come back from their file bit by bit, for the same request only."""

from __future__ import annotations

import pytest
import torch

from ranksure.errors import SettingError
from ranksure.planner.network.pieces import Pieces, Reached, check_unfinished
from ranksure.records.plan import NetworkModule
from tests.refusals import refusal


def point(seed: int, rank: int) -> Reached:
    torch.manual_seed(seed)
    factors = {name: (torch.randn(5, rank).double(), torch.randn(4, rank).double()) for name in ("a.q", "b")}
    module = NetworkModule(rank=rank, spectral_ratio=1 / 3, stationarity=0.1, outside_norm=1e-17)
    history = [(1, 0.1 + 0.2, 1e-300)]
    return Reached(
        factors, 1 / 7, 1 / 9, 1e-3, modules={"a.q": module}, status="converged", history=history, forwards=3
    )


def test_what_is_kept_is_read_again(tmp_path):
    path, points = tmp_path / "out.partial", {"path/0.1": point(0, 2), "solution": point(1, 0)}
    kept = Pieces(path, {"model": "m", "rows": 3})
    for key, each in points.items():
        kept.put(key, each)
    again = Pieces(path, {"rows": 3, "model": "m"})
    for key, each in points.items():
        found = again.get(key)
        assert found is not None
        for name, pair in each.factors.items():
            assert all(map(torch.equal, pair, found.factors[name]))
        plain = [{**vars(x), "factors": None} for x in (each, found)]
        assert plain[0] == plain[1]
    assert again.get("rank/1") is None
    assert Pieces(path, {"rows": 4, "model": "m"}).get("solution") is None


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b.replace(b"loss", b"lost")])
def test_a_damaged_file_holds_nothing(tmp_path, damage):
    path = tmp_path / "out.partial"
    kept = Pieces(path, {})
    kept.put("solution", point(0, 1))
    content = path.read_bytes()
    changed = damage(content)
    assert changed != content
    path.write_bytes(changed)
    assert Pieces(path, {}).get("solution") is None
    if b"lost" not in changed:
        refusal(SettingError, "move it away", check_unfinished, path)
    Pieces(None, {}).put("solution", point(0, 1))  # nothing is written without a file
