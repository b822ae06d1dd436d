"""Records of every kind, as the commands write them, small enough to read."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import msgspec
from matplotlib.figure import Figure

from ranksure.planner.answer import sentences
from ranksure.records.plan import Plan
from ranksure.records.record import SCHEMA

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
NAMES = [f"model.layers.{layer}.{kind}" for layer in range(28) for kind in KINDS]


def plan(names: list[str] = NAMES) -> dict[str, Any]:
    """A plan of many modules: rank 2 is rank-bound, rank 4 suffices."""
    ranks = {name: index * 7 % 5 for index, name in enumerate(names)}
    none = dict.fromkeys(names, 0)
    row = {"objective": 0.5, "spectral_ratio": 1.0, "starts": 1, "stationary": True, "requested": True}
    return {
        "schema": Plan.SCHEMA,
        "model": "someone/some-model",
        "revision": None,
        "data": {"source": "train.csv", "sha256": "ab" * 32, "rows": 1000},
        "n_samples": 64,
        "n_outputs": 2,
        "loss": "cross-entropy",
        "weight_decay": 0.02,
        "weight_decay_chosen_by": "held-out loss on the path",
        "lambda_max": 0.08,
        "target_modules": names,
        "shapes": {name: [64, 64] for name in names},
        "bounds": {
            "existence": {"paper": 15, "effective": 10, "numerical": 10},
            "landscape": {"paper": 16, "effective": 11, "numerical": None},
        },
        "path": [
            {"weight_decay": 0.08, "selection_loss": 0.69, "ranks": none, "relative_gap": 0.0, "objective": 0.63},
            {"weight_decay": 0.04, "selection_loss": 0.66, "ranks": ranks, "relative_gap": 1e-5, "objective": 0.6},
            {"weight_decay": 0.02, "selection_loss": 0.64, "ranks": ranks, "relative_gap": 1e-5, "objective": 0.55},
        ],
        "optimum": {
            "objective": 0.5,
            "dual": 0.4999999,
            "gap": 1e-7,
            "relative_gap": 8e-7,
            "objective_at_zero": 0.63,
            "ranks": ranks,
            "spectral_ratio": 1.0,
            "status": "converged",
            "remedy": "",
        },
        "ranks": [
            row | {"rank": r, "captured": c, "gap": g, "verdict": v, "parameters": 128 * r * len(names)} | held
            for r, c, g, v, held in (
                (1, [0.71, 0.74], 3e-2, "not-converged", {"heldout_loss": 0.65, "heldout_accuracy": 0.61}),
                (2, [0.93, 0.9300001], 9e-3, "rank-bound", {"heldout_loss": 0.64, "heldout_accuracy": 0.62}),
                (4, [0.9999992, 1.0], 1e-7, "optimal", {"heldout_loss": 0.641, "heldout_accuracy": 0.63}),
            )
        ],
        "heldout": {
            "rows": 256,
            "loss_without_adapter": 0.68,
            "accuracy_without_adapter": 0.6,
            "best_rank": 2,
            "note": "",
        },
        "recommended": {
            "r": 4,
            "rank_pattern": dict.fromkeys(names, 4),
            "linear_pattern": {name: rank for name, rank in ranks.items() if rank > 1},
            "peft": {
                "r": 4,
                "lora_alpha": 4,
                "target_modules": "(?:a|b)",
                "rank_pattern": {"^a": 3},
                "alpha_pattern": {"^a": 3},
            },
            "parameters_uniform": 57344,
            "parameters_pattern": 20000,
            "captured_pattern": 0.999,
            "heldout_r": 2,
        },
        "subsets": [
            {"n_samples": n, "largest_rank": r, "rank_needed": r, "relative_gap": 1e-6}
            for n, r in ((16, 1), (32, 2), (64, 4))
        ],
        "extrapolation": {"n_samples": 1000, "rank_needed": 9.3, "exponent": 0.5},
        "linearity": {"train": 0.06, "heldout": 0.03, "heldout_real_loss": 0.641, "heldout_linear_loss": 0.64},
        "head": {"new": True, "accuracy": {}},
        "captured_target": 0.99,
        "seed": 7,
        "notes": ["A note."],
        "versions": {"torch": "2.13.0", "peft": "0.21.0"},
        "sentences": [
            "Rank 4 is enough in every target: it captures at least 99% of what any rank could gain.",
            "Another sentence.",
        ],
        "warnings": ["Mind the head."],
        "command": "ranksure plan --model someone/some-model --data train.csv --out plan",
    }


def network(names: list[str] = NAMES) -> dict[str, Any]:
    """The network's own answer: rank 2 suffices there, rank 1 is stuck."""
    ranks = {name: index % 3 for index, name in enumerate(names)}
    smaller = {name: min(rank, 1) for name, rank in ranks.items()}
    return {
        "n_samples": 256,
        "weight_decay": 0.01,
        "weight_decay_chosen_by": "held-out loss of the network on the path",
        "lambda_max": 0.08,
        "optimum": {
            "objective": 0.5,
            "objective_at_zero": 0.63,
            "loss": 0.41,
            "gap": 0.00104,
            "relative_gap": 0.008,
            "noise": 3e-9,
            "modules": {
                name: {
                    "rank": rank,
                    "spectral_ratio": 1.0 + 0.001 * rank,
                    "stationarity": 0.004 * rank,
                    "outside_norm": 0.01 * (0.9 + 0.01 * rank),
                }
                for name, rank in ranks.items()
            },
            "status": "converged",
            "remedy": "",
            "gradients": 48,
            "forwards": 31,
            "captures": 1,
            "history": [[1, 0.63, 0.5], [12, 0.56, 0.16], [25, 0.52, 0.04], [40, 0.503, 0.006], [48, 0.5, 0.00104]],
        },
        "r": 2,
        "captured_uniform": 0.994,
        "pattern": {name: rank for name, rank in ranks.items() if rank},
        "captured_pattern": 0.9925,
        "path": [
            {"weight_decay": w, "ranks": r, "objective": f, "relative_gap": g, "selection_loss": s, "gradients": n}
            | {"selection_accuracy": a}
            for w, r, f, g, s, a, n in (
                (0.04, smaller, 0.6, 0.09, 0.66, 0.61, 9),
                (0.02, smaller, 0.55, 0.07, 0.63, 0.63, 14),
                (0.01, ranks, 0.5, 0.08, 0.61, 0.66, 21),
                (0.005, ranks, 0.43, 0.1, 0.65, 0.65, 30),
            )
        ],
        "ranks": [
            {"rank": r, "objective": f, "captured": c, "verdict": v, "parameters": 128 * r * len(names), "gap": g}
            | {"spectral_ratio": rho, "heldout_loss": loss, "heldout_accuracy": accuracy, "gradients": 20}
            | {"start": "cut from the point found", "requested": r != 3}
            for r, f, c, v, g, rho, loss, accuracy in (
                (1, 0.5067, 0.948, "rank-bound", 0.02, 1.31, 0.652, 0.625),
                (2, 0.5008, 0.994, "first-order-optimal", 0.002, 1.009, 0.641, 0.64),
                (3, 0.5003, 0.998, "not-converged", 0.003, 1.02, 0.64, 0.64),
                (4, 0.5, 1.0, "first-order-optimal", 0.001, 1.004, 0.639, 0.645),
            )
        ],
        "subsets": [
            {"n_samples": n, "weight_decay": w, "ranks": r, "loss": loss, "objective": loss + 0.09}
            | {"relative_gap": g, "rank_needed": k, "heldout_loss": h, "heldout_accuracy": a, "gradients": 20}
            | {"seconds": 4.5}
            for n, w, r, loss, g, k, h, a in (
                (64, 0.02, smaller, 0.35, 0.09, 1, 0.66, 0.61),
                (128, 0.014, ranks, 0.39, 0.08, 2, 0.645, 0.635),
                (256, 0.01, ranks, 0.41, 0.008, 2, 0.64, 0.64),
            )
        ],
        "settled": False,
        "heldout": {
            "rows": 256,
            "loss_without_adapter": 0.68,
            "loss": 0.64,
            "accuracy_without_adapter": 0.6,
            "accuracy": 0.64,
        },
        "skipped": ["model.layers.0", "model.layers.1"],
        "gradients": 212,
    }


