"""``python -m ranksure.cli``."""

from ranksure.cli.app import main

main()
