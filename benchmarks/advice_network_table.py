"""Tables of ``benchmarks.advice`` on the network's own answer, and its targets: met, or not met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.advice_table import (
    ENOUGH,
    SAME,
    SWEEP,
    Part,
    best_objective,
    markdown,
    percent,
    sweep_seconds,
)

NEAR = 0.005
"""An objective within this share of the sweep's gain counts as the sweep's best."""

GAP = 0.01
"""The gap to reach, as a share of the gain."""

Row = list[str]


def network_tables(parts: Sequence[Part], cases: int) -> str:
    """The tables, from the parts that have both the sweep and the network's answer, of so many cases in all."""
    both = [p for p in parts if "network" in p and all(name in p["methods"] for name in SWEEP)]
    if not both:
        return "The network's own answer: no case is finished."
    out = [f"The network's own answer: {len(both)} of {cases} cases.", "", work(both)]
    out += ["", "The recommended rank, trained:", "", ranks(both)]
    out += ["", "Rivals:", "", rivals(both)]
    out += ["", "Without caring for lambda, held-out loss and accuracy:", "", recipe(both)]
    out += ["", "Targets:", "", targets(both, cases)]
    return "\n".join(out)


# ---------------------------------------------------------------------------------------------------------------------
# figures


def sweep_gradients(part: Part) -> int:
    return sum(part["methods"][name]["evaluations"] for name in SWEEP)


def first_near(part: Part) -> tuple[float, float]:
    """Gradients and seconds when the objective first came within ``NEAR`` of the sweep's gain; infinite if never."""
    best = best_objective(part)
    allowed = best + NEAR * max(part["base_loss"] - best, 1e-6 * part["base_loss"])
    return _first(part["network"]["trace"], lambda point: point[1] <= allowed)


def first_gap(part: Part) -> tuple[float, float]:
    """Gradients and seconds when the gap was first at most ``GAP`` of the gain.

    The certificate of the end counts, too: its dual may be sharper than those of the rounds.
    """
    network, base = part["network"], part["base_loss"]
    rounds = [[count, gap / max(base - value, 1e-12), seconds] for count, value, gap, seconds in network["rounds"]]
    if network["status"] == "converged":
        rounds.append([network["gradients"], 0.0, network["seconds"]])
    return _first(rounds, lambda point: point[1] <= GAP)


def _first(points: Sequence[Sequence[float]], fits: Any) -> tuple[float, float]:
    return next(((p[0], p[2]) for p in points if fits(p)), (math.inf, math.inf))


def trained_shares(part: Part) -> tuple[float, float]:
    """What the recommended rank captures of the best gain found by anyone: by the solver, and by Adam.

    Where rank 0 is recommended there is nothing to train.
    """
    table = part["network"]["table"]
    return found_share(part, table["objective"]), found_share(part, _objective_at(part, table["recommended"]))


def found_share(part: Part, objective: float) -> float:
    """Share of the gain of the best point that sweep or solver found."""
    base = part["base_loss"]
    gain = base - min(best_objective(part), part["network"]["objective"])
    return 1.0 if gain <= 1e-6 * base else (base - objective) / gain


def _objective_at(part: Part, rank: int) -> float:
    method = part["methods"].get(f"r={rank}")
    return part["base_loss"] if rank == 0 else math.nan if method is None else method["objective"]


def duel(mine: float, other: float) -> int:
    """1 where mine is lower by more than ``SAME``, -1 where it is higher by more."""
    return (mine < other - SAME) - (mine > other + SAME)


# ---------------------------------------------------------------------------------------------------------------------
# tables


def work(parts: Sequence[Part]) -> str:
    rows: list[Row] = []
    for part in parts:
        network, sweep = part["network"], sweep_gradients(part)
        near, gap = first_near(part), first_gap(part)
        rows.append(
            [
                part["case"]["name"],
                f"{part['base_loss']:.4f}",
                f"{best_objective(part):.4f}",
                f"{sweep:,}",
                f"{sweep_seconds(part):.0f}",
                f"{network['objective']:.4f}",
                ", ".join(str(rank) for rank in network["ranks"].values()) or "-",
                _count(near[0], sweep),
                _seconds(near[1]),
                _count(gap[0], sweep),
                _seconds(gap[1]),
                f"{network['forwards']} + {network['captures']}",
                f"{network['relative_gap']:.1%}",
                network["status"],
                f"{network['e']:.2g}, {network['w']:.3g}",
            ]
        )
    head = ["case", "F(0)", "sweep's best F", "its gradients", "seconds", "network's F", "ranks"]
    head += [f"gradients to {NEAR:.1%}", "seconds", f"gradients to a gap of {GAP:.0%}", "seconds"]
    return markdown([*head, "forwards + captures", "gap at the end", "status", "e, w"], rows)


def ranks(parts: Sequence[Part]) -> str:
    rows: list[Row] = []
    for part in parts:
        table, plan = part["network"]["table"], part["plan"]["recommended"]["r"]
        solver, adam = trained_shares(part)
        linear = found_share(part, _objective_at(part, plan))
        row = [part["case"]["name"], str(plan), percent(linear), str(table["recommended"]), percent(solver)]
        rows.append([*row, percent(adam) if not math.isnan(adam) else "not trained"])
    head = ["case", "linearised plan's r", "by Adam", "network's r", "by the solver", "by Adam"]
    return markdown(head, rows)