def network_plan(names: list[str] = NAMES) -> dict[str, Any]:
    """:func:`plan` with :func:`network`, whose advice it gives."""
    whole, own = plan(names), network(names)
    whole["recommended"] |= {"r": 2, "linear_r": 4, "rank_pattern": dict.fromkeys(names, 2), "weight_decay": 0.01}
    whole["recommended"]["peft"] = {"r": 2, "lora_alpha": 2, "target_modules": "(?:a|b)"}
    whole["sentences"] = sentences(msgspec.convert({**whole, "network": own}, Plan))
    return {**whole, "network": own, "warnings": []}


def certificate(names: list[str] = NAMES[:8], verdict: str = "rank-bound") -> dict[str, Any]:
    """A certificate with a penalty."""
    module = {"verdict": verdict, "rank": 4, "gradient_norm": 0.02, "stationarity": 0.01, "followed": 0.9, "lam": 0.02}
    return {
        "schema": SCHEMA,
        "verdict": verdict,
        "adapter": "default",
        "tolerance": 0.05,
        "modules": {
            name: module
            | {
                "rank_used": index % 5,
                "spectral_ratio": 0.9 + 0.1 * index,
                "outside": 1.2,
                "slope": 0.001,
                "nuclear_norm": 2.0,
            }
            for index, name in enumerate(names)
        },
        "loss": 0.4,
        "penalty": 0.1,
        "objective": 0.5,
        "objective_at_zero": 0.63,
        "rank_gain_bound": 0.04,
        "training_gain_bound": 0.01,
        "radius": None,
        "weight_decay": 0.02,
        "lam": None,
        "n_samples": 64,
        "probes": [{"kind": "new direction", "step": 0.1, "decrease": 0.002}],
        "reasons": [],
        "advice": ["The run is stationary, and its rank is the limit in: two modules.", "Bounds."],
        "run": {
            "adapter": "out/my-lora",
            "adapter_sha256": "cd" * 32,
            "base": "someone/some-model",
            "dtype": "float32",
        },
        "data": {"source": "train.csv", "sha256": "ab" * 32, "rows": 64, "notes": []},
        "ranksure_version": "0.1.0",
        "command": "ranksure certify out/my-lora --data train.csv",
    }


