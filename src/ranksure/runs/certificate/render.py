"""A run's certificate on a terminal: a table per module, the verdict, the advice."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from ranksure.losses import get_loss
from ranksure.records.certificate import ModuleVerdict, RunCertificate

_WIDE = 110  # columns that the full table needs
_COLOURS = {
    "first-order-optimal": "green",
    "rank-bound": "yellow",
    "not-converged": "red",
    "failed-loudly": "red",
    "not-checked": "dim",
}


def show_certificate(
    found: RunCertificate, console: Console, *, parameters: Mapping[str, int] | None = None, most: int = 24
) -> None:
    """Print a certificate, with the adapter's ``parameters`` by module if given; of many modules the steepest."""
    if found.loss is not None:
        console.print(f"[bold]objective[/bold]  {_objective(found)}", highlight=False)
        console.print(f"           {_gains(found)}", highlight=False)
    if found.modules:
        console.print(_table(found, console.width, parameters or {}, most))
    for probe in found.probes:
        console.print(f"measured on the network itself: {_probe(probe)}", highlight=False)
    title = f"[{_COLOURS[found.verdict]}]{found.verdict}[/]"
    console.print(Panel("\n".join(found.advice()), title=title, expand=False))


def _objective(found: RunCertificate) -> str:
    assert found.loss is not None and found.objective is not None and found.loss_kind is not None
    mean = f"mean {found.loss_kind} of {found.n_terms:,} terms of {found.n_samples:,} rows"
    if get_loss(found.loss_kind).term == "sample" and found.n_terms != found.n_samples:
        mean += f", every {found.weighting} alike"
    text = f"{found.objective:.6g} = loss {found.loss:.6g} + penalty {found.penalty:.4g}  ({mean})"
    if found.objective_at_zero is not None:
        text += f"; without the adapter {found.objective_at_zero:.6g}"
    return text


def _gains(found: RunCertificate) -> str:
    where = "any rank" if found.radius is None else f"any rank in the ball of radius {found.radius:.3g}"
    return (
        f"possible gain, at most: {_bound(found, found.training_gain_bound)} along the present directions, "
        f"{_bound(found, found.rank_gain_bound)} at {where} (re-linearised; counts as none below {found.tolerance:.0%} "
        "of the objective)"
    )


def _bound(found: RunCertificate, gain: float | None) -> str:
    return "all of it (the bound says nothing)" if found.says_nothing(gain) else f"{gain:.3g}"


def _probe(probe: Any) -> str:
    if probe.decrease > 0:
        return f"a {probe.kind} of size {probe.step:.2g} lowers the objective by {probe.decrease:.3g}"
    return f"a {probe.kind} lowers the objective at no size tried"


def _table(found: RunCertificate, width: int, parameters: Mapping[str, int], most: int) -> Table:
    states = found.modules
    penalised = any(state.lam is not None for state in states.values())
    names = _steepest(states, most)
    common = os.path.commonprefix(list(states)) if len(states) > 1 else ""  # noqa: RUF071 (cut at a dot below)
    common = common[: common.rfind(".") + 1]
    title = f"Every module{f' of {common[:-1]}' if common else ''}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    columns = {
        "module": lambda name, state: name.removeprefix(common),
        "rank used": lambda name, state: f"{state.rank_used}/{state.rank}",
        "lambda": lambda name, state: _number(state.lam, ".3g"),
        "rho": lambda name, state: _number(state.spectral_ratio, ".3f"),
        "gradient norm": lambda name, state: f"{state.gradient_norm:.3g}",
        "stationarity": lambda name, state: _number(state.stationarity, ".2g"),
        "outside": lambda name, state: f"{state.outside:.3g}",
        "slope": lambda name, state: f"{state.slope:.2g}",
        "followed": lambda name, state: f"{state.followed:.0%}",
        "nuclear norm": lambda name, state: f"{state.nuclear_norm:.3g}",
        "parameters": lambda name, state: f"{parameters[name]:,}" if name in parameters else "-",
        "time": lambda name, state: f"{state.seconds:.2f} s",
        "verdict": lambda name, state: f"[{_COLOURS[state.verdict]}]{state.verdict}[/]",
    }
    hidden = {"gradient norm", "nuclear norm"} if penalised else {"lambda", "rho", "stationarity"}
    if not parameters:
        hidden.add("parameters")
    if width < _WIDE:
        hidden |= {"lambda", "slope", "nuclear norm", "parameters", "stationarity", "time"}
    columns = {name: cell for name, cell in columns.items() if name not in hidden}
    for name in columns:
        left = name in ("module", "verdict")
        table.add_column(name, justify="left" if left else "right", no_wrap=name == "verdict", overflow="fold")
    for name in names:
        table.add_row(*(cell(name, states[name]) for cell in columns.values()))
    notes = [f"and {len(states) - len(names)} more in certificate.json"] if len(names) < len(states) else []
    notes.append(
        "rho and outside in units of lambda"
        if penalised
        else "gradient norms; outside: of the part that the present factors cannot follow"
    )
    table.caption = "; ".join(notes)
    table.caption_justify = "left"
    return table


def _steepest(states: Mapping[str, ModuleVerdict], most: int) -> Sequence[str]:
    if len(states) <= most:
        return list(states)
    kept = set(sorted(states, key=lambda name: -states[name].slope)[:most])
    return [name for name in states if name in kept]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
