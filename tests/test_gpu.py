"""Capture and plan parts on a CUDA device; skipped where there is none (see conftest)."""

import pytest
import torch
from torch import nn

from ranksure.capture import capture
from ranksure.losses import CrossEntropy
from ranksure.network.targets import select_targets

pytestmark = pytest.mark.gpu


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(x)).mean(1))


def test_capture_on_cuda_equals_capture_on_cpu() -> None:
    torch.manual_seed(0)
    net = _Net().double()
    batches = [{"x": torch.randn(4, 7, 6, dtype=torch.float64)} for _ in range(2)]
    contrasts = CrossEntropy().contrasts(3)
    results = []
    for device in ("cpu", "cuda"):
        moved = net.to(device)
        found = capture(moved, batches, select_targets(moved, ["inner"]), contrasts, dtype=torch.float64)
        assert found.operator.device.type == "cpu"
        results.append((found.operator.gram(), found.base_logits))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-9, atol=1e-12)
