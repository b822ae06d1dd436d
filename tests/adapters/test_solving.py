"""The network's solver on a PeftModel: it starts from the adapter, which is off meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from ranksure.adapters.solving import solve_network
from ranksure.errors import AdapterError, SettingError
from ranksure.factors import nuclear_norms
from ranksure.network.targets import select_targets
from ranksure.solvers.network import solve_network as solve_plain
from tests.adapters.networks import edited, save_bert, with_new_head
from tests.helpers import rounding

LAM = 0.05


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


def network(folder: str | Path) -> nn.Module:
    return with_new_head(str(folder), "classifier", num_labels=3)


def rows() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [
        {"input_ids": torch.randint(50, (n, 6)), "attention_mask": torch.ones(n, 6).long(), "labels": labels}
        for n, labels in ((5, torch.tensor([0, 1, 2, 0, 1])), (4, torch.tensor([2, 2, 1, 0])))
    ]


def adapted(folder: str, factors: dict | None = None, **settings: object) -> nn.Module:
    """A PeftModel with a random adapter, or the solution's."""
    config = LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=["query", "value"], layers_to_transform=[1], **settings
    )
    model = get_peft_model(network(folder), config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def test_it_starts_from_the_adapter_and_replaces_it(bert):
    """The first point is the adapter's own objective by PEFT's forward pass; the end, one of the network without it."""
    model, batches = adapted(bert), rows()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        loss = sum(
            F.cross_entropy(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]) * n
            for batch, n in zip(batches, (5, 4), strict=True)
        )
    scale, nuclear = 8 / 4**0.5, 0.0
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            delta = scale * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
            nuclear += float(torch.linalg.svdvals(delta.detach()).sum())
    found = solve_network(model, batches, weight_decay=LAM, tolerance=0.05)
    assert found.history[0][1] == pytest.approx(float(loss) / 9 + LAM * nuclear, rel=64 * rounding(model))
    assert found.status == "converged" and found.objective < found.objective_at_zero
    assert found.skipped == ["bert.encoder.layer.0"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    plain = edited(network(bert), found.factors)
    with torch.no_grad():
        logits = torch.cat([plain(**{k: v for k, v in b.items() if k != "labels"}).logits for b in batches])
    own = F.cross_entropy(logits, torch.cat([b["labels"] for b in batches]))
    penalty = LAM * sum(nuclear_norms(found.factors).values())
    assert found.objective == pytest.approx(float(own) + penalty, rel=256 * rounding(plain))


def test_a_start_that_is_given_comes_first(bert):
    model = adapted(bert)
    first = solve_network(model, rows(), weight_decay=LAM, start={}, max_gradients=1)
    assert first.history[0][1] == pytest.approx(first.objective_at_zero, rel=64 * rounding(model))


def test_more_modules_than_the_adapter_has_and_fewer(bert):
    model = adapted(bert)
    base = model.get_base_model()
    every = select_targets(base, ["query", "value"])
    assert len(every) == 4
    found = solve_network(model, rows(), every, weight_decay=LAM, max_gradients=3)
    assert list(found.factors) == list(every)
    with pytest.raises(AdapterError, match="value, which is not among"):
        solve_network(model, rows(), select_targets(base, ["query"]), weight_decay=LAM)


def test_what_cannot_be_read_is_refused(bert):
    with pytest.raises(SettingError, match="no adapter"):
        solve_network(network(bert), rows(), weight_decay=LAM)
    model = adapted(bert)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged"):
        solve_network(model, rows(), weight_decay=LAM)


def test_gradient_checkpointing_changes_nothing(bert):
    batches, found = rows(), []
    for checkpointed in (False, True):
        net = network(bert)
        if checkpointed:
            net.gradient_checkpointing_enable()
            net.train()
        targets = select_targets(net, ["query", "value"], "last")
        found.append(solve_plain(net, batches, targets, weight_decay=LAM, tolerance=0.05))
    for name in found[0].factors:
        assert all(torch.equal(a, b) for a, b in zip(found[0].factors[name], found[1].factors[name], strict=True))