def fit(names: list[str] = NAMES[:8]) -> dict[str, Any]:
    """A fit that grew once; its certificate is :func:`certificate`."""
    return {
        "schema": SCHEMA,
        "model": "someone/some-model",
        "revision": None,
        "data": {"source": "train.csv", "sha256": "ab" * 32},
        "n_samples": 64,
        "mode": "train",
        "ranks": dict.fromkeys(names, 4),
        "lambda": 0.02,
        "parameters": 4096,
        "optimizer": "Adam",
        "steps": 60,
        "verdict": "rank-bound",
        "objective_at_zero": 0.63,
        "final": {"loss": 0.42, "penalty": 0.1, "objective": 0.52},
        "prediction": {
            "of": "rank 4",
            "objective": 0.5,
            "objective_at_zero": 0.63,
            "optimum": 0.5,
            "heldout_loss": 0.64,
            "heldout_accuracy": 0.63,
        },
        "heldout": {
            "rows": 256,
            "loss": 0.645,
            "accuracy": 0.62,
            "loss_without_adapter": 0.68,
            "accuracy_without_adapter": 0.6,
        },
        "stages": [{"ranks": dict.fromkeys(names, 2), "objective": 0.54, "verdict": "rank-bound"}],
        "history": [
            *({"step": step, "loss": 0.4 + 0.2 * math.exp(-step / 15)} for step in range(5, 61, 5)),
            {"step": 30, "ranksure/objective": 0.55},
        ],
        "settings": {"seed": 3, "learning_rate": 0.002, "rank": None},
        "notes": [],
        "versions": {"torch": "2.13.0"},
    }


def grow() -> dict[str, Any]:
    """A grown adapter."""
    return {
        "schema": SCHEMA,
        "verdict": "rank-bound",
        "forced": False,
        "modules": {
            name: {
                "rank_before": 2,
                "rank_after": 2 + index % 3,
                "slopes": [0.01] * (index % 3),
                "sizes": [1.0] * (index % 3),
            }
            for index, name in enumerate(NAMES[:8])
        },
        "rank_before": 16,
        "rank_after": 23,
        "certificate": certificate(),
        "run": {"adapter": "out/my-lora", "adapter_sha256": "cd" * 32, "base": "someone/some-model"},
        "ranksure_version": "0.1.0",
    }


