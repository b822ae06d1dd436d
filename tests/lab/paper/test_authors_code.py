"""What docs/paper.md says of the authors' released code, checked on the statements themselves."""

from __future__ import annotations

import torch
from torch import nn


def test_rebinding_a_loop_variable_decays_nothing():
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()
    for _, param in model.named_parameters():
        param = param - 0.5 * param
    assert torch.equal(model.weight, before)
    with torch.no_grad():  # what would
        for _, param in model.named_parameters():
            param.copy_(param - 0.5 * param)
    assert torch.equal(model.weight, 0.5 * before)


def test_a_vector_of_singular_values_rebuilds_no_matrix():
    torch.manual_seed(0)
    w = torch.randn(4, 4)
    u, s, v = torch.svd(w)
    assert (u @ s @ v).shape == (4,)
    assert torch.allclose((u * s) @ v.T, w, atol=1e-5)
    shrunk = torch.nn.Threshold(0, 0)(s - 0.5)
    assert not torch.allclose((u * shrunk) @ v, (u * shrunk) @ v.T, atol=1e-3)  # v is not transposed
