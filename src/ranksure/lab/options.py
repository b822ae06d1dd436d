"""The options of ``ranksure lab`` and ``ranksure reproduce``, each once; nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ranksure.errors import SettingError
from ranksure.lab.claim import Run
from ranksure.lab.settings import named
from ranksure.progress import Reporter

if TYPE_CHECKING:
    from ranksure.lab.settings.run import SettingRun


@dataclass(frozen=True)
class LabOptions:
    """What ``ranksure lab`` can be told.

    Attributes:
        out: folder for NAME.json and NAME.png.
        full: the large size; the default takes under two minutes.
        seed: seed of everything random.
        json: the record on standard output, all else on error.
    """

    out: Path = Path("out/lab")
    full: bool = False
    seed: int = 0
    json: bool = False

    def run(self, reporter: Reporter) -> Run:
        """How claims are measured."""
        return Run(self.full, seed=self.seed, reporter=reporter)


@dataclass(frozen=True)
class ReproduceOptions:
    """What ``ranksure reproduce`` can be told.

    Attributes:
        out: folder for NAME.json, .csv, .png and .svg, and for finished parts.
        on: settings to run on, by name, with commas; all by default.
        authors_models: the paper's kinds of model, from the Hub (needs the network).
        full: more seeds, ranks and steps: hours.
        small: a tiny size that only shows that all runs.
        seed: first seed of rows and starts.
        json: the records on standard output, all else on error.
    """

    out: Path = Path("out/reproduce")
    on: str | None = None
    authors_models: bool = False
    full: bool = False
    small: bool = False
    seed: int = 0
    json: bool = False

    def settings(self) -> tuple[named.Setting, ...]:
        """What there is to run on.

        Raises:
            SettingError: ``on`` names no setting, or one that there is not.
        """
        if self.on is None:
            return named.AUTHORS if self.authors_models else named.SETTINGS
        found = tuple(named.setting_named(part.strip()) for part in self.on.split(",") if part.strip())
        if not found:
            raise SettingError("--on names no setting: write it like rotten-tomatoes,spam-assassin")
        return found

    def run(self, reporter: Reporter) -> SettingRun:
        """How experiments are run.

        Raises:
            SettingError: options that exclude each other, or see :meth:`settings`.
        """
        if self.full and self.small:
            raise SettingError("--full and --small exclude each other")
        settings = self.settings()
        from ranksure.lab.settings.parts import Parts
        from ranksure.lab.settings.run import SettingRun

        parts = Parts(self.out / "parts")
        return SettingRun(self.full, self.small, self.seed, reporter, parts=parts, settings=settings)
