"""A plan: which rank, and how certain that is."""

from __future__ import annotations

from typing import Any

from ranksure.records.plan import Plan
from ranksure.records.record import Ranks
from ranksure.report.blocks import Code, Fold, Section, Status, Tile
from ranksure.report.lora_source import pattern, source, written
from ranksure.report.records import Record
from ranksure.report.sections import plan_linearised, plan_network
from ranksure.report.sections.shared import reproduce
from ranksure.report.spectrum import spectrum_figure
from ranksure.report.wording import after, number, power, share, short


def build(record: Record, section_id: str, command: str | None = None) -> Section:
    """The section of a plan: the network's answer with the linearised one folded below it, or the latter alone."""
    data: Plan = record.data
    i, net = section_id, data.network
    linearised = plan_linearised.blocks(data, i)
    worth = plan_linearised.worth(data) if net is None else Status.MEASURED
    what = "the update that solves the linearised problem" if net is None else "the update found for the network"
    spectrum = spectrum_figure(f"{i}-spectrum", record.folder / "adapter", worth, what)
    own = linearised[:2] if net is None else plan_network.blocks(data, net, i)
    blocks: list[Any] = [*own[:2], *([spectrum] if spectrum else []), *own[2:]]
    if net is None:
        blocks += linearised[2:]
        answer, tiles, zero = _answer(data), _tiles(data), data.optimum.is_zero
        good = not data.warnings
    else:
        blocks.append(Fold("For the network linearised at its pretrained weights", _linear(data), linearised))
        answer, tiles, zero = plan_network.answer(data, net), plan_network.tiles(data, net), net.optimum.is_zero
        good = not data.warnings and not plan_network.worse(net)
    section = Section(
        i,
        "Plan",
        f"{short(data.model)} on {data.data.source}",
        answer,
        "good" if good else "warn",
        [after(answer, text) for text in data.sentences],
        [*data.warnings, *data.notes],
        tiles,
    )
    if not zero:
        blocks += _configurations(record, i)
    section.blocks = [*blocks, *reproduce(i, record, command, _facts(data))]
    return section


def _facts(data: Plan) -> list[tuple[str, Any]]:
    optimum, net = data.optimum, data.network
    chosen = net or data
    return [
        ("model", data.model),
        ("revision", data.revision),
        ("data", f"{data.data.source}, {chosen.n_samples:,} of {data.data.rows:,} rows"),
        ("data SHA-256", data.data.sha256),
        ("seed", data.seed),
        ("weight decay λ", f"{chosen.weight_decay!r} ({chosen.weight_decay_chosen_by})"),
        *([] if net is None else plan_network.facts(net)),
        ("certified optimum, linearised", f"{optimum.objective!r}, dual bound {optimum.dual!r}"),
    ]


def _linear(data: Plan) -> str:
    """What the folded part says, in a sentence."""
    where = f"at λ = {data.weight_decay:.4g} on {data.n_samples:,} rows"
    if data.optimum.is_zero:
        return f"The certified optimum of the linearised problem, {where}, is no update."
    said = plan_linearised.reached(data)
    return f"A convex problem, whose answer is proved, {where}. {said}"


def _answer(data: Plan) -> str:
    if data.optimum.is_zero:
        return "No adapter is needed: the certified optimum is no update at all."
    enough = plan_network.enough(data, data.recommended.r)
    if data.linearity.far:
        return f"{enough} of the linearised network, which is far from the real one here."
    if data.heldout and data.recommended.heldout_r == 0:
        return f"{enough} for the training rows; held-out rows show no gain from it."
    return f"{enough}."


def _tiles(data: Plan) -> list[Tile]:
    zero, worth = data.optimum.is_zero, plan_linearised.worth(data)
    optimum, advice, held = data.optimum, data.recommended, data.heldout
    rows = {row.rank: row for row in data.ranks}
    out = [Tile("Rank", str(0 if zero else advice.r), worth, "the same for every target")]
    if not zero and advice.r in rows:
        low, high = rows[advice.r].captured
        out.append(Tile("Captured", share(low, high, 1), Status.CERTIFIED, "of what any rank could gain"))
    gap = power(optimum.relative_gap)
    out.append(Tile("Optimality gap", gap, worth, "of the possible gain, at most"))
    if advice.parameters_uniform and not zero:
        out.append(Tile("Parameters", f"{advice.parameters_uniform:,}", None, "in all targets"))
    row = rows.get(advice.r)
    if held and row and row.heldout_loss is not None:
        change = row.heldout_loss - held.loss_without_adapter
        out.append(
            Tile(
                "Change of held-out loss",
                number(change, "+.2g"),
                Status.MEASURED,
                f"against {held.loss_without_adapter:.4f}",
            )
        )
    return out


def _configurations(record: Record, i: str) -> list[Code]:
    data = record.data
    advice = data.recommended
    found = written(record.folder)
    arguments = found[1] if found else dict(advice.peft or {})
    if not arguments:
        return []
    decay = "Its weight decay is L2 on the factors, as SGD applies it, not AdamW's."
    text = found[0] if found else source(arguments)
    out = [Code(f"{i}-config", f"LoraConfig: rank {advice.r} in every target", text, f"The one to train. {decay}")]
    small, why = _smaller(data)
    if small:
        out.append(Code(f"{i}-pattern", "LoraConfig: the smallest pattern found", pattern(arguments, small), why))
    return out


def _smaller(data: Plan) -> tuple[Ranks, str]:
    """A pattern of fewer parameters than the recommended rank has, and what is to be said of it; empty for none."""
    net, advice = data.network, data.recommended
    if net is not None:
        why = f"It captures {share(net.captured_pattern, net.captured_pattern)}, measured on the network itself."
        kept = {name: rank for name, rank in net.pattern.items() if rank}
        return (kept, why) if sum(kept.values()) < sum(advice.rank_pattern.values()) else ({}, "")
    if (advice.parameters_pattern or 0) >= (advice.parameters_uniform or 0):
        return {}, ""
    why = "The fewest parameters for the linearised network; a trained one often uses what it leaves out."
    return advice.linear_pattern, why
