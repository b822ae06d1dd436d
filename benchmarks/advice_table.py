"""Tables of ``benchmarks.advice``, as Markdown, from its finished parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ranksure.records.plan import LINEARITY_WARNING

SWEEP = ("r=1", "r=2", "r=4", "r=8", "r=16")
ENOUGH = 0.98
"""Share of the sweep's best gain that a transferred rank must capture."""

SAME = 1e-3
"""Held-out losses closer than this are the same: of two runs to one point, one is always a little better."""

Part = dict[str, Any]


def tables(parts: Sequence[Part]) -> str:
    """Every table, from parts whose sweep is complete."""
    whole = [part for part in parts if all(name in part["methods"] for name in SWEEP)]
    scored = [part for part in whole if part["case"]["scored"]]
    unscored = [part for part in whole if not part["case"]["scored"]]
    out = [f"{len(scored)} scored cases and {len(unscored)} that choose the threshold; {len(parts)} begun."]
    if unscored:
        out += ["", "Cases that choose the threshold:", "", _linearity(unscored), "", threshold_sentence(unscored)]
    if scored:
        out += ["", "Scored cases:", "", _linearity(scored)]
        out += ["", "Share of the best gain of the sweep:", "", _captured(scored)]
        out += ["", "Held-out loss:", "", _heldout(scored)]
        out += ["", "Cost:", "", _cost(scored)]
        out += ["", "Against the plan:", "", _duels(scored), "", _summary(scored)]
        out += ["", "Learning rates:", "", _rates(scored)]
    return "\n".join(out)


# ---------------------------------------------------------------------------------------------------------------------
# figures


def difference(part: Part) -> float:
    """The larger of the plan's two relative differences between the real network and its linearisation."""
    linearity = part["plan"]["linearity"]
    return max(v for v in (linearity["train"], linearity["heldout"]) if v is not None)


def best_objective(part: Part) -> float:
    return min(part["methods"][name]["objective"] for name in SWEEP)


def captured(part: Part, method: Part | None) -> float:
    """Share of the sweep's best gain, ``(F(0) - F) / (F(0) - F_best)``; ``None`` is no adapter: 0."""
    gain = part["base_loss"] - best_objective(part)
    if gain <= 1e-6 * part["base_loss"]:
        return 1.0  # no rank gains anything
    return 0.0 if method is None else (part["base_loss"] - method["objective"]) / gain


def choices(part: Part) -> dict[str, Part | None]:
    """What each adviser trains: the plan, its pattern, the data-size rule, the paper's bound, EVA, AdaLoRA.

    None is a plan's rank 0; advisers that were not run are missing.
    """
    methods, advice = part["methods"], part["plan"]["recommended"]
    paper = part["plan"]["bounds"]["landscape"]["paper"]
    out: dict[str, Part | None] = {"plan": methods.get(f"r={advice['r']}")}
    out["pattern"] = methods.get("planned pattern", out["plan"])
    out["data size"] = methods[f"r={data_size_rank(part['case']['samples'])}"]
    for name, key in (("paper", f"r={paper}"), ("EVA", "EVA"), ("AdaLoRA", "AdaLoRA")):
        if key in methods:
            out[name] = methods[key]
    return out


def data_size_rank(samples: int) -> int:
    """The rule of thumb: under 1,000 samples 8, under 10,000 16, under 100,000 32, else 64."""
    return next((rank for limit, rank in ((1_000, 8), (10_000, 16), (100_000, 32)) if samples < limit), 64)


def within_error(part: Part, losses: Sequence[float]) -> tuple[float, bool]:
    """Mean excess over the sweep's best held-out loss, and whether it is within one paired standard error."""
    best = min((part["methods"][name]["heldout"] for name in SWEEP), key=_mean)
    excess = [a - b for a, b in zip(losses, best, strict=True)]
    mean = _mean(excess)
    error = math.sqrt(sum((e - mean) ** 2 for e in excess) / (len(excess) - 1) / len(excess))
    return mean, mean <= max(error, SAME)


def threshold(parts: Iterable[Part]) -> float:
    """The largest difference that still has every plan below it transfer: just below the first failure."""
    failures = [difference(p) for p in parts if captured(p, choices(p)["plan"]) < ENOUGH]
    return min(failures, default=math.inf)


