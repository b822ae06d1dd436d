"""docs/families.md, made by the campaign over architectures: what plan and certify take, what they refuse, and why.

``python -m scripts.docs.families`` runs the campaign (about eight minutes on two cores) and fails where an answer is
wrong; with ``--write`` it also writes the page.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import transformers

from tests.families.agreement import EXACT, SINGLE, SIZES, Outcome, Report, Untried, examine
from tests.families.networks import MAPPINGS, Family, families

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
TITLES = {
    "text": "Texts: sequence classifiers",
    "causal": "Causal language models: prompts and fine-tuning",
    "image": "Images",
    "speech": "Recordings",
}
_HEAD = """\
# Architectures

What `plan` and `certify` make of every architecture that transformers {version} has for texts, images, recordings and
causal language models, at toy size with random weights. This page is made by the campaign that checks it:
`python -m scripts.docs.families --write`.

What is right for a row is what plain torch autograd gives for that row alone, without padding: its logits, the
gradient of every logit in every target, the objective and lambda_max for `plan`; the loss that PEFT computes and its
gradients for `certify`. Each is compared at batches of {sizes} rows (all), padded on the right and on the left. In
float64 the largest relative difference may be {exact:.0e}; where the network itself rounds to float32 on the way
(norms, rotary angles, routers), {single:.1e}, 128 units of float32.

"Refused" is a message in one line, or `not-checked`; reasons are below each table. An architecture may be refused for
its default targets alone, where some of them are never used: name the others with `target_modules`.

{counts}
"""


def outcome(family: Family) -> tuple[Family, Report | str]:
    """The report of an architecture, or why it could not be tried."""
    try:
        return family, examine(family)
    except Untried as error:
        return family, str(error)[:300]


def word(name: str, report: Report) -> str:
    """A question's cell."""
    found: Outcome = getattr(report, name)
    if any(line.startswith(f"{name},") for line in report.wrong):
        return "wrong, see below"
    if found.refusals:
        return "right, or refused" if found.errors else "refused"
    return "right" if found.errors else "not asked"


def reasons(report: Report) -> Iterator[str]:
    """Why an architecture is refused, a line each."""
    if report.default:
        yield f"default targets: {report.default}"
    for name, found in (("plan", report.plan), ("certify", report.certify)):
        by_reason: dict[str, list[str]] = {}
        for what, why in found.refusals.items():
            by_reason.setdefault(why, []).append(what)
        for why, cases in by_reason.items():
            where = f" ({'; '.join(cases)})" if found.errors else ""
            yield f"{name}{where}: {why}"


def page(reports: Mapping[Family, Report | str]) -> str:
    """The page in Markdown."""
    done = [report for report in reports.values() if isinstance(report, Report)]
    whole = sum(not r.wrong and not r.plan.refusals and not r.certify.refusals for r in done)
    counts = f"{len(reports)} architectures: {len(done)} tried, {whole} of them right in both without a refusal."
    sizes = f"{SIZES[0]}, {SIZES[1]} and {SIZES[2]}"
    text = [_HEAD.format(version=transformers.__version__, sizes=sizes, exact=EXACT, single=SINGLE, counts=counts)]
    for kind, title in TITLES.items():
        mine = {family: report for family, report in reports.items() if family.kind == kind}
        if not mine:
            continue
        tried = {family: report for family, report in mine.items() if isinstance(report, Report)}
        text += [
            f"## {title}\n",
            "| model type | class | plan | certify | largest difference |",
            "|---|---|---|---|---:|",
        ]
        for family, report in tried.items():
            errors = [*report.plan.errors.values(), *report.certify.errors.values()]
            cells = [family.model_type, f"`{family.name}`", word("plan", report), word("certify", report)]
            text.append(f"| {' | '.join(cells)} | {f'{max(errors):.0e}' if errors else ''} |")
        told = [f"- `{family.name}`, {line}" for family, report in tried.items() for line in reasons(report)]
        text += ["\n### Refused, and why\n", *told] if told else []
        wrong = [f"- `{family.name}`, {line}" for family, report in tried.items() for line in report.wrong]
        text += ["\n### Wrong\n", *wrong] if wrong else []
        untried = [f"- `{family.name}`: {why}" for family, why in mine.items() if isinstance(why, str)]
        text += ["\n### Not tried: transformers cannot run it at toy size here\n", *untried] if untried else []
        text.append("")
    return "\n".join(text).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; the number of architectures with a wrong answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/families.md")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(MAPPINGS)}; default: all")
    options = parser.parse_args(arguments)
    chosen = [family for kind in options.kinds or MAPPINGS for family in families(kind)]
    reports: dict[Family, Report | str] = {}
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for family, report in pool.imap(outcome, chosen):
            reports[family] = report
            print(family.kind, family.name, report if isinstance(report, str) else report.wrong or "", flush=True)
    if options.write:
        PAGE.write_text(page(reports), encoding="utf-8")
    return min(100, sum(isinstance(report, Report) and bool(report.wrong) for report in reports.values()))


if __name__ == "__main__":
    sys.exit(main())
