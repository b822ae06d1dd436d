"""Singular values of a LoRA update, read from an adapter's file of weights."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ranksure.errors import DataError
from ranksure.report.blocks import Figure, Key, Status, Table, drawn
from ranksure.report.module_places import by_layer, places
from ranksure.report.svg import INKS, MARKERS, SERIES, Canvas, label, layer_ticks, log_ticks
from ranksure.report.wording import counted, number

_SMALLEST = 1e-6  # of the largest: below it a singular value is rounding
_MOST_BYTES = 2 * 2**30
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")


def singular_values(folder: Path) -> dict[str, np.ndarray] | None:
    """Singular values of every module's update in an adapter's folder, descending, those that are rounding left out.

    None where there is no adapter, or one that is not a plain LoRA.

    Raises:
        DataError: the file is damaged.
    """
    config_path, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_path.is_file() or not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return None
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise DataError(f"{config_path} is damaged, no JSON: write the adapter again, or move it away") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or config.get("use_dora"):
        return None
    factors: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in _tensors(path).items():
        if (found := _KEY.match(key)) and tensor.ndim == 2:
            factors.setdefault(found["module"], {})[found["side"]] = tensor.astype(np.float64)
    out = {}
    for name, pair in factors.items():
        if set(pair) != {"A", "B"} or pair["B"].shape[1] != pair["A"].shape[0]:
            raise DataError(f"{path} is damaged: the matrices of {name} do not belong together")
        if not all(np.isfinite(part).all() for part in pair.values()):
            raise DataError(f"{path}: {name} holds a value that is not finite")
        left, right = np.linalg.qr(pair["B"])[1], np.linalg.qr(pair["A"].T)[1]
        out[name] = _scale(config, name, pair["A"].shape[0]) * np.linalg.svd(left @ right.T, compute_uv=False)
    largest = max((values[0] for values in out.values() if len(values)), default=0.0)
    if largest <= 0:
        return None
    return {name: values[values > _SMALLEST * largest] for name, values in out.items()}


def _tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            names = [name for name in file.keys() if ".lora_" in name]  # noqa: SIM118  (not a dict)
            if any(file.get_slice(name).get_dtype() == "BF16" for name in names):
                raise TypeError
            return {name: file.get_tensor(name) for name in names}
    except TypeError:  # numpy has no bfloat16
        from safetensors.torch import load_file

        return {name: tensor.float().numpy() for name, tensor in load_file(path).items() if ".lora_" in name}
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({' '.join(str(error).split())}): write the adapter again") from None


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """``alpha / r`` of a module as PEFT takes it, ``alpha / sqrt(r)`` for rsLoRA."""
    alpha = config.get("lora_alpha", rank)
    with suppress(re.error):
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                alpha = value
                break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def spectrum_figure(figure_id: str, folder: Path, status: Status, what: str) -> Figure | None:
    """The singular values of an adapter's updates, by layer; None where there is no adapter to read.

    ``what`` says what the update is, such as ``the certified optimum``, ``status`` what it is worth.
    """
    found = singular_values(folder)
    total = sum(len(values) for values in found.values()) if found else 0
    if not found or total < 2:
        return None  # one number needs no picture
    one_layer, stops, series = by_layer(places(found), found)
    most = max(len(values) for values in found.values())
    used = sum(1 for values in found.values() if len(values))
    largest, place = max((float(values[0]), name) for name, values in found.items() if len(values))
    summary = (
        f"{what[0].upper()}{what[1:]} has {counted(total, 'singular value')} in "
        f"{used} of {counted(len(found), 'module')}, "
        f"at most {most} in one; the largest, {number(largest, '.3g')}, is in {place}."
    )
    legend = [Key(kind, f"c{index % len(SERIES)}", MARKERS[index % len(MARKERS)]) for index, kind in enumerate(series)]
    return drawn(
        figure_id,
        lambda canvas: _draw(canvas, one_layer, stops, series),
        "How large is the update in each layer?",
        status,
        summary,
        f"Dots on a logarithmic scale, by {'module' if one_layer else 'layer'}.",
        _table(found, min(most, 8), most),
        legend if len(series) > 1 and not one_layer else (),
        note=f"Singular values below {_SMALLEST:g} of the largest are rounding and left out.",
    )


def _draw(canvas: Canvas, one_layer: bool, stops: list[str], series: dict[str, list[tuple[int, float]]]) -> None:
    spread = 0.0 if one_layer else min(0.6, 0.12 * (len(series) - 1))
    (axes,) = canvas.axes(height=280 if not canvas.narrow else 270)
    for index, points in enumerate(series.values()):
        shift = spread * (index / max(len(series) - 1, 1) - 0.5)
        if points:
            axes.plot(
                [x + shift for x, _ in points],
                [y for _, y in points],
                MARKERS[index % len(MARKERS)],
                color=SERIES[index % len(SERIES)],
                markersize=6 if len(stops) < 30 else 4,
                markeredgecolor=INKS["card"],
                markeredgewidth=0.6,
            )
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.3, high * 1.3)
    log_ticks(axes.yaxis)
    layer_ticks(canvas, axes, stops)
    label(axes, "module" if one_layer else "layer", "singular value of the update (log scale)")


def _table(found: dict[str, np.ndarray], shown: int, most: int) -> Table:
    rows = []
    for name, values in found.items():
        cells = [number(float(value), ".3g") for value in values[:shown]]
        rows.append([name, str(len(values)), *cells, *[""] * (shown - len(cells))])
    return Table(
        "Singular values of the update",
        ["module", "numerical rank", *(f"σ{i + 1}" for i in range(shown))],
        rows,
        more=f"Only the first {shown} of each module are listed." if most > shown else "",
    )
