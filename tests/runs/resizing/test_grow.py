"""Growing a run: the missing directions, the function unchanged, and a lower objective after training on."""

from __future__ import annotations

import copy
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from ranksure.adapters.loaded import read_adapter
from ranksure.errors import AdapterError, SettingError
from ranksure.runs.certificate.certify import certify
from ranksure.runs.resizing.grow import Missing, grow
from ranksure.runs.saved.data import DataSettings, read_data
from ranksure.runs.saved.open import load_run
from ranksure.solvers.burer_monteiro import solve
from ranksure.spectral import top_pairs
from tests.commands import call
from tests.processes import ended_at, script
from tests.runs.networks import Linear, Small, gradients, largest_lambda, linear_run, place, small_run, stuck_run
from tests.runs.tiny_runs import copy_runs, save_runs
from tests.tiny_text import strict_json


@pytest.fixture(scope="module")
def stuck():
    """A linear classifier whose best rank-1 point is well above the optimum: the point, and the problem."""
    model, batches, problem, factors, _ = stuck_run()
    place(model, "layer", *factors)
    return model, batches, problem


def train(model: nn.Module, batches, lam: float, steps: int, optimizer: str = "adam", lr: float = 0.02) -> list[float]:
    """Full-batch training of the factors on loss + (wd / 2)(||A||^2 + ||B||^2); the objective before every step."""
    x, y = (torch.cat([batch[key] for batch in batches]) for key in ("x", "labels"))
    read = read_adapter(model)
    decays = {name: lam * block.scale for name, block in read.blocks.items()}
    groups = [
        {"params": [p for n, p in block.module.named_parameters() if "lora_" in n], "weight_decay": decays[name]}
        for name, block in read.blocks.items()
    ]
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    chosen = torch.optim.SGD(groups, lr=lr) if optimizer == "sgd" else torch.optim.Adam(groups, lr=lr)
    out = []
    for _ in range(steps):
        chosen.zero_grad()
        loss = F.cross_entropy(model(x), y)
        half = sum(0.5 * g["weight_decay"] * sum(p.square().sum() for p in g["params"]) for g in groups)
        out.append(float((loss + half).detach()))
        loss.backward()
        chosen.step()
    return out


