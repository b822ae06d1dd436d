"""What ``ranksure.fit`` returns: what was trained and how, what came of it, and what the plan predicted."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from ranksure.losses import get_loss
from ranksure.records.certificate import RunCertificate
from ranksure.records.fit import Final, Fit, FitData, Stage
from ranksure.records.record import plain, read
from ranksure.runs.fitting.inputs import Setup
from ranksure.runs.fitting.settings import FitSettings


class FitResult:
    """A finished fit.

    Attributes:
        record: the content of ``fit.json``.
        certificate: the certificate of the final weights, from a full pass.
        folder: where the adapter is.
        model: the trained model; None where the run had been finished before.
    """

    def __init__(self, record: Fit, certificate: RunCertificate, folder: Path, model: nn.Module | None = None) -> None:
        self.record, self.certificate, self.folder, self.model = record, certificate, folder, model

    @classmethod
    def read(cls, folder: Path) -> FitResult:
        """A result from its folder.

        Raises:
            DataError: a file of it is missing or damaged.
        """
        # `ranksure certify` may have written its record here since, which says more of the same.
        return cls(read(folder / "fit.json", Fit), read(folder / "certificate.json", RunCertificate), folder)

    @property
    def data(self) -> dict[str, Any]:
        """The record as dicts and lists."""
        return plain(self.record)

    @property
    def objective(self) -> float:
        """Mean loss and penalty at the end, factors balanced; NaN where the configuration was not checked."""
        final = self.record.final.objective
        return math.nan if final is None else final

    def sentences(self) -> list[str]:
        """What was trained, what came of it against the prediction, and the certificate's advice."""
        return [
            self._what(),
            *(self.record.solved.said() if self.record.solved else []),
            *self._prediction(),
            *self._held_out(),
            *self._grown(),
            *self.certificate.advice(),
        ]

    def readme(self) -> str:
        """Markdown for the adapter's README."""
        return "\n\n".join(["## Training", *self.sentences(), "Numbers: `fit.json` and `certificate.json`."])

    def _what(self) -> str:
        record, final, clipping = self.record, self.record.final, self.record.gradient_clipping
        ranks = sorted(set(record.ranks.values()))
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        count = len(record.ranks)
        what = f"{count} module{'s' * (count != 1)} at {shown}"
        rows, lam = f"{record.n_samples} rows", f"lambda {record.lam:.4g}"
        if record.mode == "train":
            solved = record.solved is not None
            steps = f"{record.steps} {'gradients' if solved else 'steps'} of {record.optimizer}"
            how = [steps + " over all rows" * solved, f"true L2 decay of the factors at {lam}"]
            how.append(f"loss averaged per {record.mean_per}")
            how.append(f"gradients clipped to norm {clipping:g}" if clipping else "no gradient clipping")
            how.append("head trained too" if record.head_trained else "head frozen")
            first = f"{'Solved' if solved else 'Trained'} {what} on {rows} ({', '.join(how)})"
        else:
            first = f"Took the linear optimum, {what}, without any training ({rows}, {lam})"
        if final.objective is None:  # a configuration that no certificate covers
            return f"{first}."
        return (
            f"{first}: objective {final.objective:.5g} = loss {final.loss:.5g} + penalty {final.penalty:.4g}, "
            f"from {record.objective_at_zero:.5g} without an adapter."
        )

    def _prediction(self) -> list[str]:
        found = self.record.prediction
        zero = self.record.objective_at_zero
        if found is None or zero is None or self.record.final.objective is None:
            return []
        gain = found.objective_at_zero - found.objective
        happened = zero - self.objective
        share = f", {happened / gain:.1%} of the predicted gain" if gain > 0 else ""
        linearity = found.linearity
        doubt = "" if linearity is None else f"; the plan measured a linearity error of {linearity:.1%}"
        return [
            f"The linearised problem predicted {found.objective:.5g} for {found.of}; the network reached "
            f"{self.objective:.5g}{share}{doubt}."
        ]

    def _held_out(self) -> list[str]:
        held, found = self.record.heldout, self.record.prediction
        if held is None:
            return []
        text = f"On {held.rows} held-out rows: loss {held.loss:.4f}"
        text += "" if held.accuracy is None else f", accuracy {held.accuracy:.1%}"
        text += f" (without the adapter {held.loss_without_adapter:.4f}"
        text += "" if held.accuracy is None else f", {held.accuracy_without_adapter:.1%}"
        if found is not None and found.heldout_loss is not None:
            text += f"; predicted {found.heldout_loss:.4f}"
            text += "" if found.heldout_accuracy is None else f", {found.heldout_accuracy:.1%}"
        return [text + ")."]

    def _grown(self) -> list[str]:
        stages = self.record.stages
        if not stages or self.record.final.objective is None:
            return []
        path = " -> ".join(f"{sum(stage.ranks.values())} ({stage.objective:.5g})" for stage in stages)
        return [
            f"Grown {len(stages)} time{'s' * (len(stages) != 1)}, sum of ranks (objective): {path} -> "
            f"{sum(self.record.ranks.values())} ({self.objective:.5g})."
        ]


def fit_record(
    setup: Setup,
    options: FitSettings,
    verdict: RunCertificate,
    last: Stage,
    stages: list[Stage],
    lam: float,
    scale: float,
    **more: Any,
) -> Fit:
    """The content of ``fit.json``; ``more`` are further fields of it."""
    return Fit(
        model=setup.name,
        revision=setup.revision,
        data=FitData(source=setup.source, sha256=setup.sha256),
        n_samples=len(setup.features),
        n_outputs=setup.n_outputs,
        loss=setup.kind,
        mean_per=options.weighting if setup.n_outputs is None else get_loss(setup.kind).term,
        pooling=setup.pooling,
        mode=options.mode,
        init=options.init,
        scale_in_training=scale,
        lam=lam,
        parameters=sum(rank * sum(setup.shapes[name]) for name, rank in last.ranks.items()),
        optimizer="L-BFGS" if options.certified else {"adam": "Adam", "sgd": "SGD"}[options.optim],
        method=options.method,
        gradient_clipping=options.max_grad_norm,
        head_trained=options.train_head,
        ranks=last.ranks,
        steps=last.steps,
        history=last.history,
        verdict=verdict.verdict,
        final=Final(**plain({name: getattr(verdict, name) for name in Final.__struct_fields__})),
        stages=stages,
        settings=options.to_json(),
        notes=setup.notes,
        versions={name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        **more,
    )
