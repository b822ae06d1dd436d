"""Spectral norms: an upper bound that is one, a top pair that is one, whatever the matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksure import spectral
from ranksure.spectral import norm_bound, norms, top_pair, top_pairs


def matrix(m: int, n: int, values, seed: int = 0):
    """A float64 matrix with the given singular values (the rest zero)."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    s = torch.as_tensor(values, dtype=torch.float64)
    return (left[:, : len(s)] * s) @ right[:, : len(s)].T


def checked(w: torch.Tensor, rel: float = 1e-5) -> float:
    """Bound and pair against all singular values of the scaled matrix."""
    scale = float(w.abs().max()) or 1.0
    true = scale * float(torch.linalg.svdvals(w.double() / scale)[0])
    bound = norm_bound(w)
    p, sigma, q = top_pair(w)
    assert true * (1 - 1e-14) <= bound <= true * (1 + rel)
    assert true * (1 - rel) <= float(sigma) <= true * (1 + 1e-12)
    assert float(p.norm()) == pytest.approx(1, abs=1e-9) and float(q.norm()) == pytest.approx(1, abs=1e-9)
    # sigma is what the vectors give
    assert float(p @ (w.double() / scale) @ q) * scale == pytest.approx(float(sigma), rel=1e-9, abs=1e-12 * true)
    assert float(sigma) <= bound
    return bound


CASES = {
    "random": lambda: torch.randn(150, 120),
    "wide": lambda: torch.randn(100, 260),
    "tall": lambda: torch.randn(260, 100),
    "clustered": lambda: matrix(140, 120, [2 - 1e-7 * i for i in range(60)] + [1.0] * 60),
    "equal": lambda: matrix(140, 120, [1.0] * 120),
    "identity": lambda: torch.eye(128),
    "rank one": lambda: matrix(130, 120, [3.0]),
    "rank three": lambda: matrix(130, 120, [3.0, 3.0, 1e-9]),
    "slow decay": lambda: matrix(130, 120, [(i + 1) ** -0.05 for i in range(120)]),
    "steep decay": lambda: matrix(130, 120, [10.0**-i for i in range(120)]),
    "single entry": lambda: torch.zeros(130, 120).index_put((torch.tensor(3), torch.tensor(7)), torch.tensor(2.0)),
    "half precision": lambda: torch.randn(150, 120).bfloat16(),
}


@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150])
@pytest.mark.parametrize("name", CASES)
def test_above_the_small_limit(name, scale):
    torch.manual_seed(0)
    w = CASES[name]()
    assert min(w.shape) > spectral._SMALL
    checked(w if scale == 1 else w.double() * scale)


@settings(max_examples=60)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    rank=st.integers(0, 24),
    power=st.integers(-140, 140),
    seed=st.integers(0, 999),
)
def test_any_shape_rank_and_scale(m, n, rank, power, seed):
    """With the iteration and the factorisation in use at every size."""
    generator = torch.Generator().manual_seed(seed)
    k = min(rank, m, n)
    values = 10.0**power * torch.rand(k, generator=generator, dtype=torch.float64) ** 3
    w = matrix(m, n, values, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectral, "_SMALL", 0)
        checked(w)


@pytest.mark.parametrize("shape", [(150, 120), (1, 300), (300, 1), (3, 2), (120, 150)])
def test_zero_and_thin(shape):
    zero = torch.zeros(shape)
    assert norm_bound(zero) == 0
    p, sigma, q = top_pair(zero)
    assert float(sigma) == 0 and float(p.norm()) == pytest.approx(1) and float(q.norm()) == pytest.approx(1)
    torch.manual_seed(0)
    checked(torch.randn(shape))


def test_a_bound_holds_where_no_factorisation_succeeds(monkeypatch):
    torch.manual_seed(0)
    w = torch.randn(150, 120)
    true = float(torch.linalg.svdvals(w.double())[0])
    lowest = torch.linalg.svd(w.double()).Vh[-1]
    monkeypatch.setattr(spectral, "_top_vector", lambda gram: lowest)  # far too low an estimate
    assert true <= norm_bound(w) <= true * (1 + 1e-10)


def test_a_low_estimate_is_found_out(monkeypatch):
    """The iteration alone bounds from below: here it is 0.5% low, and the next margin has to step in."""
    w = matrix(150, 120, [1.0, 0.995, 0.5])
    second = torch.linalg.svd(w).Vh[1]
    monkeypatch.setattr(spectral, "_top_vector", lambda gram: second)
    assert 1 <= norm_bound(w) <= 1.006


@pytest.mark.parametrize(("m", "n", "r"), [(150, 120, 3), (110, 250, 3), (40, 30, 2), (150, 120, 0), (120, 120, 120)])
def test_the_pair_outside_two_subspaces(m, n, r):
    torch.manual_seed(0)
    w = torch.randn(m, n)
    left, right = torch.linalg.qr(torch.randn(m, r).double()).Q, torch.linalg.qr(torch.randn(n, r).double()).Q
    bound, (p, sigma, q) = norms(w, left, right)
    outside = w.double() - left @ (left.T @ w.double())
    outside = outside - (outside @ right) @ right.T
    true = float(torch.linalg.svdvals(outside)[0])
    assert float(sigma) == pytest.approx(true, rel=1e-9, abs=1e-9)
    assert float(p @ outside @ q) == pytest.approx(true, rel=1e-9, abs=1e-9)
    assert float(p.norm()) == pytest.approx(1) and float(q.norm()) == pytest.approx(1)
    if r < min(m, n):
        assert float((left.T @ p).abs().sum() + (right.T @ q).abs().sum()) < 1e-10
    assert 1 <= bound / float(torch.linalg.svdvals(w.double())[0]) <= 1 + 1e-5


def test_several_pairs(monkeypatch):
    w = matrix(140, 120, [5.0, 4.0, 4.0, 1.0, 0.5])
    for small in (1024, 0):
        monkeypatch.setattr(spectral, "_SMALL_PAIRS", small)
        p, s, q = top_pairs(w, 3)
        assert torch.allclose(s, torch.tensor([5.0, 4.0, 4.0]).double(), atol=1e-8)
        assert torch.allclose(w @ q, p * s, atol=1e-4)
        assert torch.allclose(p.T @ p, torch.eye(3).double(), atol=1e-9)
    assert top_pairs(torch.zeros(2, 3), 5)[1].tolist() == [0, 0]
