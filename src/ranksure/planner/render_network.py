"""The network's own answer on a terminal, and the linearised one in a few lines beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ranksure.planner.tables import COLOURS, WIDE, counted, module_names, optional, shown_share
from ranksure.records.plan import NetworkPlan, NetworkRank, Plan


def show_network(record: Plan, net: NetworkPlan, console: Console, brief: bool) -> None:
    """Its path, ranks, modules, subsets and status; ``brief`` leaves out what does not concern its ranks."""
    wide = console.width >= WIDE
    if net.path and not brief:
        console.print(_path_table(net, wide))
    console.print(_rank_table(net, wide))
    console.print(_module_table(record, net, wide))
    if net.subsets and not brief:
        console.print(_subset_table(net, wide))
    console.print(_status(net), highlight=False)
    console.print(_work(net), highlight=False)
    console.print(_linearised(record), highlight=False)


def _table(title: str, columns: dict[str, Callable[[Any], str]], rows: list[Any], words: tuple[str, ...] = ()) -> Table:
    """A table by what each column shows of a row; columns of ``words`` are at the left, and may wrap."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        left = name in words
        table.add_column(name, justify="left" if left else "right", no_wrap=not left)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


def _path_table(net: NetworkPlan, wide: bool) -> Table:
    columns: dict[str, Callable[[Any], str]] = {
        "weight decay": lambda step: f"{step.weight_decay:.4g}",
        "selection loss": lambda step: optional(step.selection_loss, ".4f"),
        "accuracy": lambda step: optional(step.selection_accuracy, ".1%"),
        "objective": lambda step: f"{step.objective:.6f}",
        "gap / gain": lambda step: optional(step.relative_gap, ".1%"),
        "largest rank": lambda step: str(max(step.ranks.values(), default=0)),
        "sum of ranks": lambda step: str(sum(step.ranks.values())),
        "gradients": lambda step: str(step.gradients),
        "": lambda step: "chosen" if step.weight_decay == net.weight_decay else "",
    }
    if not wide:
        columns = {name: columns[name] for name in ("weight decay", "selection loss", "largest rank", "gradients", "")}
    return _table("How the weight decay was chosen (path on the network itself)", columns, net.path)


def _rank_table(net: NetworkPlan, wide: bool) -> Table:
    held, optimum = net.heldout, net.optimum
    columns: dict[str, Callable[[NetworkRank], str]] = {
        "rank": lambda row: str(row.rank) + ("" if row.requested else "*"),
        "objective": lambda row: f"{row.objective:.6f}",
        "captured": lambda row: f"{row.captured:.2%}",
        "rho": lambda row: optional(row.spectral_ratio, ".3f"),
        "gap": lambda row: optional(row.gap, ".1e"),
        "held-out loss": lambda row: optional(row.heldout_loss, ".4f"),
        "accuracy": lambda row: optional(row.heldout_accuracy, ".1%"),
        "parameters": lambda row: f"{row.parameters:,}",
        "verdict": lambda row: f"[{COLOURS.get(row.verdict, 'default')}]{row.verdict}[/]",
        "start": lambda row: escape(row.start),
    }
    if not wide:
        columns = {name: columns[name] for name in ("rank", "captured", "rho", "held-out loss", "verdict")}
    nothing = NetworkRank(
        rank=0,
        objective=optimum.objective_at_zero,
        captured=0.0,
        heldout_loss=held and held.loss_without_adapter,
        heldout_accuracy=held and held.accuracy_without_adapter,
        parameters=0,
        verdict="no adapter",
    )
    table = _table(
        f"What each rank reaches on the network itself (measured; the solver's own point: F = {optimum.objective:.6f})",
        columns,
        [nothing, *net.ranks],
        ("verdict", "start"),
    )
    if any(not row.requested for row in net.ranks):
        table.caption = "* examined to find the smallest sufficient rank"
    return table


