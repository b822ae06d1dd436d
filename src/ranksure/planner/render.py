"""The plan on a terminal: tables and sentences, drawn by rich."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ranksure.planner.prepare import Estimate, Prepared
from ranksure.planner.render_network import show_network
from ranksure.planner.result import PlanResult
from ranksure.planner.tables import COLOURS, WIDE, module_names, optional
from ranksure.records.plan import Generalization, Plan, PlanBounds, RankRow


def show(result: PlanResult, console: Console, folder: str | None = None, brief: bool = False) -> None:
    """Print a plan; ``brief`` leaves out what does not concern its ranks."""
    record, net = result.record, result.record.network
    console.print()
    console.print(
        f"[bold]{escape(_short(record.model))}[/bold] on {escape(record.data.source)}: "
        f"{(net or record).n_samples} of {record.data.rows} rows, "
        f"{record.n_outputs} outputs, {record.loss}, {len(record.target_modules)} target modules",
        highlight=False,
    )
    chosen = net or record
    console.print(
        f"weight decay (lambda) {chosen.weight_decay:.4g}, chosen by {chosen.weight_decay_chosen_by}; "
        f"lambda_max {chosen.lambda_max:.4g}",
        highlight=False,
    )
    if net is None:
        _show_linearised(record, console, brief)
    else:
        show_network(record, net, console, brief)
    accuracies = record.head.accuracy
    if accuracies:
        shown = ", ".join(f"{pooling} pooling {value:.1%}" for pooling, value in accuracies.items())
        where = "the rows that choose lambda" if chosen.path else "one half of the held-out rows"
        console.print(f"new head, accuracy before any adapter on {where}: {shown}", highlight=False)
    for note in record.notes:
        console.print(f"[yellow]note[/yellow] {escape(note)}", highlight=False)
    for warning in result.warnings:
        console.print(f"[bold yellow]warning[/bold yellow] {escape(warning)}", highlight=False)
    console.print(Panel(escape("\n".join(result.sentences())), title="Answer", expand=False))
    if not result.is_zero and not brief:
        console.print(result.snippet(), highlight=False, markup=False, soft_wrap=True)
    if folder is not None:
        console.print(f"written to {escape(folder)} in {record.seconds['total']:.1f} s", highlight=False)


def _show_linearised(record: Plan, console: Console, brief: bool) -> None:
    if record.path and not brief:
        console.print(_path_table(record))
    console.print(_bounds_table(record.bounds))
    console.print(_rank_table(record, console.width))
    console.print(_module_table(record))
    if record.subsets and not brief:
        console.print(_subset_table(record))
        _extrapolation(record, console)
    _linearity(record, console)
    if record.generalization is not None:
        _generalization(record.generalization, console)


def show_estimate(prepared: Prepared, guess: Estimate, console: Console) -> None:
    """Print the estimate of a dry run."""
    options = prepared.settings
    table = Table(title="Estimate (nothing was solved)", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("training rows, held-out rows", f"{options.samples}, {_held_rows(prepared)}")
    table.add_row("target modules", str(len(prepared.targets)))
    table.add_row("training tokens", f"{guess.tokens:,}")
    table.add_row("captured factors, at most", f"{guess.factor_bytes / 2**20:,.0f} MiB")
    table.add_row(
        "all memory, at most", f"{guess.total_bytes / 2**20:,.0f} MiB of {options.memory_bytes / 2**20:,.0f} MiB"
    )
    table.add_row("capture, about", f"{guess.capture_seconds:,.0f} s")
    table.add_row("solving, very roughly", f"{guess.solve_seconds:,.0f} s")
    console.print(table)


def _held_rows(prepared: Prepared) -> int:
    return sum(len(rows) for rows in (prepared.split.select, prepared.split.report) if rows is not None)


def _path_table(record: Plan) -> Table:
    table = Table(title="How the weight decay was chosen (path from lambda_max down)", title_justify="left")
    for column in ("weight decay", "selection loss", "largest rank", "sum of ranks", ""):
        table.add_column(column, justify="right")
    for point in record.path:
        ranks = point.ranks.values()
        chosen = "chosen" if point.weight_decay == record.weight_decay else ""
        loss = f"{point.selection_loss:.4f}"
        table.add_row(f"{point.weight_decay:.4g}", loss, str(max(ranks)), str(sum(ranks)), chosen)
    return table


def _bounds_table(bounds: PlanBounds) -> Table:
    table = Table(title="What theory says (rank of each module)", title_justify="left")
    for column in ("claim", "paper (KN)", "loss's effective outputs", "measured operator rank"):
        table.add_column(column, justify="left" if column == "claim" else "right")
    for bound, text in (
        (bounds.existence, "an optimum exists at rank <="),
        (bounds.landscape, "no spurious minima, if perturbed a little, from rank"),
    ):
        table.add_row(text, *map(_number, (bound.paper, bound.effective, bound.numerical)))
    return table


def _rank_table(record: Plan, width: int) -> Table:
    """The rank table; a narrow terminal gets the columns that matter most."""
    optimum, held = record.optimum, record.heldout
    table = Table(
        title=f"What each rank reaches (certified optimum: F = {optimum.objective:.6f}, relative gap "
        f"{optimum.relative_gap:.1e}; rank 0 is the network as it is)",
        title_justify="left",
    )
    columns = {
        "rank": lambda row: str(row.rank) + ("" if row.requested else "*"),
        "objective": lambda row: f"{row.objective:.6f}",
        "gap": lambda row: optional(row.gap, ".1e"),
        "rho": lambda row: optional(row.spectral_ratio, ".3f"),
        "captured": _captured,
        "held-out loss": lambda row: optional(row.heldout_loss, ".4f"),
        "accuracy": lambda row: optional(row.heldout_accuracy, ".1%"),
        "parameters": lambda row: f"{row.parameters:,}",
        "starts": lambda row: optional(row.starts, "d"),
        "verdict": lambda row: f"[{COLOURS.get(row.verdict, 'default')}]{row.verdict}[/]",
    }
    if width < WIDE:
        columns = {name: columns[name] for name in ("rank", "gap", "rho", "captured", "held-out loss", "verdict")}
    for name in columns:
        table.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    nothing = RankRow(
        rank=0,
        objective=optimum.objective_at_zero,
        captured=(0.0, 0.0),
        heldout_loss=held and held.loss_without_adapter,
        heldout_accuracy=held and held.accuracy_without_adapter,
        parameters=0,
        verdict="no adapter",
    )
    for row in [nothing, *record.ranks]:
        table.add_row(*(cell(row) for cell in columns.values()))
    if any(not row.requested for row in record.ranks):
        table.caption = "* examined to find the smallest sufficient rank"
    return table


def _captured(row: RankRow) -> str:
    low, high = row.captured
    return f"{low:.2%}" if high - low < 5e-5 else f"{low:.2%} to {high:.2%}"


def _module_table(record: Plan, most: int = 24) -> Table:
    names = record.target_modules
    common, shown = module_names(names)
    table = Table(title=f"Rank of every module{f' of {common}' if common else ''}", title_justify="left")
    for column in ("module", "shape", "certified optimum", "smallest pattern found"):
        table.add_column(column, justify="left" if column == "module" else "right")
    pattern = record.recommended.linear_pattern
    for name in names[:most]:
        m, n = record.shapes[name]
        table.add_row(shown[name], f"{m} x {n}", str(record.optimum.ranks[name]), str(pattern.get(name, 0)))
    if len(names) > most:
        table.caption = f"and {len(names) - most} more in plan.json"
    return table


def _subset_table(record: Plan) -> Table:
    table = Table(
        title="How the answer moves with data (nested subsets, lambda scaled as N^-1/2)", title_justify="left"
    )
    ranks = list(record.subsets[0].captured)
    for column in (
        "rows",
        "largest certified rank",
        f"rank for {100 * record.captured_target:.6g}%",
        *(f"rank {r}" for r in ranks),
    ):
        table.add_column(column, justify="right")
    for row in record.subsets:
        shares = [f"{row.captured[rank]:.1%}" for rank in ranks]
        table.add_row(str(row.n_samples), str(row.largest_rank), str(row.rank_needed), *shares)
    return table


def _extrapolation(record: Plan, console: Console) -> None:
    fit = record.extrapolation
    if fit is None:
        console.print("extrapolation: too few subsets for a fit", highlight=False)
        return
    console.print(
        f"extrapolation (a power law N^{fit.exponent:.2f} through {len(fit.points)} subsets, not certified): "
        f"about rank {fit.rank_needed:.1f} at {fit.n_samples} rows",
        highlight=False,
    )


def _linearity(record: Plan, console: Console) -> None:
    linearity = record.linearity
    pairs = (("train", linearity.train), ("heldout", linearity.heldout))
    shown = [f"{name} {value:.1%}" for name, value in pairs if value is not None]
    text = f"real network against its linearisation, relative difference of the change: {', '.join(shown)}"
    if linearity.heldout_real_loss is not None:
        text += f"; real held-out loss {linearity.heldout_real_loss:.4f} (linear {linearity.heldout_linear_loss:.4f})"
    console.print(text, highlight=False)


def _generalization(bound: Generalization, console: Console) -> None:
    doubts = f" (heuristic: {', '.join(bound.heuristic)})" if bound.heuristic else ""
    text = (
        f"Theorem 5.1 (generalisation) would set lambda to {bound.prescribed_weight_decay:.4g}{doubts}, "
        f"{bound.prescribed_over_used:.3g} times what was used"
    )
    if bound.prescribed_over_lambda_max is None or bound.prescribed_over_lambda_max >= 1:
        text += "; there no adapter is trained"
    console.print(text, highlight=False)


def _short(model: str) -> str:
    """The last two parts of a long path; a Hub id as it is."""
    return model if model.count("/") < 2 else "/".join(model.rstrip("/").split("/")[-2:])


def _number(value: int | None) -> str:
    return "not measured" if value is None else str(value)
