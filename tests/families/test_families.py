"""A share of the campaign over architectures (`python -m scripts.docs.families` runs it whole)."""

from __future__ import annotations

import pytest
import torch

from scripts.docs.families import page
from tests.families.agreement import SIZES, Outcome, Report, examine
from tests.families.networks import MAPPINGS, Family, families

RIGHT = {
    "text": "albert bert deberta-v2 distilbert falcon gpt_neox gptj llama mistral modernbert-decoder nemotron olmo2 "
    "opt phi phi3 qwen2 qwen3_5 roberta smollm3 stablelm starcoder2 xlm",
    "causal": "bert cpmant ctrl gemma3 git gpt_bigcode gpt_neo jamba lfm2 opt recurrent_gemma rwkv starcoder2 "
    "xlm-roberta",
    "image": "beit clip convnext deit dinov2 hiera ijepa pvt_v2 resnet segformer siglip swiftformer swin swinv2 vit",
    "speech": "audio-spectrogram-transformer wav2vec2-bert whisper",
}
"""Right in plan and certify, at every batch size and on either padding side."""

RIGHT_PADDED = "bloom gemma2 mpt"
"""Texts: right where rows are padded on the right; on the left eager attention is NaN in float64."""

REFUSED = {
    ("text", "perceiver"): ("plan", "has no linear layer with 3 outputs outside its base model"),
    ("text", "phimoe"): ("plan", "is a PhimoeTopKRouter, which does not map one tensor to one tensor"),
    ("text", "t5"): ("certify", "the network is an encoder-decoder, which was not tested"),
    ("causal", "axk2"): ("certify", "the network itself takes none there"),
    ("causal", "mamba"): ("certify", "PEFT: "),
    ("image", "bit"): ("certify", "is a WeightStandardizedConv2d, whose output is not its weight times its input"),
    ("image", "imagegpt"): ("plan", "You have to specify either input_ids or inputs_embeds"),
    ("speech", "wavlm"): ("plan", "no target module reaches the logits with a gradient"),
}


def present(kind: str, names: str) -> list[Family]:
    """Those that the installed transformers has."""
    return [family for family in families(kind) if family.model_type in names.split()]


def complete(outcome: Outcome, sides: int) -> bool:
    return len(outcome.errors) == sides * len(SIZES) and not outcome.refusals


CASES = [family for kind in MAPPINGS for family in present(kind, RIGHT[kind])]


def name(family: Family) -> str:
    return f"{family.kind}-{family.model_type}"


@pytest.mark.parametrize("family", CASES, ids=name)
def test_right_row_by_row(family: Family) -> None:
    report = examine(family)
    assert not report.wrong
    sides = 2 if family.kind in ("text", "causal") else 1
    assert complete(report.plan, sides) and complete(report.certify, sides)


@pytest.mark.parametrize("family", present("text", RIGHT_PADDED), ids=name)
def test_right_row_by_row_where_padded_on_the_right(family: Family) -> None:
    report = examine(family, ("right",))
    assert not report.wrong and complete(report.plan, 1) and complete(report.certify, 1)


@pytest.mark.parametrize("family", [f for k, t in REFUSED for f in present(k, t)], ids=name)
def test_refused_for_the_true_reason(family: Family) -> None:
    question, words = REFUSED[family.kind, family.model_type]
    report = examine(family, ("right",))
    assert all(words in why for why in getattr(report, question).refusals.values())
    assert getattr(report, question).refusals and not getattr(report, question).errors


def test_batches_whose_padding_a_network_reads_are_refused() -> None:
    """A group norm over all of a recording's time: given batches, one or several, have another loss than their rows."""
    report = examine(next(iter(present("speech", "sew"))))
    assert not report.wrong and complete(report.plan, 1)
    assert report.certify.errors.keys() == {"batches of 1"}
    assert all("how far its batch is padded" in why for why in report.certify.refusals.values())


def test_a_wrong_answer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees a captured product that is off, and one row's logits in another's place."""
    family = next(iter(present("image", "vit")))
    from tests.families import agreement

    own = agreement.capture_rows

    def off(*args, **options):
        found = own(*args, **options)
        found.base_logits = found.base_logits + 3e-6 * found.base_logits.abs().max() * torch.eye(
            *found.base_logits.shape
        )
        return found

    monkeypatch.setattr(agreement, "capture_rows", off)
    assert examine(family).wrong


def test_the_page() -> None:
    family = Family("text", "x", "XForY")
    right = Report(family, False, plan=Outcome({"batches of 1": 1e-9}), certify=Outcome({"batches of 1": 3e-15}))
    half = Report(
        Family("text", "z", "ZForY"),
        True,
        "default reason",
        Outcome({"a": 1e-7}, {"b": "no | good"}),
        Outcome({}, {"any": "bad"}),
    )
    stuck = Report(Family("text", "y", "YForZ"), False, plan=Outcome(failures={"any": "no"}))
    tried = {each.family: each for each in (right, half, stuck)}
    made = page({**tried, Family("image", "w", "W"): "cannot be built"})
    assert "| y | `YForZ` | wrong, see below | not asked |  |" in made
    assert "| x | `XForY` | right | right | 1e-09 |" in made
    assert "| z | `ZForY` | right, or refused | refused | 1e-07 |" in made
    assert "`ZForY`, default targets: default reason" in made and "plan (b): no | good" in made
    assert "`W`: cannot be built" in made and "certify: bad" in made
