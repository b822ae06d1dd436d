"""From (task, targets, rows, loss) to a linearised problem."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ranksure.data.samples import Samples
from ranksure.factors import Factors
from ranksure.losses import Loss, accuracy
from ranksure.operators.base import TangentOperator, cast_factors


@dataclass
class HeldOut:
    """Rows that the network was captured on but the solver never sees."""

    operator: TangentOperator
    base_logits: Tensor
    labels: Tensor
    loss: Loss
    rows: Samples

    def logits(self, factors: Factors) -> Tensor:
        """Linearised logits, ``(N, K)``, float64."""
        contrasts = self.loss.contrasts(self.base_logits.shape[1])
        present = {name: pair for name, pair in factors.items() if pair[0].shape[1] > 0}
        if not present:
            return self.base_logits
        z = self.operator.apply_factors(cast_factors(present, self.operator)).double()
        return self.base_logits + z @ contrasts.T

    def losses(self, factors: Factors) -> Tensor:
        """Loss of each row."""
        return self.loss.value(self.logits(factors), self.labels)

    def accuracy(self, factors: Factors) -> float | None:
        """Share of rows classified correctly; None for regression."""
        return accuracy(self.logits(factors), self.labels, self.loss)
