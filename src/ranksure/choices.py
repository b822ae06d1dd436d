"""Words that options take and several rooms know. Nothing is loaded for them, so that ``--help`` is quick."""

from typing import Literal

Weighting = Literal["token", "sample"]
"""Of a causal language model's mean loss: every token alike, or every sample alike."""

LossOn = Literal["completion", "all"]
"""The tokens of a conversation that have a loss."""

OptimizerKind = Literal["adam", "sgd"]
"""Optimisers with a true L2 decay."""

Verdict = Literal["first-order-optimal", "rank-bound", "not-converged", "failed-loudly", "not-checked"]
"""Of a certificate on a trained run."""