def sweep_seconds(part: Part) -> float:
    """Seconds of the sweep as run here, on the cached prefix."""
    return part["prefix_seconds"] + sum(part["methods"][name]["seconds"] for name in SWEEP)


def whole_sweep_seconds(part: Part) -> float:
    """Estimated seconds of the same steps on the whole network."""
    return part["full_step_seconds"] * sum(part["methods"][name]["evaluations"] for name in SWEEP)


# ---------------------------------------------------------------------------------------------------------------------
# tables


def threshold_sentence(parts: Sequence[Part]) -> str:
    first = threshold(parts)
    passed = [difference(p) for p in parts if captured(p, choices(p)["plan"]) >= ENOUGH]
    if math.isinf(first):
        return f"No plan failed there, up to a difference of {max(passed):.2f}: these cases give no threshold."
    below = max((d for d in passed if d < first), default=0.0)
    return f"The first failure is at {first:.2f}; every plan up to {below:.2f} transferred."


def _linearity(parts: Sequence[Part]) -> str:
    rows = []
    for part in sorted(parts, key=difference):
        plan, choice = part["plan"], choices(part)
        line = plan["linearity"]
        spread = max(part["methods"][n]["objective"] for n in SWEEP) - best_objective(part)
        rows.append(
            [
                part["case"]["name"],
                f"{plan['weight_decay']:.3g}",
                _number(line["train"]),
                _number(line["heldout"]),
                "yes" if difference(part) > LINEARITY_WARNING else "",
                str(plan["recommended"]["r"]),
                percent(captured(part, choice["plan"])),
                percent(captured(part, choice["pattern"])),
                percent(captured(part, part["methods"]["r=1"])),
                f"{spread / part['base_loss']:.1%}",
            ]
        )
    head = ["case", "λ", "difference, train", "held-out", "warned", "planned r"]
    return markdown([*head, "captured", "by the pattern", "by r = 1", "worst to best, of F(0)"], rows)


def _captured(parts: Sequence[Part]) -> str:
    rows = []
    for part in parts:
        methods, choice = part["methods"], choices(part)
        row = [part["case"]["name"], f"{part['base_loss']:.4f}", f"{best_objective(part):.4f}"]
        row += [percent(captured(part, methods[name])) for name in SWEEP]
        for name in ("plan", "pattern", "paper", "EVA", "AdaLoRA"):
            if name not in choice:
                row.append("failed" if "failed" in methods.get(name, {}) else "-")
            elif (method := choice[name]) is not None and "failed" in method:
                row.append("failed")
            else:
                rank = f" (r {_rank(part, name)})" if name in ("plan", "paper") else ""
                row.append(percent(captured(part, method)) + rank)
        rows.append(row)
    return markdown(["case", "F(0)", "best F", *SWEEP, "plan", "pattern", "paper", "EVA", "AdaLoRA"], rows)


def _heldout(parts: Sequence[Part]) -> str:
    rows = []
    for part in parts:
        base, choice = part["base_heldout"], choices(part)
        row = [part["case"]["name"], str(len(base)), _judged(part, base)]
        row += [_judged(part, part["methods"][name]["heldout"]) for name in SWEEP]
        for name in ("plan", "pattern", "EVA", "AdaLoRA"):
            method = choice.get(name)
            if name in ("plan", "pattern") and method is None:
                row.append(_judged(part, base))
            else:
                row.append("-" if method is None or "failed" in method else _judged(part, method["heldout"]))
        rows.append(row)
    return markdown(["case", "rows", "no adapter", *SWEEP, "plan", "pattern", "EVA", "AdaLoRA"], rows)


def _cost(parts: Sequence[Part]) -> str:
    rows = []
    for part in parts:
        choice, plan = choices(part), part["plan"]
        seconds = plan["processor_seconds"]
        rows.append(
            [
                part["case"]["name"],
                _parameters(choice["plan"]),
                _parameters(choice["pattern"]),
                _parameters(choice["data size"]),
                f"{seconds:.0f} s",
                f"{sweep_seconds(part):.0f} s",
                f"{seconds / sweep_seconds(part):.0%}",
                f"{whole_sweep_seconds(part):.0f} s",
                f"{seconds / whole_sweep_seconds(part):.1%}",
            ]
        )
    head = ["case", "parameters, plan", "pattern", "r = 8", "plan", "sweep, cached", "plan of it"]
    return markdown([*head, "sweep, whole network (estimated)", "plan of it"], rows)


