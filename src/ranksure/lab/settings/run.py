"""A run over settings: what there is to run on, made ready, with finished parts kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ranksure.errors import RanksureError, SettingError
from ranksure.lab.claim import Run
from ranksure.lab.settings.named import SETTINGS, Setting
from ranksure.lab.settings.parts import Parts
from ranksure.lab.settings.prepared import Prepared

Item = TypeVar("Item")

_KEPT = 3  # settings in memory at once


@dataclass(kw_only=True)
class SettingRun(Run):
    """How an experiment of the paper is run."""

    parts: Parts  # where finished parts are found and kept
    settings: Sequence[Setting] = SETTINGS  # what there is to run on
    _prepared: dict[str, Prepared] = field(default_factory=dict)

    def prepared(self, setting: Setting, seed: int) -> Prepared:
        """A setting made ready; the last few stay in memory."""
        key = f"{setting.to_json()} {seed}"
        if key not in self._prepared:
            while len(self._prepared) >= _KEPT:
                self._prepared.pop(next(iter(self._prepared)))
            self._prepared[key] = Prepared(setting, seed, self.parts, self.reporter)
        else:
            self._prepared[key] = self._prepared.pop(key)  # most recent last
        return self._prepared[key]

    def each(
        self, pairs: Iterable[tuple[Setting, int]], one: Callable[[Prepared], Sequence[Item]]
    ) -> tuple[list[Item], list[str]]:
        """What ``one`` gives of every setting and seed, and a line for each setting that cannot be run.

        Raises:
            SettingError: none can be run.
        """
        found: list[Item] = []
        missing: dict[str, str] = {}
        for setting, seed in pairs:
            if setting.name in missing:
                continue
            try:
                prepared = self.prepared(setting, seed)
            except RanksureError as error:
                missing[setting.name] = f"{setting.title}: not run: {error}"
                continue
            found += one(prepared)
            prepared.release()
        if not found:
            raise SettingError("; ".join(missing.values()) or "there is no setting that this experiment runs on")
        return found, list(missing.values())

    def first_and_others(self) -> tuple[list[Setting], list[Setting]]:
        """The texts and the rest; where there are no texts, the first setting stands for them."""
        texts = [setting for setting in self.settings if setting.kind in ("text", "prompt")]
        first = texts or list(self.settings[:1])
        return first, [setting for setting in self.settings if setting not in first]

    def images_of_all_classes(self) -> list[Setting]:
        """The images of the rest whose classes are all kept."""
        others = self.first_and_others()[1]
        return [setting for setting in others if setting.kind == "image" and setting.classes is None]

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"on": [setting.to_json() for setting in self.settings]}

    def parts_count(self) -> dict[str, int]:
        return {"made": len(self.parts.made), "found": len(self.parts.found)}
