"""Tangent operators: the map from updates of the weights to the linearised logits, one operator a file.

``TangentOperator`` is the base class of all. ``FactoredOperator`` holds packed token factors (what a capture gives),
``DenseOperator`` every gradient (the oracle), ``MatrixFreeOperator`` nothing: each product is a pass through the
network. Losses and penalties are not here: see ``problem.py``.
"""

from ranksure.operators.base import Pullback, TangentOperator, cast_factors, zero_factors
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator, Group
from ranksure.operators.matrix_free import MatrixFreeOperator
from ranksure.operators.span import SpanBases

__all__ = [
    "DenseOperator",
    "FactoredOperator",
    "Group",
    "MatrixFreeOperator",
    "Pullback",
    "SpanBases",
    "TangentOperator",
    "cast_factors",
    "zero_factors",
]
