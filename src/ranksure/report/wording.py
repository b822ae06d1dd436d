"""Numbers and lists as a reader writes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

NONE = "–"


def number(value: float | None, form: str = ".4g") -> str:
    """A number, or a dash."""
    return (
        NONE if value is None else format(value, form).replace("-", "\u2212", 1) if value < 0 else format(value, form)
    )


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage; 99.96% is not shown as 100%, nor 0.04% as 0%."""
    if value is None:
        return NONE
    shown = f"{100 * value:.{digits}f}"
    whole = {f"{100:.{digits}f}": 1.0, f"{0:.{digits}f}": 0.0}
    if shown in whole and abs(value - whole[shown]) > 1e-5:
        return percent(value, digits + 1) if digits < 4 else f"{100 * value:.4g}%"
    return shown.rstrip("0").rstrip(".") + "%" if "." in shown else shown + "%"


def share(low: float, high: float, digits: int = 2) -> str:
    """An interval of shares; one number where both read the same."""
    if low >= 1 - 5e-5:
        return percent(high, digits)
    texts = percent(low, digits), percent(high, digits)
    return texts[0] if high - low < 5e-5 or texts[0] == texts[1] else " to ".join(texts)


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(value: float, digits: int = 0) -> str:
    """A small number as a power of ten, ``7·10⁻⁷``; others as they are."""
    if 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.{max(digits, 2) + 1}g}"
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    shown = "10" + str(int(exponent)).translate(_RAISED)
    return shown if mantissa == "1" else f"{mantissa}·{shown}"


def after(headline: str, sentence: str) -> str:
    """A sentence without its beginning where the headline above says that already."""
    start = headline.rstrip(".") + ": "
    rest = sentence.removeprefix(start)
    return sentence if rest == sentence or not rest else rest[0].upper() + rest[1:]


def counted(n: int, noun: str) -> str:
    """``1 module``, ``12 modules``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def listed(values: Iterable[Any], most: int = 6) -> str:
    """``1, 2 and 4``."""
    texts = [str(value) for value in values]
    if len(texts) > most:
        return f"{', '.join(texts[:most])} and {len(texts) - most} more"
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1] if texts else "none"


def short(model: str) -> str:
    """The last two parts of a long path; a Hub id as it is."""
    return model if model.count("/") < 2 else "/".join(model.rstrip("/").split("/")[-2:])
