"""Errors that a user can act on.

Every subclass of :class:`RanksureError` carries one line that names what is wrong (the file,
column, module or value) and what to do. The command line prints that line and exits with code 2.
"""

from __future__ import annotations


class RanksureError(Exception):
    """A mistake in the input or the request, told in one line that says what to do."""


class DataError(RanksureError):
    """A data file, column, row or label that cannot be used."""


class ModelError(RanksureError):
    """A model that cannot be found, loaded, or used for this question."""


class TargetError(RanksureError):
    """A request for target modules that no module, or the wrong kind of module, answers."""


class CaptureError(RanksureError):
    """A network whose per-sample gradients could not be captured exactly."""


class MemoryBudgetError(RanksureError):
    """Work that would not fit the memory budget; says what would make it fit."""


class SettingError(RanksureError):
    """An option or argument with a value that has no meaning here."""


class AdapterError(RanksureError):
    """A PEFT adapter that cannot be written or does not load back as written."""
