"""Module names as places in a picture: a layer and what the module is within it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping

NO_LAYER = "–"


def is_control(char: str) -> bool:
    """Whether a character is for control, formatting or half of another; joiners, which scripts need, are not."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs") and char not in "\u200c\u200d"


def clean(text: object) -> str:
    """One line of text without control characters, which neither SVG nor a reader can use."""
    return "".join(" " if is_control(char) else char for char in str(text)).strip() or "?"


def shortened(text: str, most: int) -> str:
    """The end of a long name, which is what tells it from others."""
    return text if len(text) <= most else "…" + text[-(most - 1) :]


def places(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Layer and label of every module; no two names share both.

    The layer is the first component that is a number (``encoder.layer.3.attention.query`` is of layer 3), as text, or
    :data:`NO_LAYER`; the label is the shortest ending of the name that tells it from others of the layer (``query``).
    """
    split: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {}
    for name in names:
        parts = tuple(clean(name).split("."))
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if index is None:
            split[name] = (NO_LAYER, (), parts)
        else:
            split[name] = (parts[index], parts[:index], parts[index + 1 :])
    own = {
        name: (*prefix, "*", *parts) if layer != NO_LAYER else parts for name, (layer, prefix, parts) in split.items()
    }
    short = _endings(set(own.values()))
    return {name: (layer, clean(short[own[name]])) for name, (layer, _, _) in split.items()}


def layers(found: dict[str, tuple[str, str]]) -> list[str]:
    """Layers in order; what is in none comes last."""
    seen = {layer for layer, _ in found.values()}
    return sorted(seen, key=lambda layer: (layer == NO_LAYER, int(layer) if layer.isdigit() else 0))


def labels(found: dict[str, tuple[str, str]]) -> list[str]:
    """Labels in order of appearance."""
    return list(dict.fromkeys(text for _, text in found.values()))


def by_layer(
    found: dict[str, tuple[str, str]], values: Mapping[str, Iterable[float]]
) -> tuple[bool, list[str], dict[str, list[tuple[int, float]]]]:
    """Whether there is one layer only, stops of an axis (layers; of one, its labels), and by label the points there."""
    one = len(layers(found)) == 1
    stops = labels(found) if one else layers(found)
    points: dict[str, list[tuple[int, float]]] = {}
    for name, place in found.items():
        points.setdefault(place[1], []).extend((stops.index(place[one]), float(value)) for value in values[name])
    return one, stops, points


def _endings(rows: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The shortest ending of each that no other has; the layer's place in it is a star."""
    out = {}
    for row in rows:
        count = 1
        while count < len(row) and any(row[-count:] == other[-count:] for other in rows if other != row):
            count += 1
        out[row] = ".".join(row[-count:])
    return out
