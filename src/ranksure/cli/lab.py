"""``ranksure lab``: claims of the literature, measured."""

from ranksure.cli.commands import command
from ranksure.lab.options import LabOptions


@command(
    LabOptions,
    "ranksure lab",
    "ranksure lab no-spurious-minima --out out/lab",
    "ranksure lab generalization --full --seed 1 --out out/lab",
)
def lab(asked: LabOptions) -> None:
    """Measure a claim of the literature: what is claimed, what was measured, and whether they agree."""
    from ranksure.cli.claims import list_claims, measure_claims
    from ranksure.cli.terminal import RichReporter, window
    from ranksure.lab.run import THEORY

    console = window(asked.json)
    if asked.name is None:
        list_claims(console, THEORY, ("entry", "what it measures", "source"))
        console.print("\nRun one: ranksure lab NAME --out DIR", highlight=False)
        return
    measure_claims(console, THEORY, [asked.name], asked.run(RichReporter()), asked.out, asked.json)
