"""Terms: losses, gradients, and the line in c against exact conjugates in high precision."""

from __future__ import annotations

import math
from types import SimpleNamespace

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ranksure import loss_terms
from ranksure.errors import DataError, SettingError
from ranksure.loss_terms import Terms, batch_terms, is_shifted, kind_of
from ranksure.losses import get_loss
from tests.refusals import refusal


def line_by_conjugate(kind: str, z: torch.Tensor, y: torch.Tensor, c: float) -> float:
    """``mean of <c a, z> - conj(c a)`` with the conjugates of the linearised problem, which see logits, not losses."""
    loss = get_loss(kind)
    a = c * loss.gradient(z, y)
    return float(((a * z).sum(-1) - loss.conjugate(a, y)).mean())


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999), size=st.sampled_from([0.1, 1.0, 5.0]), share=st.floats(0.01, 0.999), k=st.integers(2, 5)
)
@pytest.mark.parametrize("kind", ["cross-entropy", "logistic", "squared-error"])
def test_the_line_is_that_of_the_exact_conjugates(kind, seed, size, share, k):
    generator = torch.Generator().manual_seed(seed)
    z = size * torch.randn(6, k, generator=generator, dtype=torch.float64)
    if kind == "cross-entropy":
        y = torch.randint(k, (6,), generator=generator)
    elif kind == "logistic":
        y = torch.randint(2, (6, k), generator=generator).double()
    else:
        y = torch.randn(6, k, generator=generator, dtype=torch.float64)
    found = batch_terms(kind, z, y)
    n = len(found.losses)
    all_terms = Terms(kind, found.losses, torch.full((n,), 1 / n, dtype=torch.float64))
    limit = min(all_terms.largest_step, 5.0)
    for c in (share * limit, min(1.0, limit)):
        value, rounding = all_terms.dual_line(c)
        assert value == pytest.approx(line_by_conjugate(kind, z, y, c), rel=1e-9, abs=1e-11)
        assert 0 <= rounding <= 1e-9 * (1 + abs(value))
    assert all_terms.dual_line(0.0) == (0.0, 0.0)
    # at c = 1 Fenchel-Young is an equality, and the slope there is zero
    assert all_terms.dual_line(1.0)[0] == pytest.approx(all_terms.mean, rel=1e-9)
    # (1 - (1 - p) keeps p to eps only: the slope steers the search, and needs no more)
    assert all_terms.dual_slope(1.0) == pytest.approx(0, abs=1e-15 * math.exp(float(found.losses.max())) + 1e-9)
    # slope by central differences
    c, h = share * min(limit, 2.0), 1e-5 * share
    difference = (all_terms.dual_line(c + h)[0] - all_terms.dual_line(c - h)[0]) / (2 * h) if c + h < limit else None
    if difference is not None:
        assert all_terms.dual_slope(c) == pytest.approx(difference, rel=1e-3, abs=1e-4)


@settings(max_examples=60)
@given(
    powers=st.lists(st.floats(-250, 2.5), min_size=1, max_size=4),
    share=st.one_of(st.just(0.0), st.floats(1e-9, 1), st.just(1 - 2**-52)),
)
def test_rounding_of_the_line_is_bounded(powers, share):
    """Losses from 1e-250 to 300, steps up to the largest: against 60 digits."""
    losses = torch.tensor([10.0**power for power in powers], dtype=torch.float64)
    weights = torch.rand(len(losses), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    weights /= weights.sum()
    found = Terms("cross-entropy", losses, weights)
    c = share * min(found.largest_step * (1 - 2e-16), 1e6)
    value, bound = found.dual_line(c)
    if value == -math.inf:  # c was rounded across the limit
        return
    with mpmath.workdps(400):
        exact = mpmath.mpf(0)
        for loss, weight in zip(losses.tolist(), weights.tolist(), strict=True):
            p, step = mpmath.exp(-mpmath.mpf(loss)), mpmath.mpf(c)
            q = 1 - step * (1 - p)
            if q < 0:  # likewise
                return
            log_c = mpmath.log(step) if step else mpmath.mpf(0)
            own = q * mpmath.log(q) if q else mpmath.mpf(0)
            exact += mpmath.mpf(weight) * (step * (1 - p) * (mpmath.mpf(loss) - log_c) - own)
        assert abs(exact - mpmath.mpf(value)) <= mpmath.mpf(bound)


def test_beyond_the_domain_the_line_is_minus_infinity():
    found = Terms("logistic", torch.tensor([3.0, 0.1]).double(), torch.tensor([0.5, 0.5]).double())
    assert math.isfinite(found.dual_line(found.largest_step * (1 - 1e-15))[0])
    assert found.dual_line(found.largest_step * 1.001)[0] == -math.inf
    assert Terms("squared-error", found.losses, found.weights).largest_step == math.inf
    perfect = Terms("cross-entropy", torch.zeros(2).double(), found.weights)
    assert perfect.largest_step == math.inf and perfect.dual_line(1e6) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["cross-entropy", "tokens", "aligned", "logistic", "squared-error"])