def compress() -> dict[str, Any]:
    """A compressed adapter."""
    return {
        "schema": SCHEMA,
        "level": "budget",
        "ranks_before": dict.fromkeys(NAMES[:8], 8),
        "ranks_after": {name: index % 4 for index, name in enumerate(NAMES[:8])},
        "parameters_before": 8192,
        "parameters_after": 1536,
        "before": {"loss": 0.4, "penalty": 0.1, "objective": 0.5},
        "after": {"loss": 0.41, "penalty": 0.095, "objective": 0.505},
        "at_zero": {"loss": 0.63, "penalty": 0.0, "objective": 0.63},
        "captured": 0.9615,
        "update_change": 0.02,
        "logit_changes": {"compressed": 0.01},
        "notes": [],
    }


def lab(name: str = "some-claim") -> dict[str, Any]:
    """A lab record, one of two parts of the claim holding."""
    return {
        "schema": 1,
        "name": name,
        "title": "Some claim",
        "claim": "Two things are so.",
        "measured": {
            "summary": ["one", "two"],
            "cases": [{"n": n, "gap": 1 / n, "ranks": [n, 1]} for n in (8, 16)],
            "most": 3,
        },
        "verdict": "partly",
        "checks": [
            {"claim": "The first thing is so.", "measured": "in 2 of 2 cases", "holds": True},
            {"claim": "The second thing is so.", "measured": "in 0 of 2 cases", "holds": False},
        ],
        "source": "Somebody (2024), Theorem 1",
        "size": "default",
        "seed": 0,
        "seconds": 1.5,
        "versions": {"python": "3.11"},
    }


def reproduce() -> dict[str, Any]:
    """Three panels of three curves; the last point of one lies on the reference."""
    curves, reference = [], {}
    for panel in range(3):
        level = 0.4 + 0.1 * panel
        reference[f"setting {panel}"] = level
        for label, floor in (("full fine-tuning", 0.0), ("rank 1", 0.02), ("rank 4", 1e-6)):
            x = list(range(0, 200, 2))
            y = [level + floor + (0.3 * math.exp(-0.05 * step) if step < 198 else 0.0) for step in x]
            curves.append({"label": label, "group": f"setting {panel}", "x": x, "y": y})
    few = {"x": [16, 64, 1024], "y": [0.7, None, 0.6], "spread": [0.02, None, 0.01]}
    curves.append({"label": "over seeds", "group": "more rows", **few})
    return {
        "schema": 1,
        "kind": "reproduce",
        "name": "training-curves",
        "title": "Training curves of the linearised problem",
        "claim": "LoRA of sufficient rank reaches the optimum.",
        "where": "Section 5, Figure 2",
        "settings": {"rows": 32, "on": [{"name": "one"}, {"name": "two"}], "missing": ["three: no such package"]},
        "axes": {"x": "step", "y": "objective: loss plus penalty"},
        "checks": [{"claim": "They meet.", "measured": "in 3 of 3 settings", "holds": True}],
        "curves": curves,
        "reference": {"label": "certified optimum", "value": None, "per_group": reference},
        "table": {"columns": ["setting", "rank", "distance"], "rows": [["setting 0", 1, 0.02], ["setting 1", 4, 1e-6]]},
        "summary": ["In 3 of 3 settings."],
        "verdict": "agreed",
        "seed": 0,
        "versions": {"torch": "2.13.0"},
        "command": "ranksure reproduce training-curves",
    }


def write(folder: Path, name: str, record: dict[str, Any]) -> Path:
    """A record in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(record), encoding="utf-8")
    return folder


def write_all(root: Path) -> Path:
    """A folder with one result of every kind."""
    write(root / "plan", "plan.json", network_plan())
    write(root / "linearised", "plan.json", plan())
    write(root / "certify", "certificate.json", certificate())
    write(root / "fit" / "adapter", "fit.json", fit())
    write(root / "fit" / "adapter", "certificate.json", certificate())
    write(root / "grown", "grow.json", grow())
    write(root / "smaller", "compress.json", compress())
    write(root / "lab", "some-claim.json", lab())
    picture(root / "lab" / "some-claim.png")
    write(root / "reproduce", "training-curves.json", reproduce())
    return root


def renamed(record: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """The record with every occurrence of a string replaced, in keys and values."""

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {change(key): change(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [change(entry) for entry in value]
        return value.replace(old, new) if isinstance(value, str) else value

    return change(copy.deepcopy(record))


def picture(path: Path) -> None:
    """A small PNG."""
    figure = Figure(figsize=(4, 2))
    figure.subplots().plot([1, 2, 4])
    figure.savefig(path, format="png", metadata={"Software": None})
