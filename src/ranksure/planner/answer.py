"""The answer of a plan in plain sentences, and what to know before trusting it.

What was measured on the network and what is certified are told apart; a gap is of a linearised model, never of the
network itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from ranksure.planner.tables import shown_share
from ranksure.records.plan import FIRST_ORDER, NetworkPlan, NetworkSubset, Plan, Recommended
from ranksure.records.record import Ranks


def sentences(record: Plan) -> list[str]:
    """The answer: of the network itself where it was solved, else of its linearisation."""
    return _linearised(record) if record.network is None else _network(record, record.network)


def warnings(record: Plan) -> list[str]:
    """What a user should know before trusting the advice."""
    if record.network is None:
        own = _linearised_warnings(record)
    else:
        own = _network_warnings(record.network) + _stops_earlier(record, record.network)
    mean, model = record.head.accuracy.get("mean"), record.head.accuracy.get("model")
    if mean is not None and model is not None and mean - model > 0.01 and record.pooling == "model":
        doubt = "" if record.network else ", and look at its linearity before you trust it"
        own.append(
            f"Mean pooling is the better head here ({mean:.1%} against {model:.1%} before any adapter, on the rows "
            f"that choose lambda): try `pooling` mean{doubt}."
        )
    return own


# ---------------------------------------------------------------------------------------------------------------------
# the network itself


def certified(net: NetworkPlan) -> str:
    """What the gap proves at the point found, and how near it is to first-order optimal; two different things."""
    optimum, share = net.optimum, net.optimum.relative_gap
    near = ""
    if net.is_first_order:
        near = f" Every module is first-order optimal there within {FIRST_ORDER:.0%} (measured)."
    if optimum.is_zero:
        return (
            f"Certified: the network linearised at its pretrained weights could gain at most {optimum.gap:.2g} of "
            f"{optimum.objective_at_zero:.4g}, at any rank; nothing is proved about the network itself."
        )
    of = f"to {shown_share(share)}" if share is not None and share < 1 else ""
    left = f"{optimum.gap:.2g}, {of.removeprefix('to ') or 'more than all'} of what was gained"
    if not optimum.certified:
        return (
            f"Not certified to the tolerance: the model re-linearised at the point found could still gain up to {left}."
            f"{near}"
        )
    return (
        f"Certified {of or 'to the noise of an evaluation'}: the model re-linearised at the point found could gain at "
        f"most {left}, at any rank. It bounds no optimum of the network itself.{near}"
    )


def _network(record: Plan, net: NetworkPlan) -> list[str]:
    held, bad = _network_held_out(net, record.recommended.heldout_r)
    if net.optimum.is_zero:
        out = [_none(net), certified(net), *([_compared(record, net)] if record.recommended.linear_r else [])]
    else:
        out = [_enough(record, net), certified(net), _compared(record, net)]
    moved = [_moved(net.subsets, net.settled)] if len(net.subsets) > 1 else []
    return [held, *out, *moved] if bad else [*out, *moved, held]


def _stops_earlier(record: Plan, net: NetworkPlan) -> list[str]:
    """Where the linearised optimum, put on the network, does better on the rows that chose nothing."""
    real = record.linearity.heldout_real_loss
    if net.heldout is None or real is None or real >= net.heldout.loss or record.optimum.is_zero:
        return []
    return [
        f"Held-out rows that chose nothing prefer the linearised optimum, put on the network (loss {real:.4f} against "
        f"{net.heldout.loss:.4f}): it stops nearer to the pretrained weights. `linearised` makes a plan of it."
    ]


def _none(net: NetworkPlan) -> str:
    none = f"No adapter is needed: at weight decay {net.weight_decay:.3g} (lambda_max is {net.lambda_max:.3g}) "
    none += "the solver of the network itself ends at no update at all, so the rank is 0."
    losses = [(step.selection_loss, step.weight_decay) for step in net.path if step.selection_loss is not None]
    here = next((loss for loss, lam in losses if lam == net.weight_decay), None)
    weaker = [pair for pair in losses if pair[1] < net.weight_decay]
    if here is None or not weaker or min(weaker)[0] <= here:
        return f"{none} Lower the weight decay to let the data move the weights."
    loss, lam = min(weaker)
    return (
        f"{none} Every weaker one that was tried does worse on the rows that choose it: their loss is {here:.4f} here, "
        f"and {loss:.4f} at {lam:.3g}."
    )


def _enough(record: Plan, net: NetworkPlan) -> str:
    asked, reached = f"{100 * record.captured_target:.6g}%", shown_share(net.captured_uniform)
    where = _every(len(record.target_modules))
    best = f"of what the best point found gains on these {net.n_samples:,} rows"
    if net.captured_uniform >= record.captured_target:
        text = (
            f"Rank {net.r} is enough in {where}: on the network itself it reaches {reached} {best} (measured; {asked} "
            "was asked for). It is the smallest found, so the smallest there is may be lower."
        )
    else:
        text = f"Rank {net.r} in {where} reaches {reached} {best} (measured), less than the {asked} that was asked for."
    stuck = [(row.rank, row.captured) for row in net.ranks if row.verdict == "rank-bound" and row.rank < net.r]
    if stuck:
        text += (
            f" Below it, {' and '.join(f'rank {rank} stops at {shown_share(share)}' for rank, share in stuck[-2:])}."
        )
    kept = {name: rank for name, rank in net.pattern.items() if rank}
    sizes = [sum(rank * sum(record.shapes[name]) for name, rank in ranks.items()) for ranks in (kept, _uniform(record))]
    if kept and sizes[0] < sizes[1]:
        text += (
            f" {_pattern(kept)[0].upper()}{_pattern(kept)[1:]} {'does' if len(kept) == 1 else 'do'} too "
            f"({shown_share(net.captured_pattern)}), with {sizes[0]:,} parameters in place of {sizes[1]:,}."
        )
    return text


def _uniform(record: Plan) -> Ranks:
    assert record.network is not None
    return {name: min(record.network.r, m, n) for name, (m, n) in record.shapes.items()}


def _compared(record: Plan, net: NetworkPlan) -> str:
    """The linearised rank beside the network's."""
    linear, at = record.recommended.linear_r or 0, ""
    if net.n_samples != record.n_samples:
        at = f", on {record.n_samples:,} rows"
    if abs(net.weight_decay - record.weight_decay) > 1e-6 * record.weight_decay:
        at += f", at weight decay {record.weight_decay:.3g} instead of {net.weight_decay:.3g}"
    if linear == net.r:
        return f"The same rank suffices for the network linearised at its pretrained weights (certified{at})."
    return (
        f"The two answers differ: for the network linearised at its pretrained weights rank {linear} suffices "
        f"(certified{at}), for the network itself rank {net.r} (measured), which is the advice."
    )