def settle(model: nn.Module, batches, lam: float, rounds: int = 15) -> None:
    """To stationarity, by L-BFGS on the same objective."""
    x, y = (torch.cat([batch[key] for batch in batches]) for key in ("x", "labels"))
    parts = [
        (lam * block.scale, p.requires_grad_(True))
        for block in read_adapter(model).blocks.values()
        for n, p in block.module.named_parameters()
        if "lora_" in n
    ]
    chosen = torch.optim.LBFGS([p for _, p in parts], max_iter=50, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure() -> torch.Tensor:
        chosen.zero_grad()
        value = F.cross_entropy(model(x), y) + sum(0.5 * decay * p.square().sum() for decay, p in parts)
        value.backward()
        return value

    for _ in range(rounds):
        chosen.step(closure)


def loaded(folder, network: nn.Module, dtype=torch.float64) -> nn.Module:
    return PeftModel.from_pretrained(network, str(folder), autocast_adapter_dtype=False, is_trainable=True).to(dtype)


def base_like(model: nn.Module, n: int, m: int) -> nn.Module:
    net = Linear(n, m).double()
    net.layer.weight.data.copy_(model.base_model.model.layer.base_layer.weight)
    return net


def test_growing_a_stuck_run_reaches_the_optimum_of_every_rank(stuck, tmp_path):
    model, batches, problem = stuck
    lam = problem.penalty["layer"]
    found = grow(model, batches, lam=lam, tolerance=0.02)
    assert found.certificate.verdict == "rank-bound" and not found.forced
    assert found.added == {"layer": found.factors["layer"][0].shape[1] - 1} and found.added["layer"] >= 1
    assert found.slopes["layer"] == sorted(found.slopes["layer"], reverse=True) and found.slopes["layer"][-1] > 0
    done = found.save(model, tmp_path / "grown")
    assert done.ranks == {"layer": 1 + found.added["layer"]}
    grown = loaded(tmp_path / "grown", base_like(model, 8, 6))
    assert read_adapter(grown).blocks["layer"].scale == read_adapter(model).blocks["layer"].scale
    x = torch.cat([batch["x"] for batch in batches])
    assert torch.allclose(grown(x), model(x), rtol=1e-13, atol=1e-13)  # function-preserving

    before = found.certificate.objective
    assert certify(grown, batches, lam=lam, tolerance=0.02).objective == pytest.approx(before, rel=1e-12)
    train(grown, batches, lam, 1500)
    after = certify(grown, batches, lam=lam, tolerance=0.02)
    best = solve(problem, tolerance=1e-9).certificate.objective
    assert after.verdict == "first-order-optimal"
    assert after.objective < before - 0.9 * (before - best)
    record = json.loads((tmp_path / "grown" / "grow.json").read_text())
    assert record["schema"] == 2 and record["verdict"] == "rank-bound"
    assert record["modules"]["layer"]["rank_after"] == done.ranks["layer"]
    assert record["penalty_added"] == pytest.approx(0.5 * lam * sum(found.sizes["layer"]))


@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 0.005), ("sgd", 0.2)])
def test_both_kinds_of_optimizer_leave_the_start(stuck, tmp_path, optimizer, lr):
    """Not a saddle: within a few hundred steps the objective falls, where training at the old rank stays."""
    model, batches, problem = stuck
    lam = problem.penalty["layer"]
    same = copy.deepcopy(model)
    here = train(same, batches, lam, 300, optimizer, lr)
    found = grow(model, batches, lam=lam, tolerance=0.02)
    found.save(model, tmp_path / "grown")
    grown = loaded(tmp_path / "grown", base_like(model, 8, 6))
    path = train(grown, batches, lam, 300, optimizer, lr)
    assert path[0] == pytest.approx(found.certificate.objective + found.penalty_added, rel=1e-6)
    assert here[-1] > here[0] - 1e-4 * here[0]
    assert path[-1] < here[-1] - 0.5 * (here[-1] - solve(problem, tolerance=1e-8).certificate.objective)


def test_the_gradient_of_a_new_column_is_the_slope(stuck, tmp_path):
    """The new column of u has gradient sqrt(t) sigma p: by autograd on the written adapter."""
    model, batches, problem = stuck
    lam = problem.penalty["layer"]
    found = grow(model, batches, lam=lam, tolerance=0.02, most_new=1)
    found.save(model, tmp_path / "grown")
    grown = loaded(tmp_path / "grown", base_like(model, 8, 6))
    x, y = (torch.cat([batch[key] for batch in batches]) for key in ("x", "labels"))
    F.cross_entropy(grown(x), y).backward()
    layer = grown.base_model.model.layer
    root = math.sqrt(layer.scaling["default"])
    u_gradient = layer.lora_B["default"].weight.grad / root
    v_gradient = layer.lora_A["default"].weight.grad / root
    sigma = found.slopes["layer"][0] + lam
    assert float(u_gradient[:, -1].norm()) == pytest.approx(math.sqrt(found.sizes["layer"][0]) * sigma, rel=1e-5)
    assert float(v_gradient[-1].norm()) <= 1e-12


@given(seed=st.integers(0, 1000), k=st.integers(1, 4))
@settings(max_examples=20)
def test_missing_directions_against_dense_linear_algebra(seed, k):
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    u, v, g = randn(7, 2), randn(9, 2), randn(7, 9)
    left, right = torch.linalg.svd(u)[0][:, 2:], torch.linalg.svd(v)[0][:, 2:]
    truth = torch.linalg.svdvals(left.T @ g @ right)
    p, sigma, q = Missing({"a": (u, v)}, k)("a", g)
    assert torch.allclose(sigma, truth[:k], atol=1e-10)
    assert torch.allclose((p.T @ g @ q).diagonal(), sigma, atol=1e-10)
    assert float((u.T @ p).abs().max()) < 1e-10 and float((v.T @ q).abs().max()) < 1e-10