def test_losses_and_gradients_are_those_of_torch(kind, dtype):
    torch.manual_seed(0)
    shape = (3, 5, 7) if kind in ("tokens", "aligned") else (6, 7)
    z = (4 * torch.randn(shape)).to(dtype)
    exact = z.double().requires_grad_(True)
    weights = torch.rand(shape[0], dtype=torch.float64)
    if kind in ("tokens", "aligned"):
        y = torch.randint(7, shape[:2])
        y[0, :3], y[2, 4] = -100, -100
        seen, target = (exact[:, :-1], y[:, 1:]) if kind == "tokens" else (exact, y)
        each = F.cross_entropy(seen.transpose(1, 2), target, reduction="none", ignore_index=-100)
        mask = target != -100
        found = batch_terms("cross-entropy", z, y, shifted=kind == "tokens")
    else:
        mask = torch.ones(shape, dtype=torch.bool)
        if kind == "cross-entropy":
            y = torch.randint(7, (6,))
            y[4] = -100
            each, mask = F.cross_entropy(exact, y, reduction="none"), y != -100
        elif kind == "logistic":
            y = torch.randint(2, shape).float()
            each = F.binary_cross_entropy_with_logits(exact, y.double(), reduction="none")
        else:
            y = torch.randn(shape).to(dtype)
            each = F.mse_loss(exact, y.double(), reduction="none")
        found = batch_terms(kind, z, y)
    assert torch.equal(found.rows, mask.nonzero()[:, 0])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert torch.allclose(found.losses, each[mask].detach(), rtol=tolerance, atol=tolerance)
    (expected,) = torch.autograd.grad((weights.view(-1, *[1] * (each.dim() - 1)) * each).sum(), exact)
    got = found.seed(weights)
    assert got.dtype == dtype and got.shape == z.shape
    rounding = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert torch.allclose(got.double(), expected, rtol=rounding, atol=rounding * 1e-3)


def test_a_term_that_is_all_but_certain_keeps_its_precision():
    z = torch.tensor([[40.0, 0.0], [20.0, 0.0], [0.0, 120.0]])
    found = batch_terms("cross-entropy", z, torch.tensor([0, 0, 0]))
    assert found.losses.tolist() == pytest.approx([math.exp(-40), math.exp(-20), 120.0], rel=1e-6)
    assert found.gradient[0].tolist() == pytest.approx([-math.exp(-40), math.exp(-40)], rel=1e-5)
    masked = torch.tensor([[1.0, -math.inf, 0.5]])  # an output that the model rules out
    found = batch_terms("cross-entropy", masked, torch.tensor([0]))
    assert float(found.losses[0]) == pytest.approx(math.log(1 + math.exp(-0.5)), rel=1e-6)
    assert float(found.gradient[0, 1]) == 0


def test_a_wide_vocabulary_is_taken_in_parts(monkeypatch):
    torch.manual_seed(0)
    z, y = torch.randn(3, 6, 50), torch.randint(50, (3, 6))
    whole = batch_terms("cross-entropy", z, y)
    monkeypatch.setattr(loss_terms, "CHUNK_VALUES", 120)
    parts = batch_terms("cross-entropy", z, y)
    assert torch.equal(whole.losses, parts.losses) and torch.equal(whole.gradient, parts.gradient)


def test_which_loss():
    def config(**settings):
        return SimpleNamespace(**settings)

    classes, floats = torch.tensor([0, 1]), torch.randn(2, 3)
    assert kind_of(config(), classes, torch.randn(2, 3)) == "cross-entropy"
    assert kind_of(config(), classes[:, None], torch.randn(2, 3)) == "cross-entropy"
    assert kind_of(config(), floats, torch.randn(2, 3)) == "logistic"
    assert kind_of(config(), floats[:, 0], torch.randn(2, 1)) == "squared-error"
    assert kind_of({"model_type": "custom"}, classes, torch.randn(2, 1)) == "squared-error"
    assert kind_of(config(problem_type="regression"), floats, torch.randn(2, 3)) == "squared-error"
    assert kind_of(config(problem_type="multi_label_classification"), floats, torch.randn(2, 3)) == "logistic"
    refusal(SettingError, "fit no known loss", kind_of, config(), floats[:, :2], torch.randn(2, 3))
    assert is_shifted(SimpleNamespace()) and is_shifted(SimpleNamespace(loss_type="ForCausalLM"))
    assert not is_shifted(SimpleNamespace(loss_type="ForTokenClassification"))
    refusal(SettingError, "ForQuestionAnswering", is_shifted, SimpleNamespace(loss_type="ForQuestionAnswering"))


@pytest.mark.parametrize(
    ("kind", "logits", "labels", "message"),
    [
        ("cross-entropy", torch.zeros(2, 3), torch.tensor([0, 3]), "label 3 is out of range: the model has 3"),
        ("cross-entropy", torch.zeros(2, 3), torch.tensor([0, -1]), "label -1 is out of range"),
        ("cross-entropy", torch.zeros(2, 3), torch.tensor([0]), "do not fit"),
        ("cross-entropy", torch.zeros(2, 3), torch.zeros(2), "float labels"),
        ("cross-entropy", torch.zeros(2, 3, 4), torch.zeros(2, 2).long(), "token labels"),
        ("cross-entropy", torch.tensor([[0.0, math.nan]]), torch.tensor([0]), "not finite"),
        ("cross-entropy", torch.tensor([[math.inf, 0.0]]), torch.tensor([0]), "not finite"),
        ("cross-entropy", torch.tensor([[math.inf, 0.0]]), torch.tensor([1]), "not finite"),
        ("logistic", torch.zeros(2, 3), torch.full((2, 3), 0.5), "0 or 1"),
        ("logistic", torch.zeros(2, 3), torch.zeros(3, 2), "do not fit"),
        ("squared-error", torch.full((2, 1), math.inf), torch.zeros(2), "not finite"),
        ("squared-error", torch.zeros(2, 1), torch.tensor([0.0, math.nan]), "not finite"),
    ],
)
def test_what_is_refused(kind, logits, labels, message):
    with pytest.raises(DataError, match=message):
        batch_terms(kind, logits, labels)
