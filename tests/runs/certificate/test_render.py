from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from ranksure.records.certificate import ModuleVerdict, Probe, RunCertificate
from ranksure.runs.certificate.record import sampled
from ranksure.runs.certificate.render import show_certificate


def module(verdict: str, slope: float, lam: float | None = 0.01) -> ModuleVerdict:
    return ModuleVerdict(
        verdict=verdict,  # type: ignore[arg-type]
        rank=2,
        rank_used=2,
        spectral_ratio=None if lam is None else 1.5,
        gradient_norm=0.015,
        stationarity=None if lam is None else 0.01,
        outside=1.5,
        slope=slope,
        followed=0.25,
        nuclear_norm=3.25,
        lam=lam,
    )


def certificate(n: int = 3, lam: float | None = 0.01) -> RunCertificate:
    return RunCertificate(
        "rank-bound",
        "default",
        0.05,
        modules={f"layers.{i}.self_attn.q_proj": module("rank-bound", i * 1e-3, lam) for i in range(n)},
        loss=0.5,
        penalty=0.0 if lam is None else 0.1,
        objective_at_zero=0.9,
        rank_gain_bound=0.2,
        training_gain_bound=0.01,
        radius=None if lam is not None else 7.0,
        lam=lam,
        loss_kind="cross-entropy",
        weighting="sample",
        n_samples=40,
        n_terms=80,
        probes=[Probe("new direction", 0.3, 0.02), Probe("weakest column", 0.3, -0.1)],
    )


def shown(found: RunCertificate, width: int = 140, **settings) -> str:
    out = io.StringIO()
    show_certificate(found, Console(file=out, width=width), **settings)
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("lam", [0.01, None])
def test_what_matters_is_shown_at_every_width(width, lam):
    text = shown(certificate(lam=lam), width)
    flat = " ".join(text.split())
    assert max(map(len, text.splitlines())) <= width
    assert "rank-bound" in text and "2/2" in text and "0.2" in text and "0.01" in text
    assert "80 terms of 40 rows, every sample alike" in flat and "without the adapter 0.9" in flat
    assert ("rho" in text) == (lam is not None) and ("radius 7" in flat) == (lam is None)


def test_wide_tables_say_more():
    text = shown(certificate(), parameters={"layers.0.self_attn.q_proj": 1234})
    assert "1,234" in text and "slope" in text and "time" in text
    assert "a new direction of size 0.3 lowers the objective by 0.02" in text
    assert "a weakest column lowers the objective at no size tried" in text


def test_the_steepest_of_many_modules():
    text = shown(certificate(30), most=2)
    table = text[: text.index("and 28 more in certificate.json")]
    assert "29.self_attn" in table and "28.self_attn" in table and "27.self_attn" not in table


def test_a_sample_and_nothing_at_all():
    text = " ".join(shown(sampled(certificate(), 10, 1000)).split())
    assert "rank-bound" not in text and "not-checked" in text and "only 10 of 1,000 rows" in text
    nothing = replace(RunCertificate("not-checked", "default", 0.05), reasons=["use_dora=True is not tested"])
    text = shown(nothing)
    assert "use_dora" in text and "objective" not in text