def test_top_pairs_of_a_large_matrix(monkeypatch):
    from ranksure import spectral

    w = torch.randn(60, 3, dtype=torch.float64) @ torch.randn(3, 50, dtype=torch.float64)
    w += 1e-3 * torch.randn(60, 50, dtype=torch.float64)
    monkeypatch.setattr(spectral, "_SMALL", 10)
    p, s, q = top_pairs(w, 4)
    assert torch.allclose(s, torch.linalg.svdvals(w)[:4], rtol=1e-6)
    assert torch.allclose(w @ q, p * s, atol=1e-3 * float(s[0]))
    assert torch.allclose(p.T @ p, torch.eye(4, dtype=torch.float64), atol=1e-10)


def test_only_rank_bound_modules_of_a_nonlinear_network_grow(tmp_path):
    """Trained at rank 1 to stationarity; the threshold is the certificate's own, with a penalty and without."""
    model, batches, _ = small_run(rank=1, seed=3)
    lam = 0.004
    settle(model, batches, lam)
    verdict = certify(model, batches, lam=lam)
    assert verdict.verdict == "rank-bound"
    found = grow(model, batches, lam=lam, certificate=verdict)
    grads = gradients(model, batches).gradients
    for name, state in verdict.modules.items():
        u, v = (torch.linalg.svd(x)[0][:, 1:] for x in read_adapter(model).blocks[name].factors)
        outside = torch.linalg.svdvals(u.T @ grads[name] @ v)
        expected = int((outside > lam / 0.95).sum()) if state.verdict == "rank-bound" else 0
        assert found.added.get(name, 0) == min(expected, 8)
    found.save(model, tmp_path / "grown")
    torch.manual_seed(3)
    grown = loaded(tmp_path / "grown", Small().double())
    before = found.certificate.objective
    settle(grown, batches, lam)
    assert certify(grown, batches, lam=lam).objective < before - 1e-3


def test_without_a_penalty_the_threshold_is_that_of_the_ball():
    from ranksure.relinearised import ball_gaps, module_states
    from ranksure.runs.resizing.grow import _threshold
    from ranksure.verdict import Point

    model, batches, _ = small_run(rank=1, seed=3)
    certificate = certify(model, batches, probe=False)
    read = read_adapter(model)
    found = gradients(model, batches)
    states = module_states(read.factors, found.gradients, None)
    gaps = ball_gaps(states, found.terms, certificate.first.length)
    point = Point(read, states, None, found.terms.mean, gaps, certificate.tolerance)
    assert point.gaps.total > 0
    assert _threshold(certificate, "first") == pytest.approx(point.threshold("first"), rel=1e-9)


def test_what_is_refused_and_what_force_does(stuck):
    model, batches, problem = stuck
    lam = problem.penalty["layer"]
    start = copy.deepcopy(model)
    u, v = read_adapter(model).blocks["layer"].factors
    place(start, "layer", 0.4 * u, 0.4 * v)
    with pytest.raises(SettingError, match=r"not-converged, not rank-bound.*Train on.*`force`"):
        grow(start, batches, lam=lam, tolerance=0.02)
    forced = grow(start, batches, lam=lam, tolerance=0.02, force=True)
    assert forced.forced and forced.added and forced.to_json()["forced"]
    roomy, again, same = linear_run(0, rank=4)
    same = same.with_penalty(0.3 * largest_lambda(same))
    place(roomy, "layer", *solve(same, tolerance=1e-10).factors["layer"])
    with pytest.raises(SettingError, match=r"first-order-optimal, not rank-bound. The run is done"):
        grow(roomy, again, lam=same.penalty["layer"])
    with pytest.raises(SettingError, match="at least 1"):
        grow(model, batches, lam=lam, most_new=0)
    none, batches_, _ = linear_run(0, rank=2)
    with pytest.raises(AdapterError, match="cannot be certified"):
        grow(none, batches_)  # untrained, and no penalty
    big = get_peft_model(Small(), LoraConfig(r=2, target_modules=["first"], use_dora=True))
    with pytest.raises(AdapterError, match="use_dora"):
        grow(big, small_run()[1], lam=lam)