def _moved(subsets: list[NetworkSubset], settled: bool | None) -> str:
    first, last = subsets[0], subsets[-1]
    ranks = " and ".join(str(max(part.ranks.values(), default=0)) for part in (first, last))
    text = f"From {first.n_samples:,} to {last.n_samples:,} rows "
    if first.rank_needed is not None and last.rank_needed is not None:
        text += f"the rank needed goes from {first.rank_needed} to {last.rank_needed}"
    else:
        text += f"the largest ranks are {ranks}"
    if first.heldout_loss is not None and last.heldout_loss is not None:
        text += f" and the held-out loss from {first.heldout_loss:.4f} to {last.heldout_loss:.4f}"
    ends = {True: "; the answer has settled", False: "; the answer has not settled, so more rows may move it", None: ""}
    return f"{text}{ends[settled]}."


def _network_held_out(net: NetworkPlan, within: int | None) -> tuple[str, bool]:
    """What held-out rows say, and whether it is bad news, which comes first; ``within`` one standard error of the best
    is this rank.
    """
    held = net.heldout
    if held is None:
        return "There were no held-out rows, so nothing is said about generalisation.", False
    rows = f"On {held.rows:,} held-out rows that chose nothing"
    if net.optimum.is_zero:
        return f"{rows}, the loss is {held.loss_without_adapter:.4f} without an adapter.", False
    pairs = f"loss {held.loss:.4f} against {held.loss_without_adapter:.4f}"
    if held.accuracy is not None and held.accuracy_without_adapter is not None:
        pairs += f", accuracy {held.accuracy:.1%} against {held.accuracy_without_adapter:.1%}"
    worse = held.loss > held.loss_without_adapter
    verb = "the network does worse with the adapter than" if worse else "the adapter has"
    if worse:
        return f"{rows}, {verb} without it: {pairs}.", True
    doubt = " That is within one standard error, so they show no gain." if within == 0 else ""
    return f"{rows}, {verb} {pairs} without it.{doubt}", within == 0


def _network_warnings(net: NetworkPlan) -> list[str]:
    out: list[str] = []
    if net.stopped:
        out.append(
            f"The work ended early ({net.stopped.rstrip('.')}): these are the best points so far, and what was not "
            "reached is not known."
        )
    if not net.optimum.certified:
        gap = net.optimum.relative_gap
        left = "nothing is bounded" if gap is None else f"gap {shown_share(gap)} of what was gained"
        out.append(f"The network's solution was not certified to the tolerance ({left}): {net.optimum.remedy}.")
    if net.weight_decay_chosen_by != "the user":
        out += _still_falling([(step.weight_decay, step.selection_loss) for step in net.path], net.lambda_max)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# the linearised network


