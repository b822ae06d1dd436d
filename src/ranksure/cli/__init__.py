"""The command line: parses, calls, prints. Answers go to standard output, everything else to standard error.

``commands`` makes click's options from the dataclasses of settings; each command is a file: what it takes beyond its
settings, examples, what it calls and what it prints.
"""

from ranksure.cli.app import main

__all__ = ["main"]