def test_the_model_stays_as_it_is(stuck):
    model, batches, problem = stuck
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    grow(model, batches, lam=problem.penalty["layer"], tolerance=0.02)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1]


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_runs(tmp_path_factory.mktemp("grow"))


@pytest.fixture
def here(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copy_runs(assets, tmp_path))
    return tmp_path


@pytest.mark.parametrize(("run", "data"), [("texts", "data.csv"), ("causal", "pairs.jsonl")])
def test_the_command(here, monkeypatch, capfd, run, data):
    """Not trained, so it is refused with advice; forced, it writes what loads and computes the same."""
    before = sorted(here.rglob("*"))
    arguments = ["grow", run, "--data", data, "--lambda", "1e-3", "--out", "deep/grown"]
    assert call(*arguments, monkeypatch=monkeypatch) == 2
    out, err = capfd.readouterr()
    assert out == "" and "error the verdict is not-converged, not rank-bound" in err.splitlines()[-1]
    assert sorted(here.rglob("*")) == before
    assert call(*arguments, "--force", "--most-new", "2", "--json", monkeypatch=monkeypatch) == 0
    out, err = capfd.readouterr()
    record = strict_json(out)
    assert record == strict_json((here / "deep/grown/grow.json").read_text())
    assert record["forced"] and record["rank_after"] > record["rank_before"] and record["data"]["rows"] > 0
    assert "Traceback" not in err and "train on" in err
    old, new = load_run(run), load_run("deep/grown")
    batch = {k: v for k, v in read_data(old, data, DataSettings()).batches[0].items() if k != "labels"}
    with torch.no_grad():
        assert torch.allclose(old.model(**batch).logits, new.model(**batch).logits, atol=2e-6)
    ranks = {name: block.rank for name, block in read_adapter(new.model).blocks.items()}
    assert ranks == {name: entry["rank_after"] for name, entry in record["modules"].items()}
    assert max(ranks.values()) <= 4


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--out", "data.csv"], ["data.csv", "is a file"]),
        (["--out", "."], ["holds no adapter"]),
        (["--out", "x", "--weighting", "word"], ["word"]),
        (["--out", "x", "--most-new", "0"], ["at least 1"]),
        (["--out", "x", "--lambda", "1", "--weight-decay", "1"], ["not both"]),
        (["--out", "x", "--base", "nowhere"], ["nowhere"]),
        (["--out", "x", "--data", "absent.csv"], ["absent.csv"]),
    ],
)
def test_mistakes_of_the_command(here, monkeypatch, capfd, options, parts):
    before = sorted(here.rglob("*"))
    assert call("grow", "texts", "--data", "data.csv", *options, monkeypatch=monkeypatch) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("error ") and "Traceback" not in err
    assert all(part in err.splitlines()[-1] for part in parts)
    assert sorted(here.rglob("*")) == before


HALFWAY = """
import sys
import ranksure.adapters.rewrite as rewrite
real = rewrite.save_file
def half(tensors, path, metadata):
    real(tensors, path, metadata=metadata)
    print("half", flush=True)
    sys.stdin.read()
rewrite.save_file = half
from ranksure.cli import main
main()
"""


def test_killed_while_growing_in_place(here, monkeypatch, capfd):
    """Kill -9 in the middle of the write: the old adapter is whole, and the same command again grows it."""
    before = {path.name: path.read_bytes() for path in (here / "texts").iterdir()}
    arguments = ["grow", "texts", "--data", "data.csv", "--lambda", "1e-3", "--force", "--out", "texts"]
    status, _, errors = ended_at("half", signal.SIGKILL, script(HALFWAY, *arguments))
    assert status == -signal.SIGKILL, errors
    assert {path.name: path.read_bytes() for path in (here / "texts").iterdir()} == before
    assert call(*arguments, monkeypatch=monkeypatch) == 0
    assert (here / "texts" / "grow.json").is_file()
    assert load_run("texts").model is not None
    capfd.readouterr()
