"""The loss of a fit is one mean over an optimizer step, however many batches it is made of."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from ranksure.runs.fitting.optimizer import l2_optimizer
from ranksure.runs.fitting.trainer import FitTrainer, mean_loss_function

pytestmark = pytest.mark.usefixtures("quick_collections")


@pytest.mark.parametrize("weighting", ["token", "sample"])
def test_the_mean_over_accumulated_batches_is_that_of_all_rows(weighting):
    """Causal tokens in uneven batches, against one cross-entropy written out."""
    torch.manual_seed(0)
    z = torch.randn(5, 6, 7, dtype=torch.float64)
    labels = torch.randint(7, (5, 6))
    for row, told in enumerate([5, 1, 3, 2, 4]):
        labels[row, : 6 - told] = -100
    losses = F.cross_entropy(z[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
    told = (labels[:, 1:] != -100).sum(1)
    expected = losses.sum() / told.sum() if weighting == "token" else (losses.sum(1) / told).mean()
    compute = mean_loss_function("cross-entropy", weighting)
    count = int(told.sum()) if weighting == "token" else 5
    parts = sum(compute({"logits": z[part]}, labels[part], count) for part in (slice(0, 2), slice(2, 5)))
    assert float(parts) == pytest.approx(float(expected), rel=1e-12)
    assert float(compute({"logits": z}, labels)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("kind", ["cross-entropy", "logistic", "squared-error"])
def test_accumulated_batches_give_the_gradient_of_the_whole(kind, tmp_path):
    """Through the Trainer, three uneven batches in one step of SGD; its own sum would be far off."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.layer(x))

    torch.manual_seed(1)
    model = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=2, target_modules=["layer"]))
    nn.init.normal_(model.base_model.model.layer.lora_B["default"].weight)
    x = torch.randn(7, 4)
    y = torch.randint(3, (7,)) if kind == "cross-entropy" else torch.randint(2, (7, 3)).float()
    copied = copy.deepcopy(model).eval()
    loss = {
        "cross-entropy": F.cross_entropy,
        "logistic": F.binary_cross_entropy_with_logits,
        "squared-error": F.mse_loss,
    }[kind](copied(x), y)
    loss.backward()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=True,
        disable_tqdm=True,
    )
    optimizer = l2_optimizer(model, lam=0.0, lr=1.0, kind="sgd")
    before = {name: value.clone() for name, value in model.named_parameters()}
    rows = [{"x": x[i], "labels": y[i]} for i in range(7)]
    FitTrainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None), kind=kind, weighting="token").train()
    for name, parameter in copied.named_parameters():
        if parameter.grad is not None:
            moved = dict(model.named_parameters())[name]
            assert torch.allclose(before[name] - moved, parameter.grad, rtol=1e-4, atol=1e-6), name


def test_the_trap_that_the_docs_name_is_there(tiny, tmp_path):
    """A plain Trainer adds up a classifier's accumulated means; with our loss function it averages them."""
    model = AutoModelForSequenceClassification.from_pretrained(str(tiny / "bert"), num_labels=2).eval()
    rows = [{"input_ids": torch.tensor([2, 5 + i, 3]), "labels": i % 2} for i in range(8)]
    with torch.no_grad():
        logits = model(torch.stack([row["input_ids"] for row in rows])).logits
    mean = float(F.cross_entropy(logits, torch.tensor([row["labels"] for row in rows])))
    told = []
    for compute in (None, mean_loss_function("cross-entropy")):
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            learning_rate=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        config = copy.deepcopy(model)
        for module in config.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        trainer = Trainer(config, arguments, train_dataset=rows, compute_loss_func=compute)
        trainer.train()
        told.append(trainer.state.log_history[0]["loss"])
    assert told[1] == pytest.approx(mean, rel=1e-4)
    assert told[0] == pytest.approx(4 * mean, rel=1e-4)