def _module_table(record: Plan, net: NetworkPlan, wide: bool, most: int = 24) -> Table:
    names = list(net.optimum.modules)
    common, shown = module_names(names)
    found = net.optimum.modules
    columns: dict[str, Callable[[str], str]] = {
        "module": lambda name: escape(shown[name]),
        "shape": lambda name: " x ".join(map(str, record.shapes[name])),
        "rank found": lambda name: str(found[name].rank),
        "smallest pattern": lambda name: str(net.pattern.get(name, 0)),
        "linearised": lambda name: str(record.optimum.ranks.get(name, 0)),
        "rho": lambda name: f"{found[name].spectral_ratio:.3f}",
        "e": lambda name: f"{found[name].stationarity:.3f}",
        "w": lambda name: f"{found[name].outside_norm / net.weight_decay:.3f}",
    }
    if not wide:
        columns = {name: columns[name] for name in ("module", "rank found", "smallest pattern", "rho")}
    title = f"Rank of every module{f' of {common}' if common else ''}"
    table = _table(title, columns, names[:most], ("module",))
    if len(names) > most:
        table.caption = f"and {len(names) - most} more in plan.json"
    return table


def _subset_table(net: NetworkPlan, wide: bool) -> Table:
    columns: dict[str, Callable[[Any], str]] = {
        "rows": lambda part: f"{part.n_samples:,}",
        "weight decay": lambda part: f"{part.weight_decay:.4g}",
        "rank needed": lambda part: optional(part.rank_needed, "d"),
        "largest rank": lambda part: str(max(part.ranks.values(), default=0)),
        "sum of ranks": lambda part: str(sum(part.ranks.values())),
        "loss": lambda part: f"{part.loss:.4f}",
        "held-out loss": lambda part: optional(part.heldout_loss, ".4f"),
        "accuracy": lambda part: optional(part.heldout_accuracy, ".1%"),
        "gap / gain": lambda part: optional(part.relative_gap, ".1%"),
        "gradients": lambda part: str(part.gradients),
        "seconds": lambda part: f"{part.seconds:.1f}",
    }
    if not wide:
        columns = {name: columns[name] for name in ("rows", "rank needed", "loss", "held-out loss", "gradients")}
    table = _table("How the answer moves with data (nested subsets, on the network itself)", columns, net.subsets)
    if net.settled is not None:
        table.caption = "settled" if net.settled else "not settled: more rows may move it"
    return table


def _status(net: NetworkPlan) -> str:
    optimum = net.optimum
    share = "" if optimum.relative_gap is None else f" ({optimum.relative_gap:.2%} of what was gained)"
    stationarity, outside = net.first_order
    return (
        f"[bold]point found[/bold]: {optimum.status}, gap of the model re-linearised there {optimum.gap:.1e}{share}; "
        f"first-order: e at most {stationarity:.3f} (optimal: 0), w at most {outside:.3f} (optimal: up to 1); noise of "
        f"an evaluation {optimum.noise:.0e}"
    )


def _work(net: NetworkPlan) -> str:
    optimum, skipped = net.optimum, len(net.skipped)
    prefix = f"{counted(skipped, 'frozen layer')} ran once" if skipped else "no layer could be left out"
    captures = f", {counted(optimum.captures, 'capture')}" if optimum.captures else ""
    return (
        f"[bold]work[/bold]: {counted(optimum.gradients, 'gradient')}, {counted(optimum.forwards, 'forward pass')}"
        f"{captures} at the chosen weight decay, {net.gradients:,} gradients in all; {prefix}"
    )


def _linearised(record: Plan) -> str:
    """The answer for the linearised network in a few lines."""
    optimum, linearity = record.optimum, record.linearity
    row = next((row for row in record.ranks if row.rank == record.recommended.linear_r), None)
    kind = "certified" if optimum.status == "converged" else "not certified"
    if optimum.is_zero:
        text = f"no update is the {kind} optimum"
    elif row is None:
        text = f"no rank examined surely captures {record.captured_target:.6g} of the gain"
    else:
        text = f"rank {row.rank} captures at least {shown_share(row.captured[0])}"
    pairs = (("training", linearity.train), ("held-out", linearity.heldout))
    far = " and ".join(f"{value:.1%} on {name} rows" for name, value in pairs if value is not None)
    bounds = record.bounds
    return (
        f"[bold]linearised[/bold] at its pretrained weights (weight decay {record.weight_decay:.4g}, "
        f"{record.n_samples:,} rows): {text} ({kind}, relative gap {optimum.relative_gap:.1e}, optimum of rank "
        f"{optimum.largest_rank})"
        + (f"; the network differs from it there by {far}" if far else "")
        + f"; theory: an optimum exists at rank <= {bounds.existence.best}, no spurious minima, if perturbed a little, "
        f"from rank {bounds.landscape.best}. Its tables: --linearised, or the report"
    )
