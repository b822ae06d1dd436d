"""Test accuracy of full fine-tuning and LoRA by rank, linearised and real: mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ranksure.factors import Factors
from ranksure.lab.claim import Check, Claim, Curve, Finding, Table
from ranksure.lab.figures import curve_panels
from ranksure.lab.settings.parts import Made
from ranksure.lab.settings.prepared import LOSS, Prepared
from ranksure.lab.settings.real_network import RealNetwork
from ranksure.lab.settings.run import SettingRun
from ranksure.lab.settings.trained import Trained, linear_full, linear_lora, real_full, real_lora
from ranksure.losses import accuracy
from ranksure.network.logits import predict

SHARE = 0.1  # lambda as a share of lambda_max
NOTICEABLE = 0.02  # accuracies that differ by at most this are not told apart


@dataclass(frozen=True)
class Score:
    """A method on one seed, judged on the test rows."""

    setting: str
    network: str  # linearised or real
    method: str  # no adapter, full fine-tuning, rank 4 ...
    rank: int | None  # 0 without adapter, None for full fine-tuning
    seed: int  # of the rows and the start
    accuracy: float
    loss: float  # mean cross-entropy
    sufficient: bool = False  # whether the rank is the theorem's


def measure(run: SettingRun) -> Finding:
    """Run the experiment."""
    text, others = run.first_and_others()
    linear = [*text[: run.size(1, 2, 9)], *others[: run.size(0, 1, 9)]]
    real = text[: run.size(1, 1, 9)]
    seeds = [run.seed + k for k in range(run.size(2, 3, 5))]
    pairs = [(setting, seed) for setting in linear for seed in seeds]
    return finding(*run.each(pairs, lambda prepared: score(run, prepared, with_real=prepared.setting in real)))


def score(run: SettingRun, prepared: Prepared, with_real: bool) -> list[Score]:
    """All methods on one seed."""
    lam = SHARE * prepared.lambda_max
    out = [_score(prepared, "linearised", "no adapter", 0, tested(prepared, "linearised", {}, {"lambda": 0}))]
    few = run.size([1], [1, 4], [1, 2, 4, 8])
    for one in [linear_full(run, prepared, lam), *(linear_lora(run, prepared, lam, r) for r in prepared.ranks(few))]:
        out.append(_of(prepared, "linearised", one, lam))
    if with_real:
        few = run.size([1], [1], [1, 2, 4, 8])
        for one in [real_full(run, prepared, lam), *(real_lora(run, prepared, lam, r) for r in prepared.ranks(few))]:
            out.append(_of(prepared, "real", one, lam))
    return out


def tested(prepared: Prepared, network: str, factors: Factors, key: dict[str, object]) -> tuple[float, float]:
    """Accuracy and loss on the test rows."""

    def make() -> Made:
        if network == "linearised":
            held = prepared.held_out
            logits, labels = held.logits(factors), held.labels
        else:
            labels = prepared.task.labels(prepared.splits.report)
            with prepared.reporter.stage(f"Testing the real network: {prepared.place}"):
                if factors:
                    logits = RealNetwork(prepared.task, prepared.targets, prepared.splits.report).logits(factors)
                else:
                    batches, back = prepared.task.batches_by_length(prepared.splits.report)
                    logits = predict(prepared.task.model, batches).double()[back]
        return {"accuracy": accuracy(logits, labels, LOSS), "loss": float(LOSS.value(logits, labels).mean())}, {}

    facts, _ = prepared.parts.get("tested", {**prepared.key, "network": network, **key}, make)
    return facts["accuracy"], facts["loss"]


def _of(prepared: Prepared, network: str, one: Trained, lam: float) -> Score:
    digest = float(sum(torch.as_tensor(u).double().square().sum() for u, _ in one.factors.values()))
    key = {"lambda": lam, "rank": one.rank, "method": one.method, "objective": one.value, "size": digest}
    return _score(prepared, network, one.label, one.rank, tested(prepared, network, one.factors, key))


def _score(prepared: Prepared, network: str, method: str, rank: int | None, found: tuple[float, float]) -> Score:
    return Score(
        prepared.setting.title, network, method, rank, prepared.seed, *found, sufficient=rank == prepared.paper_rank
    )


def finding(scores: Sequence[Score], missing: Sequence[str]) -> Finding:
    """What the scores say."""
    methods: dict[tuple[str, str, str], list[Score]] = {}
    for one in scores:
        methods.setdefault((one.setting, one.network, one.method), []).append(one)
    table = Table.of(
        methods.values(),
        {
            "setting": lambda these: these[0].setting,
            "network": lambda these: these[0].network,
            "method": lambda these: these[0].method,
            "rank": lambda these: these[0].rank,
            "seeds": len,
            "accuracy, mean": lambda these: _spread([one.accuracy for one in these])[0],
            "accuracy, spread": lambda these: _spread([one.accuracy for one in these])[1],
            "loss, mean": lambda these: _spread([one.loss for one in these])[0],
            "loss, spread": lambda these: _spread([one.loss for one in these])[1],
        },
    )
    curves = [
        curve
        for group in dict.fromkeys(key[:2] for key in methods)
        for curve in _curves(", ".join(group), [these for key, these in methods.items() if key[:2] == group])
    ]
    return Finding(
        checks=checks(scores),
        figure=curve_panels(curves, x="rank", y="test accuracy", markers=True, height=3.0),
        numbers={"scores": [vars(score) for score in scores]},
        table=table,
        curves=curves,
        axes={"x": "rank", "y": "test accuracy, mean and standard deviation over seeds"},
        missing=missing,
    )


def _spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; None for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _curves(group: str, methods: Sequence[Sequence[Score]]) -> list[Curve]:
    """LoRA over its ranks; what has no rank as a level over the same ranks."""
    lora = [these for these in methods if these[0].rank]
    ranks = [these[0].rank or 0 for these in lora]
    out = []
    for these in methods:
        if not these[0].rank:
            mean, spread = _spread([one.accuracy for one in these])
            out.append(Curve(these[0].method, ranks, [mean] * len(ranks), group, [spread or 0.0] * len(ranks)))
    spreads = [_spread([one.accuracy for one in these]) for these in lora]
    return [*out, Curve("LoRA", ranks, [mean for mean, _ in spreads], group, [spread or 0.0 for _, spread in spreads])]


def checks(scores: Sequence[Score]) -> list[Check]:
    """The parts of the claim: paired over seeds, LoRA at the theorem's rank against full fine-tuning."""
    out = []
    for network in dict.fromkeys(score.network for score in scores):
        lines, holds = [], []
        for setting in dict.fromkeys(score.setting for score in scores if score.network == network):
            mine = [score for score in scores if (score.setting, score.network) == (setting, network)]
            full = {score.seed: score.accuracy for score in mine if score.rank is None}
            differences = [score.accuracy - full[score.seed] for score in mine if score.sufficient]
            mean, spread = _spread(differences)
            error = (spread or 0.0) / len(differences) ** 0.5
            holds.append(abs(mean) <= max(NOTICEABLE, 2 * error))
            lines.append(f"{mean:+.3f} (standard error {error:.3f}, {len(differences)} seeds, {setting})")
        out.append(
            Check(
                f"LoRA at the theorem's rank generalises like full fine-tuning ({network} network).",
                f"Accuracy of LoRA at the theorem's rank less that of full fine-tuning, {network} network: "
                f"{'; '.join(lines)}. Up to {NOTICEABLE:g}, or two standard errors, they are not told apart.",
                all(holds),
            )
        )
    return out


CLAIM = Claim(
    title="Test accuracy",
    claim="The low-rank solution that LoRA finds generalises as well as full fine-tuning.",
    source="Theorem 5.1; test accuracy in the appendix",
    minutes=(11, 120),
    measure=measure,
)
