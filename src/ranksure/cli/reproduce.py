"""``ranksure reproduce``: the paper's experiments on parts that anyone can install."""

from ranksure.cli.commands import command
from ranksure.lab.options import ReproduceOptions


@command(
    ReproduceOptions,
    "ranksure reproduce",
    "ranksure reproduce linearised-curves --on rotten-tomatoes",
    "ranksure reproduce all --out out/reproduce",
    "ranksure reproduce linearised-curves --authors-models     (from the Hub)",
)
def reproduce(asked: ReproduceOptions) -> None:
    """Run the experiments of the paper: what is claimed, what was measured, and whether they agree.

    A run that is stopped goes on where it was: finished parts lie in OUT/parts.
    """
    from ranksure.cli.claims import list_claims, measure_claims
    from ranksure.cli.terminal import RichReporter, window
    from ranksure.lab.run import PAPER

    console = window(asked.json)
    if not asked.names:
        list_claims(console, PAPER, ("experiment", "what is claimed", "where", "minutes (--full)"))
        console.print(f"\nOn: {', '.join(setting.name for setting in asked.settings())}", highlight=False)
        console.print("Run one: ranksure reproduce NAME --out DIR; every one: ranksure reproduce all", highlight=False)
        console.print("Random starts at low rank: ranksure lab no-spurious-minima", highlight=False)
        return
    chosen = PAPER.chosen(asked.names)
    run = asked.run(RichReporter())
    console.print(
        f"{len(chosen)} experiment{'s' * (len(chosen) != 1)}, about {PAPER.minutes(chosen, run):.0f} minutes on two "
        "cores with every setting and nothing finished yet; Ctrl-C keeps the finished parts.\n",
        highlight=False,
    )
    measure_claims(console, PAPER, chosen, run, asked.out, asked.json)
