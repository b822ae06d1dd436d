"""The shapes of the records: what a page reads of each, and so what a record must hold."""

from __future__ import annotations

from ranksure.records.shape import Maybe, Spec, Values, count, flag, interval, number, scalar, text

_MODULE = {
    "verdict": text,
    "rank": count,
    "rank_used": count,
    "spectral_ratio": Maybe(number),
    "outside": Maybe(number),
    "slope": Maybe(number),
    "nuclear_norm": Maybe(number),
}
_CERTIFICATE: Spec = {
    "verdict": text,
    "modules": Values(_MODULE),
    "objective": Maybe(number),
    "loss": Maybe(number),
    "penalty": Maybe(number),
    "objective_at_zero": Maybe(number),
    "rank_gain_bound": Maybe(number),
    "training_gain_bound": Maybe(number),
    "radius": Maybe(number),
    "tolerance": number,
    "n_samples": count,
    "advice": [text],
    "reasons": Maybe([text]),
    "probes": Maybe([{"kind": text, "step": number, "decrease": number}]),
    "data": Maybe({"source": text}),
}
_SHARED: Spec = {"versions": Maybe(Values(scalar)), "command": Maybe(text), "notes": Maybe([text])}
_CHECK = {"claim": text, "measured": text, "holds": flag}
_BOUND = {"paper": count, "effective": count, "numerical": Maybe(count)}
SPECS: dict[str, Spec] = {
    "plan": {
        **_SHARED,
        "model": text,
        "data": {"source": text, "rows": count, "sha256": Maybe(text)},
        "n_samples": count,
        "n_outputs": count,
        "weight_decay": number,
        "weight_decay_chosen_by": text,
        "lambda_max": number,
        "target_modules": [text],
        "shapes": Values([count]),
        "bounds": {"existence": _BOUND, "landscape": _BOUND},
        "path": Maybe(
            [
                {
                    "weight_decay": number,
                    "selection_loss": Maybe(number),
                    "ranks": Values(count),
                    "relative_gap": Maybe(number),
                }
            ]
        ),
        "optimum": {
            "objective": number,
            "dual": number,
            "gap": number,
            "relative_gap": number,
            "objective_at_zero": number,
            "ranks": Values(count),
            "status": text,
        },
        "ranks": [
            {
                "rank": count,
                "objective": number,
                "gap": Maybe(number),
                "captured": interval,
                "verdict": text,
                "parameters": count,
                "spectral_ratio": Maybe(number),
                "heldout_loss": Maybe(number),
                "heldout_accuracy": Maybe(number),
            }
        ],
        "heldout": Maybe({"rows": count, "loss_without_adapter": number, "accuracy_without_adapter": Maybe(number)}),
        "recommended": {
            "r": count,
            "rank_pattern": Values(count),
            "linear_pattern": Maybe(Values(count)),
            "parameters_uniform": Maybe(count),
            "parameters_pattern": Maybe(count),
            "captured_pattern": Maybe(number),
            "peft": Maybe(Values(lambda value: True)),
        },
        "subsets": Maybe(
            [{"n_samples": count, "largest_rank": count, "rank_needed": Maybe(count), "relative_gap": Maybe(number)}]
        ),
        "extrapolation": Maybe({"n_samples": count, "rank_needed": number, "exponent": number}),
        "linearity": Maybe(
            {
                "train": Maybe(number),
                "heldout": Maybe(number),
                "heldout_real_loss": Maybe(number),
                "heldout_linear_loss": Maybe(number),
            }
        ),
        "captured_target": number,
        "seed": count,
        "sentences": Maybe([text]),
        "warnings": Maybe([text]),
    },
    "fit": {
        **_SHARED,
        "model": text,
        "data": {"source": text, "sha256": Maybe(text)},
        "n_samples": count,
        "mode": text,
        "ranks": Values(count),
        "lambda": number,
        "parameters": count,
        "optimizer": text,
        "steps": count,
        "verdict": text,
        "objective_at_zero": Maybe(number),
        "final": {"loss": Maybe(number), "penalty": Maybe(number), "objective": Maybe(number)},
        "prediction": Maybe(
            {
                "of": text,
                "objective": number,
                "objective_at_zero": number,
                "optimum": Maybe(number),
                "heldout_loss": Maybe(number),
                "heldout_accuracy": Maybe(number),
            }
        ),
        "heldout": Maybe(
            {
                "rows": count,
                "loss": number,
                "accuracy": Maybe(number),
                "loss_without_adapter": number,
                "accuracy_without_adapter": Maybe(number),
            }
        ),
        "stages": [{"ranks": Values(count), "objective": Maybe(number), "verdict": text}],
        "history": [{"step": Maybe(number), "loss": Maybe(number), "ranksure/objective": Maybe(number)}],
        "settings": Values(lambda value: True),
    },
    "certificate": {**_SHARED, **_CERTIFICATE},
    "grow": {
        **_SHARED,
        "verdict": text,
        "forced": flag,
        "modules": Values({"rank_before": count, "rank_after": count, "slopes": [number]}),
        "rank_before": count,
        "rank_after": count,
        "certificate": _CERTIFICATE,
    },
    "compress": {
        **_SHARED,
        "level": text,
        "ranks_before": Values(count),
        "ranks_after": Values(count),
        "parameters_before": count,
        "parameters_after": count,
        "before": Maybe({"loss": number, "penalty": number, "objective": number}),
        "after": Maybe({"loss": number, "penalty": number, "objective": number}),
        "at_zero": Maybe({"objective": number}),
        "captured": Maybe(number),
        "update_change": Maybe(number),
        "logit_changes": Maybe(Values(number)),
    },
    "reproduce": {
        **_SHARED,
        "name": text,
        "title": text,
        "claim": text,
        "where": text,
        "settings": Maybe(Values(lambda value: True)),
        "curves": Maybe(
            [
                {
                    "label": text,
                    "x": [number],
                    "y": [Maybe(number)],
                    "group": Maybe(text),
                    "spread": Maybe([Maybe(number)]),
                }
            ]
        ),
        "axes": Maybe(Values(text)),
        "checks": Maybe([_CHECK]),
        "reference": Maybe({"label": text, "value": Maybe(number), "per_group": Maybe(Values(Maybe(number)))}),
        "table": Maybe({"columns": [text], "rows": [[scalar]]}),
        "summary": Maybe([text]),
        "verdict": text,
        "seed": Maybe(scalar),
    },
    "lab": {
        **_SHARED,
        "name": text,
        "title": text,
        "claim": text,
        "verdict": text,
        "checks": [_CHECK],
        "source": text,
        "measured": Maybe(Values(lambda value: True)),
        "seed": Maybe(count),
        "size": Maybe(text),
        "seconds": Maybe(number),
    },
}
"""By kind of record, in the order of a page."""
