"""Test accuracy of full fine-tuning and LoRA by rank, linearised and real: mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ranksure.factors import Factors
from ranksure.losses import accuracy
from ranksure.network.logits import predict
from ranksure.reproduce.experiment import Check, Curve, Experiment, Finding, Run, nothing_to_run
from ranksure.reproduce.figures import curve_panels
from ranksure.reproduce.network import RealNetwork
from ranksure.reproduce.prepared import LOSS, Prepared
from ranksure.reproduce.storage import Made
from ranksure.reproduce.trainings import Trained, linear_full, linear_lora, real_full, real_lora

SHARE = 0.1  # lambda as a share of lambda_max
NOTICEABLE = 0.02  # accuracies that differ by at most this are not told apart


@dataclass(frozen=True)
class Score:
    """A method on one seed.

    Attributes:
        setting: title of the setting.
        network: ``linearised`` or ``real``.
        method: ``no adapter``, ``full fine-tuning``, ``rank 4`` ...
        rank: of LoRA; 0 without adapter, None for full fine-tuning.
        seed: of the rows and the start.
        accuracy: share of test rows classified correctly.
        loss: mean cross-entropy on them.
        sufficient: whether the rank is the theorem's.
    """

    setting: str
    network: str
    method: str
    rank: int | None
    seed: int
    accuracy: float
    loss: float
    sufficient: bool = False


def measure(run: Run) -> Finding:
    """Run the experiment."""
    text, others = run.first_and_others()
    linear = [*text[: run.size(1, 2, 9)], *others[: run.size(0, 1, 9)]]
    real = text[: run.size(1, 1, 9)]
    seeds = [run.seed + k for k in range(run.size(2, 3, 5))]
    scores: list[Score] = []
    missing: dict[str, str] = {}
    for setting in linear:
        for seed in seeds:
            if setting.name in missing:
                continue
            ready, lacks = run.available([(setting, seed)], some=False)
            if lacks:
                missing[setting.name] = lacks[0]
            for prepared in ready:
                scores += score(run, prepared, with_real=setting in real)
                prepared.release()
    if not scores:
        raise nothing_to_run(list(missing.values()))
    return finding(scores, list(missing.values()))


def score(run: Run, prepared: Prepared, with_real: bool) -> list[Score]:
    """All methods on one seed."""
    lam = SHARE * prepared.lambda_max
    few = run.size([1], [1, 4], [1, 2, 4, 8])
    zero = tested(prepared, "linearised", {}, {"lambda": 0})
    out = [_score(prepared, "linearised", "no adapter", 0, zero)]
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
            held = prepared.held_out("report")
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
    key = {"lambda": lam, "rank": one.rank, "method": one.method, "objective": one.objective, "size": digest}
    return _score(prepared, network, one.label, one.rank, tested(prepared, network, one.factors, key))


def _score(prepared: Prepared, network: str, method: str, rank: int | None, found: tuple[float, float]) -> Score:
    return Score(
        prepared.setting.title, network, method, rank, prepared.seed, *found, sufficient=rank == prepared.paper_rank
    )


def finding(scores: Sequence[Score], missing: Sequence[str]) -> Finding:
    """What the scores say."""
    groups = list(dict.fromkeys((score.setting, score.network) for score in scores))
    columns = ["setting", "network", "method", "rank", "seeds", "accuracy, mean", "accuracy, spread", "loss, mean"]
    columns += ["loss, spread"]
    rows, curves = [], []
    for setting, network in groups:
        mine = [score for score in scores if (score.setting, score.network) == (setting, network)]
        means, spreads, ranks = [], [], []
        for method in dict.fromkeys(score.method for score in mine):
            these = [score for score in mine if score.method == method]
            accuracies, losses = [one.accuracy for one in these], [one.loss for one in these]
            rows.append([setting, network, method, these[0].rank, len(these), *_spread(accuracies), *_spread(losses)])
            if these[0].rank:
                ranks.append(these[0].rank)
                means.append(statistics.fmean(accuracies))
                spreads.append(_spread(accuracies)[1] or 0.0)
            else:
                name = "full fine-tuning" if these[0].rank is None else "no adapter"
                curves.append((name, None, _spread(accuracies), f"{setting}, {network}"))
        curves.append(("LoRA", ranks, (means, spreads), f"{setting}, {network}"))
    drawn = _curves(curves)
    return Finding(
        checks=checks(scores),
        columns=columns,
        rows=rows,
        figure=curve_panels(drawn, x="rank", y="test accuracy", markers=True, height=3.0),
        curves=drawn,
        axes={"x": "rank", "y": "test accuracy, mean and standard deviation over seeds"},
        numbers={"scores": [vars(score) for score in scores]},
        missing=missing,
    )


def _spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; None for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _curves(found: Sequence[tuple]) -> list[Curve]:
    """LoRA over its ranks; what has no rank as a level over the same ranks."""
    out = []
    width = {group: ranks for _, ranks, _, group in found if ranks is not None}
    for label, ranks, values, group in found:
        if ranks is not None:
            out.append(Curve(label, ranks, values[0], group, values[1]))
        else:
            x = width.get(group) or [1]
            out.append(Curve(label, x, [values[0]] * len(x), group, [values[1] or 0.0] * len(x)))
    return out


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


EXPERIMENT = Experiment(
    title="Test accuracy",
    claim="The low-rank solution that LoRA finds generalises as well as full fine-tuning.",
    where="Theorem 5.1; test accuracy in the appendix",
    minutes=(11, 120),
    measure=measure,
)