def rivals(parts: Sequence[Part]) -> str:
    """Ranks or parameters that each adviser asks for, and what they capture when trained (by the sweep's rule)."""
    rows: list[Row] = []
    for part in parts:
        network, methods = part["network"], part["methods"]
        once = max(network["one_gradient"].values(), default=0)
        reached = _objective_at(part, once)
        at_once = "not trained" if math.isnan(reached) else percent(found_share(part, reached))
        row = [part["case"]["name"], f"{network['parameters']:,}", percent(found_share(part, network["objective"]))]
        row += [f"r {once}: {at_once}"]
        for name in ("EVA", "compressed"):
            method = methods.get(name)
            if method is None or "failed" in method:
                row += ["-" if method is None else "failed"]
            else:
                row += [f"{method['parameters']:,}: {percent(found_share(part, method['objective']))}"]
        rows.append(row)
    head = ["case", "network: parameters", "captured", "one gradient's rank", "EVA: parameters"]
    return markdown([*head, "train at 16, compress: parameters"], rows)


def recipe(parts: Sequence[Part]) -> str:
    rows: list[Row] = []
    counts = {"loss": [0, 0, 0], "accuracy": [0, 0, 0]}
    for part in parts:
        if "recipe" not in part:
            continue
        base, other = sum(part["base_heldout"]) / len(part["base_heldout"]), part["recipe"]
        own = part["network"]["heldout"]
        chosen = part["network"].get("chosen") or own
        counts["loss"][1 - duel(chosen["loss"], other["loss"])] += 1
        counts["accuracy"][1 - duel(-chosen["accuracy"], -other["accuracy"])] += 1
        rows.append(
            [
                part["case"]["name"],
                f"{base:.3f}",
                _figures(own, part["network"]["parameters"]),
                _figures(chosen, chosen.get("parameters", part["network"]["parameters"])),
                f"{_figures(other, other['parameters'])} ({other['rate']:g}, {other['epochs']} epochs)",
            ]
        )
    head = ["case", "no adapter", "certified, the case's λ", "certified, λ by held-out loss", "AdamW, r = 8"]
    sums = [f"{name}: {a} wins, {c} losses, {b} ties." for name, (a, b, c) in counts.items()]
    return markdown(head, rows) + "\n\nThe certified adapter (λ by held-out loss) against AdamW: " + " ".join(sums)


def targets(parts: Sequence[Part], cases: int) -> str:
    """Each target with what was measured, and whether it is met on the cases measured."""
    near = [first_near(part)[0] / sweep_gradients(part) for part in parts]
    gaps = [first_gap(part)[0] / sweep_gradients(part) for part in parts]
    open_ones = [part for part in parts if part["network"]["status"] != "converged"]
    missed = [part["case"]["name"] for part, share in zip(parts, near, strict=True) if math.isinf(share)]
    shares = [(part["case"]["name"], *trained_shares(part)) for part in parts]
    weak = [name for name, solver, _ in shares if solver < ENOUGH]
    trapped = [name for name, _, adam in shares if not adam >= ENOUGH]
    longer = [part["case"]["name"] for part in parts if _path_share(part) > 1]

    def met(yes: bool) -> str:
        return ("met" if yes else "not met") + (" on these" if len(parts) < cases else "")

    rows = [
        ["objective within 0.5% of the sweep's best", "every case", _but(missed, parts), met(not missed)],
        ["its gradients, share of the sweep's, median", "8%", _share(median(near)), met(median(near) <= 0.08)],
        ["its gradients, share of the sweep's, at worst", "20%", _share(max(near)), met(max(near) <= 0.2)],
        ["gap of 1%, gradients, median", "10%", _share(median(gaps)), met(median(gaps) <= 0.1)],
        ["gap of 1%, gradients, at worst", "35%", _share(max(gaps)), met(max(gaps) <= 0.35)],
        [
            "not converged",
            "at most 3",
            f"{len(open_ones)}: " + ", ".join(_open(part) for part in open_ones) if open_ones else "0",
            met(len(open_ones) <= 3),
        ],
        ["path and rank table within one sweep's gradients", "every case", _but(longer, parts), met(not longer)],
        ["recommended rank, by the solver, captures 98%", "every case", _but(weak, parts), met(not weak)],
        ["the same by Adam", "all but 2", _but(trapped, parts), met(len(trapped) <= 2)],
    ]
    share = "" if len(parts) == cases else f"On {len(parts)} of {cases} cases; the others are not measured.\n\n"
    return share + markdown(["target", "asked", "measured", ""], rows)


def _path_share(part: Part) -> float:
    path = part["network"]["path"] or {"gradients": 0}
    return (path["gradients"] + part["network"]["table"]["gradients"]) / sweep_gradients(part)


def _open(part: Part) -> str:
    network = part["network"]
    return f"{part['case']['name']} (gap {network['relative_gap']:.1%}, e {network['e']:.2g}, w {network['w']:.3g})"


def _but(names: Sequence[str], parts: Sequence[Part]) -> str:
    return f"{len(parts) - len(names)} of {len(parts)}" + (f"; not {', '.join(names)}" if names else "")


def _count(gradients: float, sweep: int) -> str:
    return "never" if math.isinf(gradients) else f"{gradients:.0f} ({gradients / sweep:.1%})"


def _share(value: float) -> str:
    return "never" if math.isinf(value) else percent(value)


def _seconds(value: float) -> str:
    return "-" if math.isinf(value) else f"{value:.0f}"


def _figures(found: Part, parameters: int) -> str:
    return f"{found['loss']:.3f}, {found['accuracy']:.1%} ({parameters:,})"
