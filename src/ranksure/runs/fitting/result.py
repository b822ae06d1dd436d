"""What ``ranksure.fit`` returns: what was trained and how, what came of it, and what the plan predicted."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from ranksure.errors import SettingError
from ranksure.losses import get_loss
from ranksure.runs.certificate.result import ModuleVerdict, Probe, RunCertificate
from ranksure.runs.fitting.inputs import Setup
from ranksure.runs.fitting.settings import FitSettings

SCHEMA = 1


class FitResult:
    """A finished fit.

    Attributes:
        data: the content of ``fit.json``.
        certificate: the certificate of the final weights, from a full pass.
        folder: where the adapter is.
        model: the trained model; None where the run had been finished before.
    """

    def __init__(
        self, data: dict[str, Any], certificate: RunCertificate, folder: Path, model: nn.Module | None = None
    ) -> None:
        self.data, self.certificate, self.folder, self.model = data, certificate, folder, model

    @classmethod
    def read(cls, folder: Path) -> FitResult:
        """A result from its folder.

        Raises:
            SettingError: a file of it is missing or damaged.
        """
        try:
            data = json.loads((folder / "fit.json").read_text(encoding="utf-8"))
            # `ranksure certify` may have written its record here since, which says more of the same.
            found = _known(RunCertificate, json.loads((folder / "certificate.json").read_text(encoding="utf-8")))
            found["modules"] = {
                name: ModuleVerdict(**_known(ModuleVerdict, state)) for name, state in found["modules"].items()
            }
            found["probes"] = [Probe(**probe) for probe in found["probes"]]
            return cls(data, RunCertificate(**found), folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingError(f"{folder} holds a finished run that cannot be read: {error}") from None

    @property
    def objective(self) -> float:
        """Mean loss and penalty at the end, factors balanced; NaN where the configuration was not checked."""
        if self.data["final"]["objective"] is None:
            return math.nan
        return float(self.data["final"]["objective"])

    def sentences(self) -> list[str]:
        """What was trained, what came of it against the prediction, and the certificate's advice."""
        return [self._what(), *self._prediction(), *self._held_out(), *self._grown(), *self.certificate.advice()]

    def readme(self) -> str:
        """Markdown for the adapter's README."""
        return "\n\n".join(["## Training", *self.sentences(), "Numbers: `fit.json` and `certificate.json`."])

    def _what(self) -> str:
        data, final, clipping = self.data, self.data["final"], self.data["gradient_clipping"]
        ranks = sorted(set(data["ranks"].values()))
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        count = len(data["ranks"])
        what = f"{count} module{'s' * (count != 1)} at {shown}"
        rows, lam = f"{data['n_samples']} rows", f"lambda {data['lambda']:.4g}"
        if data["mode"] == "train":
            how = [f"{data['steps']} steps of {data['optimizer']}", f"true L2 decay of the factors at {lam}"]
            how.append(f"loss averaged per {data['mean_per']}")
            how.append(f"gradients clipped to norm {clipping:g}" if clipping else "no gradient clipping")
            how.append("head trained too" if data["head_trained"] else "head frozen")
            first = f"Trained {what} on {rows} ({', '.join(how)})"
        else:
            first = f"Took the linear optimum, {what}, without any training ({rows}, {lam})"
        if final["objective"] is None:  # a configuration that no certificate covers
            return f"{first}."
        return (
            f"{first}: objective {final['objective']:.5g} = loss {final['loss']:.5g} + penalty {final['penalty']:.4g}, "
            f"from {data['objective_at_zero']:.5g} without an adapter."
        )

    def _prediction(self) -> list[str]:
        found = self.data["prediction"]
        if found is None or self.data["final"]["objective"] is None:
            return []
        gain = found["objective_at_zero"] - found["objective"]
        happened = self.data["objective_at_zero"] - self.objective
        share = f", {happened / gain:.1%} of the predicted gain" if gain > 0 else ""
        linearity = found["linearity"]
        doubt = "" if linearity is None else f"; the plan measured a linearity error of {linearity:.1%}"
        return [
            f"The linearised problem predicted {found['objective']:.5g} for {found['of']}; the network reached "
            f"{self.objective:.5g}{share}{doubt}."
        ]

    def _held_out(self) -> list[str]:
        held, found = self.data["heldout"], self.data["prediction"] or {}
        if held is None:
            return []
        text = f"On {held['rows']} held-out rows: loss {held['loss']:.4f}"
        text += "" if held["accuracy"] is None else f", accuracy {held['accuracy']:.1%}"
        text += f" (without the adapter {held['loss_without_adapter']:.4f}"
        text += "" if held["accuracy"] is None else f", {held['accuracy_without_adapter']:.1%}"
        if found.get("heldout_loss") is not None:
            text += f"; predicted {found['heldout_loss']:.4f}"
            text += "" if found["heldout_accuracy"] is None else f", {found['heldout_accuracy']:.1%}"
        return [text + ")."]

    def _grown(self) -> list[str]:
        stages = self.data["stages"]
        if not stages or self.data["final"]["objective"] is None:
            return []
        path = " -> ".join(f"{sum(stage['ranks'].values())} ({stage['objective']:.5g})" for stage in stages)
        return [
            f"Grown {len(stages)} time{'s' * (len(stages) != 1)}, sum of ranks (objective): {path} -> "
            f"{sum(self.data['ranks'].values())} ({self.objective:.5g})."
        ]


def _known(kind: type, content: dict[str, Any]) -> dict[str, Any]:
    """The entries that are fields of a data class."""
    return {field.name: content[field.name] for field in fields(kind) if field.name in content}


def summary(
    setup: Setup,
    options: FitSettings,
    verdict: RunCertificate,
    facts: dict[str, Any],
    stages: list[dict[str, Any]],
    lam: float,
    scale: float,
) -> dict[str, Any]:
    """The content of ``fit.json``."""
    per = get_loss(setup.kind).term
    if setup.n_outputs is None:
        per = options.weighting
    final = {
        "loss": verdict.loss,
        "penalty": verdict.penalty,
        "objective": verdict.objective,
        "imbalance": verdict.imbalance,
        "rank_gain_bound": verdict.rank_gain_bound,
        "training_gain_bound": verdict.training_gain_bound,
    }
    return {
        "schema": SCHEMA,
        "model": setup.name,
        "revision": setup.revision,
        "data": {"source": setup.source, "sha256": setup.sha256},
        "n_samples": len(setup.features),
        "n_outputs": setup.n_outputs,
        "loss": setup.kind,
        "mean_per": per,
        "pooling": setup.pooling,
        "mode": options.mode,
        "init": options.init,
        "ranks": facts["ranks"],
        "scale_in_training": scale,
        "lambda": lam,
        "parameters": sum(rank * sum(setup.shapes[name]) for name, rank in facts["ranks"].items()),
        "optimizer": {"adam": "Adam", "sgd": "SGD"}[options.optim],
        "gradient_clipping": options.max_grad_norm,
        "head_trained": options.train_head,
        "steps": facts["steps"],
        "verdict": verdict.verdict,
        "objective_at_zero": facts["objective_at_zero"],
        "final": {key: None if value is None or not math.isfinite(value) else value for key, value in final.items()},
        "prediction": facts["prediction"],
        "heldout": facts["heldout"],
        "stages": stages,
        "history": facts["history"],
        "settings": options.to_json(),
        "notes": setup.notes,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
    }