def _linearised_warnings(record: Plan) -> list[str]:
    out: list[str] = []
    linearity, held, optimum = record.linearity, record.heldout, record.optimum
    if linearity.far:
        out.append(
            f"The real network differs from its linearisation by {linearity.worst:.0%} of the change: the "
            "certificate is for the linearised problem, so treat the ranks as a guide, consider twice the rank, "
            "and certify the trained run."
        )
    out += _still_falling([(step.weight_decay, step.selection_loss) for step in record.path], record.lambda_max)
    real = linearity.heldout_real_loss
    if held is not None and real is not None and real > held.loss_without_adapter:
        out.append(
            "With the solved update the real network does worse on held-out rows than without an adapter (loss "
            f"{real:.4f} against {held.loss_without_adapter:.4f})."
        )
    if optimum.status != "converged":
        out.append(
            f"The optimum was not certified to the tolerance: relative gap {optimum.relative_gap:.1e}; "
            f"{optimum.remedy}."
        )
    return out


def _still_falling(path: list[tuple[float, float | None]], lambda_max: float) -> list[str]:
    found = [(loss, lam) for lam, loss in path if loss is not None]
    if len(found) < 2 or min(found)[0] != found[-1][0]:
        return []
    lam = found[-1][1]
    return [
        f"The held-out loss still fell at the end of the path of lambda ({lam:.3g}, {lam / lambda_max:.2g} of "
        "lambda_max): a weaker decay may be better; give `weight_decay` a smaller number to see."
    ]


def _linearised(record: Plan) -> list[str]:
    optimum, advice, held = record.optimum, record.recommended, record.heldout
    if optimum.is_zero:
        return [
            f"No adapter is needed: at weight decay {record.weight_decay:.3g} (lambda_max is "
            f"{record.lambda_max:.3g}) the certified optimum is no update at all, so the rank is 0.",
            "Held-out loss rises as the weight decay falls, so nothing is gained by a weaker one."
            if len(record.path) > 1
            else "Lower the weight decay to let the data move the weights.",
        ]
    first = _linearised_enough(record, advice)
    stuck = [row.rank for row in record.ranks if row.verdict == "rank-bound"]
    trapped = f", and rank {_listed(stuck)} is stuck below it (rank-bound)" if stuck else ""
    second = (
        f"Theory promises an optimum of rank at most {record.bounds.existence.best} and, for almost every small "
        f"perturbation of the objective, no spurious minima from rank {record.bounds.landscape.best}; the "
        f"certified optimum has rank {optimum.largest_rank} (relative gap {optimum.relative_gap:.1e}){trapped}."
    )
    if held is None:
        return [first, second, "There were no held-out rows, so nothing is said about generalisation."]
    third = (
        f"On {held.rows} held-out rows that chose nothing, the smallest rank within one standard error of the "
        f"best is {advice.heldout_r}"
    )
    if advice.heldout_r == 0:
        return [f"{third}: there the adapter shows no gain over the network without it.", first, second]
    return [first, second, f"{third}."]


def _linearised_enough(record: Plan, advice: Recommended) -> str:
    share = f"{100 * record.captured_target:.6g}%"  # 99.9% is not 100%
    kept = advice.linear_pattern
    first = (
        f"Rank {advice.r} is enough in {_every(len(record.target_modules))}: it captures at least {share} of "
        f"what any rank could gain on these {record.n_samples} rows."
    )
    if record.linearity.far:
        first = f"For the linearised network, which is far from the real one here, {first[0].lower()}{first[1:]}"
    if advice.parameters_pattern < advice.parameters_uniform:
        first += f" The linearised network needs only {_pattern(kept)} ({advice.captured_pattern:.2%})"
        # measured in docs/does-the-advice-transfer.md
        first += ", but a trained one often uses the targets left out." if len(kept) < len(record.shapes) else "."
    return first


def _pattern(kept: Ranks) -> str:
    ranks, where = set(kept.values()), f"{len(kept)} module{'s' * (len(kept) != 1)}"
    return f"rank {ranks.pop()} in {where}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)} in {where}"


def _every(n: int) -> str:
    return "the target" if n == 1 else "both targets" if n == 2 else f"each of the {n} targets"


def _listed(values: Iterable[int]) -> str:
    texts = [str(value) for value in values]
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1]
