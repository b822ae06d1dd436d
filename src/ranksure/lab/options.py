"""The options of ``ranksure lab`` and ``ranksure reproduce``, each once; nothing here needs torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ranksure.errors import SettingError
from ranksure.options import COMMON, OUTPUT, SEED, Option, Settings, whole
from ranksure.progress import Reporter

if TYPE_CHECKING:
    from ranksure.lab.claim import Run
    from ranksure.lab.settings.named import Setting
    from ranksure.lab.settings.run import SettingRun


@dataclass(frozen=True, kw_only=True)
class LabOptions(Settings):
    """What ``ranksure lab`` is asked."""

    name: Annotated[str | None, Option("Which entry; without one, all are listed.", COMMON, positional=True)] = None
    out: Annotated[Path, Option("Folder for NAME.json and NAME.png.", COMMON)] = Path("out/lab")
    full: Annotated[bool, Option("The large size; the default takes under two minutes.", COMMON)] = False
    seed: Annotated[int, Option("Seed of everything random.", COMMON, check=SEED)] = 0
    json: Annotated[bool, Option("The record on standard output, all else on error.", OUTPUT)] = False

    def run(self, reporter: Reporter) -> "Run":
        from ranksure.lab.claim import Run

        return Run(self.full, seed=self.seed, reporter=reporter)


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions(Settings):
    """What ``ranksure reproduce`` is asked."""

    names: Annotated[Sequence[str], Option("Which experiments, or all; none lists them.", COMMON, positional=True)] = ()
    out: Annotated[Path, Option("Folder for NAME.json, .csv, .png and .svg, and for finished parts.", COMMON)] = Path(
        "out/reproduce"
    )
    on: Annotated[str | None, Option("Settings to run on, by name, with commas; all by default.", COMMON)] = None
    authors_models: Annotated[bool, Option("The paper's kinds of model, from the Hub (needs the network).", COMMON)] = (
        False
    )
    full: Annotated[bool, Option("More seeds, ranks and steps: hours.", COMMON)] = False
    small: Annotated[bool, Option("A tiny size that only shows that all runs.", COMMON)] = False
    seed: Annotated[int, Option("First seed of rows and starts.", COMMON, check=whole(0, 2**31))] = 0
    json: Annotated[bool, Option("The records on standard output, all else on error.", OUTPUT)] = False

    def settings(self) -> "tuple[Setting, ...]":
        """What there is to run on.

        Raises:
            SettingError: ``on`` names no setting, or one that there is not.
        """
        from ranksure.lab.settings import named

        if self.on is None:
            return named.AUTHORS if self.authors_models else named.SETTINGS
        found = tuple(named.setting_named(part.strip()) for part in self.on.split(",") if part.strip())
        if not found:
            raise SettingError("`on` names no setting: write it like rotten-tomatoes,spam-assassin")
        return found

    def run(self, reporter: Reporter) -> "SettingRun":
        """How experiments are run.

        Raises:
            SettingError: options that exclude each other, or see :meth:`settings`.
        """
        if self.full and self.small:
            raise SettingError("`full` and `small` exclude each other")
        settings = self.settings()
        from ranksure.lab.settings.parts import Parts
        from ranksure.lab.settings.run import SettingRun

        parts = Parts(self.out / "parts")
        return SettingRun(self.full, self.small, self.seed, reporter, parts=parts, settings=settings)