def _duels(parts: Sequence[Part]) -> str:
    rows = []
    for rival in ("data size", "paper", "EVA", "AdaLoRA", "r=1", "r=2", "r=4", "r=16"):
        wins = losses = ties = 0
        for part in parts:
            choice = choices(part)
            other = part["methods"][rival] if rival in SWEEP else choice.get(rival)
            if other is None or "failed" in other:
                continue
            result = duel(part, choice["plan"], other)
            wins, losses, ties = wins + (result > 0), losses + (result < 0), ties + (result == 0)
        rows.append([rival, str(wins), str(losses), str(ties), str(wins + losses + ties)])
    return markdown(["the plan's rank against", "wins", "losses", "ties", "cases"], rows)


def duel(part: Part, mine: Part | None, other: Part) -> int:
    """1, -1 or 0: whoever captures ``ENOUGH`` alone; if both do, fewer parameters; if neither, the larger share."""
    shares = captured(part, mine), captured(part, other)
    enough = [share >= ENOUGH for share in shares]
    if enough[0] != enough[1]:
        return 1 if enough[0] else -1
    if not enough[0]:
        return (shares[0] > shares[1]) - (shares[0] < shares[1])
    sizes = (0 if mine is None else mine["parameters"]), other["parameters"]
    return (sizes[0] < sizes[1]) - (sizes[0] > sizes[1])


def _summary(parts: Sequence[Part]) -> str:
    quiet = [part for part in parts if difference(part) <= LINEARITY_WARNING]
    held = [part for part in quiet if captured(part, choices(part)["plan"]) >= ENOUGH]
    small = [part for part in quiet if _size(choices(part)["plan"]) < part["methods"]["r=8"]["parameters"]]
    every = [part for part in parts if captured(part, choices(part)["plan"]) >= ENOUGH]
    warned = len(parts) - len(quiet)
    errors = [m["tail_error"] for part in parts for m in part["methods"].values() if m.get("tail_error") is not None]
    left = sum(not m.get("converged", True) for part in parts for m in part["methods"].values())
    near = [p for p in parts if within_error(p, _heldout_losses(p, choices(p)["plan"]))[1]]
    zero = sum(choices(part)["plan"] is None for part in parts)
    sentences = [
        f"Without a warning (difference at most {LINEARITY_WARNING:g}): {len(quiet)} of {len(parts)} cases; the "
        f"planned rank captures {ENOUGH:.0%} on {len(held)} of them, with fewer parameters than r = 8 on {len(small)}.",
        f"With a warning: {warned}, of which {len(every) - len(held)} capture it all the same.",
        f"Plans of rank 0 (no adapter): {zero}.",
        f"Held-out loss within one standard error of the sweep's best: {len(near)} of {len(parts)}.",
        f"Largest difference between cached and whole network: {max(errors, default=0.0):.1e} of the largest logit.",
        f"Runs stopped by the cap on L-BFGS: {left}.",
    ]
    return "\n".join(sentences)


def _rates(parts: Sequence[Part]) -> str:
    rows = []
    for part in parts:
        methods = part["methods"]
        cells = [
            f"{methods[name]['learning_rate']:g} ({methods[name]['evaluations']})"
            if name in methods and "failed" not in methods[name]
            else "-"
            for name in (*SWEEP, "EVA", "AdaLoRA")
        ]
        rows.append([part["case"]["name"], *cells])
    return markdown(["case", *(f"{name}: rate (gradients)" for name in (*SWEEP, "EVA", "AdaLoRA"))], rows)


def _rank(part: Part, name: str) -> int:
    return part["plan"]["recommended"]["r"] if name == "plan" else part["plan"]["bounds"]["landscape"]["paper"]


def _heldout_losses(part: Part, method: Part | None) -> list[float]:
    return part["base_heldout"] if method is None else method["heldout"]


def _judged(part: Part, losses: Sequence[float]) -> str:
    return f"{_mean(losses):.3f}{'' if within_error(part, losses)[1] else ' ✗'}"


def _parameters(method: Part | None) -> str:
    return f"{_size(method):,}"


def _size(method: Part | None) -> int:
    return 0 if method is None else int(method["parameters"])


def percent(share: float) -> str:
    return f"{share:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]])
